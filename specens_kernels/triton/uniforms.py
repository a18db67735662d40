# SPDX-License-Identifier: Apache-2.0
"""`uniforms`: one lane for each block of four numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_device

BLOCK = 128


@triton.jit
def philox(
    seeds, seed_stride, positions, batch_stride, row_stride, stream, index, rows, count, results,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < count
    b, t = row // rows, row % rows
    seed = tl.load(seeds + b * seed_stride, mask=mask, other=0)
    position = tl.load(positions + b * batch_stride + t * row_stride, mask=mask, other=0)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    stream_word = (tl.zeros((BLOCK,), tl.int64) + stream).to(tl.uint32)
    index_word = (tl.zeros((BLOCK,), tl.int64) + index).to(tl.uint32)
    words = tl.philox(seed, low, high, stream_word, index_word)
    for i in tl.static_range(4):
        number = (words[i] >> 8).to(tl.float32) * (2.0**-24)
        tl.store(results + row * 4 + i, number, mask=mask)


def uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    """See `reference.uniforms`."""
    check_device(seeds.device)
    batch, rows = seeds.shape[0], positions.shape[1]
    results = torch.empty(batch, rows, 4, dtype=torch.float32, device=seeds.device)
    positions = positions.expand(batch, rows)
    if batch * rows > 0:
        philox[(triton.cdiv(batch * rows, BLOCK),)](
            seeds, seeds.stride(0), positions, *positions.stride(), stream, index, rows,
            batch * rows, results, BLOCK, num_warps=4,
        )  # fmt: skip
    return results
