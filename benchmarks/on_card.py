# SPDX-License-Identifier: Apache-2.0
"""Everything that only a card can show, in nine minutes, on a machine with a GPU and no network.

    python3 benchmarks/on_card.py           # or: make on-card

takes the Python that runs it, which must have torch, and nothing beside this repository. It builds
the kernels in place for the card that is there, then runs `parts`, most valuable first, each in a
process group of its own. A part has a share of the time, and what earlier parts left over; at its
limit the whole group is killed. A part that fails or hangs does not stop the next one. Tests stop
by themselves when their share is used, and go on at the end with what is left of the time: Triton
compiles for hours to run them all.

The folder $OUT (else build/card) gets two files: `card.log`, what the parts printed, and
`card.json`, rewritten after each part: what became of it, and what it measured. A part that has
passed is not run again on the same card at the same clean commit, and tests that have passed are
not either, so that a second call goes on where the first one ended. For the case that $OUT was
emptied in between, build/card keeps a copy of card.json. Where there is no git, set COMMIT (see
`revision.py`).

    python3 benchmarks/on_card.py --only tests-cuda,bench-verify   # these parts, run again
    python3 benchmarks/on_card.py --extract card.json              # afterwards, where there is git

The second one writes the results of benchmarks into benchmarks/results, to be committed.
`--dry-run` goes through the same parts on a CPU, tiny, and compiles nothing.

To add a part, add it to `parts`. One that measures something writes JSON to $CARD_RESULT, in which
"summary" is its line of the last table; "complete": false says that there is more to run. What a
part writes must go to $TMPDIR. Needs the standard library alone.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import revision

ROOT, HERE = revision.ROOT, Path(__file__).resolve().parent
KEPT = ROOT / "build" / "card"
RESULTS = HERE / "results"
SECONDS = 540
# A part that measures its own time ends this long before it would be killed.
MARGIN_S = 25
GRACE_S = 3
LEAST_S = 45  # for which tests that were left are taken up again
TAIL_LINES = 40
WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))


@dataclass(frozen=True)
class Part:
    """One program.

    seconds: its share of the time.
    result: of the files that it writes, the one to keep.
    fills: whether it uses whatever time it is given, so that it does not get more than its share
        until all parts have had theirs.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    result: str = "result.json"
    fills: bool = False


def parts(dry: bool) -> list[Part]:
    """Most valuable first; the shares add up to SECONDS."""
    python = sys.executable
    own = [python, str(HERE / "card_parts.py")]
    flags = ["--dry-run"] if dry else []
    bench = [python, str(HERE / "bench_verify.py"), "--quick", "--save", "--results", "."]
    bench += (
        ["--threads", "1", "--vocab-sizes", "1100", "--compiled", "none"]
        if dry
        else ["--backend", "triton,cuda"]
    )
    measured = "bench_verify.json" if dry else "bench_verify_gpu.json"
    compiled = {"TRITON_INTERPRET": "1" if dry else "0"}
    return [
        Part("facts", [*own, "facts", *flags], 15),
        Part("build", [*own, "build", *flags], 90),
        _tests("tests-cuda", "cuda", ["-m", "gpu and not slow"], 45, dry),
        _tests("tests-triton", "triton", ["-m", "gpu and not slow"], 90, dry),
        _tests("conformance-cuda", "cuda", CONFORMANCE, 45, dry),
        _tests("conformance-triton", "triton", CONFORMANCE, 75, dry),
        Part("bench-verify", bench, 90, result=measured),
        Part("generation", [*own, "generation", *flags], 60, compiled),
        _tests("sanitizer", "cuda", ["-m", "gpu and slow"], 30, dry),
    ]


CONFORMANCE = ["--card", str(ROOT / "tests" / "kernels" / "test_conformance.py")]
# Of the emulator and of Triton's interpreter, in seconds.
DRY = [f"{CONFORMANCE[-1]}::test_without_{what}" for what in ("nodes", "sequences")]


