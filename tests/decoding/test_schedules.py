# SPDX-License-Identifier: Apache-2.0
"""What each schedule writes has exactly the ensemble's law.

That a comparison can fail is shown here and, with decoders that are wrong on purpose, in
test_wrong_decoders.py. To test a schedule, add a `Case`.
"""

from typing import Any

import pytest
from cases import HONEST, LAWS, LENGTH, VOCAB_SIZE, WRONG, Case, disagreeing, p_values
from toys import prompts, sequence_law

import specens
from specens.schedules import (
    SCHEDULES,
    STOPS,
    Alternating,
    Companion,
    Component,
    ConfidenceStop,
    EntropyStop,
    Hierarchy,
    LearnedStop,
    LookAhead,
    Lookup,
    Plain,
    Speculative,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return disagreeing()


CASES = [
    Case("mixture", 2, Plain()),
    Case("warped product together", 3, Plain()),
    Case("maximum", 2, Plain()),
    Case("maximum", 3, Speculative(tokens=2, proposer=1)),
    Case("maximum", 2, Alternating(tokens=(2, 1))),
    Case("highest logit", 2, Speculative(tokens=2), drafts=1),
    Case("highest logit", 2, Lookup(tokens=2)),
    Case("mixture", 3, Component()),
    Case("warped", 2, Component()),
    Case("mixture", 2, Speculative(tokens=1, proposer=0)),
    Case("warped", 2, Speculative(tokens=2, proposer=1)),
    Case("contrastive", 2, Speculative(tokens=3, proposer=1)),
    Case("product", 3, Speculative(tokens=2, proposer=2)),
    Case("mixture", 2, Speculative(tokens=2), drafts=1),
    Case("warped product together", 2, Speculative(tokens=3), drafts=1),
    Case("warped", 1, Alternating(tokens=2)),
    Case("mixture", 2, Alternating(tokens=1, order=(1, 0))),
    Case("mixture", 2, Alternating(tokens=(1, 2))),
    Case("warped together", 2, Alternating(tokens=(3, 1))),
    Case("contrastive", 2, Alternating(tokens=(1, 3), order=(1, 0))),
    Case("product", 3, Alternating(tokens=1)),
    Case("warped product", 3, Alternating(tokens=(1, 2, 2))),
    Case("warped", 4, Alternating(tokens=(1, 1, 2, 1))),
    Case("mixture", 4, Alternating(tokens=1, order=(2, 0, 3, 1))),
    Case("mixture", 2, LookAhead(ahead=0)),
    Case("warped", 2, LookAhead(ahead=1, proposer=1)),
    Case("mixture", 3, LookAhead(ahead=2)),
    Case("mixture", 3, LookAhead(ahead=5, tokens=2)),
    Case("warped", 2, Lookup(tokens=3)),
    Case("mixture", 2, Hierarchy(tokens=2), drafts=1),
    Case("warped", 2, Hierarchy(tokens=(1, 2)), drafts=2),
    Case("product", 1, Hierarchy(tokens=(2, 3)), drafts=2),
    Case("mixture", 1, Hierarchy(tokens=(1, 2, 3)), drafts=3),
    Case("mixture", 2, Speculative(tokens=3), {"acceptance": "block"}),
    Case("warped", 1, Speculative(), {"acceptance": "block"}, drafts=1),
    Case("mixture", 2, Alternating(tokens=(3, 2)), {"acceptance": "block"}),
    Case("mixture", 1, Hierarchy(tokens=(2, 3)), {"acceptance": ("block", "block")}, drafts=2),
    Case("mixture", 2, Speculative(stop=ConfidenceStop(0.5)), drafts=1),
    Case("mixture", 1, Companion(tokens=3, token_cost=0.4), drafts=2),
    Case("warped", 2, Companion(tokens=2, token_cost=0.7), drafts=2),
    Case("product", 2, Companion(token_cost=0.4), {"acceptance": "block"}, drafts=2),
    Case("mixture", 1, Companion(token_cost=0.4, cut="token"), drafts=2),
    Case("contrastive", 2, Companion(token_cost=0.7, cut="token"), drafts=2),
    Case("warped", 2, Speculative(stop=EntropyStop(0.5, 0.3))),
    Case("mixture", 1, Speculative(stop=LearnedStop((1.0, 1.0, 0.0, -1.0))), drafts=1),
]


def test_every_schedule_has_a_case():
    assert {case.schedule.name for case in CASES} == set(SCHEDULES)


def test_every_schedule_and_every_stop_is_public():
    named = [*SCHEDULES.values(), *STOPS.values()]
    assert all(getattr(specens, kind.__name__) is kind for kind in named)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_text_has_the_ensembles_law(case: Case, models):
    found = p_values(case.texts(models), case.joint(models))
    assert min(found.values()) > HONEST, found


@pytest.mark.slow
@pytest.mark.parametrize("law", ["mixture", "warped", "contrastive"])
def test_the_comparison_tells_laws_apart(law: str, models):
    """Each member alone, and the ensemble with its weights exchanged, are found out."""
    case = Case(law, 2, Plain())
    texts = case.texts(models, 1000)
    settings = LAWS[law]
    prompt = prompts([3], VOCAB_SIZE)["input_ids"]
    for weights in ([1.0, 0.0], [0.0, 1.0], case.weights[::-1]):
        wrong = sequence_law(models[:2], prompt, LENGTH, weights=weights, **settings)
        found = p_values(texts, wrong)
        assert max(found.values()) < WRONG, (weights, found)
