# SPDX-License-Identifier: Apache-2.0
"""Capacities that grow by doubling, so that memory is for what is written, not for what may be.

They are powers of two: of few sizes each is used for long, and a graph that is compiled for one
serves all texts that fit. Whatever has a place for each token of a text grows so.
"""

import torch
from torch import Tensor

_LEAST = 64


def capacity_for(size: int) -> int:
    """The power of two that holds `size` tokens."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def widened(tensor: Tensor, dim: int, capacity: int, fill: float = 0) -> Tensor:
    """A copy with `capacity` entries along `dim`; those after the old ones are `fill`."""
    shape = list(tensor.shape)
    shape[dim] = capacity
    # Not an inference tensor, which could not be written outside inference mode.
    with torch.inference_mode(False):
        # Zeros are not touched before they are written, where the system hands out memory so.
        wide = tensor.new_full(shape, fill) if fill != 0 else tensor.new_zeros(shape)
        wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide
