# SPDX-License-Identifier: Apache-2.0
"""Decoding with ensembles of Hugging Face causal LMs, speculatively and exactly.

Names are imported when they are first used: torch and transformers take seconds, and
`specens --help` should not. To add a public name, add it here twice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specens.decoder import SpeculativeDecoder, SpeculativeOutput
    from specens.loop.statistics import Statistics
    from specens.members.member import Member, member
    from specens.members.probe import Probe, probe
    from specens.members.weight_head import WeightHead
    from specens.methods import METHODS, build

__all__ = [
    "METHODS",
    "Member",
    "Probe",
    "SpeculativeDecoder",
    "SpeculativeOutput",
    "Statistics",
    "WeightHead",
    "build",
    "member",
    "probe",
]

_HOMES = {
    "METHODS": "methods",
    "Member": "members.member",
    "Probe": "members.probe",
    "SpeculativeDecoder": "decoder",
    "SpeculativeOutput": "decoder",
    "Statistics": "loop.statistics",
    "WeightHead": "members.weight_head",
    "build": "methods",
    "member": "members.member",
    "probe": "members.probe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