def _tests(name: str, backend: str, chosen: list[str], seconds: float, dry: bool) -> Part:
    """Tests of one backend; `card_tests.py` says how they are chosen and reported."""
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "card_tests", "-W", "default", "-o", "faulthandler_timeout=60"]
    command += ["--maxfail=40", "--color=no", *(DRY if dry else chosen)]
    if find_spec("xdist") is not None and not dry:  # a test's time is that of the CPU's reference
        command += ["-n", str(WORKERS)]
    interpret = {"TRITON_INTERPRET": "1" if dry else "0"}
    variables = {"CARD_BACKEND": backend, "OMP_NUM_THREADS": "1", **interpret}
    return Part(name, command, seconds, variables, fills=True)


@dataclass
class Report:
    """card.json: what was run, on what, and what became of it.

    about: the commit, the hash of the sources, the card, and whether it is a dry run. Records of
        another state are forgotten.
    copies: folders where it is written besides.
    """

    out: Path
    about: dict[str, Any]
    copies: Sequence[Path] = ()
    records: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Take up the records of an earlier run of the same state, if there are any."""
        for folder in (self.out, *self.copies):
            try:
                known = json.loads((folder / "card.json").read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            if known.get("about") == self.about and not self.is_dirty:
                self.records = known["parts"]
                return

    def outcome(self, part: Part) -> str:
        """What became of the part; empty if it has not run."""
        return str(self.records.get(part.name, {}).get("outcome", ""))

    @property
    def is_dirty(self) -> bool:
        """Whether nobody could say later which sources these were."""
        return str(self.about["commit"]).endswith("-dirty")

    def write(self) -> None:
        """All of it, at once: who reads it finds the old file or the new one."""
        text = json.dumps({"about": self.about, "parts": self.records}, indent=1) + "\n"
        for folder in (self.out, *self.copies):
            folder.mkdir(parents=True, exist_ok=True)
            path, draft = folder / "card.json", folder.parent / f".{folder.name}-card.json"
            try:
                draft.write_text(text)
                os.replace(draft, path)
            except OSError:  # the folder is a file system of its own, or all that may be written
                path.write_text(text)
                draft.unlink(missing_ok=True)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """The whole process group. Python prints where it was; who stays after that is killed."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGABRT:
            time.sleep(0.2)  # for the others of the group
    process.wait()


def environment(scratch: Path) -> dict[str, str]:
    """Of every part: this repository's modules, no network, and files in `scratch` only."""
    folders = ("", "python", "tests", "tests/oracles", "tests/tools", "benchmarks")
    paths = [str(ROOT / name) for name in folders]
    tools = [str(Path(sys.executable).parent), "/usr/local/cuda/bin"]
    given = {name: os.environ.get(name, "") for name in ("PYTHONPATH", "PATH")}
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, [*paths, given["PYTHONPATH"]])),
        # What the machine's owner put first stays first, but for Python's own tools.
        "PATH": os.pathsep.join(filter(None, [tools[0], given["PATH"], tools[1]])),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # tests ask torch for deterministic algorithms
        "TMPDIR": str(scratch),
        "HF_HOME": str(scratch / "huggingface"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
        # Kept from call to call: compiling is what Triton's tests take longest for.
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
    }
    return {**os.environ, **own}


