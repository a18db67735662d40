# SPDX-License-Identifier: Apache-2.0
"""What each schedule writes has exactly the ensemble's law, and costs the calls that it should.

Thousands of rows write a few tokens after one prompt; every window of two or three neighbouring
tokens is compared with the law that enumeration gives. The windows hold bonus tokens, tokens after
a block kept whole and tokens after a replacement. Decoders that are wrong on purpose must fail the
same comparison. To test a schedule, add a `Case`.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from folds import FOLDS
from laws import chi_square
from torch import Tensor
from toys import logits_after, noisy, prompts, sequence_law, toy

from specens import SpeculativeDecoder
from specens.loop import run as run_module
from specens.loop.occurrences import Occurrences
from specens.loop.rows import Row
from specens.loop.run import Run
from specens.loop.schedule import Schedule, Verification
from specens.loop.survival import Survival
from specens.schedules import (
    SCHEDULES,
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
    companion,
    mixture,
)
from specens.schedules.mixture import KEPT
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 5
LENGTH = 4  # tokens whose law is compared; more are written, so that the end changes nothing
ROWS = 2000

# With a fixed seed a test passes or fails for good. 45 cases of 5 windows: by chance alone the
# least of 225 p-values is below 1e-4 in one choice of seeds out of forty.
HONEST = 1e-4
# A wrong decoder must be told from a right one by far, not by luck.
WRONG = 1e-7


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Four members and a draft: two that disagree, and copies of each that nearly agree with it."""
    first, second = toy(0, VOCAB_SIZE), toy(1, VOCAB_SIZE)
    copies = [noisy(first, 1.0), noisy(second, 1.0), noisy(first, 2.0)]
    return [first, second, *copies]


# --- laws -----------------------------------------------------------------------------------------

