# SPDX-License-Identifier: Apache-2.0
"""What every test of the kernels shares: the backends, a seed, and poisoned memory.

A test that takes `backend` runs once for each implementation. What a native kernel does not take is
skipped with its reason; test_ops.py has the list of what it may refuse.
"""

import os
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from importlib import import_module
from operator import itemgetter
from types import ModuleType

import calls
import pytest
import simt
import torch

import specens_kernels
from specens_kernels import dispatch, triton


def pytest_addoption(parser: pytest.Parser) -> None:
    """--card: what test_conformance.py compares runs on a CUDA device. --zoo: test_families.py."""
    parser.addoption("--card", action="store_true", help="compare kernels on a CUDA device")
    parser.addoption("--zoo", action="store_true", help="write with every architecture there is")


def pytest_configure(config: pytest.Config) -> None:
    """Triton looks at it when imported: its kernels run on CPU tensors here, but for a card."""
    card = config.getoption("card")
    compiled = card or config.getoption("markexpr").startswith("gpu")
    os.environ.setdefault("TRITON_INTERPRET", "0" if compiled else "1")
    if card and not torch.cuda.is_available():
        raise pytest.UsageError("--card: expected a CUDA device, got none")
    calls.ON_CARD.update(("triton", "cuda") if card else ())


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN or the largest integer, so that a test sees it read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The global generator starts every test from the same place."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are fastest so, and their sums the same in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", *dispatch.MODULES])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the implementation that every op runs on.

    Here "triton" is Triton's interpreter under our guard, and "cuda" the emulator of tests/simt;
    with --card both are the real ones.
    """
    name = request.param
    with ExitStack() as stack:
        if name in calls.ON_CARD:
            pass
        elif name == "cuda":
            missing = simt.what_is_missing()
            if missing:
                pytest.skip(f"cuda: {missing}")
            stack.enter_context(simt.emulated())
        elif name == "triton" and triton.AVAILABLE:
            triton_guard().install()
        if name != "reference" and not dispatch.MODULES[name].AVAILABLE:
            pytest.skip(f"{name}: {dispatch.MODULES[name].REASON}")
        stack.enter_context(specens_kernels.backend(name))
        yield name


def triton_guard() -> ModuleType:
    """The guard, which imports Triton."""
    return import_module("triton_guard")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip what a backend refuses: one that was asked for raises instead of falling back."""
    try:
        return (yield)
    except specens_kernels.Unsupported as reason:
        pytest.skip(str(reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With --zoo, what became of each architecture."""
    if not terminalreporter.config.getoption("zoo"):
        return
    rows = [
        dict(report.user_properties)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
    ]
    terminalreporter.section("families")
    counts: Counter[str] = Counter()
    for row in sorted(rows, key=itemgetter("family")):
        outcome = row.get("outcome", "wrong")  # it crashed
        cells = f"{row['family']:26} {outcome:9} {row.get('modes', ''):7} {row.get('reason', '')}"
        terminalreporter.write_line(cells.rstrip())
        counts[outcome] += 1
    terminalreporter.write_line(", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
