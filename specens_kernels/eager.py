# SPDX-License-Identifier: Apache-2.0
"""Whether torch's dispatcher may be passed by, which costs more than a small call's kernel."""

from collections.abc import Iterable

import torch
from torch import Tensor


def is_eager_call(tensors: Iterable[Tensor]) -> bool:
    """Whether torch would only pass these tensors on: no mode, transform, trace or profile."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.is_neg() or tensor._is_zerotensor():
            return False
    return True
