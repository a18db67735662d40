# SPDX-License-Identifier: Apache-2.0
"""`compact`: one launch for a slab; a program moves what it moves in the path's order.

A path ascends, so that a node lies at or above the slot that it is moved to, and no row is written
before it has been read. Nothing is read on the host.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Slabs
from .launch import check_device

MOST = 128  # words of a row that a program moves at once
# What rows are moved as: the widest words that they and their strides are whole numbers of.
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Pages(NamedTuple):
    """table: (B, pages) int32, or None; its strides over batch and page. size: slots of a page."""

    table: Any
    batch: Any
    page: Any
    size: Any


@triton.jit
def move(
    slab, layer_stride, batch_stride, head_stride, row_stride, heads, size, slots, lengths,
    lengths_batch, path, path_batch, path_place, depth, pages, block: tl.constexpr,
):  # fmt: skip
    """Grid: layers and heads, rows of the batch, pieces of a row."""
    layer, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    b = tl.program_id(1).to(tl.int64)
    element = tl.program_id(2) * block + tl.arange(0, block)
    root = tl.load(lengths + b * lengths_batch)
    base = slab + layer.to(tl.int64) * layer_stride + head.to(tl.int64) * head_stride + element
    going = root >= 0
    for i in range(0, depth):
        node = tl.load(path + b * path_batch + i * path_place).to(tl.int64)
        going = going & (node >= 0) & (root + tl.maximum(node, i + 1) < slots)
        source, target = root + node, root + i + 1
        from_page, to_page = b, b
        if pages.table is not None:
            row = pages.table + b * pages.batch
            from_page = tl.load(row + source // pages.size * pages.page, mask=going, other=0)
            to_page = tl.load(row + target // pages.size * pages.page, mask=going, other=0)
            from_page, to_page = from_page.to(tl.int64), to_page.to(tl.int64)
            source, target = source % pages.size, target % pages.size
        kept = (element < size) & going
        values = tl.load(base + from_page * batch_stride + source * row_stride, mask=kept)
        tl.store(base + to_page * batch_stride + target * row_stride, values, mask=kept)


def compact(slabs: Slabs, lengths: Tensor, path: Tensor, block_table: Tensor | None) -> None:
    """See `reference.compact`."""
    check_device(lengths.device)
    batch, depth = path.shape
    count = 1 if block_table is None else block_table.shape[1]
    for slab in slabs:
        words = _as_words(slab)
        layers, _, heads, page, size = words.shape
        pages = Pages(None, 0, 0, page)
        if block_table is not None:
            pages = Pages(block_table, block_table.stride(0), block_table.stride(1), page)
        block = min(MOST, triton.next_power_of_2(max(size, 1)))
        grid = (layers * heads, batch, triton.cdiv(size, block))
        if 0 not in grid and depth > 0:
            move[grid](
                words, *words.stride()[:4], heads, size, page * count, lengths, lengths.stride(0),
                path, *path.stride(), depth, pages, block, num_warps=1,
            )  # fmt: skip


def _as_words(slab: Tensor) -> Tensor:
    """The same memory in the widest words that fit."""
    size, item = slab.shape[4], slab.element_size()
    apart = [stride * item for stride in slab.stride()[:4]]
    apart += [size * item, int(slab.storage_offset()) * item, slab.data_ptr()]
    dtype = next(each for each in WORDS if all(step % each.itemsize == 0 for step in apart))
    factor = dtype.itemsize / item
    if factor == 1:
        return slab.view(dtype)
    strides = [int(stride / factor) for stride in slab.stride()[:4]]
    shape = (*slab.shape[:4], int(size / factor))
    bare = torch.empty(0, dtype=dtype, device=slab.device).set_(slab.untyped_storage())
    return bare.as_strided(shape, (*strides, 1), int(slab.storage_offset() / factor))
