# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line share; the shipped family is package data and needs no network."""

import functools
from collections.abc import Iterator

import pytest
import torch

from specens.cli import loading


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """One thread, which is the fastest for models this small, and no model is loaded twice."""
    threads, load = torch.get_num_threads(), loading._load
    torch.set_num_threads(1)
    loading._load = functools.cache(load)
    yield
    loading._load = load
    torch.set_num_threads(threads)
