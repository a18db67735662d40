# SPDX-License-Identifier: Apache-2.0
"""Checks of `attention` and `compact`, the ops over a cache in slots.

`check_<op>` is of all that crosses the dispatcher, as in `checks.py`; `check_<op>_slots` is of what
only a look at lengths, paths and pages tells, and implementations on a CPU ask for it.
"""

import math

import torch
from torch import Tensor

from .call import AttentionCall
from .law import FLOATS
from .refusal import Refusal
from .storage import wrong
from .tree import WORD


def check_attention(call: AttentionCall) -> None:
    """All that `attention` takes."""
    query, keys, device = call.query, call.keys, call.query.device
    if query.dim() != 4 or query.dtype not in FLOATS or 0 in query.shape[1:]:
        raise wrong("attention", "query", "(B, H, N+1, E) float", query)
    batch, heads, nodes, size = query.shape
    dtype = str(query.dtype).removeprefix("torch.")
    outer = f"B={batch}, K" if call.block_table is None else "P, K"
    shape = keys.shape
    if (
        keys.dim() != 4
        or (call.block_table is None and shape[0] != batch)
        or shape[1] < 1
        or heads % shape[1] != 0
        or shape[2] < 1
        or shape[3] != size
        or keys.dtype != query.dtype
        or keys.device != device
    ):
        expected = f"({outer}, S, E={size}) {dtype} on {device}, K a divisor of H={heads}"
        raise wrong("attention", "keys", expected, keys)
    values = call.values
    if (
        values.dim() != 4
        or values.shape[:3] != shape[:3]
        or values.shape[3] < 1
        or values.dtype != query.dtype
        or values.device != device
    ):
        expected = f"{(*shape[:3], 'F')} {dtype} on {device}".replace("'", "")
        raise wrong("attention", "values", expected, values)
    for name, tensor in (("query", query), ("keys", keys), ("values", values)):
        if tensor.stride()[3] != 1 and tensor.shape[3] > 1:
            raise wrong("attention", name, "contiguous rows", tensor)
    capacity = shape[2]
    if call.block_table is not None:
        _check_block_table("attention", call.block_table, batch, device)
        capacity *= call.block_table.shape[1]
    if nodes > capacity:
        raise wrong("attention", "keys", f"S >= N+1={nodes} slots", keys)
    _check_lengths("attention", call.lengths, batch, device)
    _check_tree(call, batch, nodes, device)
    sinks = call.sinks
    if sinks is not None and (
        sinks.shape != (heads,) or sinks.dtype != torch.float32 or sinks.device != device
    ):
        raise wrong("attention", "sinks", f"(H={heads},) float32 on {device}", sinks)
    if not -math.inf < call.scale < math.inf:
        raise Refusal("attention", "scale", "a finite number", call.scale)
    if not 0 <= call.softcap < math.inf:
        raise Refusal("attention", "softcap", "a finite number >= 0", call.softcap)


def _check_tree(call: AttentionCall, batch: int, nodes: int, device: torch.device) -> None:
    """Words and depths of the nodes, and the window that they are asked for."""
    visible, depths = call.visible, call.depths
    words = (nodes + WORD - 1) // WORD
    # Written out, for a compiler's size is not found in a tuple.
    if (
        visible.dim() != 3
        or (visible.shape[0] != 1 and visible.shape[0] != batch)
        or visible.shape[1] != nodes
        or visible.shape[2] != words
        or visible.dtype != torch.int64
        or visible.device != device
    ):
        expected = f"(B={batch} or 1, N+1={nodes}, W={words}) int64 on {device}"
        raise wrong("attention", "visible", expected, visible)
    if call.window < 0:
        raise Refusal("attention", "window", "an integer >= 0", call.window)
    if call.window > 0 and depths is None:
        raise Refusal("attention", "depths", "a tensor with a window", None)
    if depths is not None and (
        depths.dim() != 2
        or (depths.shape[0] != 1 and depths.shape[0] != batch)
        or depths.shape[1] != nodes
        or depths.dtype != torch.int32
        or depths.device != device
    ):
        expected = f"(B={batch} or 1, N+1={nodes}) int32 on {device}"
        raise wrong("attention", "depths", expected, depths)


