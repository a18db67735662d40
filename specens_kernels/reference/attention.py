# SPDX-License-Identifier: Apache-2.0
"""`attention`: a dense mask made of lengths and words, and a softmax in float64."""

import math

import torch
from torch import Tensor

from ..cache_checks import check_attention_slots
from ..call import AttentionCall
from ..tree import WORD


def seen_slots(call: AttentionCall, capacity: int) -> Tensor:
    """(B, N+1, S) bool. Whether node i sees slot s."""
    nodes = call.visible.shape[1]
    lengths = call.lengths[:, None, None]
    slots = torch.arange(capacity, device=lengths.device)
    node = slots - lengths  # (B, 1, S): what lies in the slot, if it is no prefix
    places = node.clamp(0, nodes - 1).expand(-1, nodes, -1)
    words = call.visible.expand(len(lengths), -1, -1).gather(-1, places // WORD)
    prefix = node < 0
    if call.window > 0:
        assert call.depths is not None
        prefix = prefix & (node > call.depths[:, :, None] - call.window)
    return prefix | ((node >= 0) & (node < nodes) & ((words >> places % WORD) & 1 == 1))


def in_order(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """(B, K, S, ...) of (P, K, page, ...)."""
    if block_table is None:
        return cache
    # What is no page, a window has left behind.
    return cache[block_table.long().clamp(0, len(cache) - 1)].transpose(1, 2).flatten(2, 3)


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(B, N+1, H, F) and (B, H, N+1) float32 log-sum-exps; see `ops.attention`."""
    check_attention_slots(call)
    query = call.query.double()
    keys, values = (in_order(each, call.block_table) for each in (call.keys, call.values))
    seen = seen_slots(call, keys.shape[2])[:, None]
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    scores = query @ keys.mT * call.scale
    if call.softcap > 0:
        scores = (scores / call.softcap).tanh() * call.softcap
    scores = scores.masked_fill(~seen, -math.inf)  # (B, H, N+1, S)
    if call.sinks is not None:
        sinks = call.sinks.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    lse = scores.logsumexp(-1)
    # A node that sees nothing gets 0.
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    # Whatever lies in a hidden slot, NaN for instance, does not enter.
    rows = [
        weights[:, :, i, None, : keys.shape[2]] @ values.masked_fill(~seen[:, :, i, :, None], 0.0)
        for i in range(query.shape[2])
    ]
    return torch.cat(rows, 2).transpose(1, 2).to(call.query.dtype).contiguous(), lse.float()
