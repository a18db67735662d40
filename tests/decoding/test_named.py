# SPDX-License-Identifier: Apache-2.0
"""Schedules and stops as values and as text: what is written is read, mistakes have a name."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from specens.schedules import (
    SCHEDULES,
    STOPS,
    Alternating,
    Companion,
    ConfidenceStop,
    Hierarchy,
    LearnedStop,
    LookAhead,
    Lookup,
    Plain,
    Speculative,
    read_schedule,
)
from specens_kernels import Refusal

TEXTS = {
    "plain": Plain(),
    "speculative": Speculative(),
    "speculative:tokens=8,proposer=1": Speculative(8, 1),
    "speculative:tokens=8,stop=confidence": Speculative(8, stop=ConfidenceStop()),
    "speculative:stop=confidence(least=0.25)": Speculative(stop=ConfidenceStop(0.25)),
    "speculative:stop=learned(coefficients=0.5,1.0,-2.0,3e-05,least=0.25)": Speculative(
        stop=LearnedStop((0.5, 1.0, -2.0, 3e-5), 0.25)
    ),
    "alternating:tokens=4,2,order=1,0": Alternating((4, 2), (1, 0)),
    "hierarchy:tokens=3,5": Hierarchy((3, 5)),
    "hierarchy:tokens=4,": Hierarchy((4,)),
    "companion:token_cost=0.4,cut=token": Companion(token_cost=0.4, cut="token"),
    "lookahead:ahead=3": LookAhead(ahead=3),
    "lookup:longest=5": Lookup(longest=5),
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_is_read_again(text: str) -> None:
    schedule = read_schedule(text)
    assert schedule == TEXTS[text]
    assert str(schedule) == text
    assert read_schedule(str(schedule)) == schedule


def test_a_stop_needs_no_brackets_and_blanks_do_not_count() -> None:
    assert read_schedule(" speculative(tokens=8, stop=confidence()) ") == Speculative(
        8, stop=ConfidenceStop()
    )
    bare = read_schedule("speculative: tokens=8, stop=confidence")
    assert bare == Speculative(8, stop=ConfidenceStop())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "schedule: name: expected one of plain, component, lookahead, .*, got 'fast'"),
        ("speculative:gamma=4", "speculative: arguments: expected tokens, .*, got 'gamma'"),
        ("speculative:tokens=4,tokens=5", "speculative: arguments: .*, got 'tokens=5'"),
        (
            "speculative:tokens=four",
            "speculative: tokens: expected an integer from 1 to 4096, got 'four'",
        ),
        ("speculative:tokens=0", "speculative: tokens: expected an integer from 1 to 4096, got 0"),
        ("speculative:stop=never", "draft_stop: name: expected one of confidence, .*"),
        ("speculative:stop=entropy(scale=-1)", "entropy: scale: expected a number >= 0, got -1.0"),
        ("speculative:stop=learned", "learned: coefficients: expected 4 numbers, not all 0"),
        (
            "speculative:stop=learned(coefficients=1,2)",
            "learned: coefficients: expected 4 numbers,",
        ),
        (
            "alternating:tokens=2,0",
            r"alternating: tokens: expected integers from 1 to 4096, got \[2, 0\]",
        ),
        ("companion:cut=words", "companion: cut: expected 'law' or 'token', got 'words'"),
        ("companion:token_cost=-0.1", "companion: token_cost: expected a number >= 0, got -0.1"),
        ("companion:token_cost=nan", "companion: token_cost: expected a number >= 0, got nan"),
        (
            "speculative:tokens=1000000000000",
            "speculative: tokens: expected an integer from 1 to 4096, got 1000000000000",
        ),
        ("alternating:tokens=1,5000", "alternating: tokens: expected integers from 1 to 4096"),
        *(
            (text, f"{name}: arguments: expected brackets in pairs, got ")
            for text, name in (
                ("speculative:stop=confidence(least=0.25", "speculative"),
                ("speculative:stop=confidence(least=0.25))", "speculative"),
                ("speculative:stop=confidence)least=0.25(", "speculative"),
                ("speculative(tokens=4", "schedule"),
                ("speculative(tokens=4)5", "schedule"),
                ("speculative(tokens=4))", "speculative"),
                ("speculative:tokens=4)", "speculative"),
            )
        ),
    ],
)
def test_a_mistake_in_a_text_has_a_name(text: str, message: str) -> None:
    with pytest.raises(Refusal, match=f"^{message}"):
        read_schedule(text)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            Speculative,
            {"tokens": True},
            "speculative: tokens: expected an integer from 1 to 4096, got True",
        ),
        (
            Speculative,
            {"tokens": 2.0},
            "speculative: tokens: expected an integer from 1 to 4096, got 2.0",
        ),
        (
            Speculative,
            {"tokens": [2]},
            r"speculative: tokens: expected an integer from 1 to 4096, got \[2\]",
        ),
        (Speculative, {"stop": 0.4}, "speculative: stop: expected a DraftStop, got 0.4"),
        (Speculative, {"stop": ConfidenceStop}, "speculative: stop: expected a DraftStop, got <"),
        (
            Alternating,
            {"tokens": []},
            r"alternating: tokens: expected integers from 1 to 4096, got \[\]",
        ),
        (
            Alternating,
            {"order": [True, False]},
            "alternating: order: expected integers from 0 to 4096, got",
        ),
        (Companion, {"token_cost": math.inf}, "companion: token_cost: expected a number >= 0"),
        (
            Companion,
            {"token_cost": True},
            "companion: token_cost: expected a number >= 0, got True",
        ),
        (
            Companion,
            {"token_cost": 10**400},
            "companion: token_cost: expected a number >= 0, got ",
        ),
        (Companion, {"cut": ["law"]}, r"companion: cut: expected 'law' or 'token', got \['law'\]"),
        (Speculative, {"tokens": None}, "speculative: tokens: expected an integer from 1 to 4096"),
        (Speculative, {"tokens": torch.tensor(4)}, "speculative: tokens: expected an integer from"),
        (Speculative, {"proposer": "0"}, "speculative: proposer: expected an integer from 0 to"),
        (LookAhead, {"ahead": {1: 2}}, "lookahead: ahead: expected integers from 0 to 4096, got {"),
        (LearnedStop, {"coefficients": "1234"}, "learned: coefficients: expected 4 numbers, got"),
        (LearnedStop, {"coefficients": [True] * 4}, "learned: coefficients: expected 4 numbers"),
        (LearnedStop, {"coefficients": 1.0}, "learned: coefficients: expected 4 numbers, got 1.0"),
    ],
)
def test_a_wrong_argument_has_a_name(
    kind: type[Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refusal, match=f"^{message}"):
        kind(**arguments)


@pytest.mark.parametrize("kind", [*SCHEDULES.values(), *STOPS.values()], ids=lambda kind: kind.name)
def test_every_argument_says_its_range_and_its_meaning(kind: type[Any]) -> None:
    assert kind.summary
    for field in dataclasses.fields(kind):
        assert field.metadata["kind"].range
        assert field.metadata["description"].endswith(".")


def test_names_and_ranges_are_read_without_torch() -> None:
    code = "import sys, specens.methods, specens.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
