# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest for `on_card.py`: one backend's tests, until a time, and what became of each.

CARD_BACKEND   the backend whose tests run; the others are deselected.
CARD_UNTIL     seconds since the epoch after which no test begins; what is left is counted.
CARD_DONE      a file with a JSON list of tests that have passed before, which do not run again.
CARD_RESULT    where the result goes. It is written after every test, for a kernel may hang.

Tests of few variants run first, and the variants of one test in random order, so that whatever
there is time for is a fair sample. A run in which nothing passed has failed, even if all was
skipped.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

OUT_OF_TIME = "out of time"
SLOWEST = 8

_until = float(os.environ.get("CARD_UNTIL", "inf"))
_passed: list[str] = []
_failed: dict[str, str] = {}
_skipped: Counter[str] = Counter()
_seconds: dict[str, float] = {}


def _done() -> list[str]:
    path = os.environ.get("CARD_DONE")
    return json.loads(Path(path).read_text()) if path else []


def _is_wanted(item: pytest.Item) -> bool:
    wanted = os.environ.get("CARD_BACKEND")
    given = getattr(item, "callspec", None)
    backend = given.params.get("backend") if given else None
    if backend is None:
        return item.get_closest_marker("gpu") is not None
    return wanted is None or backend == wanted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose, and put first what is worth most."""
    done = frozenset(_done())
    kept = [item for item in items if _is_wanted(item) and item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    variants = Counter(item.nodeid.split("[")[0] for item in kept)
    dice = random.Random(0)
    places = {item.nodeid: dice.random() for item in kept}
    items[:] = sorted(kept, key=lambda i: (variants[i.nodeid.split("[")[0]], places[i.nodeid]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin no test that there is no time for."""
    if time.time() > _until:
        pytest.skip(OUT_OF_TIME)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of it; with pytest-xdist, in the process that hears of all of them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.failed:
        _failed[report.nodeid] = report.longreprtext[-1500:]
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[reason.removeprefix("Skipped: ")] += 1
    elif report.when == "call":
        _passed.append(report.nodeid)
        _seconds[report.nodeid] = round(report.duration, 2)
    _write()


def _write() -> None:
    left = _skipped[OUT_OF_TIME]
    passed = _done() + [name for name in _passed if name not in _failed]
    counts = {"passed": len(passed), "failed": len(_failed), "left for lack of time": left}
    counts["skipped"] = sum(_skipped.values()) - left
    parts = [f"{count} {name}" for name, count in counts.items() if count or name == "passed"]
    slowest = sorted(_seconds.items(), key=lambda pair: -pair[1])[:SLOWEST]
    result: dict[str, Any] = {"summary": ", ".join(parts), "complete": left == 0}
    result |= {"failed": _failed, "skipped": dict(_skipped), "slowest": dict(slowest)}
    result["passed"] = passed
    path = os.environ.get("CARD_RESULT")
    if path:
        Path(path).write_text(json.dumps(result))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing passed: failed, whatever was skipped. Nothing was left to run: passed."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    _write()
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _done():
        session.exitstatus = pytest.ExitCode.OK
    elif session.exitstatus == pytest.ExitCode.OK and not _passed and not _skipped[OUT_OF_TIME]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