def check_attention_slots(call: AttentionCall) -> None:
    """What only a look at lengths and pages tells, on a CPU, where it costs nothing."""
    if call.lengths.device.type != "cpu":
        return
    nodes, page = call.query.shape[2], call.keys.shape[2]
    table = call.block_table
    last = page * (1 if table is None else table.shape[1]) - nodes
    for length in call.lengths.tolist():
        if not 0 <= length <= last:
            raise Refusal("attention", "lengths", f"0 to S - N - 1 = {last}", length)
    if table is not None:
        # Where a window begins; without one, at or before the first slot.
        reach = call.window if call.window > 0 else last + nodes
        first, end = call.lengths - reach + 1, call.lengths + nodes
        _check_pages("attention", table, page, len(call.keys), first, end)


def check_compact_slots(
    slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None
) -> None:
    """What only a look at lengths, paths and pages tells, on a CPU."""
    if lengths.device.type != "cpu":
        return
    pages = 1 if block_table is None else block_table.shape[1]
    capacity = min([slab.shape[3] for slab in slabs]) * pages
    ends = []
    for length, nodes in zip(lengths.tolist(), path.tolist(), strict=True):
        before = 0
        for place, node in enumerate(nodes):
            if node < 0:
                break
            if node <= before:
                ascending = "nodes that ascend from 1, then -1"
                raise Refusal("compact", "path", ascending, f"{node} at {place}, after {before}")
            before = node
        end = length + before + 1 if before > 0 else length
        if length < 0 or end > capacity:
            expected = f"slots of 0 to S = {capacity} for the nodes of a path"
            raise Refusal("compact", "lengths", expected, f"{length} and node {before}")
        ends.append(end)
    if block_table is not None:
        count, page = slabs[0].shape[1], slabs[0].shape[3]
        end = torch.tensor(ends, dtype=torch.int64)
        _check_pages("compact", block_table, page, count, lengths, end)


def _check_pages(op: str, table: Tensor, page: int, count: int, first: Tensor, end: Tensor) -> None:
    """That what lies in slots [first, end) of each row lies in one of `count` pages."""
    start = torch.arange(table.shape[1]) * page
    used = (start + page > first[:, None]) & (start < end[:, None])
    if (used & ((table < 0) | (table >= count))).any():
        raise Refusal(op, "block_table", f"pages of [0, {count})", "another one")


def check_compact(
    slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None
) -> None:
    """All that `compact` takes."""
    device = lengths.device
    if path.dim() != 2 or path.dtype != torch.int32 or path.device != device:
        raise wrong("compact", "path", f"(B, D) int32 on {device}", path)
    batch = path.shape[0]
    _check_lengths("compact", lengths, batch, device)
    if block_table is not None:
        _check_block_table("compact", block_table, batch, device)
    if len(slabs) == 0:
        raise Refusal("compact", "slabs", "one tensor or more", "none")
    for i, slab in enumerate(slabs):
        if (
            slab.dim() != 5
            or slab.shape[1] != (batch if block_table is None else slabs[0].shape[1])
            or (block_table is not None and slab.shape[3] != slabs[0].shape[3])
            or slab.device != device
        ):
            paged = f"(L, P, K, page, E) on {device}, P and page as in slabs[0]"
            expected = f"(L, B={batch}, K, S, E) on {device}" if block_table is None else paged
            raise wrong("compact", f"slabs[{i}]", expected, slab)
        strides = slab.stride()
        if 0 in strides and any(strides[k] == 0 and slab.shape[k] > 1 for k in range(5)):
            raise wrong("compact", f"slabs[{i}]", "memory of its own for each element", slab)
        if strides[4] != 1 and slab.shape[4] > 1:
            raise wrong("compact", f"slabs[{i}]", "contiguous rows", slab)


def _check_lengths(op: str, lengths: Tensor, batch: int, device: torch.device) -> None:
    if lengths.shape != (batch,) or lengths.dtype != torch.int64 or lengths.device != device:
        raise wrong(op, "lengths", f"(B={batch},) int64 on {device}", lengths)


def _check_block_table(op: str, table: Tensor, batch: int, device: torch.device) -> None:
    if (
        table.dim() != 2
        or table.shape[0] != batch
        or table.shape[1] < 1
        or table.dtype != torch.int32
        or table.device != device
    ):
        raise wrong(op, "block_table", f"(B={batch}, pages) int32 on {device}", table)
