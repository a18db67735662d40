# SPDX-License-Identifier: Apache-2.0
"""Whether torch's dispatcher may be passed by, which costs more than a small call's kernel."""

from collections.abc import Iterable

import torch
from torch import Tensor


def is_eager_call(tensors: Iterable[Tensor]) -> bool:
    """Whether torch would only pass these tensors on: no mode, transform, trace or profile."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
        and all(
            type(tensor) is Tensor and not tensor.is_neg() and not tensor._is_zerotensor()
            for tensor in tensors
        )
    )
