# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, refuse wrong contestants, and keep the README in step with the results.

Speeds are not tested: they belong to a machine, these facts to the code.
"""

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specens.methods import METHODS

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


def test_verify_on_trees_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tree", "--quick", "--threads", "1", "--vocab-sizes", "1100"]
    assert bench("bench_verify").main(arguments) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    assert [each["id"] for each in headline["targets"]] == ["V1"] * 3


def test_attention_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("bench_attention").main(["--quick", "--threads", "1", "--slots", "96,33"]) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    # Those of time are of a longer cache.
    assert [(each["id"], each["verdict"]) for each in headline["targets"]] == [("A4", "pass")] * 2


def test_attention_keeps_its_bits() -> None:
    assert all(bench("bench_attention").bits(torch.bfloat16).values())


def test_compact_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("bench_compact").main(["--quick", "--threads", "1"]) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    (target,) = headline["targets"]
    assert target["id"] == "C1"
    assert target["verdict"] in ("pass", "miss")


def test_attention_says_which_targets_are_met() -> None:
    attention, harness = bench("bench_attention"), bench("harness")
    row = {"heads": 32, "key_heads": 8, "size": 64, "slots": 4096, "nodes": 4, "threads": 1}
    row |= {"dtype": "bfloat16", "packed_over_ours": harness.Spread.of([3.0])}
    row |= {"hf_over_ours": harness.Spread.of([9.0]), "ours_over_read": harness.Spread.of([1.3])}
    found = attention.verdicts([row], 1, "avx512")
    assert [(each["ratio"], each["verdict"]) for each in found] == [("packed_over_ours", "pass")]
    found = attention.verdicts([row], 1, "amx")
    verdicts = [("hf_over_ours", "miss"), ("ours_over_read", "miss")]
    assert [(each["ratio"], each["verdict"]) for each in found] == verdicts
    assert attention.verdicts([row | {"slots": 512}], 1, "amx") == []


def test_forward_agrees_and_ends_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--tiny", "--threads", "1", "--slots", "96", "--models", "smollm2-135m"]
    assert bench("bench_forward").main(arguments) == 0
    headline = last_line(capsys)
    assert headline["wrong_rows"] == 0
    assert headline["targets"] == []  # which are of longer texts


def test_forward_says_which_targets_are_met() -> None:
    forward, harness = bench("bench_forward"), bench("harness")
    row = {"model": "m", "dtype": "float32", "slots": 4096, "nodes": 8, "threads": 1}
    row |= {"none_over_kernel": harness.Spread.of([0.9])}
    row |= {"floor_over_kernel": harness.Spread.of([0.95])}
    row |= {"mask_over_kernel": harness.Spread.of([0.99])}
    grid = [(4096, "pass"), (16384, "pass"), (512, "miss")]
    found = forward.verdicts([row | {"slots": slots} for slots, _ in grid] + [row | {"nodes": 1}])
    assert [each["verdict"] for each in found] == [verdict for _, verdict in grid]
    assert [each["figure"] for each in found] == [0.9, 0.9, 0.99]


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


class Card:
    """A device that does what it is told when it is told, and a log of that."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0  # milliseconds

    def work(self, name: str, milliseconds: float) -> None:
        self.log.append(name)
        self.now += milliseconds

    def event(self) -> "Event":
        return Event(self)


class Event:
    """What torch.cuda.Event is to the clock."""

    def __init__(self, card: Card) -> None:
        self.card, self.reached, self.waited = card, 0.0, False

    def record(self) -> None:
        self.card.work("event", 0.0)
        self.reached = self.card.now

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: "Event") -> float:
        assert end.waited, "torch raises where the work is not done"
        return end.reached - self.reached


