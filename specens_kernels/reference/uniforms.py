# SPDX-License-Identifier: Apache-2.0
"""`uniforms`: a counter-based generator, on tensors of integers."""

import torch
from torch import Tensor

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    """Philox-4x32-10: key = seed, counter = (position, stream, index); see `ops.uniforms`."""
    positions = positions.expand(len(seeds), -1)
    seeds = seeds[:, None].expand_as(positions)
    counter = [
        positions & _WORD,
        (positions >> 32) & _WORD,
        torch.full_like(positions, stream & _WORD),
        torch.full_like(positions, index & _WORD),
    ]
    key = [seeds & _WORD, (seeds >> 32) & _WORD]
    for _ in range(10):
        high0, low0 = _multiply_32(counter[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_32(counter[2], _PHILOX_MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(word + weyl) & _WORD for word, weyl in zip(key, _PHILOX_WEYL, strict=True)]
    words = torch.stack(counter, -1)
    return (words >> 8).to(torch.float32) * 2.0**-24


def _multiply_32(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low halves of a 32 x 32-bit product, in int64 that would overflow at 2^63."""
    low_part = (words & 0xFFFF) * factor
    high_part = (words >> 16) * factor
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _WORD
    return high, low
