# SPDX-License-Identifier: Apache-2.0
"""Which data a step takes: windows of tokens, the order of examples, and seeds.

All depends on nothing but the arguments, so that a run can be resumed anywhere.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specens_kernels import Refusal


def token_windows(tokenizer: Any, texts: Sequence[str], tokens: int, seed: int) -> Tensor:
    """(W, tokens) int64. The texts one after the other, cut and shuffled.

    Raises:
        Refusal: the texts do not fill one window.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for row in rows for token in (*separator, *row)])
    count = len(stream) // tokens
    if count == 0:
        raise Refusal("train", "data", f"text of at least {tokens} tokens", len(stream))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return stream[: count * tokens].reshape(count, tokens)[order]


def in_turn(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Which of `count` examples step `step` takes: each comes once before any comes again."""
    places = (divmod(place, count) for place in range(step * batch, (step + 1) * batch))
    return [_order(count, epoch, seed)[within] for epoch, within in places]


# Two: a step may end one epoch and begin the next.
@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    dice = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=dice).tolist()
    return order


def row_seeds(seed: int, step: int, rows: int) -> Tensor:
    """(rows,) int64: seeds for `uniforms`, from nothing but the arguments."""
    dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(2**62, (rows,), generator=dice)
