# SPDX-License-Identifier: Apache-2.0
"""Measuring, against the loop itself under a clock of ours.

Models' forwards take exactly what `COSTS` says (`clock`), so that measuring is exact and a turn
that costs one forward more or less than predicted is found out.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import noisy, prompts, toy

from specens import SpeculativeDecoder
from specens.loop.profile import Candidate
from specens.members.member import Member
from specens.schedules import STOPS, EntropyStop, Lookup, Plain, Speculative, read_schedule
from specens.schedules.stops import stop_features
from specens.tuning import decoder_of, stops, tune
from specens.tuning.agreement import Agreement, chunks, curve, read, starts
from specens.tuning.compare import sampling
from specens.tuning.lookups import LookUps, replayed
from specens.tuning.measure import Sweep
from specens.tuning.stops import draw
from specens_kernels import Acceptance

pytestmark = pytest.mark.usefixtures("one_thread")

COSTS = {"0": (5.0, 0.5), "1": (3.0, 0.25), "2": (1.0, 0.125)}
LENGTHS = (4, 6, 3)
# Of these rules, whose acceptance does not jump from all to nothing.
SMOOTH = ("lenient:lenience=0.4", "cactus:divergence=0.5")
LOSSY = (
    "js:threshold=0.1",
    "lenient:lenience=0.4",
    "typical:epsilon=0.02",
    "cactus:divergence=0.5",
)


class Clock:
    """Time passes when a model runs, and only then: a start and a bit for each token."""

    def __init__(self, models: Sequence[Any]) -> None:
        self.now = 0.0
        self.costs = {id(model): COSTS[str(i)] for i, model in enumerate(models)}

    def forward(self, original: Any) -> Any:
        def timed(member: Member, tokens: Any, counts: Any, *rest: Any, **options: Any) -> Any:
            start, each = self.costs[id(member.model)]
            self.now += start + each * max(counts)
            return original(member, tokens, counts, *rest, **options)

        return timed


@pytest.fixture(scope="module")
def models() -> list[Any]:
    first = toy(0, 23, spread=2.0, max_position_embeddings=1024)
    return [first, noisy(first, 0.25, 1), noisy(first, 0.35, 2)]


@pytest.fixture
def clock(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock(models)
    monkeypatch.setattr(Member, "forward", ticking.forward(Member.forward))
    monkeypatch.setattr(time, "perf_counter", lambda: ticking.now)
    return ticking


def texts() -> list[torch.Tensor]:
    return [prompts((length,), 23, seed=length)["input_ids"] for length in LENGTHS]


def seconds_per_token(decoder: SpeculativeDecoder, temperature: float, rounds: int) -> float:
    """What the loop takes, by the clock."""
    seconds = tokens = 0.0
    options = sampling(120, temperature=temperature)
    for number in range(rounds):
        for seed, text in enumerate(texts()):
            decoder.generate(text, seed=10 * (number + 1) + seed, **options)
            assert decoder.statistics is not None
            seconds += decoder.statistics.decode_seconds
            tokens += decoder.statistics.num_tokens
    return seconds / tokens


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_what_is_predicted_is_what_the_loop_takes(
    models: list[Any], clock: Clock, temperature: float
) -> None:
    """Every candidate, two members and a draft; the clock leaves nothing but chance."""
    found = tune(
        models[:2],
        texts(),
        sampling(300 if temperature > 0 else 120, temperature=temperature),
        drafts=models[2:],
        weights=(0.6, 0.4),
    )
    for times, (start, each) in zip(found.profile.forwards, COSTS.values(), strict=True):
        assert times == tuple((n, start + each * n) for n in (1, 2, 4, 8))
    assert found.profile.draw == 0
    assert set(dict(found.profile.verify).values()) == {0.0}
    for one in found.candidates:
        if " stop" in one.name:  # see test_long_proposals_are_predicted_too
            continue
        decoder = decoder_of(one, models[:2], drafts=models[2:], weights=(0.6, 0.4))
        # When sampled, another text is written now: of 360 tokens the time varies by up to 7 %.
        expected = seconds_per_token(decoder, temperature, 4 if temperature > 0 else 1)
        tolerance = 1e-9 if one.name == "plain" else 0.06 if temperature > 0 else 0.03
        assert one.seconds == pytest.approx(expected, rel=tolerance), one.name


def test_models_that_are_being_trained_are_read_in_evaluation_mode() -> None:
    models = [toy(seed, 11, kind="gpt2") for seed in range(2)]
    text = prompts((20,))["input_ids"]
    members = SpeculativeDecoder(models, schedule="plain").members
    expected = list(chunks(members, text, 4))
    for model in models:
        model.train()
    for given, wanted in zip(chunks(members, text, 4), expected, strict=True):
        assert all(map(torch.equal, given, wanted))
    assert all(module.training for model in models for module in model.modules())


def test_acceptance_is_the_overlap_of_the_laws(models: list[Any]) -> None:
    """Against full forwards, without a cache."""
    text, drafts = texts()[0], [models[2], models[0]]
    decoder = SpeculativeDecoder(models[:2], schedule="hierarchy", draft=drafts, weights=(0.6, 0.4))
    sweep, agreement = Sweep(), Agreement(4, 2, 8)
    decoder.schedule = sweep
    written = decoder.generate(text, seed=0, **sampling(80, temperature=0.7))
    read(decoder, sweep, agreement, written, text.shape[1])
    with torch.no_grad():
        laws = [
            (model(written[:, :-1]).logits[0, text.shape[1] - 1 :] / 0.7).double().softmax(-1)
            for model in (*models, models[0])
        ]
    laws.append(0.6 * laws[0] + 0.4 * laws[1])
    for (m, one), (v, other) in itertools.product(enumerate(laws[:-1]), enumerate(laws)):
        (found,) = agreement.overlaps[m][v]
        expected = torch.minimum(one, other).sum(-1)
        # Logits of single precision, whose sums have another order.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert (float(expected.mean()) < 0.99) == (m != v and {m, v} != {0, 3})


def test_a_block_begins_where_another_ended() -> None:
    """Greedy drafts, four kept and four refused: five blocks of eight tokens, one kept whole."""

    def begins_of(kept: torch.Tensor, size: int) -> list[float]:
        return starts(kept, kept, size).tolist()

    text = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0] * 6, dtype=torch.float64)
    begins = [1.0, 0, 0, 0, 0, 1, 1, 1] * 6
    assert begins_of(text, 4) == begins
    # Of the texts' last block, what would come next is not known.
    assert curve([text], 8)[:4] == pytest.approx([0.25] * 4, abs=0.02)
    even = torch.full((200,), 0.7, dtype=torch.float64)
    assert curve([even], 8) == pytest.approx([0.7**n for n in range(1, 9)])
    assert curve([even[:3]], 8) == pytest.approx([0.7, 0.49, 0.343])


def test_the_text_that_is_measured_by_is_the_ensembles(models: list[Any]) -> None:
    plain = SpeculativeDecoder(models[:2], schedule="plain")
    swept = SpeculativeDecoder(models[:2], schedule="hierarchy", draft=[models[2]])
    swept.schedule = Sweep()
    for text in texts():
        found, expected = (
            one.generate(text, do_sample=False, max_new_tokens=60) for one in (swept, plain)
        )
        assert found.tolist() == expected.tolist()


def test_too_little_text_is_an_error(models: list[Any]) -> None:
    with pytest.raises(ValueError, match="tune: max_new_tokens: expected enough to time every mod"):
        tune(models[:2], texts()[:1], sampling(2))


def ending(models: list[Any], monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    monkeypatch.setattr(models[0].generation_config, "eos_token_id", list(tokens))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_texts_that_end_at_once_are_measured_by(
    models: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    options = sampling(40, temperature=temperature)
    whole = tune(models[:2], texts(), options, drafts=models[2:])
    ending(models, monkeypatch, range(23))  # every token does
    found = tune(models[:2], texts(), options, drafts=models[2:])
    assert found.num_tokens == 120
    assert found == replace(whole, seconds=found.seconds)
    assert models[0].generation_config.eos_token_id == list(range(23))


def test_acceptance_is_of_the_texts_up_to_their_ends(
    models: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending(models, monkeypatch, [20])
    plain = SpeculativeDecoder(models[:2], schedule="plain")
    options = sampling(200, temperature=0.0)
    sizes = [plain.generate(text, **options).shape[1] - text.shape[1] for text in texts()]
    assert 16 <= sum(sizes) < 600  # some do end
    found = tune(models[:2], texts(), options)
    assert found.num_tokens == sum(sizes)
    # What is written beyond the ends is timed all the same.
    assert [n for n, _ in found.profile.forwards[0]] == [1, 2, 4, 8]


def test_few_turns_are_enough(models: list[Any], clock: Clock) -> None:
    """Each model is timed in two sizes at least: a block costs more than its first token."""
    for count in (6, 8, 12):
        found = tune(models[:2], texts()[:1], sampling(count), drafts=models[2:])
        for times, (start, each) in zip(found.profile.forwards, COSTS.values(), strict=True):
            assert len(times) > 1
            assert all(seconds == start + each * n for n, seconds in times)


def test_a_product_has_no_components(models: list[Any]) -> None:
    found = tune(models[:2], texts(), sampling(40), ensemble="product", weights=(1.5, -0.5))
    kinds = {one.schedule.name for one in found.candidates}
    assert kinds == {"plain", "speculative", "alternating", "lookup"}


def test_every_kind_of_stop_is_a_candidate(models: list[Any]) -> None:
    found = tune(models[:2], texts(), sampling(40), drafts=models[2:])
    stopped = {one.schedule.stop.name: one for one in found.candidates if " stop" in one.name}
    assert set(stopped) == set(STOPS)
    for kind, one in stopped.items():
        saved = json.loads(json.dumps(one.as_dict()))
        again = replace(one, schedule=read_schedule(saved["schedule"]))
        assert again == one
        decoder = decoder_of(again, models[:2], drafts=models[2:])
        stop = decoder.schedule.stop  # type: ignore[attr-defined]
        assert type(stop) is STOPS[kind]
        if kind == "learned":
            assert stop == found.stops[2 if one.drafts else one.schedule.proposer]
    assert found.checked()[0].schedule == Plain()
    assert found.best() == found.candidates[0]


def test_a_stop_is_told_the_same_by_the_loop_and_by_measuring(models: list[Any]) -> None:
    """At temperature 0, too, where a draft's law has one token and its log-probability is bare."""
    told: list[torch.Tensor] = []

    class Ears:
        def asks(self, log_probs: torch.Tensor, logits: torch.Tensor) -> list[bool]:
            told.append(stop_features(log_probs, logits))
            return [False] * len(logits)

    decoder = SpeculativeDecoder(models[:1], schedule=Speculative(stop=Ears()), draft=models[2])
    for temperature in (0.0, 0.7):
        told.clear()
        written = decoder.generate(texts()[0], seed=1, **sampling(12, temperature=temperature))
        first = texts()[0].shape[1] - 1
        with torch.no_grad():
            logits = models[2](written).logits[0, first : first + 1]
        law = (logits / (temperature or 1.0)).softmax(-1)
        if temperature == 0:
            law = torch.nn.functional.one_hot(law.argmax(-1), 23).float()
        seen = draw(logits, law, law, greedy=temperature == 0)
        assert bool((seen.chances == 1).all())
        near = (seen.features[0] - told[0].double()).abs().amax(-1)
        assert float(near.min()) < 1e-4  # one of the four draws is the loop's; at 0 all are
        assert temperature > 0 or float(near.max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_long_proposals_are_predicted_too(
    models: list[Any], clock: Clock, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Stops that end some blocks, and look-ups, at sizes that the search would not choose."""
    # No law over 23 tokens is flat enough for the default.
    monkeypatch.setitem(stops.READY, "entropy", EntropyStop(least=0.35))
    size = 300 if temperature > 0 else 120
    options: dict[str, Any] = {"drafts": models[2:], "weights": (0.6, 0.4)}
    found = tune(models[:2], texts(), sampling(size, temperature=temperature), **options)
    here, wrong, ends = found.profile, [], []

    def compare(predicted: float, schedule: Any, draft: bool) -> float:
        one = Candidate("", schedule, 0.0, (0,) if draft else ())
        decoder = decoder_of(one, models[:2], **options)
        expected = seconds_per_token(decoder, temperature, 4 if temperature > 0 else 1)
        assert predicted == pytest.approx(expected, rel=0.08), schedule
        return expected

    for one in here.stopped:
        if one.model == 0:
            continue
        schedule = Speculative(8, None if one.model == 2 else one.model, one.stop)
        predicted = Speculative.stopped_seconds(here, one, 8)
        expected = compare(predicted, schedule, one.model == 2)
        wrong.append(abs(Speculative.seconds(here, one.model, 8) / expected - 1))
        ends.append(one.going[0] < 0.95)
    assert sum(ends) >= 3
    assert temperature > 0 or max(wrong) > 0.5  # as if nothing were stopped
    for gamma in (1, 4):
        predicted = Lookup.seconds(here, gamma)
        expected = compare(predicted, Lookup(gamma), False)
        sure = replace(here, found=(((gamma, 1.0, gamma),),) * gamma)
        assert temperature == 0 or Lookup.seconds(sure, gamma) < 0.9 * expected


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_lossy_rules_are_predicted_and_never_the_best(
    models: list[Any], clock: Clock, temperature: float
) -> None:
    rules = [Acceptance.parse(rule) for rule in LOSSY]
    options: dict[str, Any] = {"drafts": models[2:], "weights": (0.6, 0.4)}
    writing = sampling(120, temperature=temperature)
    found = tune(models[:2], texts(), writing, acceptances=rules, **options)
    lossy = {one.acceptance: one for one in found.candidates if not one.lossless}
    assert list(lossy) == sorted(LOSSY, key=lambda rule: lossy[rule].seconds)
    assert not found.candidates[0].lossless  # or the next line would say nothing
    assert found.best().lossless
    assert all(one in found.checked() for one in lossy.values())
    for rule, one in lossy.items():
        assert one.law == Acceptance.parse(rule).rule.law
        # Greedily a rule may well trust nothing but what the target says, too.
        assert (0 if temperature > 0 else -1) < one.divergence <= 1
    for one in found.profile.relaxed:
        if one.model != 2:
            continue
        for gamma in (2, 8):
            way = Candidate("", Speculative(gamma), 0.0, (0,), one.acceptance)
            decoder = decoder_of(way, models[:2], **options)
            expected = seconds_per_token(decoder, temperature, 3 if temperature > 0 else 1)
            predicted = Speculative.relaxed_seconds(found.profile, one, gamma)
            if temperature == 0:
                assert predicted == pytest.approx(expected, rel=0.03), way
            elif one.acceptance in SMOOTH:
                assert predicted == pytest.approx(expected, rel=0.07), way
            # A gate lets whole stretches pass or none: 360 tokens tell its time within some 20 %.
            if temperature > 0:
                assert Speculative.seconds(found.profile, 2, gamma) > 1.1 * expected, way


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_long_blocks_begin_more_rarely_where_drafts_are_kept(
    models: list[Any], clock: Clock, gamma: int
) -> None:
    """Greedy texts that repeat themselves: a draft is kept in two of them, never in the third."""
    options: dict[str, Any] = {"drafts": models[2:], "weights": (0.6, 0.4)}
    found = tune(models[:2], texts(), sampling(120, temperature=0.0), **options)
    way = Candidate("", Speculative(gamma), 0.0, (0,))
    expected = seconds_per_token(decoder_of(way, models[:2], **options), 0.0, 1)
    predicted = Speculative.seconds(found.profile, 2, gamma)
    assert predicted == pytest.approx(expected, rel=0.03)
    if gamma != 4:  # the size that one curve for all is made for
        of_all = Speculative.seconds(replace(found.profile, blocks=()), 2, gamma)
        assert abs(of_all / expected - 1) > 0.07


def test_one_model_alone_looks_up(models: list[Any], clock: Clock) -> None:
    found = tune(models[:1], texts(), sampling(40))
    assert {one.schedule.name for one in found.candidates} == {"plain", "lookup"}
    start, each = COSTS["0"]
    (times,) = found.profile.forwards
    assert {1, 2, 4, 8} <= {n for n, _ in times}
    assert all(seconds == start + each * n for n, seconds in times)


def test_what_is_looked_up_is_what_the_loop_looks_up() -> None:
    #        0  1  2  3  4  5  6  7  8  9
    text = [5, 6, 7, 5, 6, 7, 5, 8, 9, 5]
    found = LookUps(text, 3, 4)
    law = torch.full((10,), 0.5)
    for place in range(7):
        found.read(place, law)
    # "7" has not occurred; "5" has, and 6 7 5 is kept; "8" and "9" have not. The law finds each
    # proposal that follows what was written as likely as not.
    assert list(found.turns(4)) == [(0, 0.0), (3, 1.5), (0, 0.0), (0, 0.0)]
    assert replayed([found], 4) == ((0, 0.75, 0.0), (3, 0.25, 1.5))
    # Two at most: of 6 7, which are kept, then of 8, which follows "5" no more than 6 does.
    assert list(found.turns(2)) == [(0, 0.0), (2, 1.0), (2, 0.5), (0, 0.0), (0, 0.0)]
