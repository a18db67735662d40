# SPDX-License-Identifier: Apache-2.0
"""`make on-card`, without a card: what fails stops nothing, and what has passed stays so."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = {"card.log", "card.json"}
ABOUT = {"commit": "0123456789ab", "tree": "1", "card": "none", "dry": True}


@pytest.fixture(autouse=True)
def neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import what they share as a neighbour."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("COMMIT", raising=False)


def script(name: str) -> ModuleType:
    return __import__(name)


def part(name: str, program: str, seconds: float = 60) -> Any:
    return script("on_card").Part(name, [sys.executable, "-c", program], seconds)


def run(todo: list[Any], out: Path, **about: Any) -> tuple[int, dict[str, Any]]:
    """The exit status, and what card.json says of each part."""
    on_card = script("on_card")
    report = on_card.Report(out, {**ABOUT, **about})
    status = on_card.run_all(todo, report, sum(each.seconds for each in todo))
    assert {path.name for path in out.iterdir()} == FILES
    assert not list(out.parent.glob(".*"))
    return status, json.loads((out / "card.json").read_text())["parts"]


def is_running(process: int) -> bool:
    """Whether it is there and no zombie, which nobody may have waited for yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="process groups as Linux has them")
def test_what_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_card, children = script("on_card"), tmp_path / "children"
    hang = f"trap '' ABRT; sleep 600 & echo $! > {children}; wait; sleep 600"
    measured = (
        "import json, os; open(os.environ['CARD_RESULT'], 'w').write(json.dumps("
        "{'summary': 'all well', 'folder': os.environ['TMPDIR']}))"
    )
    todo = [
        on_card.Part("hangs", ["sh", "-c", hang], 5),
        part("fails", "print('what went wrong'); raise SystemExit(3)"),
        part("passes", measured),
    ]
    began = time.monotonic()
    status, records = run(todo, tmp_path / "out")
    assert status == 1
    assert [record["outcome"] for record in records.values()] == ["killed", "failed", "passed"]
    assert records["fails"]["code"] == 3
    assert records["fails"]["tail"] == ["what went wrong"]
    assert 5 <= records["hangs"]["seconds"] <= time.monotonic() - began + 1
    assert not is_running(int(children.read_text()))
    assert not Path(records["passes"]["result"]["folder"]).exists()
    shown = capsys.readouterr().out
    assert "all well" in shown
    assert "what went wrong" in shown
    assert "what went wrong" in (tmp_path / "out" / "card.log").read_text()


def test_what_has_passed_at_this_clean_commit_is_not_run_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    note = f"open({str(runs)!r}, 'a').write('{{}} '); raise SystemExit({{}})"
    todo = [part("good", note.format("good", 0)), part("bad", note.format("bad", 1))]

    def ran(**about: Any) -> str:
        runs.write_text("")
        run(todo, tmp_path / "out", **about)
        return runs.read_text()

    assert ran() == "good bad "
    assert ran() == "bad "
    assert ran(tree="2") == "good bad "
    assert ran(commit="0123456789ab-dirty") == "good bad "
    assert ran(commit="0123456789ab-dirty") == "good bad "


def test_what_had_too_little_time_goes_on_at_the_end(tmp_path: Path) -> None:
    program = """
import json, os
done = json.load(open(os.environ["CARD_DONE"]))
result = {"complete": bool(done), "passed": [*done, f"test {len(done)}"]}
json.dump(result, open(os.environ["CARD_RESULT"], "w"))
"""
    fills = replace(part("tests", program), fills=True)
    status, records = run([fills, part("next", "")], tmp_path / "out")
    assert status == 0
    assert records["tests"]["result"]["passed"] == ["test 0", "test 1"]
    log = (tmp_path / "out" / "card.log").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("=====")] == [
        "tests,",
        "next,",
        "tests,",
    ]


def test_a_kept_copy_replaces_a_folder_that_was_emptied(tmp_path: Path) -> None:
    on_card, kept = script("on_card"), tmp_path / "kept"
    for name, seconds in (("first", [0.0]), ("second", [])):
        report = on_card.Report(tmp_path / name, ABOUT, [kept])
        on_card.run_all([part("good", "")], report, 60)
        known = json.loads((tmp_path / name / "card.json").read_text())["parts"]
        assert known["good"]["outcome"] == "passed"
        assert ("good" in (tmp_path / name / "card.log").read_text()) == bool(seconds)


def test_results_of_benchmarks_are_extracted(tmp_path: Path) -> None:
    parts = {
        "bench": {"outcome": "passed", "result": {"benchmark": "sample", "rows": [1]}},
        "wrong": {"outcome": "failed", "result": {"benchmark": "wrong"}},
        "tests": {"outcome": "passed", "result": {"summary": "3 passed"}},
    }
    (tmp_path / "card.json").write_text(json.dumps({"about": ABOUT, "parts": parts}))
    written = script("on_card").extract(tmp_path / "card.json", tmp_path / "results")
    assert [path.name for path in written] == ["sample.json"]
    assert json.loads(written[0].read_text())["rows"] == [1]


def test_the_shares_are_all_of_the_time() -> None:
    on_card = script("on_card")
    assert sum(each.seconds for each in on_card.parts(dry=False)) == on_card.SECONDS
    names = [each.name for each in on_card.parts(dry=True)]
    assert names == [each.name for each in on_card.parts(dry=False)]


# the sources