LAWS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "warped": {"temperature": 0.7, "top_p": 0.9},
    "warped together": {"temperature": 0.7, "top_p": 0.9, "scope": "ensemble"},
    "product": {"ensemble": "product"},
    # A product of nuclei that share no token would be empty.
    "warped product": {"ensemble": "product", "temperature": 1.3, "top_p": 0.97},
    "contrastive": {"ensemble": "product", "temperature": 0.7, "plausibility": 0.05},
    "maximum": {"ensemble": "maximum", "temperature": 0.7, "top_p": 0.9},
    "highest logit": {"ensemble": "highest_logit", "scope": "ensemble", "temperature": 0.8},
    "warped product together": {
        "ensemble": "product",
        "temperature": 0.7,
        "top_p": 0.9,
        "scope": "ensemble",
    },
}
WEIGHTS = {
    "mixture": [[1.0], [0.4, 0.6], [0.5, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]],
    "product": [[1.0], [0.7, 0.6], [0.6, 0.5, 0.3], [0.5, 0.4, 0.3, 0.2]],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule, how many members it has, and an entry of LAWS."""

    law: str
    members: int
    schedule: Schedule
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    drafts: int = 0

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.schedule} {self.members} {self.law} {options}".replace(" ", "_")

    @property
    def weights(self) -> list[float]:
        if self.law == "contrastive":
            return [1.4, -0.4]
        ensemble = LAWS[self.law].get("ensemble", "mixture")
        return WEIGHTS.get(ensemble, WEIGHTS["mixture"])[self.members - 1]

    def decoder(self, models: list[Any]) -> SpeculativeDecoder:
        ours = ("ensemble", "scope", "plausibility")
        return SpeculativeDecoder(
            models[: self.members],
            weights=self.weights,
            schedule=self.schedule,
            draft=models[-1 : -1 - self.drafts : -1] or None,
            **{
                name: FOLDS.get(value, value)
                for name, value in LAWS[self.law].items()
                if name in ours
            },
            **self.options,
        )

    def texts(self, models: list[Any], rows: int = ROWS) -> Tensor:
        """(rows, LENGTH) tokens written after the prompt, one seed a row."""
        decoder = self.decoder(models)
        prompt = prompts([3], VOCAB_SIZE)["input_ids"]
        theirs = ("temperature", "top_p")
        warpers = {name: value for name, value in LAWS[self.law].items() if name in theirs}
        texts = [
            decoder.generate(
                prompt.expand(1000, -1),
                attention_mask=torch.ones(1000, 3, dtype=torch.int64),
                max_new_tokens=LENGTH + 2,
                do_sample=True,
                top_k=0,
                seed=seed,
                **warpers,
            )
            for seed in range(0, rows, 1000)
        ]
        return torch.cat(texts)[:, 3 : 3 + LENGTH]

    def joint(self, models: list[Any]) -> Tensor:
        """(V,) * LENGTH: the law those tokens must have."""
        prompt = prompts([3], VOCAB_SIZE)["input_ids"]
        members = models[: self.members]
        return sequence_law(members, prompt, LENGTH, weights=self.weights, **LAWS[self.law])


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


def lumped(counts: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and law with the rarest tokens in one cell, so that 5 are expected in each."""
    impossible = law == 0
    order = law.masked_fill(impossible, math.inf).argsort()[: int((~impossible).sum())]
    expected = law[order] * counts.sum()
    few = int((expected < 5).sum())
    while few and expected[:few].sum() < 5:
        few += 1
    rare, rest = order[:few], order[few:]
    cells = [law[impossible].sum()[None], law[rare].sum()[None][: min(few, 1)], law[rest]]
    found = [counts[impossible].sum()[None], counts[rare].sum()[None][: min(few, 1)], counts[rest]]
    return torch.cat(found), torch.cat(cells)


def p_values(texts: Tensor, joint: Tensor) -> dict[tuple[int, int], float]:
    """The p-value of every window of two or three neighbouring tokens, (first, last)."""
    length = joint.dim()
    windows = [range(at, at + n) for n in (2, 3) for at in range(length - n + 1)]
    found = {}
    for window in windows:
        others = [at for at in range(length) if at not in window]
        law = joint.sum(others).flatten()
        cell = torch.zeros(len(texts), dtype=torch.int64)
        for at in window:
            cell = cell * VOCAB_SIZE + texts[:, at]
        counts = torch.bincount(cell, minlength=len(law))
        found[window[0], window[-1]] = chi_square(*lumped(counts, law)).p_value
    return found


def test_every_schedule_has_a_case():
    assert {case.schedule.name for case in CASES} == set(SCHEDULES)


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


# --- calls and invariants -------------------------------------------------------------------------


def write(decoder: SpeculativeDecoder, lengths: tuple[int, ...] = (3,), **options: Any) -> Tensor:
    settings = {"max_new_tokens": 60, "do_sample": True, "top_k": 0, "seed": 0}
    return decoder.generate(**prompts(lengths, VOCAB_SIZE), **{**settings, **options})


def check_alone(decoder: SpeculativeDecoder, lengths: tuple[int, ...], together: Tensor) -> None:
    """Each row of what `write` wrote with seed 0 is what it is without the others."""
    inputs, width = prompts(lengths, VOCAB_SIZE)["input_ids"], max(lengths)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": together.shape[1] - width}
    for row, length in enumerate(lengths):
        prompt = inputs[row : row + 1, width - length :]
        alone = decoder.generate(prompt, **options, seed=row, attention_mask=prompt >= 0)
        assert torch.equal(together[row, width:], alone[0, length:])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_alternating_calls_are_the_papers(size, models):
    """n / (n - (n - 1) a) times fewer than plain decoding, for proposals of one token.

    A turn tests one token and makes n calls if it starts afresh, else one; it starts afresh after
    every replacement but the last token's, and once at the beginning.
    """
    decoder = SpeculativeDecoder(models[:size], schedule=Alternating(tokens=1))
    write(decoder)
    counts = decoder.statistics
    assert counts.turns == counts.num_tokens == sum(counts.tested) == 60
    predicted = size - (size - 1) * counts.acceptance_rate
    assert 0 <= counts.calls_per_token - predicted <= (size - 1) / 60 + 1e-9
    if size > 1:
        assert 0.2 < counts.acceptance_rate < 0.95
        assert counts.calls_per_token < size - 0.2


def test_component_makes_one_call_a_token(models):
    weights = [0.5, 0.3, 0.2]
    decoder = SpeculativeDecoder(models[:3], weights=weights, schedule="component")
    write(decoder, max_new_tokens=200)
    counts = decoder.statistics
    assert sum(counts.calls) == counts.num_tokens == counts.turns == 200
    # Four standard deviations of a binomial share.
    for calls, weight in zip(counts.calls, weights, strict=True):
        assert abs(calls - 200 * weight) < 4 * math.sqrt(200 * weight * (1 - weight))


def test_component_catches_up_on_any_number_of_tokens(models):
    """A member that is seldom drawn, in rows that are far apart: text is that of a row alone."""
    decoder = SpeculativeDecoder(models[:2], weights=[0.9, 0.1], schedule="component")
    together = write(decoder, (40, 1, 2, 38), max_new_tokens=40)
    assert 0 < decoder.statistics.calls[1] < 40
    check_alone(decoder, (40, 1, 2, 38), together)


def test_plain_calls_every_member_for_every_token(models):
    decoder = SpeculativeDecoder(models[:3], schedule="plain")
    write(decoder)
    assert decoder.statistics.calls == [60, 60, 60]
    assert sum(decoder.statistics.drafted) == 0


@pytest.mark.parametrize("draft", [False, True])
def test_speculative_calls_each_scorer_once_a_turn(draft, models):
    decoder = SpeculativeDecoder(
        models[:2],
        schedule=Speculative(tokens=3, proposer=None if draft else 0),
        draft=models[-1] if draft else None,
    )
    write(decoder)
    counts = decoder.statistics
    drafted = sum(counts.drafted)
    assert counts.drafted == ([0, 0, drafted] if draft else [drafted, 0])
    # A member that drafts scores its own last draft too, for the bonus token.
    turns = counts.turns
    assert counts.calls == ([turns, turns, drafted] if draft else [turns + drafted, turns])
    assert counts.num_tokens == sum(counts.accepted) + turns


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


def test_looking_ahead_goes_by_what_was_kept(models, monkeypatch):
    """A proposer that is always right goes far, one that is seldom right does not; rows differ."""
    monkeypatch.setattr(mixture, "best_ahead", lambda *given: round(8 * given[4]))
    calls = {}
    for name, other in (("itself", models[0]), ("another", models[1])):
        settings = {"schedule": LookAhead(proposer=0), "weights": [0.3, 0.7]}
        decoder = SpeculativeDecoder([models[0], other], **settings)
        assert decoder.schedule.ahead == (0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8)
        write(decoder, max_new_tokens=300)
        calls[name] = decoder.statistics.calls[1]
        settings["schedule"] = LookAhead(proposer=0, ahead=6)
        fixed = SpeculativeDecoder([models[0], other], **settings)
        write(fixed, max_new_tokens=300)
        if name == "itself":
            assert calls[name] < fixed.statistics.calls[1]
        else:
            assert sum(decoder.statistics.drafted) < sum(fixed.statistics.drafted)
    assert calls["itself"] < calls["another"]
    together = write(decoder, (3, 6, 1), max_new_tokens=30)
    check_alone(decoder, (3, 6, 1), together)


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


def test_a_lookup_finds_the_latest_of_the_longest():
    """As a search of the whole text would, while the text grows."""

    def searched(tokens: list[int], longest: int, count: int) -> list[int]:
        size = len(tokens)
        for length in range(min(longest, size - 1), 0, -1):
            for start in range(size - length - 1, -1, -1):
                if tokens[start : start + length] == tokens[size - length :]:
                    return tokens[start + length : start + length + count]
        return []

    dice = torch.Generator().manual_seed(0)
    lengths = set()
    for longest in (1, 2, 3, 5):
        text = torch.randint(4, (60,), generator=dice).tolist()
        occurrences, size = Occurrences(), 1
        while size <= len(text):
            found = occurrences.continuation(text[:size], longest, 4)
            assert found == searched(text[:size], longest, 4)
            lengths.add(len(found))
            size += int(torch.randint(3, (), generator=dice))
    assert lengths >= {0, 4}
    assert Occurrences().continuation([1, 2, 1], 3, -1) == []


def num_laws(run: Run, member: int, row: Row) -> int:
    """How many tokens from the next one on the run holds a member's laws for."""
    pieces = run.laws[member]._pieces(row, row.length, 1000)
    return sum(size for *_, size in pieces)


@pytest.mark.parametrize(
    ("size", "gammas"), [(1, 3), (2, (1, 1)), (2, (3, 2)), (3, (1, 2, 2)), (4, (1, 3, 2, 2))]
)
def test_alternating_keeps_its_invariants(size, gammas, models, monkeypatch):
    """I1: a cache holds N + |D| - 1 tokens. I2: the |D| differ, one is empty. I3: whose block."""
    verify, forget = Run._verify, Run._forget
    blocks: list[int] = []
    states: list[tuple[int, ...]] = []

    def watched_verify(self: Run, verification: Any) -> Any:
        schedule = self.schedule
        for row, count in zip(verification.rows, verification.num_drafts, strict=True):
            held = [num_laws(self, member, row) for member in self.ensemble]
            lengths = [model.lengths[self.rows.index(row)] for model in self.members]
            assert lengths == [row.length + laws - 1 for laws in held], "I1"
            following = (row.slot + 1) % size
            ends = self.room(row) <= 0
            assert count == min(*held, len(row.pending)) if ends else count == min(held)
            assert ends or count == schedule.tokens[following], "I3"
            assert set(row.pending[:count]) == {schedule.order[following]} or ends, "I3"
            blocks.append(count)
        return verify(self, verification)

    def watched_forget(self: Run) -> None:
        forget(self)
        for place, row in enumerate(self.rows):
            held = [num_laws(self, member, row) for member in self.ensemble]
            lengths = [model.lengths[place] for model in self.members]
            assert lengths == [row.length + laws - 1 for laws in held], "I1"
            if self.room(row) > 0:  # at the end of the text there is nothing more to propose
                assert held.count(0) == (1 if row.pending else size), "I2"
                assert not row.pending or len(set(held)) == size, "I2"
            states.append(tuple(held))

    monkeypatch.setattr(Run, "_verify", watched_verify)
    monkeypatch.setattr(Run, "_forget", watched_forget)
    decoder = SpeculativeDecoder(models[-size:], schedule=Alternating(tokens=gammas))
    write(decoder, (3, 5, 1), max_new_tokens=30)
    assert len(set(blocks)) >= len(set(decoder.schedule.tokens))
    assert size == 1 or any(any(held) for held in states), "no block was kept whole"


# --- decoders that are wrong on purpose -----------------------------------------------------------


def test_a_block_kept_whole_must_stay_in_the_context(models, monkeypatch):
    """Speculative Ensemble's published code proposes, after a block, without that block."""

    def stale(self: Alternating, run: Run, slot: int, rows: list[Row]) -> None:
        member, block = self.order[slot], self.tokens[(slot + 1) % len(self.order)]
        for _ in range(self.tokens[slot] - 1):
            active = [row for row in rows if run.room(row) > 0]
            if not active:
                return
            run.feed(member, active)
            chunk = run.laws[member].chunks[-1]
            for end in {row.end for row in active}:
                alike = [row for row in active if row.end == end]
                texts = [run.text.tokens[row.index, row.pad : row.pad + end] for row in alike]
                texts = [
                    torch.cat([text[: row.length - block], text[row.length :]])
                    for text, row in zip(texts, alike, strict=True)
                ]
                places = [chunk.places[row][0] for row in alike]
                chunk.logits[places, 0] = logits_after(models[member], torch.stack(texts)).float()
            run.draw(member, active)

    models = [models[0], noisy(models[0], 0.5)]  # most blocks are kept whole
    case = Case("mixture", 2, Alternating(tokens=(1, 2)))
    joint = case.joint(models)
    assert min(p_values(case.texts(models), joint).values()) > HONEST
    monkeypatch.setattr(Alternating, "_extend", stale)
    found = p_values(case.texts(models), joint)
    assert found[0, 1] > HONEST, found  # nothing is stale before the first block is kept
    assert found[0, 2] < WRONG, found


def test_a_bonus_token_must_come_from_the_ensemble(models, monkeypatch):
    """Transformers' assisted ensembles draw it from the target alone."""
    right = run_module.verify

    def wrong(logits: list[Tensor], *arguments: Any, **options: Any) -> Any:
        logits = [tensor.clone() for tensor in logits]
        for tensor in logits[1:]:
            tensor[:, -1] = logits[0][:, -1]
        return right(logits, *arguments, **options)

    case = Case("mixture", 2, Speculative(tokens=2, proposer=1))
    joint = case.joint(models)
    monkeypatch.setattr(run_module, "verify", wrong)
    found = p_values(case.texts(models, 1000), joint)
    assert found[0, 1] > HONEST, found  # drafted tokens are right
    assert found[1, 2] < WRONG, found


@pytest.mark.slow
def test_looking_ahead_may_learn_but_not_look(models, monkeypatch):
    """By what became of earlier tokens it may ask sooner, but not by a token that it has drawn."""
    # One refusal is enough to ask at once, for as long as these texts last.
    monkeypatch.setattr(mixture, "best_ahead", lambda *given: 3 * (given[4] >= KEPT))
    case = Case("mixture", 3, LookAhead(proposer=1))
    assert set(case.decoder(models).schedule.ahead) == {0, 3}
    joint = case.joint(models)
    found = p_values(case.texts(models), joint)
    assert min(found.values()) > HONEST, found
    right = LookAhead.turn

    def looking(self: LookAhead, run: Run) -> list[Verification]:
        (verification,) = right(self, run)
        counts = list(verification.num_drafts)
        for k, row in enumerate(verification.rows):
            owner = mixture.components(run, row, 1)[0]
            refusable = counts[k] > 0 and owner != self.proposer
            if refusable and run.text.tokens[row.index, row.pad + row.length] < 2:
                counts[k] = 0
                row.pending.clear()
        weights = verification.law.weights[:, : max(counts) + 1]
        law = dataclasses.replace(verification.law, weights=weights)
        return [dataclasses.replace(verification, num_drafts=counts, law=law)]

    monkeypatch.setattr(LookAhead, "turn", looking)
    found = p_values(case.texts(models), joint)
    assert min(found.values()) < WRONG, found


@pytest.mark.slow
def test_a_cut_must_not_look_at_the_token_it_takes_back(models, monkeypatch):
    """As Speculative Verification publishes it: by the token's own ratio, then the target's law."""

    def wrong(self: Survival, said: list[tuple[float, float]], token_cost: float) -> int:
        reached = expected = 1.0
        for at, (shared, ratio) in enumerate(said):
            gain = reached * self.chance(shared, ratio)
            if gain * (1 + token_cost * at) <= token_cost * expected:
                return at
            expected += gain
            reached = gain
        return len(said)

    models = [models[0], noisy(models[0], 0.5), models[1]]  # the companion knows the target well
    case = Case("mixture", 1, Companion(tokens=2, token_cost=0.4), drafts=2)
    joint = case.joint(models)
    assert min(p_values(case.texts(models), joint).values()) > HONEST
    monkeypatch.setattr(Survival, "cut", wrong)
    found = p_values(case.texts(models), joint)
    assert found[0, 1] < WRONG, found


def test_a_token_taken_back_for_what_it_is_leaves_a_smaller_law(models, monkeypatch):
    models = [models[0], noisy(models[0], 0.5), models[1]]
    case = Case("mixture", 1, Companion(tokens=2, token_cost=0.4, cut="token"), drafts=2)
    joint = case.joint(models)
    assert min(p_values(case.texts(models, 6000), joint).values()) > HONEST
    monkeypatch.setattr(companion, "staying_laws", lambda *given: {})
    found = p_values(case.texts(models, 6000), joint)
    assert min(found.values()) < WRONG, found


def test_a_token_taken_back_must_count_as_less_likely():
    """What would allow a cut by the token itself: q'(x) = q(x) k(x) in the ratio and the residual.

    Of one token: x ~ q, kept with chance k(x) and then verified; else it is replaced.
    """
    dice = torch.Generator().manual_seed(0)
    laws = torch.rand(3, 4, generator=dice, dtype=torch.float64).pow(3)
    p, q, companion = laws / laws.sum(-1, keepdim=True)
    keep = ((companion / q).clamp(max=1) > 0.5).double()
    assert 0 < (q * keep).sum() < 1

    def emitted(proposal: Tensor, when_taken_back: Tensor) -> Tensor:
        accepted = q * keep * (p / proposal).nan_to_num(posinf=1.0).clamp(max=1)
        residual = (p - proposal).clamp(min=0)
        refused = (q * keep).sum() - accepted.sum()
        dropped = (q * (1 - keep)).sum()
        return accepted + refused * residual / residual.sum() + dropped * when_taken_back

    less = (p - q * keep).clamp(min=0)
    torch.testing.assert_close(emitted(q * keep, less / less.sum()), p, atol=1e-15, rtol=0)
    assert (emitted(q, p) - p).abs().max() > 0.05


@pytest.mark.parametrize("schedule", [Speculative(tokens=2), Alternating(tokens=2)], ids=str)
def test_a_draft_must_have_the_law_it_is_said_to_have(schedule, models, monkeypatch):
    """Transformers warps the draft's logits twice."""
    right = run_module.sample

    def wrong(logits: list[Tensor], numbers: Tensor, law: Any) -> Any:
        return right(logits, numbers, dataclasses.replace(law, temperature=law.temperature**2))

    case = Case("warped", 2, schedule)
    joint = case.joint(models)
    monkeypatch.setattr(run_module, "sample", wrong)
    found = p_values(case.texts(models, 1000), joint)
    assert found[0, 1] < WRONG, found


def test_a_level_must_be_verified_against_the_level_below_it(models, monkeypatch):
    """Not against the first draft, from whose law most tokens were drawn."""
    target, middle, smallest = models[0], models[2], models[-1]
    right = Run.proposal

    def wrong(self: Run, rows: list[Row], counts: Any, begins: Any, among: Any) -> Any:
        proposal = right(self, rows, counts, begins, among)
        if rows[0].pending[:1] == [2]:  # the ensemble's turn: all of them are the middle one's
            texts = self.text.tokens[[row.index for row in rows]]
            laws = smallest(texts, use_cache=False).logits
            at = torch.tensor(begins)[:, None] - 1 + torch.arange(max(counts))
            proposal["draft_logits"] = torch.take_along_dim(laws, at[..., None], 1)
        return proposal

    def text() -> Tensor:
        decoder = SpeculativeDecoder(
            [target], schedule=Hierarchy(tokens=(2, 3)), draft=[smallest, middle]
        )
        prompt = prompts([3], VOCAB_SIZE)["input_ids"].expand(1000, -1)
        mask = torch.ones(1000, 3, dtype=torch.int64)
        options = {"max_new_tokens": LENGTH + 2, "do_sample": True, "top_k": 0, "seed": 0}
        return decoder.generate(prompt, attention_mask=mask, **options)[:, 3 : 3 + LENGTH]

    joint = sequence_law([target], prompts([3], VOCAB_SIZE)["input_ids"], LENGTH, weights=[1.0])
    assert min(p_values(text(), joint).values()) > HONEST
    monkeypatch.setattr(Run, "proposal", wrong)
    assert min(p_values(text(), joint).values()) < WRONG


def flat(law: list[float]) -> Any:
    """A model that gives every next token this law, whatever the text."""
    model = toy(1, len(law))
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding[1:2].expand_as(embedding))
        seen: list[Tensor] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
        model(torch.tensor([[1, 2]]))
        hook.remove()
        head.weight.copy_(torch.tensor(law).log()[:, None] * seen[0] / seen[0].dot(seen[0]))
    return model


@pytest.mark.slow
def test_an_end_that_a_level_has_refused_ends_nothing():
    """Whether a level goes on must not hang on numbers of tokens that come after a refused one."""
    small, large = flat([0.5, 0.4, 0.1]), flat([0.5, 0.1, 0.4])
    decoder = SpeculativeDecoder(
        [large], schedule=Hierarchy(tokens=(3, 3, 4)), draft=[small, small, large]
    )
    ids = torch.ones(8000, 1, dtype=torch.int64)
    texts = decoder.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        eos_token_id=0,
        pad_token_id=0,
        seed=0,
    )
    for first in (1, 2):
        second = texts[texts[:, 1] == first][:, 2]
        counts = torch.bincount(second, minlength=3)
        assert chi_square(counts, torch.tensor([0.5, 0.1, 0.4])).p_value > HONEST
