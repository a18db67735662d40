# SPDX-License-Identifier: Apache-2.0
"""How every number is made: gate, warm up, interleave, summarise, write down.

A benchmark declares contestants: functions of the round's number that return what they measured,
in seconds. They take turns within a round, so that a busy moment of the machine hits all of them,
and the first one changes from round to round. One that fails its gate has no time: it is WRONG.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import revision
import torch

import specens_kernels
from specens_kernels import flat, native

RESULTS = Path(__file__).parent / "results"
WRONG = "WRONG"
QUICK_S = 25.0  # with the imports and the last case this stays under a minute
Contestant = Callable[[int], float]


@dataclass(frozen=True)
class Spread:
    """Median, 10 % and 90 % quantiles and minimum of what was measured in `rounds` rounds."""

    median: float
    low: float
    high: float
    minimum: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise; at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return cls(statistics.median(ordered), low, high, ordered[0], len(ordered))

    def text(self, scale: float, digits: int = 1) -> str:
        """For tables: `median (low-high, min minimum)`, times `scale`."""
        numbers = (self.median, self.low, self.high, self.minimum)
        median, low, high, minimum = (f"{number * scale:.{digits}f}" for number in numbers)
        return f"{median} ({low}-{high}, min {minimum})"


def clock(function: Callable[[], Any], least_s: float = 2e-3) -> Contestant:
    """Times calls of `function`: as many a round as take `least_s`; the mean of them counts."""
    function()
    began = time.perf_counter()
    function()
    number = max(1, int(least_s / (time.perf_counter() - began)))

    def measure(_: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            function()
        return (time.perf_counter() - began) / number

    return measure


def interleave(
    contestants: Mapping[str, Contestant], rounds: int, budget_s: float = float("inf")
) -> dict[str, list[float]]:
    """What each contestant measured, round by round: lists of equal length.

    Stops after `rounds`, or after the first round that ends later than `budget_s`.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in range(rounds):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            samples[name].append(contestants[name](number))
        if time.perf_counter() - began > budget_s:
            break
    return samples


def ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """How many times faster, round by round."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few cases, at most 60 seconds")
    parser.add_argument("--save", action="store_true", help="write <name>.json into --results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="benchmarks/results")
    parser.add_argument("--threads", type=numbers, default=[1, 2], help="torch threads, e.g. 1,2")
    return parser


def in_time(options: argparse.Namespace, cases: Sequence[Any]) -> Iterator[Any]:
    """The cases; with --quick, those that begin within QUICK_S, and a line about the others."""
    began = time.perf_counter()
    for number, case in enumerate(cases):
        if options.quick and number > 0 and time.perf_counter() - began > QUICK_S:
            print(f"out of time: {len(cases) - number} of {len(cases)} cases are left out")
            return
        yield case


def numbers(text: str) -> list[int]:
    """Comma-separated integers, for argparse."""
    return [int(part) for part in text.split(",")]


def surroundings() -> dict[str, Any]:
    """Where and with what a number was measured: commit, date, versions and machine."""
    versions = {
        "python": platform.python_version(),
        "specens-kernels": specens_kernels.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    return {
        "commit": revision.commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
        "native": native_build(),
        "machine": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def native_build() -> dict[str, Any]:
    """Whether the native kernels run, their instruction set and compiler."""
    if not native.AVAILABLE:
        return {"available": False, "reason": native.REASON}
    # What the compiler left in the module: "GCC: (Debian 12.2.0-14) 12.2.0".
    compilers = re.findall(
        rb"(?:GCC: |clang version )[ -~]+", Path(flat.MODULE.__file__).read_bytes()
    )
    names = sorted({name.decode() for name in compilers})
    return {"available": True, "isa": native.cpu_isa(), "compiler": names}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return names[0] if names else platform.processor()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned text; the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for first, *rest in cells:
        right = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return "\n".join(lines)


def finish(
    name: str,
    options: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Mapping[str, Any]],
    headline: Mapping[str, Any],
) -> int:
    """Save if asked to, and print the headline as the last line. `tables` are for report.py."""
    asked = {key: value for key, value in vars(options).items() if key not in ("save", "results")}
    asked = {key: None if value == math.inf else value for key, value in asked.items()}  # no limit
    result = {"benchmark": name, **surroundings(), "options": asked, "headline": dict(headline)}
    result |= {"tables": dict(tables), "rows": list(rows)}
    if options.save:
        options.results.mkdir(exist_ok=True)
        path = options.results / f"{name}.json"
        path.write_text(json.dumps(result, indent=1, default=_plain, allow_nan=False) + "\n")
        print(f"saved {path.name}")
    print(json.dumps({"benchmark": name, **headline}, default=_plain))
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    return value.name if isinstance(value, Path) else str(value)  # no path of this machine
