# SPDX-License-Identifier: Apache-2.0
"""`sample`: the sweep, then one program for each row draws its token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..law import LawTensors
from ..refusal import Unsupported
from .draw import most_probable, pick, pick_sub_tile, sub_tile_tokens
from .launch import law_arguments, workspace
from .logits import log_prob, look
from .parameters import SUB_TILE, is_greedy
from .sweep import sweep
from .totals import normalise, sub_tile_masses

WARPS = 4


@triton.jit
def draw(law, work, numbers, batch_stride, row_stride, word, tokens, log_probs, lses, statuses):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // law.rows, row % law.rows
    greedy = is_greedy(law, b)
    laws, empty, lse, status, _draft_status = normalise(law, None, work, row, b, t, -1, greedy)
    token = tl.full((), 0, tl.int32)
    if empty == 0:
        if greedy:
            token = most_probable(law, work, row, b, t, laws, greedy)
        else:
            at = numbers + b * batch_stride + t * row_stride
            masses = sub_tile_masses(law, work, row, b, t, laws, greedy, True)
            sub_tile = pick_sub_tile(law, masses, at, word)
            offsets, mask = sub_tile_tokens(law, sub_tile)
            masses, _drafted = look(law, None, laws, b, t, -1, offsets, mask, tl.float64)
            token = sub_tile * SUB_TILE + pick(masses, tl.load(at + 3 * word).to(tl.float64))
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(log_probs + row, log_prob(law, laws, b, t, token).to(tl.float32))
    tl.store(lses + row, lse.to(tl.float32))
    tl.store(statuses + row, status)


def sample(
    logits: list[Tensor],
    numbers: Tensor,
    law: LawTensors,
    member: int,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sample`."""
    if places is not None:
        raise Unsupported("triton", "rows", "None", "a tensor")
    if numbers.dim() == 4:
        raise Unsupported("triton", "count", "None", numbers.shape[2])
    arguments = law_arguments(logits, law, member)
    batch, rows, _ = numbers.shape
    work = workspace(arguments, batch)
    results = tuple(
        torch.empty(batch, rows, dtype=dtype, device=numbers.device)
        for dtype in (torch.int64, torch.float32, torch.float32, torch.int32)
    )
    if batch > 0 and rows > 0:
        sweep(arguments, None, work, batch)
        draw[(batch * rows,)](
            arguments, work, numbers, *numbers.stride(), *results, num_warps=WARPS
        )
    tokens, log_probs, lses, statuses = results
    return tokens, log_probs, lses, statuses
