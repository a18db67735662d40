# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA and ROCm, under the signatures of the ops in `ops.py`.

The package imports without Triton; then `AVAILABLE` is false and `REASON` says why. Rules and folds
are device functions of the same names in `rules.py`. To add an op: its file here, with its kernels
and the function that launches them; what two ops share is in `laws.py` and `stats.py`.
"""

try:
    from .mix import mix
    from .sample import sample
    from .uniforms import uniforms
    from .verify import verify
except ImportError as error:
    AVAILABLE = False
    REASON = f"Triton cannot be imported ({error})"
else:
    AVAILABLE = True
    REASON = ""

__all__ = ["AVAILABLE", "REASON", "mix", "sample", "uniforms", "verify"]
