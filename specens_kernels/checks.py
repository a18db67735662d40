# SPDX-License-Identifier: Apache-2.0
"""Checks of the ops' arguments: what does not fit raises a `Refusal`, and kernels need not ask.

A check returns its argument where the kernels take it in another shape or dtype. To check a new
argument, add a function here and call it in `ops.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .acceptance import AcceptanceRule
from .law import Law, LawTensors
from .refusal import Refusal

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def wrong(op: str, argument: str, expected: str, got: Tensor) -> Refusal:
    """The refusal of a tensor, by its shape, dtype and device."""
    dtype = str(got.dtype).removeprefix("torch.")
    return Refusal(op, argument, expected, f"{tuple(got.shape)} {dtype} on {got.device}")


def check_coordinates(seeds: Tensor, positions: Tensor, stream: int, index: int) -> None:
    """All that `uniforms` takes."""
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise wrong("uniforms", "seeds", "(B,) int64", seeds)
    if positions.dim() != 2 or positions.dtype != torch.int64:
        raise wrong("uniforms", "positions", "(B, T) int64", positions)
    if positions.shape[0] not in (1, seeds.shape[0]):
        raise wrong("uniforms", "positions", f"(B={seeds.shape[0]}, T) or (1, T)", positions)
    if seeds.device != positions.device:
        raise wrong("uniforms", "positions", f"device {seeds.device}", positions)
    for name, value in (("stream", stream), ("index", index)):
        if not 0 <= value < 2**32:
            raise Refusal("uniforms", name, "an integer in [0, 2^32)", value)


def check_members(op: str, logits: Any, law: Law) -> tuple[list[Tensor], LawTensors]:
    """The checked logits and the law's parameters."""
    if isinstance(logits, Tensor) or len(logits) == 0:
        raise Refusal(op, "logits", "a list of M >= 1 tensors", type(logits))
    first = logits[0]
    shape, device = first.shape, first.device
    vocab_size = law.vocab_size or max(min([tensor.shape[-1:].numel() for tensor in logits]), 1)
    for m, tensor in enumerate(logits):
        size = tensor.shape
        if (
            len(size) != 3
            or size[0] != shape[0]
            or size[1] != shape[1]
            or size[2] < vocab_size
            or tensor.dtype not in FLOATS
            or tensor.device != device
        ):
            expected = f"(B, T, V >= {vocab_size}) float, like logits[0] {tuple(shape)} on {device}"
            raise wrong(op, f"logits[{m}]", expected, tensor)
        if tensor.stride()[2] != 1 and size[2] > 1:
            raise wrong(op, f"logits[{m}]", "contiguous rows", tensor)
    return list(logits), law.tensors(op, shape[0], shape[1], len(logits), device, vocab_size)


def check_numbers(op: str, numbers: Tensor, batch: int, rows: int, device: torch.device) -> None:
    """The blocks that an op draws with."""
    if (
        numbers.shape != (batch, rows, 4)
        or numbers.dtype != torch.float32
        or numbers.device != device
    ):
        raise wrong(op, "uniforms", f"(B={batch}, {rows}, 4) float32 on {device}", numbers)


def check_nodes(
    argument: str, value: Tensor | None, batch: int, columns: int, device: torch.device
) -> Tensor | None:
    """(B or 1, columns) integers, of those or (columns,)."""
    if value is None:
        return None
    if value.dim() == 1:
        value = value[None]
    if (
        value.dim() != 2
        or value.shape[0] not in (1, batch)
        or value.shape[1] != columns
        or value.dtype not in INTEGERS
        or value.device != device
    ):
        expected = f"(B={batch} or 1, {columns}) int32 or int64 on {device}"
        raise wrong("verify", argument, expected, value)
    return value


def check_draft_logits(
    draft: Tensor, batch: int, nodes: int, vocab_size: int, device: torch.device
) -> None:
    """Logits of a draft outside the ensemble."""
    shape = draft.shape
    if (
        draft.dim() != 3
        or shape[0] != batch
        or shape[1] not in (nodes, nodes + 1)
        or shape[2] < vocab_size
        or draft.dtype not in FLOATS
        or draft.device != device
    ):
        expected = f"(B={batch}, N={nodes} or N+1, V >= {vocab_size}) float on {device}"
        raise wrong("verify", "draft_logits", expected, draft)
    if draft.stride(-1) != 1 and shape[2] > 1:
        raise wrong("verify", "draft_logits", "contiguous rows", draft)


def check_lse(
    argument: str,
    lse: Tensor,
    shape: Sequence[int],
    law: LawTensors,
    device: torch.device,
) -> None:
    """Log-sum-exps, of the members or of a separate draft."""
    if any(value is not None for value in (law.top_k, law.top_p, law.min_p)):
        raise Refusal("verify", argument, "None for a law with filters", "a tensor")
    if lse.shape != tuple(shape) or lse.dtype != torch.float32 or lse.device != device:
        raise wrong("verify", argument, f"{tuple(shape)} float32 on {device}", lse)


def check_draft_temperature(value: Tensor, batch: int, device: torch.device) -> Tensor:
    """(1,) or (B,) float32, of (), (1,) or (B,) float."""
    shape = value.shape
    if (
        len(shape) > 1
        or (len(shape) == 1 and shape[0] not in (1, batch))
        or value.dtype not in FLOATS
        or value.device != device
    ):
        raise wrong("verify", "draft_temperature", f"() or (B={batch},) float on {device}", value)
    return value.reshape(-1).to(torch.float32)


def check_memory(
    memory: Tensor | None, rule: AcceptanceRule, batch: int, device: torch.device
) -> Tensor | None:
    """(B,) float64, of a rule that remembers."""
    if memory is None:
        return None
    if not rule.remembers:
        raise Refusal("verify", "memory", f"None for acceptance {rule.name!r}", "a tensor")
    if memory.shape != (batch,) or memory.dtype not in FLOATS or memory.device != device:
        raise wrong("verify", "memory", f"(B={batch},) float on {device}", memory)
    return memory.double()
