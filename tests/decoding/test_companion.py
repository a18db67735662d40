# SPDX-License-Identifier: Apache-2.0
"""The companion: how much of a proposal is verified, and what it learns of the tokens' survival."""

import dataclasses
from typing import Any

import pytest
import torch
from cases import check_alone, disagreeing, write

from specens import SpeculativeDecoder
from specens.loop.survival import Survival
from specens.schedules import Companion
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return disagreeing()


def test_a_companion_says_how_much_is_verified(models):
    """Proposals are all as long, and all are scored; the ensemble sees their beginnings."""
    seen: list[int] = []
    decoder = SpeculativeDecoder(
        models[:1], schedule=Companion(tokens=3, token_cost=0.4), draft=[models[2], models[4]]
    )
    ensemble = decoder.members[0]
    forward = ensemble.forward
    ensemble.forward = lambda tokens, *rest, **more: (
        seen.append(tokens.shape[1]),
        forward(tokens, *rest, **more),
    )[1]
    write(decoder)
    counts = decoder.statistics
    assert counts.calls[0] == counts.turns == len(seen[1:])  # the first is the prompt's
    assert counts.calls[1] == sum(counts.drafted) == counts.drafted[1]
    assert counts.turns - 2 <= counts.calls[2] <= counts.turns  # at the end nothing is proposed
    assert set(seen[1:-3]) == {2, 3, 4}  # with the last token, which is committed
    # Tokens that cost nothing are all verified; of those that cost as much as all, the first.
    for cost, fed in ((0.0, 4), (1.0, 2)):
        seen.clear()
        decoder.schedule = dataclasses.replace(decoder.schedule, token_cost=cost)
        write(decoder)
        assert set(seen[1:-3]) == {fed}


@pytest.mark.parametrize("cut", ["law", "token"])
def test_a_companions_rows_do_not_depend_on_each_other(cut, models):
    schedule = Companion(token_cost=0.4, cut=cut)
    decoder = SpeculativeDecoder(models[:1], schedule=schedule, draft=[models[1], models[2]])
    together = write(decoder, (3, 6, 1), max_new_tokens=30)
    assert 0 < sum(decoder.statistics.tested) < sum(decoder.statistics.drafted)
    check_alone(decoder, (3, 6, 1), together)


@pytest.mark.parametrize("cut", ["law", "token"])
@pytest.mark.parametrize("cost", [0.05, 0.4, 0.9])
def test_a_companion_writes_the_plain_greedy_text(cost, cut, models):
    options = {"do_sample": False, "max_new_tokens": 20}
    plain = write(SpeculativeDecoder(models[:2], schedule="plain"), (3, 5), **options)
    schedule = Companion(token_cost=cost, cut=cut)
    decoder = SpeculativeDecoder(models[:2], schedule=schedule, draft=[models[-1], models[-2]])
    assert torch.equal(write(decoder, (3, 5), **options), plain)
    assert sum(decoder.statistics.accepted) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": None}, r"draft: expected two models, the one that proposes and .*, got none"),
        ({"draft": [0]}, r"draft: expected two models, .*, got LlamaForCausalLM$"),
        (
            {"schedule": "speculative"},
            r"draft: expected one model at most for schedule 'speculative'",
        ),
    ],
)
def test_a_companion_needs_two_drafts(options, message, models):
    settings = {"schedule": "companion", "draft": [0, 1], **options}
    settings["draft"] = settings["draft"] and [models[i] for i in settings["draft"]]
    with pytest.raises(Refusal, match=f"^decoder: {message}"):
        SpeculativeDecoder(models[:1], **settings)


def test_a_cut_by_the_token_needs_rejection(models):
    drafts = [models[1], models[2]]
    with pytest.raises(Refusal, match=r"^companion: cut: expected 'law' .*, got 'token' for 'blo"):
        SpeculativeDecoder(
            models[:1], schedule="companion:cut=token", draft=drafts, acceptance="block"
        )


def test_a_cut_by_the_token_takes_no_filters(models):
    decoder = SpeculativeDecoder(
        models[:1], schedule=Companion(cut="token"), draft=[models[1], models[2]]
    )
    with pytest.raises(ValueError, match=r"^generate: top_k: expected none for a companion"):
        write(decoder, top_k=5)


def test_survival_starts_with_the_companion_and_follows_outcomes():
    survival = Survival()
    assert survival.chance(0.6) == pytest.approx(0.6)
    assert survival.chance(0.6, 0.9) == pytest.approx(0.9)
    for _ in range(200):  # the first is kept, the second refused, and the third never reached
        survival.ask([(0.6, 0.9), (0.6, 0.1), (0.1, 0.1)], 10)
        survival.learn(12)
    assert survival.outcomes.keys() == {(2, 3), (2, 0)}
    assert survival.chance(0.6, 0.9) == pytest.approx(1, abs=0.01)
    assert survival.chance(0.6, 0.1) == pytest.approx(0, abs=0.01)
    assert survival.chance(0.6) == pytest.approx(0.5, abs=0.01)
    assert survival.chance(0.1) == pytest.approx(0.1)
    tested = survival.outcomes[2, 3][0]
    survival.learn(13)  # nothing was asked since, and what was seen counts less
    assert 0.9 * tested < survival.outcomes[2, 3][0] < tested
    for _ in range(400):
        survival.learn(13)
    assert survival.chance(0.6) == pytest.approx(0.6, abs=0.01)


def test_survival_looks_at_nothing_beyond_the_first_refused_token():
    found = []
    for beyond in ((0.1, 0.1), (0.9, 0.9)):
        survival = Survival()
        survival.ask([(0.6, 0.9), (0.6, 0.1), beyond], 10)
        survival.learn(12)
        found.append(survival)
    assert found[0].outcomes == found[1].outcomes


def test_a_cut_does_not_know_the_token_it_takes_back():
    """Whatever the ratios from some token on are, that token is among the verified or is not."""
    dice = torch.Generator().manual_seed(0)
    cuts = set()
    for _ in range(200):
        said = torch.rand(6, 2, generator=dice).tolist()
        cut = Survival().cut(said, 0.3)
        cuts.add(cut)
        for at in range(6):
            other = said[:at] + [[shared, 1 - ratio] for shared, ratio in said[at:]]
            # The law of a token depends on those before it, so later ones' change, too.
            other[at + 1 :] = torch.rand(5 - at, 2, generator=dice).tolist()
            assert (Survival().cut(other, 0.3) > at) == (cut > at)
    assert len(cuts) > 3
