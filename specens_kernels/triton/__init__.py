# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA and ROCm, under the signatures of the ops in `reference/`.

The package imports without Triton; then `AVAILABLE` is false and `REASON` says why. Rules are
device functions of the same names in `rules.py`. To add an op: its file here, with its kernels
and the function that launches them; what two ops share is in `parameters.py`, `logits.py`,
`totals.py`, `draw.py` and `stats.py`, and how arguments reach a kernel in `launch.py`.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..refusal import Unsupported

AVAILABLE = find_spec("triton") is not None
REASON = "" if AVAILABLE else "Triton is not installed"
_OPS = ("attention", "compact", "mix", "sample", "uniforms", "verify")


def __getattr__(name: str) -> Any:
    """An op; Triton, which takes a while, is imported when the first one is asked for."""
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        files = [import_module(f"{__name__}.{each}") for each in _OPS]
    except ImportError as error:
        raise Unsupported("triton", "import", "Triton", error) from error
    # Importing a file has put it here under its name, which is the op's.
    ops = {each: getattr(file, each) for each, file in zip(_OPS, files, strict=True)}
    globals().update({each: _on_its_device(op) for each, op in ops.items()})
    return globals()[name]


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(op)
    def run(*arguments: Any) -> Any:
        first = arguments[0]
        while not isinstance(first, torch.Tensor):  # of a call, or of its logits
            first = first[0]
        device = first.device
        if device.type != "cuda":
            return op(*arguments)
        with torch.cuda.device(device):
            return op(*arguments)

    return run
