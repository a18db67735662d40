# SPDX-License-Identifier: Apache-2.0
"""`attention`: splits of the cache against tiles of packed query rows, then a row's splits joined.

A split has a fixed size, and its slots are counted from the cache's first: neither batch, capacity
nor pages show in a result. Lengths are read on the device. The grid has the splits that the cache,
or the window, has room for; programs beyond the length do nothing. Tiles of the prefix hold no code
for masks. Scores are in units of log 2, for `exp2`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import AttentionCall
from ..refusal import Unsupported
from .launch import DTYPES, check_device

LARGEST_HEAD = 256
TOGETHER = 16  # splits that are joined at once
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# tanh(x) = x + x^3 P(x^2) below NEAR, within 5e-9 of itself.
NEAR = tl.constexpr(0.625)
P0 = tl.constexpr(-0.3333328068256378)
P1 = tl.constexpr(0.13331441581249237)
P2 = tl.constexpr(-0.05373971536755562)
P3 = tl.constexpr(0.02063908986747265)
P4 = tl.constexpr(-0.005704990588128567)


class Cache(NamedTuple):
    """Keys and values in slots; strides over batch or page, head and row.

    table: (B, pages) int32, or None. page: slots of one. capacity: slots of a row.
    """

    key_data: Any
    key_batch: Any
    key_head: Any
    key_row: Any
    value_data: Any
    value_batch: Any
    value_head: Any
    value_row: Any
    table: Any
    table_batch: Any
    table_page: Any
    page: Any
    capacity: Any


class Tree(NamedTuple):
    """What nodes see. depths: None without a window. sinks: of each head, or None."""

    lengths: Any
    lengths_batch: Any
    visible: Any
    visible_batch: Any
    visible_node: Any
    visible_word: Any
    depths: Any
    depths_batch: Any
    depths_node: Any
    sinks: Any
    sinks_head: Any
    nodes: Any
    window: Any


class Shape(NamedTuple):
    """Compile-time constants; `e` and `f` are `size` and `value_size` as powers of two.

    rows: of a tile. slots: of one, masked_slots of one that may hide some, and `split` of a
        split. exact: whether products are of float32.
    """

    group: Any
    size: Any
    value_size: Any
    e: Any
    f: Any
    rows: Any
    slots: Any
    masked_slots: Any
    split: Any
    stages: Any
    capped: Any
    exact: Any


@triton.jit
def reach(tree, cache, b, shape):
    """Length of the prefix, end of the nodes, first slot that any node sees, and first split."""
    length = tl.load(tree.lengths + b * tree.lengths_batch)
    length = tl.minimum(tl.maximum(length, 0), cache.capacity).to(tl.int32)
    end = tl.minimum(length + tree.nodes, cache.capacity)
    first = length * 0
    if tree.depths is not None:
        first = tl.maximum(length - tree.window + 1, 0)
    return length, end, first, first // shape.split


@triton.jit
def capped(scores, cap):
    """cap * tanh(scores / cap)."""
    x = scores / cap
    size = tl.abs(x)
    decay = tl.exp2(size * (-2.0 * LOG2_E))
    far = 1.0 - 2.0 * decay / (1.0 + decay)
    square = size * size
    near = (((P4 * square + P3) * square + P2) * square + P1) * square + P0
    near = near * square * size + size
    value = tl.where(size < NEAR, near, far)
    return tl.where(x < 0, -value, value) * cap


@triton.jit
def seen_bits(tree, b, node, at):
    """(rows,) uint64. Of 64 nodes from node `at` on, which may be below 0, those that are seen."""
    words = tree.visible + b * tree.visible_batch + node * tree.visible_node
    first, shift = tl.maximum(at, 0) // 64, (tl.maximum(at, 0) % 64).to(tl.uint64)
    count = (tree.nodes + 63) // 64
    low = tl.load(words + first * tree.visible_word, mask=first < count, other=0).to(tl.uint64)
    high = tl.load(words + (first + 1) * tree.visible_word, mask=first + 1 < count, other=0)
    # A shift by 64 is none.
    high = (high.to(tl.uint64) << 1) << (63 - shift)
    later = tl.minimum(tl.maximum(-at, 0), 63).to(tl.uint64)
    return tl.where(at < 0, tl.where(at <= -64, 0, low << later), (low >> shift) | high)


@triton.jit
def block(
    state, query, cache, tree, b, h, s, end, length, first, node, depth, scale, cap,
    masked: tl.constexpr, slots: tl.constexpr, shape,
):  # fmt: skip
    """One tile of slots added to what is known of the rows."""
    top, total, out = state
    slot = s + tl.arange(0, slots)
    e, f = tl.arange(0, shape.e), tl.arange(0, shape.f)
    inside = slot < end
    if masked:
        inside &= slot >= first
    if cache.table is None:
        # Where the tile begins takes 64 bits, where an element of it lies does not.
        row = tl.arange(0, slots)
        here = tl.zeros((), tl.int64) + s
        place = b * cache.key_batch + h * cache.key_head + here * cache.key_row
        key_at, key = cache.key_data + place, row * cache.key_row
        place = b * cache.value_batch + h * cache.value_head + here * cache.value_row
        value_at, value = cache.value_data + place, row * cache.value_row
    else:
        pages = cache.table + b * cache.table_batch + (slot // cache.page) * cache.table_page
        page = tl.load(pages, mask=inside, other=0).to(tl.int64)
        row = slot % cache.page
        key_at = cache.key_data + h * cache.key_head
        value_at = cache.value_data + h * cache.value_head
        key = page * cache.key_batch + row * cache.key_row
        value = page * cache.value_batch + row * cache.value_row
    if masked:
        kept = inside[None, :] & (e < shape.size)[:, None]
        keys = tl.load(key_at + key[None, :] + e[:, None], mask=kept, other=0.0)
        kept = inside[:, None] & (f < shape.value_size)[None, :]
        values = tl.load(value_at + value[:, None] + f[None, :], mask=kept, other=0.0)
    else:
        if shape.e == shape.size:
            keys = tl.load(key_at + key[None, :] + e[:, None])
        else:
            kept = (e < shape.size)[:, None]
            keys = tl.load(key_at + key[None, :] + e[:, None], mask=kept, other=0.0)
        if shape.f == shape.value_size:
            values = tl.load(value_at + value[:, None] + f[None, :])
        else:
            kept = (f < shape.value_size)[None, :]
            values = tl.load(value_at + value[:, None] + f[None, :], mask=kept, other=0.0)
    scores = tl.dot(query, keys, input_precision="ieee" if shape.exact else "tf32") * scale
    if shape.capped:
        scores = capped(scores, cap)
    scores *= LOG2_E
    seen = inside[None, :]
    if masked:
        bits = seen_bits(tree, b, node, s - length)
        t = tl.arange(0, slots)
        half = tl.where(
            (t < 32)[None, :], bits.to(tl.int32)[:, None], (bits >> 32).to(tl.int32)[:, None]
        )
        prefix = (slot < length)[None, :]
        if tree.depths is not None:
            prefix &= slot[None, :] > (length + depth - tree.window)[:, None]
        seen &= prefix | (((half >> (t & 31)[None, :]) & 1) != 0)
        scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    # Of a row that has seen nothing yet.
    base = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(mass, 1)
    out *= decay[:, None]
    if masked:
        # What is no finite number in a hidden slot must not meet a mass of 0, and in one that is
        # seen it spoils the row.
        broken = (values - values) != 0
        values = tl.where(broken, 0.0, values).to(values.dtype)
        spoils = tl.max(broken.to(tl.int32), 1) > 0
        spoiled = tl.max((seen & spoils[None, :]).to(tl.int32), 1) > 0
        out = tl.where(spoiled[:, None], float("nan"), out)
    out += tl.dot(mass.to(values.dtype), values, input_precision="ieee" if shape.exact else "tf32")
    return peak, total, out


@triton.jit
def attend(
    queries, query_batch, query_head, query_node, cache, tree, tops, totals, outs, splits,
    key_heads, scale, cap, shape,
):  # fmt: skip
    """Grid: splits, key heads of each row of the batch, tiles of packed rows."""
    place = tl.program_id(0)
    b = (tl.program_id(1) // key_heads).to(tl.int64)
    h = (tl.program_id(1) % key_heads).to(tl.int64)
    length, end, first, first_split = reach(tree, cache, b, shape)
    start = (first_split + place) * shape.split
    if start < end:
        count = shape.group * tree.nodes
        row = tl.program_id(2) * shape.rows + tl.arange(0, shape.rows)
        e, f = tl.arange(0, shape.e), tl.arange(0, shape.f)
        live = row < count
        node = tl.where(live, row % tree.nodes, 0)
        head = h * shape.group + row // tree.nodes
        address = b * query_batch + head.to(tl.int64) * query_head + node * query_node
        kept = live[:, None] & (e < shape.size)[None, :]
        query = tl.load(queries + address[:, None] + e[None, :], mask=kept, other=0.0)
        depth = node
        until = tl.minimum(start + shape.split, end)
        # Tiles before `whole` are of the prefix alone.
        whole = tl.maximum(tl.minimum(until, length) - start, 0)
        whole = start + whole // shape.slots * shape.slots
        begin = start
        state = (
            tl.full((shape.rows,), float("-inf"), tl.float32),
            tl.zeros((shape.rows,), tl.float32),
            tl.zeros((shape.rows, shape.f), tl.float32),
        )
        if tree.depths is not None:
            depth = tl.load(tree.depths + b * tree.depths_batch + node * tree.depths_node)
            # From `full` on, every node sees the prefix.
            full = length + tl.max(tl.where(live, depth, 0)) - tree.window + 1
            begin = tl.maximum(start, first // shape.slots * shape.slots)
            full = tl.maximum(full - start, 0) + shape.slots - 1
            full = start + full // shape.slots * shape.slots
            full = tl.maximum(tl.minimum(full, whole), begin)
            for s in tl.range(begin, full, shape.masked_slots, num_stages=1):
                state = block(
                    state, query, cache, tree, b, h, s, until, length, first, node, depth, scale,
                    cap, True, shape.masked_slots, shape,
                )  # fmt: skip
            begin = full
        for s in tl.range(begin, whole, shape.slots, num_stages=shape.stages):
            state = block(
                state, query, cache, tree, b, h, s, until, length, first, node, depth, scale, cap,
                False, shape.slots, shape,
            )  # fmt: skip
        for s in tl.range(tl.maximum(begin, whole), until, shape.masked_slots, num_stages=1):
            state = block(
                state, query, cache, tree, b, h, s, until, length, first, node, depth, scale, cap,
                True, shape.masked_slots, shape,
            )  # fmt: skip
        top, total, out = state
        at = (tl.program_id(1).to(tl.int64) * splits + place) * count + row
        tl.store(tops + at, top, mask=live)
        tl.store(totals + at, total, mask=live)
        kept = live[:, None] & (f < shape.value_size)[None, :]
        tl.store(outs + at[:, None] * shape.value_size + f[None, :], out, mask=kept)


@triton.jit
def join(
    cache, tree, tops, totals, outs, splits, key_heads, out, lse,
    together: tl.constexpr, shape,
):  # fmt: skip
    """Grid: packed rows, key heads of each row of the batch. Splits in their order."""
    b = (tl.program_id(1) // key_heads).to(tl.int64)
    h = (tl.program_id(1) % key_heads).to(tl.int64)
    row = tl.program_id(0)
    head, node = h * shape.group + row // tree.nodes, row % tree.nodes
    _length, end, _first, first_split = reach(tree, cache, b, shape)
    count = tl.minimum((end + shape.split - 1) // shape.split - first_split, splits)
    c, f = tl.arange(0, together), tl.arange(0, shape.f)
    stride = shape.group * tree.nodes
    base = tl.program_id(1).to(tl.int64) * splits * stride + row
    peak = tl.full((), float("-inf"), tl.float32)
    sink = peak
    if tree.sinks is not None:
        sink = tl.load(tree.sinks + head * tree.sinks_head) * LOG2_E
        peak = tl.maximum(peak, sink)
    for i in range(0, count, together):
        here = i + c < count
        top = tl.load(tops + base + (i + c) * stride, mask=here, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(top, 0))
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.zeros((), tl.float32)
    if tree.sinks is not None:
        mass += tl.exp2(sink - shift)
    result = tl.zeros((shape.f,), tl.float32)
    for i in range(0, count, together):
        here = i + c < count
        at = base + (i + c) * stride
        top = tl.load(tops + at, mask=here, other=float("-inf"))
        total = tl.load(totals + at, mask=here, other=0.0)
        weight = tl.where(total == 0, 0.0, tl.exp2(top - shift))
        mass += tl.sum(weight * total, 0)
        kept = here[:, None] & (f < shape.value_size)[None, :]
        part = tl.load(outs + at[:, None] * shape.value_size + f[None, :], mask=kept, other=0.0)
        result += tl.sum(weight[:, None] * part, 0)
    result = tl.where(mass == 0, 0.0, result / mass)
    place = ((b * tree.nodes + node) * (key_heads * shape.group) + head) * shape.value_size
    tl.store(out + place + f, result.to(out.dtype.element_ty), mask=f < shape.value_size)
    log = tl.where(mass == 0, float("-inf"), (shift + tl.log2(mass)) * LN_2)
    tl.store(lse + (b * (key_heads * shape.group) + head) * tree.nodes + node, log)


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `reference.attention`."""
    _refuse(call)
    batch, heads, nodes, _ = call.query.shape
    key_heads = call.keys.shape[1]
    device, value_size = call.query.device, call.values.shape[3]
    out = call.query.new_empty((batch, nodes, heads, value_size))
    lse = torch.empty(batch, heads, nodes, dtype=torch.float32, device=device)
    if batch == 0:
        return out, lse
    shape, warps = _shape(call)
    cache, tree = _cache(call), _tree(call)
    room = cache.capacity
    split = shape.split.value
    splits = triton.cdiv(room, split)
    if call.window > 0:  # which may begin anywhere in a split
        splits = min(splits, triton.cdiv(call.window + nodes, split) + 1)
    rows = shape.group.value * nodes
    parts = (batch * key_heads, splits, rows)
    tops = torch.empty(parts, dtype=torch.float32, device=device)
    totals = torch.empty(parts, dtype=torch.float32, device=device)
    outs = torch.empty(*parts, value_size, dtype=torch.float32, device=device)
    grid = (splits, batch * key_heads, triton.cdiv(rows, shape.rows.value))
    attend[grid](
        call.query, *call.query.stride()[:3], cache, tree, tops, totals, outs, splits, key_heads,
        call.scale, max(call.softcap, 1.0e-30), shape, num_warps=warps,
    )  # fmt: skip
    join[(rows, batch * key_heads)](
        cache, tree, tops, totals, outs, splits, key_heads, out, lse, TOGETHER, shape, num_warps=4,
    )  # fmt: skip
    return out, lse


