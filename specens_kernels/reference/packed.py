# SPDX-License-Identifier: Apache-2.0
"""Rows that lie packed, as an engine has them, put where the reference looks for them."""

import torch
from torch import Tensor

from ..call import VerifyCall
from ..refusal import Refusal


def refuse_outside(
    op: str, argument: str, rows: Tensor, count: int, looked_at: Tensor | bool = True
) -> None:
    """Refuse an index of no row among those that are looked at: (B, T) indices, (B, T) bool."""
    outside = ((rows < 0) | (rows >= count)) & looked_at
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise Refusal(op, argument, f"indices in [0, {count})", f"{int(rows[at])} at {at}")


def unpacked(packed: Tensor, rows: Tensor) -> Tensor:
    """(B, T, ...) of (L, ...); what lies outside is any row, or zeros where there is none."""
    if len(packed) == 0:
        return packed.new_zeros(*rows.shape, *packed.shape[1:])
    return packed[rows.long().clamp(0, len(packed) - 1)]


def padded(call: VerifyCall) -> VerifyCall:
    """The same call with (B, T, ...) rows."""
    ends = call.layout.num_drafts
    rows, draft_rows = call.layout.rows, call.layout.draft_rows
    if rows is not None:
        looked_at = _first(rows, rows.shape[1], ends, int(call.bonus))
        refuse_outside("verify", "rows", rows, len(call.logits[0]), looked_at)
        call = call._replace(
            logits=[unpacked(tensor, rows) for tensor in call.logits],
            lse=None if call.lse is None else unpacked(call.lse, rows),
        )
    if draft_rows is not None and call.draft_logits is not None:
        count = len(call.draft_logits)
        looked_at = _first(draft_rows, call.draft_tokens.shape[1], ends, 0)
        refuse_outside("verify", "draft_rows", draft_rows, count, looked_at)
        call = call._replace(
            draft_logits=unpacked(call.draft_logits, draft_rows),
            draft_lse=None if call.draft_lse is None else unpacked(call.draft_lse, draft_rows),
        )
    return call


def _first(rows: Tensor, most: int, num_drafts: Tensor | None, more: int) -> Tensor:
    """(B, T) bool: as many of a request as its drafts, and so many more."""
    ends = torch.full((len(rows),), most, device=rows.device)
    if num_drafts is not None:
        ends = torch.minimum(num_drafts.clamp(min=0) + more, ends)
    return torch.arange(rows.shape[1], device=rows.device) < ends[:, None]