@pytest.mark.parametrize(
    ("cache", "order"), [("cold", "copy event run event"), ("warm", "copy run event run event")]
)
def test_events_hold_the_run_alone(cache: str, order: str) -> None:
    device, card = bench("device"), Card()
    programs = {"ours": device.Program(lambda: card.work("run", 5.0), "graph")}
    copy = SimpleNamespace(run=lambda: card.work("copy", 100.0))
    clocks = device.clocks(programs, copy, cache, card.event)
    assert clocks["ours"](0) == pytest.approx(5e-3)
    assert " ".join(card.log) == order
    assert clocks["copy"](0) == pytest.approx(0.1)


def test_rows_of_a_device_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the device's own part, with CPU backends in its place."""
    verify, device, harness, card = bench("bench_verify"), bench("device"), bench("harness"), Card()
    monkeypatch.setattr(verify.Inputs, "cuda", lambda self: self)
    monkeypatch.setattr(
        device,
        "captured",
        lambda function: device.Program(lambda: (card.work("", 1.0), function())[1], "launches: x"),
    )
    stock = device.clocks
    monkeypatch.setattr(device, "clocks", lambda *arguments: stock(*arguments, card.event))
    copy = SimpleNamespace(run=lambda: card.work("copy", 2.0), bytes=4_000_000)
    case = verify.Case(1100, 2, 8, "float32", "rejected")
    rows = verify.measure_on_device(case, ["reference", "native"], copy, False, 3, 1.0)
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert harness.WRONG not in row["seconds"].values()
        assert row["seconds"]["reference"].median == pytest.approx(1e-3)
        assert row["bandwidth"] == pytest.approx(2e9)
        assert row["native_of_bandwidth"] == pytest.approx(case.bytes_read / 1e-3 / 2e9)
    text = verify.device_table(["reference", "native"], rows)
    assert "eager is timed with what launching costs: launches: x" in text
    assert verify.device_headline(rows) == {"wrong_rows": 0}