def _refuse(call: AttentionCall) -> None:
    check_device(call.query.device)
    if call.query.dtype not in DTYPES:
        expected = "bfloat16, float16 or float32"
        raise Unsupported("triton", "query", expected, call.query.dtype)
    for name, size in (("keys", call.keys.shape[3]), ("values", call.values.shape[3])):
        if size > LARGEST_HEAD:
            raise Unsupported("triton", name, f"heads of at most {LARGEST_HEAD}", size)
    if call.query.shape[0] * call.keys.shape[1] > 65_535:
        expected = "at most 65535 key heads of a batch"
        raise Unsupported("triton", "keys", expected, call.query.shape[0] * call.keys.shape[1])


def _shape(call: AttentionCall) -> tuple[Shape, int]:
    """The tiles for this call, and the warps of a program."""
    group = call.query.shape[1] // call.keys.shape[1]
    size, value_size = call.keys.shape[3], call.values.shape[3]
    packed = group * call.query.shape[2]
    e, f = (max(16, triton.next_power_of_2(each)) for each in (size, value_size))
    exact = call.query.dtype == torch.float32
    rows = 16 if exact or packed <= 16 else 32
    if packed > 32 and not exact and max(e, f) <= 128:
        rows = 128
    split = 256 if packed <= 32 else 512 if packed <= 128 else 1024
    # What shared memory holds, and registers without a spill; see benchmarks/gpu_budget.json.
    crowded = exact or (call.window > 0 and rows == 32)  # registers of four warps
    slots, stages = 64, 3
    if exact or max(e, f) > 128:
        slots, stages = 32, 2
    elif crowded:
        slots = 32
    masked_slots = 16 if crowded or rows == 128 or (rows == 32 and max(e, f) >= 128) else 32
    if call.window > 0 and rows == 16 and not exact and max(e, f) < 128:
        masked_slots = 64
    warps = 8 if crowded or rows == 128 else 4
    constants = (group, size, value_size, e, f, rows, slots, masked_slots, split, stages)
    return Shape(*map(tl.constexpr, (*constants, call.softcap > 0, exact))), warps


def _cache(call: AttentionCall) -> Cache:
    table, page = call.block_table, call.keys.shape[2]
    key_batch, key_head, key_row, _ = call.keys.stride()
    value_batch, value_head, value_row, _ = call.values.stride()
    return Cache(
        key_data=call.keys,
        key_batch=key_batch,
        key_head=key_head,
        key_row=key_row,
        value_data=call.values,
        value_batch=value_batch,
        value_head=value_head,
        value_row=value_row,
        table=table,
        table_batch=0 if table is None else table.stride(0),
        table_page=0 if table is None else table.stride(1),
        page=page,
        capacity=page * (1 if table is None else table.shape[1]),
    )


def _tree(call: AttentionCall) -> Tree:
    visible, depths, sinks = call.visible, call.depths, call.sinks
    return Tree(
        call.lengths,
        call.lengths.stride(0),
        visible,
        visible.stride(0) if visible.shape[0] > 1 else 0,
        visible.stride(1),
        visible.stride(2),
        depths,
        0 if depths is None or depths.shape[0] == 1 else depths.stride(0),
        0 if depths is None else depths.stride(1),
        sinks,
        0 if sinks is None else sinks.stride(0),
        visible.shape[1],
        call.window,
    )
