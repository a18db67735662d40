# SPDX-License-Identifier: Apache-2.0
"""Decoding with ensembles of Hugging Face causal LMs, speculatively and exactly.

Names are imported when they are first used: torch and transformers take seconds, and
`specens --help` should not. To add a public name, add it here twice.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoder import SpeculativeDecoder, SpeculativeOutput
    from .members import Member, member
    from .probe import Probe, probe
    from .statistics import Statistics

__all__ = [
    "Member",
    "Probe",
    "SpeculativeDecoder",
    "SpeculativeOutput",
    "Statistics",
    "member",
    "probe",
]

_HOMES = {
    "Member": "members",
    "Probe": "probe",
    "SpeculativeDecoder": "decoder",
    "SpeculativeOutput": "decoder",
    "Statistics": "statistics",
    "member": "members",
    "probe": "probe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, whose `probe` is the function and never the module that defines it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "probe" and isinstance(value, ModuleType):
            value = value.probe
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
