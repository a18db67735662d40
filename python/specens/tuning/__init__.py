# SPDX-License-Identifier: Apache-2.0
"""Which way to decode is the fastest for given models: measured, predicted and compared.

`tuner.py` has `tune` and `check`. It measures times (`measure.py`) and acceptance (`agreement.py`,
`lookups.py`, `stops.py`, `relaxation.py`), lists the best candidates, whose seconds per token the
schedules predict (`search.py`), and runs decoders beside each other (`compare.py`). Names are
imported when they are first used, since torch takes seconds. To add a public name, add it to
`_HOMES`, and for type checkers above it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specens.loop.profile import Candidate as Candidate
    from specens.tuning.compare import Comparison as Comparison
    from specens.tuning.tuner import Tuning as Tuning
    from specens.tuning.tuner import check as check
    from specens.tuning.tuner import decoder_of as decoder_of
    from specens.tuning.tuner import tune as tune

_HOMES = {
    "Candidate": "loop.profile",
    "Comparison": "tuning.compare",
    "Tuning": "tuning.tuner",
    "check": "tuning.tuner",
    "decoder_of": "tuning.tuner",
    "tune": "tuning.tuner",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"specens.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
