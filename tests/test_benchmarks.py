# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, refuse wrong contestants, and keep the README in step with the results.

Speeds are not tested: they belong to a machine, these facts to the code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# transformers and torch.compile warn as they like.
pytestmark = pytest.mark.filterwarnings("default")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import their harness as a neighbour; thread counts are put back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(name: str) -> ModuleType:
    return __import__(name)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_verify_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--threads", "1", "--vocab-sizes", "1100", "--compiled", "none"]
    assert bench("bench_verify").main(arguments) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    assert headline["verify_call_us"] > 0


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("situation", ["accepted", "rejected"])
def test_verify_inputs_keep_what_they_promise(members: int, situation: str) -> None:
    verify = bench("bench_verify")
    case = verify.Case(300, members, 8, "float32", situation)
    assert verify.ours(verify.Inputs.make(case))().num_accepted.tolist() == list(case.kept)


def test_a_wrong_contestant_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    verify, harness = bench("bench_verify"), bench("harness")
    honest = verify.contestants

    def with_a_cheat(case: Any, inputs: Any, compiled: bool) -> dict[str, Any]:
        found = honest(case, inputs, compiled)
        last, num_accepted, log_probs = found["eager"]()
        found["eager"] = lambda: (last + 1, num_accepted, log_probs)
        return found

    monkeypatch.setattr(verify, "contestants", with_a_cheat)
    case = verify.Case(300, 2, 1, "float32", "rejected")
    row = verify.measure(case, 1, False, 1, 1.0)
    assert row["seconds"]["eager"] == harness.WRONG
    assert row["seconds"]["ours"] != harness.WRONG
    assert harness.WRONG in " ".join(verify.shown(row))


def test_loop_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--threads", "1", "--vocab-sizes", "64", "--batches", "1"]
    assert bench("bench_loop").main([*arguments, "--new-tokens", "8", "--rounds", "1"]) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    assert headline["speculative_V64_1t_ms"] > 0


@pytest.mark.slow
def test_generate_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--threads", "1", "--prompts", "1", "--new-tokens", "6"]
    assert bench("bench_generate").main(arguments) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    assert set(headline["best_alternating_over_plain"]) == {
        f"shipped {data} {mode} 1t" for data in ("code", "prose") for mode in ("greedy", "sampled")
    }


def test_generate_reads_data_sets(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{n}?", "answer": "no"}) for n in range(3)]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    found = dict(bench("bench_generate").prompts(tmp_path, 2))
    assert found == {"gsm8k": ["Question: 0?\nAnswer:", "Question: 1?\nAnswer:"]}


def test_interleaving_is_fair() -> None:
    harness = bench("harness")
    order: list[str] = []

    def contestant(name: str) -> Any:
        return lambda number: order.append(name) or float(number)

    samples = harness.interleave({name: contestant(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert samples == {name: [0.0, 1.0, 2.0] for name in "abc"}
    spread = harness.Spread.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (spread.median, spread.minimum, spread.rounds) == (3.0, 1.0, 5)


@pytest.mark.parametrize("command", ["diversed", "draft"])
def test_training_tables_are_made_of_what_was_found(command: str) -> None:
    training = bench("bench_training")
    name = f"train_{command}"
    saved = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    table = training.head_table if command == "diversed" else training.draft_table
    (found,) = saved["rows"]
    assert saved["tables"] == {name: table(found)}
    assert saved["headline"] == training.headline(found)
    assert found["command"] == f"train {command}"


def test_report_fills_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness, report = bench("harness"), bench("report")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    monkeypatch.setattr(harness, "RESULTS", results)
    options = harness.arguments("sample").parse_args(["--save"])
    table = {"caption": "a table", "columns": ["what", "ratio"], "rows": [["ours", "2.0"]]}
    spread = harness.Spread.of([1.0])
    harness.finish("sample", options, [{"time": spread}], {"sample": table}, {"ratio": 2.0})
    assert json.loads((results / "sample.json").read_text())["rows"][0]["time"]["median"] == 1.0

    asked = [f"--readme={readme}", f"--results={results}"]
    text = "before\n<!-- RESULTS:BEGIN sample -->\nold\n<!-- RESULTS:END sample -->\nafter\n"
    readme.write_text(text)
    assert report.main([*asked, "--check"]) == 1
    assert readme.read_text() == text
    assert report.main(asked) == 0
    filled = readme.read_text()
    assert "| ours | 2.0 |" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert report.main([*asked, "--check"]) == 0

    readme.write_text(text.replace("sample", "missing"))
    assert report.main(asked) == 1
    assert "missing" in capsys.readouterr().err
