# SPDX-License-Identifier: Apache-2.0
"""Schedules: who proposes, how many tokens, who verifies, turn by turn.

A schedule is one file: its class (`specens.loop.schedule.Schedule`), and, where `specens tune` is
to try it, its predicted time and its candidates. To add one, write the file and list the class
here: decoder, command line, help, tuner and the law tests find it. Nothing here imports torch, so
that help and mistakes are answered at once; what needs it imports it where it runs.
"""

from collections.abc import Mapping
from types import MappingProxyType

from specens.loop.named import read_named
from specens.loop.schedule import Schedule
from specens.schedules.alternating import Alternating
from specens.schedules.companion import Companion
from specens.schedules.hierarchy import Hierarchy
from specens.schedules.lookup import Lookup
from specens.schedules.mixture import Component, LookAhead
from specens.schedules.plain import Plain
from specens.schedules.speculative import Speculative
from specens.schedules.stops import STOPS, ConfidenceStop, EntropyStop, LearnedStop

__all__ = [
    "SCHEDULES",
    "STOPS",
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
    "read_schedule",
    "with_tokens",
]

SCHEDULES: Mapping[str, type[Schedule]] = MappingProxyType(
    {
        schedule.name: schedule
        for schedule in (
            Plain,
            Component,
            LookAhead,
            Speculative,
            Companion,
            Lookup,
            Hierarchy,
            Alternating,
        )
    }
)


def with_tokens(text: str, tokens: str) -> str:
    """The text of a schedule with "tokens=..." among its arguments."""
    return f"{text}{',' if ':' in text else ':'}tokens={tokens}"


def read_schedule(text: str) -> Schedule:
    """The schedule that is written so: "alternating", "speculative:tokens=4,proposer=0".

    Raises:
        Refusal: there is no such schedule or argument, or its value is none that it takes.
    """
    return read_named("schedule", text, SCHEDULES)
