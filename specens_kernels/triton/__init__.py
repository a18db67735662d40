# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA and ROCm, under the signatures of the ops in `ops.py`.

The package imports without Triton; then `AVAILABLE` is false and `REASON` says why. Rules and folds
are device functions of the same names in `rules.py`. To add an op: its file here, with its kernels
and the function that launches them; what two ops share is in `laws.py` and `stats.py`.
"""

from importlib.util import find_spec

AVAILABLE = find_spec("triton") is not None
REASON = "" if AVAILABLE else "Triton is not installed"

if AVAILABLE:
    from .arguments import Unsupported
    from .mix import mix
    from .sample import sample
    from .uniforms import uniforms
    from .verify import verify

    __all__ = ["AVAILABLE", "REASON", "Unsupported", "mix", "sample", "uniforms", "verify"]
else:
    __all__ = ["AVAILABLE", "REASON"]
