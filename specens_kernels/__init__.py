# SPDX-License-Identifier: Apache-2.0
"""Kernels that fuse the mixing of M models' laws with sampling and speculative verification.

Needs torch only. `Law` says how logits become one distribution; `uniforms`, `mix`, `sample` and
`verify` are the ops; `backend` chooses their implementation.
"""

from .acceptance import ACCEPTANCE_RULES, Acceptance, AcceptanceRule
from .divergences import DIVERGENCES, divergence
from .ensembles import ENSEMBLES, Ensemble
from .law import Law
from .ops import (
    POINT_MASS,
    Sample,
    Status,
    Stream,
    Verdict,
    backend,
    mix,
    sample,
    uniforms,
    verify,
)
from .reference import PADDING

__version__ = "0.1.0"
__all__ = [
    "ACCEPTANCE_RULES",
    "DIVERGENCES",
    "ENSEMBLES",
    "PADDING",
    "POINT_MASS",
    "Acceptance",
    "AcceptanceRule",
    "Ensemble",
    "Law",
    "Sample",
    "Status",
    "Stream",
    "Verdict",
    "backend",
    "divergence",
    "mix",
    "sample",
    "uniforms",
    "verify",
]
