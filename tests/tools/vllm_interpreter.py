# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's model runner V2 on a CPU: its Triton kernels in Triton's interpreter.

Imported before vllm. Every kernel launch is a loop in Python.
"""

import os
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import numpy as np
import triton.backends
import triton.runtime.interpreter as interpreter


class Driver:
    """Says that there is a driver, so that vLLM does not turn Triton off; none is ever used."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)

# vLLM has masks that are integers, which a GPU takes and the interpreter (triton 3.9) does not.
_Builder = interpreter.InterpreterBuilder
_load = _Builder.create_masked_load


def _is_kept(mask: Any) -> Any:
    return np.asarray(mask.data).astype(bool)


def _masked_load(
    self: Any, ptrs: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any
) -> Any:
    mask.data = _is_kept(mask)
    return _load(self, ptrs, mask, other, cache_policy, is_volatile)


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
    return interpreter._interpreter.store(ptrs.data, value.data, _is_kept(mask))


_Builder.create_masked_load = _masked_load
_Builder.create_masked_store = _masked_store
