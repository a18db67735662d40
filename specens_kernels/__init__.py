# SPDX-License-Identifier: Apache-2.0
"""Kernels that fuse the mixing of M models' laws with sampling and speculative verification.

Needs torch only. `Law` says how logits become one distribution; `uniforms`, `mix`, `sample`,
`verify`, `attention`, `attend` and `compact` are the ops; `backend` chooses their implementation.
The module `tree` makes of a draft tree what `attention` takes, `layouts` of another engine's.

Names are imported when they are first used: torch takes seconds, and a refusal or a rule's name
needs none. The first op registers `torch.ops.specens`: a program that calls those by itself, such
as an exported graph, imports `specens_kernels.ops`. To add a public name, add it to `_HOMES`, and
for type checkers above it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceptance import ACCEPTANCE_RULES as ACCEPTANCE_RULES
    from .acceptance import Acceptance as Acceptance
    from .acceptance import AcceptanceRule as AcceptanceRule
    from .dispatch import backend as backend
    from .divergences import DIVERGENCES as DIVERGENCES
    from .divergences import divergence as divergence
    from .ensembles import ENSEMBLES as ENSEMBLES
    from .ensembles import Ensemble as Ensemble
    from .law import Law as Law
    from .ops import POINT_MASS as POINT_MASS
    from .ops import Sample as Sample
    from .ops import Status as Status
    from .ops import Stream as Stream
    from .ops import Verdict as Verdict
    from .ops import attend as attend
    from .ops import attention as attention
    from .ops import compact as compact
    from .ops import mix as mix
    from .ops import sample as sample
    from .ops import uniforms as uniforms
    from .ops import verify as verify
    from .reference import PADDING as PADDING
    from .refusal import Refusal as Refusal
    from .refusal import Unsupported as Unsupported

__version__ = "0.3.0"
_HOMES = {
    "acceptance": ("ACCEPTANCE_RULES", "Acceptance", "AcceptanceRule"),
    "dispatch": ("backend",),
    "divergences": ("DIVERGENCES", "divergence"),
    "ensembles": ("ENSEMBLES", "Ensemble"),
    "law": ("Law",),
    "ops": (
        "POINT_MASS",
        "Sample",
        "Status",
        "Stream",
        "Verdict",
        "attend",
        "attention",
        "compact",
        "mix",
        "sample",
        "uniforms",
        "verify",
    ),
    "reference": ("PADDING",),
    "refusal": ("Refusal", "Unsupported"),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f".{home}", __name__), name)
            globals()[name] = value  # the next one who asks finds it
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
