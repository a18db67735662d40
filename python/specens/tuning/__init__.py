# SPDX-License-Identifier: Apache-2.0
"""Which way to decode is the fastest for given models: measured, predicted and compared.

`tuner.py` has `tune` and `check`. It measures times (`measure.py`) and acceptance (`agreement.py`,
`lookups.py`, `stops.py`, `relaxation.py`), predicts seconds per token (`predict.py`), lists the
best candidates (`search.py`) and runs decoders beside each other (`compare.py`). Names are imported
when they are first used, since torch takes seconds. To add a public name, add it to `_HOMES`, and
for type checkers above it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specens.tuning.compare import Comparison as Comparison
    from specens.tuning.search import Candidate as Candidate
    from specens.tuning.tuner import Tuning as Tuning
    from specens.tuning.tuner import check as check
    from specens.tuning.tuner import decoder_of as decoder_of
    from specens.tuning.tuner import tune as tune

_HOMES = {
    "Candidate": "search",
    "Comparison": "compare",
    "Tuning": "tuner",
    "check": "tuner",
    "decoder_of": "tuner",
    "tune": "tuner",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
