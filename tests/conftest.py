# SPDX-License-Identifier: Apache-2.0
"""What every test of the kernels shares: the backends, a seed, and poisoned memory.

A test that takes `backend` runs once for each implementation. What a native kernel does not take is
skipped with its reason; test_ops.py has the list of what it may refuse.
"""

import os
from collections.abc import Generator, Iterator

# Triton looks at it when it is imported: its kernels run on CPU tensors here.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

import specens_kernels
from specens_kernels import native


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


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the implementation that every op runs on."""
    if request.param == "native" and not native.AVAILABLE:
        pytest.skip(f"native: {native.REASON}")
    with specens_kernels.backend(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Skip what the native kernels refuse; `backend("native")` raises instead of falling back."""
    try:
        return (yield)
    except native.Unsupported as reason:
        pytest.skip(f"native: {reason}")