@pytest.mark.parametrize("situation", ["accepted", "rejected"])
@pytest.mark.parametrize("members", [1, 2])
def test_a_chain_with_its_own_numbers(
    members: int, situation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's signatures; seeds are found with which it keeps what the others keep."""
    verify, peers = bench("bench_verify"), bench("verify_contestants")

    def softmax(logits: Tensor) -> Tensor:
        assert logits.dim() == 2
        return logits.float().softmax(-1)

    def chain_speculative_sampling(
        draft_probs: Tensor,
        draft_token_ids: Tensor,
        target_probs: Tensor,
        *,
        seed: Any,
        offset: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert draft_probs.is_contiguous()
        assert target_probs.is_contiguous()
        assert draft_token_ids.dtype == torch.int32
        assert seed.dtype == offset.dtype == torch.int64
        assert seed.shape == offset.shape == draft_token_ids.shape[:1]
        chosen = draft_token_ids[..., None].long()
        draft = draft_probs.gather(-1, chosen)[..., 0]
        target = target_probs[:, :-1].gather(-1, chosen)[..., 0]
        coins = [torch.rand(draft.shape[1], generator=generator(int(one))) for one in seed]
        taken = torch.stack(coins) * draft < target
        kept = taken.int().cumprod(-1).sum(-1)
        places = torch.arange(draft.shape[1] + 1)
        tokens = torch.cat((draft_token_ids, draft_token_ids[:, :1]), 1)
        tokens = tokens.masked_fill(places > kept[:, None], -1)
        return tokens, taken.sum(-1).int(), kept.int()

    fake = SimpleNamespace(softmax=softmax, chain_speculative_sampling=chain_speculative_sampling)
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "import_module", lambda name: fake)
    case = verify.Case(300, members, 2, "float32", situation)
    inputs = verify.Inputs.make(case)
    run = peers.flashinfer(case, inputs)
    agrees = verify.gate(verify.ours(inputs)())
    assert agrees("flashinfer", run())
    assert not agrees("flashinfer", run()._replace(num_accepted=run().num_accepted + 1))
    assert not agrees("flashinfer", run()._replace(tokens=run().tokens + 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("bench_verify").main(["--backend", "triton,cuda"]) == 2
    line = "bench_verify: --backend: expected a CUDA device for triton, cuda, got none"
    assert capsys.readouterr() == ("", line + "\n")


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
    runs = ["diversed"] if command == "diversed" else training.DRAFTS
    table, headline = training.summary(command, dict(zip(runs, saved["rows"], strict=True)))
    assert saved["tables"] == {name: table}
    assert saved["headline"] == headline
    assert {found["command"] for found in saved["rows"]} == {f"train {command}"}


def test_every_method_has_been_measured() -> None:
    saved = json.loads((BENCHMARKS / "results" / "bench_methods.json").read_text())
    shown = {row[0].strip("`") for row in saved["tables"]["methods"]["rows"]}
    assert shown == set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "family:nope"], "model: expected one of family:code, family:prose, family:d"),
        (["--members", "family:code,/no/such"], "model: expected a folder or a hub name, got '/no"),
    ],
)
def test_methods_of_models_that_are_not_there_are_one_line(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods = bench("bench_methods")
    monkeypatch.setattr("sys.argv", ["bench_methods.py", *arguments])
    assert methods.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench_methods.py: error: load: ")
    assert words in line


def test_report_fills_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness, report = bench("harness"), bench("report")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    monkeypatch.setattr(harness, "RESULTS", results)
    options = harness.arguments("sample").parse_args(["--save"])
    options.budget_s = math.inf
    table = {"caption": "a table", "columns": ["what", "ratio"], "rows": [["ours", "2.0"]]}
    spread = harness.Spread.of([1.0])
    harness.finish("sample", options, [{"time": spread}], {"sample": table}, {"ratio": 2.0})
    saved = json.loads((results / "sample.json").read_text())
    assert saved["rows"][0]["time"]["median"] == 1.0
    assert saved["options"]["budget_s"] is None

    asked = [f"--page={readme}", f"--results={results}"]
    text = "before\n<!-- BEGIN sample -->\nold\n<!-- END sample -->\nafter\n"
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


def test_what_a_rule_emits_is_computed_in_closed_form() -> None:
    import rules

    from specens_kernels import Acceptance

    emitted_law = bench("divergence").emitted_law
    dice = torch.Generator().manual_seed(0)
    target, draft, other = torch.randn(3, 9, dtype=torch.float64, generator=dice).softmax(-1)
    memory = torch.zeros((), dtype=torch.float64)
    assert torch.equal(emitted_law(Acceptance(), target, draft, draft, memory), target)
    for name in ("cactus", "cascade_v3", "js", "typical"):
        parameters = rules.DEFINITIONS[name].parameters[0]
        expected = torch.zeros(9, dtype=torch.float64)
        for x in range(9):  # drawn from one law, and taken for the draft's
            closed = rules.DEFINITIONS[name].closed
            kept, left = closed(target.tolist(), draft.tolist(), x, 0.0, **parameters)
            expected[x] += other[x] * kept
            residual = torch.tensor(left, dtype=torch.float64)
            expected += other[x] * (1 - kept) * residual / residual.sum().clamp(min=1e-300)
        found = emitted_law(Acceptance(name, **parameters), target, draft, other, memory)
        assert torch.allclose(found, expected), name


def test_bytes_of_the_ops_for_trees_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, trees = bench("bench_traffic"), bench("traffic_of_trees")
    monkeypatch.setattr(trees, "SLOTS", 512)
    monkeypatch.setattr(trees, "cases", lambda: [trees.attends(4), trees.compacts()])
    monkeypatch.setattr(trees, "KEY_HEADS", 2)
    rows = trees.rows({"triton": traffic.triton}, traffic.Memory)
    assert [(row["op"], row["launches"]) for row in rows] == [("attention", 2), ("compact", 1)]
    assert all(1.0 <= row["over_floor"] < 1.1 for row in rows)
    assert {each["verdict"] for each in trees.targets(rows)} == {"pass"}


def test_engine_says_that_it_needs_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is in this environment")
    assert bench("bench_engine").main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert error == "bench_engine: vllm: expected an installed package, got none\n"
