# SPDX-License-Identifier: Apache-2.0
"""A turn of each schedule: the calls that it costs, what it proposes, and what it keeps."""

import math
from typing import Any

import pytest
import torch
from cases import check_alone, disagreeing, write

from specens import SpeculativeDecoder
from specens.loop.occurrences import Occurrences
from specens.loop.rows import Row
from specens.loop.run import Run
from specens.schedules import Alternating, LookAhead, Speculative, mixture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return disagreeing()


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
