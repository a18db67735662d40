# SPDX-License-Identifier: Apache-2.0
"""`mix`: the sweep, the totals of every row, then a second look that writes log-probabilities."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specens_kernels.law import LawTensors

from .arguments import law_arguments, workspace
from .laws import is_greedy, load_laws, log_probs, measure, store_laws
from .stats import NARROW_WARPS, tile_tokens
from .sweep import sweep


@triton.jit
def totals(law, work, statuses):
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // law.rows, row % law.rows
    laws, _empty, _lse, status, _draft_status = measure(
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
    found = log_probs(law, load_laws(law, work, row), b, t, offsets, mask)
    tl.store(results + row * law.vocab_size + offsets, found.to(tl.float32), mask=mask)


def mix(logits: list[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """See `reference.mix`."""
    made = law_arguments(logits, law)
    batch, device = logits[0].shape[0], logits[0].device
    work = workspace(made, batch)
    shape = (batch, made.rows, law.vocab_size)
    results = torch.empty(shape, dtype=torch.float32, device=device)
    statuses = torch.empty(shape[:2], dtype=torch.int32, device=device)
    if batch > 0 and made.rows > 0:
        sweep(made, None, work, batch)
        totals[(batch * made.rows,)](made, work, statuses, num_warps=4)
        grid = (batch * made.rows, made.sub_tiles // made.narrow.value)
        write[grid](made, work, results, num_warps=NARROW_WARPS)
    return results, statuses
