# SPDX-License-Identifier: Apache-2.0
"""What tests of training share: the shipped models."""

from typing import Any

import pytest

from specens.cli import loading
from specens.training.diversed import Pair


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any, Any]:
    """Draft, target and tokenizer of the shipped family."""
    (draft, target), (tokenizer, _) = loading.load(["family:draft", "family:code"])
    return draft.requires_grad_(False), target.requires_grad_(False), tokenizer


@pytest.fixture
def pair(shipped: tuple[Any, Any, Any]) -> Pair:
    return Pair(*shipped, vocab_size=4096, stop_tokens=(0,))
