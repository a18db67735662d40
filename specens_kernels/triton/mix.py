# SPDX-License-Identifier: Apache-2.0
"""`mix`: the sweep, the totals of every row, then a second look that writes log-probabilities."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..law import LawTensors
from .launch import law_arguments, workspace
from .logits import log_probs
from .parameters import is_greedy
from .stats import NARROW_WARPS, tile_tokens
from .sweep import sweep
from .totals import load_laws, normalise, store_laws


@triton.jit
def totals(law, work, statuses):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // law.rows, row % law.rows
    laws, _empty, _lse, status, _draft_status = normalise(
        law, None, work, row, b, t, -1, is_greedy(law, b)
    )
    store_laws(law, work, row, laws)
    tl.store(statuses + row, status)


@triton.jit
def write(law, work, results):
    """Grid: rows, narrow tiles."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // law.rows, row % law.rows
    offsets, mask = tile_tokens(law, tile, law.narrow)
    values = log_probs(law, load_laws(law, work, row), b, t, offsets, mask)
    tl.store(results + row * law.vocab_size + offsets, values.to(tl.float32), mask=mask)


def mix(logits: list[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """See `reference.mix`."""
    arguments = law_arguments(logits, law)
    batch, device = logits[0].shape[0], logits[0].device
    work = workspace(arguments, batch)
    shape = (batch, arguments.rows, law.vocab_size)
    results = torch.empty(shape, dtype=torch.float32, device=device)
    statuses = torch.empty(shape[:2], dtype=torch.int32, device=device)
    if batch > 0 and arguments.rows > 0:
        sweep(arguments, None, work, batch)
        totals[(batch * arguments.rows,)](arguments, work, statuses, num_warps=4)
        grid = (batch * arguments.rows, arguments.sub_tiles // arguments.narrow.value)
        write[grid](arguments, work, results, num_warps=NARROW_WARPS)
    return results, statuses
