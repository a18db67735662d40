# SPDX-License-Identifier: Apache-2.0
"""Decoders of the toy models that decoding/conftest.py makes, and how their texts are compared.

`decoder` takes a schedule by its name; the fixture `models` has the members, with the draft last.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from toys import first_difference

from specens import SpeculativeDecoder, schedules

VOCAB_SIZE = 24
RAGGED = (5, 9, 3, 1, 7)
SCHEDULES = ("speculative", "draft", "alternating")


def decoder(models: list[Any], size: int, schedule: str, gamma: Any = 3, **options: Any):
    """A decoder of the first members; schedule "draft" is "speculative" with the last model."""
    if schedule == "draft":
        options = {"draft": models[-1], **options}
        schedule = "speculative"
    kind = schedules.SCHEDULES[schedule]
    arguments = {field.name for field in dataclasses.fields(kind)}
    chosen = {name: options.pop(name) for name in list(options) if name in arguments}
    if "tokens" in arguments:
        chosen = {"tokens": gamma, **chosen}
    return SpeculativeDecoder(models[:size], schedule=kind(**chosen), **options)


def num_written(texts: Tensor, width: int, ends: list[int]) -> Tensor:
    """(B,) tokens of each row after the prompt, the one that ended it included."""
    ended = torch.isin(texts[:, width:], torch.tensor(ends))
    return (ended.cumsum(1) - ended.long() == 0).sum(1)


def same(text: Tensor, other: Tensor) -> bool:
    assert torch.equal(text, other), first_difference(text, other)
    return True