def test_the_commit_is_found_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = script("revision")
    source, result = tmp_path / "csrc" / "a.cu", tmp_path / "benchmarks" / "results" / "a.json"
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    hashed = revision.commit(tmp_path)
    assert hashed.startswith("tree-")
    result.write_text("[]")
    assert revision.commit(tmp_path) == hashed
    source.write_text("[]")
    assert revision.commit(tmp_path) != hashed
    (tmp_path / "COMMIT").write_text("fedcba\n")
    assert revision.commit(tmp_path) == "fedcba"
    monkeypatch.setenv("COMMIT", "abcdef")
    assert revision.commit(tmp_path) == "abcdef"


def test_a_result_does_not_make_its_sources_dirty(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    revision = script("revision")
    source, result = tmp_path / "setup.py", tmp_path / revision.RESULTS / "bench_x.json"
    result.parent.mkdir(parents=True)
    for path in (source, result):
        path.write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    described = revision.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", described)
    result.write_text("2\n")
    assert revision.commit(tmp_path) == described
    source.write_text("2\n")
    assert revision.commit(tmp_path) == f"{described}-dirty"


# the build


def test_the_module_is_built_once_and_without_cuda_where_need_be(tmp_path: Path) -> None:
    parts, asked = script("card_parts"), []
    cuda = {"SPECENS_CUDA": "ON", "SPECENS_CUDA_ARCHITECTURES": "90a-real"}
    modules, stamp = [tmp_path / "module.so"], tmp_path / "build" / "stamp.json"
    modules[0].touch()

    def build(state: str, works: bool) -> Any:
        def compile_with(variables: dict[str, str]) -> int:
            asked.append(variables["SPECENS_CUDA"])
            return 0 if works or variables["SPECENS_CUDA"] == "OFF" else 1

        return parts.build_once(state, stamp, cuda, compile_with, modules)

    assert build("one", True)["cuda"]
    assert build("one", True)["what"] == "built before"
    assert asked == ["ON"]
    assert "FAILED" in build("two", False)["what"]
    assert asked == ["ON", "ON", "OFF"]
    assert build("two", True)["cuda"]
    modules[0].unlink()
    assert build("two", True)["what"] == "built for 90a-real"


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 9), "89-real"), ((9, 0), "90a-real"), ((12, 0), "120a-real")]
)
def test_the_card_s_own_machine_code(capability: tuple[int, int], name: str) -> None:
    assert script("card_parts").architecture(capability) == name


# the plugin of pytest

SAMPLE = """
import pytest

@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_many(backend, number):
    assert (backend, number) != ("cuda", 2), "a wrong token"

@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_one(backend):
    if backend == "triton":
        pytest.skip("no kernel")

def test_without_a_backend():
    pass
"""


def sample_tests(folder: Path, backend: str, until: float, done: list[str]) -> dict[str, Any]:
    """What the plugin writes, and pytest's exit status as "code"."""
    (folder / "test_sample.py").write_text(SAMPLE)
    (folder / "done.json").write_text(json.dumps(done))
    given = {"CARD_BACKEND": backend, "CARD_UNTIL": str(until)}
    given |= {f"CARD_{name}": str(folder / f"{name.lower()}.json") for name in ("DONE", "RESULT")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "card_tests", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(folder), "-c", os.devnull, "test_sample.py"]
    given["PYTHONPATH"] = str(ROOT / "benchmarks")
    # This process may be a worker of pytest-xdist; the one that it starts is none.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    process = subprocess.run(
        command, cwd=folder, env=inherited | given, capture_output=True, check=False
    )
    result = json.loads((folder / "result.json").read_text())
    return {**result, "code": process.returncode}


@pytest.mark.slow
def test_one_backend_s_tests_until_a_time(tmp_path: Path) -> None:
    names = [f"test_sample.py::test_many[cuda-{number}]" for number in range(3)]
    one = "test_sample.py::test_one[cuda]"
    result = sample_tests(tmp_path, "cuda", time.time() + 600, [])
    assert result["code"] == 1
    assert result["passed"][0] == one, "what has few variants comes first"
    assert set(result["passed"]) == {one, *names[:2]}
    assert list(result["failed"]) == [names[2]]
    assert "a wrong token" in result["failed"][names[2]]
    assert result["complete"]

    again = sample_tests(tmp_path, "cuda", time.time() + 600, result["passed"])
    assert set(again["passed"]) == set(result["passed"])
    assert again["summary"] == "3 passed, 1 failed"
    assert sample_tests(tmp_path, "cuda", time.time() + 600, [one, *names])["code"] == 0


@pytest.mark.slow
def test_no_time_and_nothing_but_skips_are_no_pass(tmp_path: Path) -> None:
    late = sample_tests(tmp_path, "cuda", time.time() - 1, [])
    assert late["code"] == 0
    assert not late["complete"]
    assert late["summary"] == "0 passed, 4 left for lack of time"
    done = [f"test_sample.py::test_many[triton-{number}]" for number in range(3)]
    skipped = sample_tests(tmp_path, "triton", time.time() + 600, done)
    assert skipped["skipped"] == {"no kernel": 1}
    assert skipped["code"] == 1


# all of it


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    """The emulator's parts are left out: where it is not built yet, that takes a minute."""
    names = ["facts", "build", "tests-triton", "bench-verify", "generation"]
    command = [sys.executable, str(ROOT / "benchmarks" / "on_card.py"), "--dry-run"]
    process = subprocess.run(
        [*command, "--only", ",".join(names)],
        env={**os.environ, "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    records = json.loads((tmp_path / "out" / "card.json").read_text())["parts"]
    assert list(records) == names
    assert records["bench-verify"]["result"]["benchmark"] == "bench_verify"
    rows = records["generation"]["result"]["rows"]
    assert {row["ops"] for row in rows} == {"torch", "reference", "triton"}
    assert {row["text"] for row in rows} == {"as expected"}
