# SPDX-License-Identifier: Apache-2.0
"""Decoding with ensembles of Hugging Face causal LMs, speculatively and exactly.

Names are imported when they are first used: torch and transformers take seconds, and
`specens --help` should not. To add a public name, add it to `_HOMES`, and for type checkers above
it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specens.decoder import SpeculativeDecoder as SpeculativeDecoder
    from specens.decoder import SpeculativeOutput as SpeculativeOutput
    from specens.loop.schedule import Schedule as Schedule
    from specens.loop.statistics import Statistics as Statistics
    from specens.members.member import Member as Member
    from specens.members.probe import Probe as Probe
    from specens.members.probe import member as member
    from specens.members.probe import probe as probe
    from specens.members.weight_head import WeightHead as WeightHead
    from specens.methods import METHODS as METHODS
    from specens.methods import build as build
    from specens.schedules import SCHEDULES as SCHEDULES
    from specens.schedules import Alternating as Alternating
    from specens.schedules import Companion as Companion
    from specens.schedules import Component as Component
    from specens.schedules import ConfidenceStop as ConfidenceStop
    from specens.schedules import EntropyStop as EntropyStop
    from specens.schedules import Hierarchy as Hierarchy
    from specens.schedules import LearnedStop as LearnedStop
    from specens.schedules import LookAhead as LookAhead
    from specens.schedules import Lookup as Lookup
    from specens.schedules import Plain as Plain
    from specens.schedules import Speculative as Speculative

_HOMES = {
    "decoder": ("SpeculativeDecoder", "SpeculativeOutput"),
    "loop.schedule": ("Schedule",),
    "loop.statistics": ("Statistics",),
    "members.member": ("Member",),
    "members.probe": ("Probe", "member", "probe"),
    "members.weight_head": ("WeightHead",),
    "methods": ("METHODS", "build"),
    "schedules": (
        "SCHEDULES",
        "Alternating",
        "Companion",
        "Component",
        "ConfidenceStop",
        "EntropyStop",
        "Hierarchy",
        "LearnedStop",
        "LookAhead",
        "Lookup",
        "Plain",
        "Speculative",
    ),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"specens.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
