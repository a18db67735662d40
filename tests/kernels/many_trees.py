# SPDX-License-Identifier: Apache-2.0
"""Random trees, many of them, on every backend that runs here; and kernels with a bug in them.

    python tests/kernels/many_trees.py [--workers 2] [--share 1.0]

Each op's judge (tests/tools/tree_judges.py) looks at as many seeds as `CALLS` says, in a process of
its own for each backend and instruction set: CUDA on the emulator, Triton in its interpreter under
the guard, and the sets that few machines have with arithmetic in place of their instructions. Each
mutant (tests/tools/tree_mutants.py) must be rejected by one of `MUTANT_SEEDS`. To add an op: its
judge, its number of calls, its mutants.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tests" / "tools"
sys.path[:0] = [str(TOOLS), str(ROOT / "tests")]

from tree_mutants import MUTANTS, Builder, Mutant, package  # noqa: E402

# Seeds of each op, by backend.
CALLS = {
    "attention": {"reference": 200, "native": 1000, "triton": 60, "cuda": 1000},
    "compact": {"reference": 200, "native": 1000, "triton": 200, "cuda": 1000},
}
STAND_INS = ("amx", "avx512bf16")
MUTANT_SEEDS = 400  # of which as many are judged as it takes


class Run(NamedTuple):
    """A process: an op, a backend, an instruction set, seeds, and where the kernels come from."""

    part: str
    backend: str
    isa: str = ""
    count: int = 0
    module: Path | None = None
    package: Path | None = None
    mutant: Mutant | None = None

    @property
    def name(self) -> str:
        stand_in = " of stand-ins" if self.module and self.mutant is None else ""
        return f"{self.backend} {self.isa}".strip() + stand_in


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def instruction_sets() -> list[str]:
    """Those of this machine, or none without native kernels."""
    code = "import specens_kernels.ops, specens_kernels.native as n; print(n.AVAILABLE)"
    environment = os.environ | {"SPECENS_CPU_ISA": "none such", "PYTHONPATH": _path(None)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return []
    return done.stderr.split("expected one of ")[1].split(" on this machine")[0].split(", ")


def _path(package: Path | None) -> str:
    first = [] if package is None else [package]
    return os.pathsep.join(map(str, (*first, ROOT, ROOT / "python", TOOLS, ROOT / "tests")))


def results_of(run: Run) -> dict[str, Any]:
    """What the process found: seeds looked at, and those that are wrong."""
    environment = os.environ | {"SPECENS_CPU_ISA": run.isa, "PYTHONPATH": _path(run.package)}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--judge", run.part, "--backend", run.backend]
    command += ["--count", str(run.count)]
    command += ["--module", str(run.module)] if run.module else []
    command += ["--stop"] if run.mutant else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{run.part} on {run.name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(part: str, backend: str, count: int, module: str, stop: bool) -> int:
    """Judge the seeds of one run; the last line is what was found."""
    import torch  # noqa: F401  # which loads the OpenMP that kernels run on

    if module and backend != "cuda":
        sys.path.append(str(ROOT / "tests" / "native"))
        from fuzz import load

        load(module)
    import simt
    from tree_judges import JUDGES

    import specens_kernels
    from specens_kernels import dispatch

    judged, wrong = 0, []
    reason = "" if backend == "reference" else dispatch.MODULES[backend].REASON
    if backend == "triton" and not reason:
        import triton_guard

        triton_guard.install()
    emulated: AbstractContextManager[None] = nullcontext()
    if backend == "cuda":
        reason = simt.what_is_missing()
        if module:
            simt.build = partial(simt.load, Path(module))
        emulated = nullcontext() if reason else simt.emulated()
    try:
        with emulated, specens_kernels.backend("reference" if reason else backend):
            for seed in range(0 if reason else count):
                problem = JUDGES[part](seed)
                judged += 1
                if problem:
                    wrong.append((seed, problem))
                    if stop:
                        break
    except specens_kernels.Unsupported as error:
        reason = str(error)
    say(json.dumps({"judged": judged, "wrong": wrong, "reason": reason}))
    return 0


def runs(builder: Builder, share: float) -> Iterator[Run]:
    """Without mutants."""
    sets = instruction_sets()
    right = builder.module() if sets else None
    for part, calls in CALLS.items():
        for backend, most in calls.items():
            count = max(1, int(most * share))
            if backend != "native":
                yield Run(part, backend, count=count)
                continue
            for isa in sets:
                yield Run(part, backend, isa, count)
            for isa in STAND_INS if sets and part == "attention" else ():
                yield Run(part, backend, isa, count, module=right)


def mutants(builder: Builder, place: Path, parts: Sequence[str]) -> Iterator[Run]:
    for mutant in MUTANTS:
        if mutant.part in parts:
            built: dict[str, Path] = {}
            if mutant.backend == "native":
                built["module"] = builder.module(mutant)
            elif mutant.backend == "cuda":
                built["module"] = builder.emulator(mutant)
            else:
                built["package"] = package(mutant, place)
            yield Run(mutant.part, mutant.backend, count=MUTANT_SEEDS, mutant=mutant, **built)


def told(run: Run, found: dict[str, Any]) -> bool:
    """Print one run; whether it is as it should be."""
    judged, wrong = found["judged"], found["wrong"]
    if found["reason"]:
        say(f"{run.part} on {run.name}: not run: {found['reason']}")
        return run.mutant is None
    if run.mutant is not None:
        verdict = f"rejected by seed {wrong[0][0]}: {wrong[0][1]}" if wrong else "NOT REJECTED"
        say(f"{run.mutant.name}, {run.name}: {verdict}")
        return bool(wrong)
    say(f"{run.part} on {run.name}: {judged - len(wrong):,} of {judged:,} right")
    for seed, problem in wrong[:5]:
        say(f"  seed {seed}: {problem}")
    return not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random trees on every backend, and mutants.")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers of calls")
    parser.add_argument("--parts", default=",".join(CALLS), help="some of the ops")
    for name in ("judge", "backend", "module"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.judge:
        return child(options.judge, options.backend, options.count, options.module, options.stop)
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        builder = Builder(Path(folder))
        every = [run for run in runs(builder, options.share) if run.part in parts]
        every += mutants(builder, Path(folder), parts)
        found, fine = [], []
        for run, result in zip(every, pool.map(results_of, every), strict=True):
            found.append((run, result))
            fine.append(told(run, result))
    for part in parts:
        of_part = [each for run, each in found if run.part == part and run.mutant is None]
        judged = sum(each["judged"] for each in of_part)
        right = judged - sum(len(each["wrong"]) for each in of_part)
        say(f"{part}: {right:,} of {judged:,} right")
    rejected = [bool(each["wrong"]) for run, each in found if run.mutant is not None]
    say(f"{sum(rejected)} of {len(rejected)} mutants rejected")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    raise SystemExit(main())
