# SPDX-License-Identifier: Apache-2.0
"""Whether a tensor's memory can be read, which torch does not ask before it reads.

FSDP, for one, frees the storage of tensors that are still in use, and a buffer's tensor may begin
between two numbers. Asked of every tensor before its address is taken or its numbers are cast.
"""

from operator import mul
from typing import TypeGuard

import torch
from torch import Tensor

from .eager import is_eager_call
from .refusal import Refusal, shown


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether it is one with a shape, which a nested tensor has not."""
    return isinstance(value, Tensor) and not value.is_nested


def is_readable(tensor: Tensor) -> bool:
    """Whether its storage reaches its last element, and its elements are aligned."""
    if tensor.is_nested:
        return False
    size = tensor.itemsize
    try:
        held = tensor.untyped_storage().nbytes()
        misaligned = tensor.data_ptr() % size
    except (NotImplementedError, RuntimeError):  # sparse, or of another layout without strides
        return False
    end = (tensor.storage_offset() + reach(tensor)) * size
    return tensor.numel() == 0 or (not misaligned and end <= held)


def reach(tensor: Tensor) -> int:
    """Elements from the first to the last one of a dense tensor, both included."""
    count = tensor.numel()
    if count == 0 or tensor.is_contiguous():
        return count
    last: int = sum(map(mul, tensor.shape, tensor.stride())) - sum(tensor.stride())
    return 1 + last


def holds_numbers(tensor: Tensor) -> bool:
    """Whether Python can read its numbers."""
    without = tensor.is_nested or tensor.is_meta or tensor.is_quantized or tensor._is_zerotensor()
    return not without and is_readable(tensor)


def viewable(op: str, argument: str, tensor: Tensor) -> Tensor:
    """The tensor itself, of which a view in another shape can be taken."""
    if is_eager_call((tensor,)) and not is_readable(tensor):
        raise unreadable(op, argument, tensor)
    return tensor


def cast(op: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype."""
    if tensor.dtype == dtype:
        return tensor
    if not is_readable(tensor):
        raise unreadable(op, argument, tensor)
    return tensor.to(dtype)


def unreadable(op: str, argument: str, tensor: Tensor) -> Refusal:
    """The refusal of a tensor that is not."""
    return wrong(op, argument, "a dense tensor that holds its memory, aligned", tensor)


def wrong(op: str, argument: str, expected: str, got: object) -> Refusal:
    """The refusal of a tensor, by its shape, dtype and device, or of what is none."""
    if not isinstance(got, Tensor):
        return Refusal(op, argument, expected, shown(got))
    if got.is_nested:
        return Refusal(op, argument, expected, "a nested tensor")
    dtype = str(got.dtype).removeprefix("torch.")
    return Refusal(op, argument, expected, f"{tuple(got.shape)} {dtype} on {got.device}")