def run(part: Part, limit: float, log: Path, done: Sequence[str] = ()) -> dict[str, Any]:
    """Run one part for `limit` seconds at most; its record. `done`: tests that have passed."""
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="card-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        (scratch / "done.json").write_text(json.dumps(list(done)))
        variables = environment(scratch) | dict(part.environment)
        variables["CARD_RESULT"] = str(scratch / part.result)
        variables["CARD_DONE"] = str(scratch / "done.json")
        variables["CARD_UNTIL"] = str(began + max(limit - MARGIN_S, limit / 2))
        command = [str(scratch) if word == "." else word for word in part.command]
        with log.open("ab") as output:
            line = f"\n===== {part.name}, at most {limit:.0f} s: {' '.join(part.command)}\n"
            output.write(line.encode())
            output.flush()
            start = output.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill(process)
        result = _result(scratch / part.result)
    seconds = round(time.time() - began, 1)
    outcome = "killed" if code is None else "failed" if code else "passed"
    if outcome == "passed" and result.get("complete") is False:
        outcome = "incomplete"
    record = {"outcome": outcome, "code": code, "seconds": seconds, "limit": round(limit, 1)}
    record["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with log.open("rb") as output:
        output.seek(start)
        tail = output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    return {**record, "result": result, "tail": tail}


def _result(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:  # killed while it wrote
        return {"summary": f"its result is not JSON: {error}"}


def run_all(todo: Sequence[Part], report: Report, seconds: float, again: bool = False) -> int:
    """Run what has not passed yet, and print a line for each; the exit status.

    again: run what has passed, too.
    """
    report.out.mkdir(parents=True, exist_ok=True)
    log = report.out / "card.log"
    log.touch()
    report.load()
    for part in todo if again else ():
        report.records.pop(part.name, None)
    report.write()
    until = time.time() + seconds

    def one(part: Part, limit: float) -> None:
        before = report.records.get(part.name, {})
        done = before.get("result", {}).get("passed", [])
        report.records[part.name] = record = run(part, max(limit, 1.0), log, done)
        report.write()
        print(f"{part.name}: {record['outcome']} in {record['seconds']} s", flush=True)

    for place, part in enumerate(todo):
        if report.outcome(part) == "passed":
            print(f"{part.name}: has passed before", flush=True)
            continue
        rest = until - time.time() - sum(each.seconds for each in todo[place + 1 :])
        one(part, part.seconds if part.fills and rest > part.seconds else rest)
    for place, part in enumerate(left := [p for p in todo if report.outcome(p) == "incomplete"]):
        share = (until - time.time()) / (len(left) - place)
        if share > LEAST_S:
            one(part, share)
    print(summary(todo, report))
    return 0 if all(report.outcome(part) == "passed" for part in todo) else 1


def summary(todo: Sequence[Part], report: Report) -> str:
    """One screen: a line for each part, and for those that failed what they said last."""
    lines = ["", " ".join(f"{name}: {value};" for name, value in report.about.items())]
    for part in todo:
        record = report.records[part.name]
        said = str(record["result"].get("summary") or record["result"].get("headline") or "")
        if not said or record["outcome"] in ("failed", "killed"):
            last = [line for line in record["tail"] if line.strip()][-1:]
            said = "; ".join(filter(None, [said, *last]))
        line = f"{part.name:<20}{record['outcome']:<11}{record['seconds']:>6} s  {said}"
        lines.append(line[:300])
        lines += [f"    {name}"[:160] for name in list(record["result"].get("failed", ()))[:4]]
    lines.append(f"{report.out}/card.json, card.log")
    return "\n".join(lines)


def card() -> str:
    """Name, compute capability and driver of the first GPU, or "none"."""
    asked = "--query-gpu=name,compute_cap,driver_version"
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", asked, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return f"none: {error}"
    return done.stdout.strip().splitlines()[0]


def extract(path: Path, into: Path = RESULTS) -> list[Path]:
    """Write the results of benchmarks in a card.json as files of their own."""
    written = []
    for record in json.loads(path.read_text())["parts"].values():
        result = record["result"]
        if "benchmark" in result and record["outcome"] == "passed":
            into.mkdir(exist_ok=True)
            written.append(into / f"{result['benchmark']}.json")
            written[-1].write_text(json.dumps(result, indent=1) + "\n")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, or extract their results."""
    parser = argparse.ArgumentParser(description="Everything that only a card can show.")
    parser.add_argument("--dry-run", action="store_true", help="the same parts on a CPU, tiny")
    parser.add_argument("--only", help="names of parts, e.g. facts,build; they run again")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--extract", type=Path, metavar="CARD_JSON", help="write its results")
    options = parser.parse_args(arguments)
    if options.extract:
        print(*(f"wrote {path.name}" for path in extract(options.extract)), sep="\n")
        return 0
    todo = parts(options.dry_run)
    if options.only:
        names = options.only.split(",")
        unknown = set(names) - {part.name for part in todo}
        if unknown:
            known = ", ".join(part.name for part in todo)
            parser.error(f"--only: expected some of {known}, got {', '.join(sorted(unknown))}")
        todo = [part for part in todo if part.name in names]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a part that is killed leaves no file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # kills the part that runs
    about = {"commit": revision.commit(), "tree": revision.tree(), "card": card()}
    about |= {"dry": options.dry_run}
    report = Report(Path(os.environ.get("OUT", KEPT)).resolve(), about)
    if not options.dry_run and report.out != KEPT:
        report.copies = [KEPT]
    return run_all(todo, report, options.seconds, again=bool(options.only))


if __name__ == "__main__":
    raise SystemExit(main())
