# SPDX-License-Identifier: Apache-2.0
"""What `predict.py` predicts from: forward times and acceptance, measured on the user's models.

The models write a text as the decoder would, with each as the proposer in turn and blocks of every
size, so that all times are taken in the loop and take turns. Where a text ends they write on: how
long a forward takes does not depend on what is read. Then they read the texts again up to their
ends, and each law is compared with the ensemble's at every position. To measure one thing more, add
it to `Profile`.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.loop.rows import Occurrences
from specens.loop.run import Run
from specens.schedules import (
    ConfidenceStop,
    DraftStop,
    EntropyStop,
    LearnedStop,
    Lookup,
    Speculative,
    Verification,
    stop_features,
)
from specens.tuning.compare import Row, compare, sampling, workload
from specens.tuning.predict import (
    Candidate,
    Found,
    Kept,
    Profile,
    Relaxed,
    Stopped,
    Times,
    candidates,
    least_chance,
    plain,
)
from specens.tuning.relaxation import check_lossy, relaxed, written
from specens_kernels import Acceptance, Law, mix

# Stops by the names that a candidate has for them; the learned one is fitted here.
STOPS: dict[str, Callable[..., DraftStop]] = {
    "confidence": ConfidenceStop,
    "entropy": EntropyStop,
    "learned": LearnedStop,
}
_READY: dict[str, ConfidenceStop | EntropyStop] = {
    "confidence": ConfidenceStop(),
    "entropy": EntropyStop(),
}

# Tokens of one forward that are timed.
SIZES = (1, 2, 4, 8)
# Positions read at a time, of which every model's laws are held.
_CHUNK = 32
# Drafts drawn at each position for the regression of `LearnedStop`.
_DRAWS = 4
_RIDGE = 1e-2
# A size is timed as often before its median counts; near a text's end, others occur, too.
_ENOUGH = 3
# Where all texts end within fewer tokens than this, what is written beyond their ends counts, too.
_LEAST_READ = 16
# Candidates that are run to be checked.
_CHECKED = 8
# Tokens of a proposal where a lossy rule writes.
_PROPOSED = 4

_T = TypeVar("_T")


@dataclass(frozen=True)
class Tuning:
    """What a tuning has found.

    candidates: the best of each kind, the fastest first.
    stops: per model, when it had better stop where it drafts.
    num_tokens: that acceptance was measured on. seconds: that it took.
    """

    profile: Profile
    candidates: list[Candidate]
    stops: list[LearnedStop]
    num_tokens: int
    seconds: float

    def speedup(self, candidate: Candidate) -> float:
        """Predicted, over the plain ensemble."""
        return plain(self.profile) / candidate.seconds

    def checked(self) -> list[Candidate]:
        """What `check` runs: plain first, then the fastest candidates, and all that are lossy."""
        exact = [one for one in self.candidates if one.lossless]
        lossy = [one for one in self.candidates if not one.lossless]
        return [*sorted(exact, key=lambda one: one.schedule != "plain")[: _CHECKED + 1], *lossy]

    def best(self, rows: Sequence[Row] | None = None) -> Candidate:
        """The one that was measured to be the fastest, or else is predicted to be; never lossy."""
        exact = [one for one in self.candidates if one.lossless]
        if not rows:
            return exact[0]
        ratios = {row.name: row.ratio for row in rows}
        return max((one for one in exact if one.name in ratios), key=lambda one: ratios[one.name])

    def as_dict(self, rows: Sequence[Row] | None = None) -> dict[str, Any]:
        """Everything, for JSON."""
        measured = {row.name: row.as_dict() for row in rows or ()}
        return {
            "best": asdict(self.best(rows)),
            "candidates": [
                {**asdict(one), "speedup": self.speedup(one), "measured": measured.get(one.name)}
                for one in self.candidates
            ],
            "stops": dict(zip(self.profile.names, map(asdict, self.stops), strict=True)),
            "profile": asdict(self.profile),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
        }


def tune(
    members: Sequence[Any],
    prompts: Sequence[Tensor],
    *,
    drafts: Sequence[Any] = (),
    tokenizers: Sequence[Any] | None = None,
    max_new_tokens: int = 64,
    most: int = 8,
    seed: int = 0,
    limit_s: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    acceptances: Sequence[Acceptance] = (),
    **arguments: Any,
) -> Tuning:
    """Measure the models and predict every schedule but "companion", which is for batches.

    Args:
        members: M >= 1 causal LMs whose ensemble writes.
        prompts: (1, S) int64 tensors that it continues.
        drafts: causal LMs outside the ensemble, the smallest first.
        tokenizers: one per model, the drafts' last.
        max_new_tokens: of each prompt.
        most: highest number of speculative tokens that a model proposes at a time.
        seed: of the text.
        limit_s: seconds of writing after which no further prompt is begun, and half of which one
            may take; None is no limit.
        temperature, top_k, top_p, min_p: of the law, as in `sampling`.
        acceptances: lossy rules to measure as well, each with every proposer.
        arguments: for `SpeculativeDecoder`: weights, ensemble, scope, plausibility.
    Raises:
        ValueError: an argument is out of range, or there was no room to time every model.
    """
    began = time.perf_counter()
    rules = [check_lossy(one) for one in acceptances]
    if rules and len(members) == 1 and not drafts:
        raise ValueError("tune: acceptance: expected a draft or a second member to judge, got none")
    decoder = SpeculativeDecoder(
        members,
        schedule="hierarchy" if drafts else "plain",
        draft=list(drafts) or None,
        tokenizers=tokenizers,
        **arguments,
    )
    sweep = _Sweep()
    decoder.schedule = sweep
    options = sampling(
        max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    writing: dict[str, Any] = {"seed": seed, "limit_s": limit_s, "options": options}
    texts = _texts(decoder, prompts, **writing)
    if not sweep.complete:
        written = sum(text.shape[1] - begin for text, begin in texts)
        expected = "enough to time every model alone and in blocks"
        raise ValueError(f"tune: max_new_tokens: expected {expected}, got {written} tokens in all")
    texts = _up_to_ends(texts, sweep.ends)
    agreement = _Agreement(len(decoder.members), decoder.num_ensemble, most)
    for text, begin in texts:
        _read(decoder, sweep, agreement, text, begin)
    profile = Profile(
        names=_names(decoder.members),
        weights=decoder.weights,
        forwards=tuple(_medians(sweep.forwards[m]) for m in range(len(decoder.members))),
        draw=statistics.median(sweep.draws),
        verify=_medians(sweep.rest),
        kept=agreement.kept(),
        blocks=agreement.blocks(),
        found=tuple(_replayed(agreement.look_ups, gamma) for gamma in range(1, most + 1)),
        look_up=statistics.median(agreement.looking),
    )
    components = temperature > 0 and decoder.ensemble == "mixture" and decoder.scope == "member"
    best = candidates(profile, most=most, components=components)[0]
    stops = [
        LearnedStop(agreement.fitted(m), least_chance(profile, m, best.seconds))
        for m in range(len(decoder.members))
    ]
    lossy = [
        _relaxation(decoder, sweep, rule, m, most, lambda: _texts(decoder, prompts, **writing))
        for rule in rules
        for m in agreement.proposers
    ]
    profile = replace(profile, stopped=agreement.stopped(stops), relaxed=tuple(lossy))
    found = candidates(profile, most=most, components=components)
    read = sum(text.shape[1] - begin for text, begin in texts)
    return Tuning(profile, found, stops, read, time.perf_counter() - began)


def decoder_of(
    candidate: Candidate,
    members: Sequence[Any],
    *,
    drafts: Sequence[Any] = (),
    tokenizers: Sequence[Any] | None = None,
    **arguments: Any,
) -> SpeculativeDecoder:
    """The decoder that a candidate stands for; the arguments are those of `tune`."""
    size, mine = len(members), dict(candidate.arguments)
    if "stop" in mine:
        mine["stop"] = stop_of(mine["stop"])
    if "acceptance" in mine:
        mine["acceptance"] = Acceptance.parse(mine["acceptance"])
    if tokenizers is not None:
        tokenizers = [*tokenizers[:size], *(tokenizers[size + i] for i in candidate.drafts)]
    return SpeculativeDecoder(
        members,
        schedule=candidate.schedule,
        draft=[drafts[i] for i in candidate.drafts] or None,
        tokenizers=tokenizers,
        **mine,
        **arguments,
    )


def stop_of(saved: Mapping[str, Any]) -> DraftStop:
    """The stop that a candidate's argument stands for."""
    parameters = dict(saved)
    return STOPS[parameters.pop("kind")](**parameters)


def check(
    tuning: Tuning,
    members: Sequence[Any],
    prompts: Sequence[Tensor],
    *,
    drafts: Sequence[Any] = (),
    tokenizers: Sequence[Any] | None = None,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
    weights: Sequence[float] | None = None,
    ensemble: str = "mixture",
    scope: str = "member",
    plausibility: float = 0.0,
    **options: Any,
) -> list[Row]:
    """Run `tuning.checked()` for real: a row for each, plain the first.

    The arguments are those of `tune`, options those of `SpeculativeDecoder.generate`.
    """
    law: dict[str, Any] = {
        "weights": weights,
        "ensemble": ensemble,
        "scope": scope,
        "plausibility": plausibility,
    }
    works = {
        one.name: workload(
            decoder_of(one, members, drafts=drafts, tokenizers=tokenizers, **law),
            prompts,
            seed=seed,
            **options,
        )
        for one in tuning.checked()
    }
    return compare(works, repeats, progress=progress)


def _names(members: Sequence[Any]) -> tuple[str, ...]:
    """Names that tell models apart."""
    names = [one.name for one in members]
    return tuple(f"{name}:{i}" if names.count(name) > 1 else name for i, name in enumerate(names))


def _texts(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Tensor],
    *,
    seed: int,
    limit_s: float | None,
    options: Mapping[str, Any],
) -> list[tuple[Tensor, int]]:
    """(text, begin) of each prompt, until time is up; `options` as `SpeculativeDecoder.generate`'s.

    text: (1, S) int64. begin: tokens of the prompt.
    """
    began = time.perf_counter()
    limit = None if limit_s is None else limit_s / 2
    texts = []
    for i, prompt in enumerate(prompts):
        mask = torch.ones_like(prompt)
        text = decoder.generate(
            prompt, attention_mask=mask, seed=seed + i, **{**options, "max_time": limit}
        )
        texts.append((text, prompt.shape[1]))
        if limit_s is not None and time.perf_counter() - began > limit_s:
            break
    return texts


def _up_to_ends(
    texts: Sequence[tuple[Tensor, int]], ends: frozenset[int]
) -> list[tuple[Tensor, int]]:
    """(text, begin) without what was written beyond a text's end, if enough is left to read."""
    cut = []
    for text, begin in texts:
        written = text[0, begin:].tolist()
        size = next((at for at, token in enumerate(written, 1) if token in ends), len(written))
        cut.append((text[:, : begin + size], begin))
    left = sum(text.shape[1] - begin for text, begin in cut)
    return cut if left >= _LEAST_READ else list(texts)


def _medians(times: dict[int, list[float]]) -> Times:
    """Of the sizes that were timed as often as was meant; more tokens never take less time.

    Where time was short, two sizes that were timed less often tell more than one.
    """
    found: list[tuple[int, float]] = []
    enough = min(_ENOUGH, *sorted(map(len, times.values()))[-2:])
    for count in sorted(times):
        if len(times[count]) >= enough:
            least = found[-1][1] if found else 0.0
            found.append((count, max(statistics.median(times[count]), least)))
    return tuple(found)


# --- times ----------------------------------------------------------------------------------------


@dataclass
class _Sweep:
    """A schedule that writes the ensemble's text and times what it does, one row at a time.

    Each model is the proposer in turn, with each of `SIZES` less the token that verifies. No text
    ends before its last token.

    ends: tokens that would have ended it.
    forwards: model -> tokens -> seconds. draws: seconds.
    rest: drafts -> seconds of a turn without forwards and draws.
    """

    most_pending: int = max(SIZES)
    ends: frozenset[int] = frozenset()
    forwards: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    draws: list[float] = field(default_factory=list)
    rest: dict[int, list[float]] = field(default_factory=dict)
    law: Law | None = None
    member_laws: Sequence[Law] = ()
    _turns: int = 0
    # Of the turn that has begun: the run, its start, seconds that are accounted for, drafts.
    _open: tuple[Run, float, float, int] | None = None

    @property
    def complete(self) -> bool:
        """Whether there are times of each model, of several sizes, and of the loop."""
        blocks = all(len(times) > 1 for times in self.forwards.values())
        return bool(self.draws) and bool(self.rest) and blocks

    def turn(self, run: Run) -> list[Verification]:
        """Propose with the next proposer, score with all models."""
        if self._open is not None and self._open[0] is run:
            _, began, known, drafts = self._open
            self.rest.setdefault(drafts, []).append(time.perf_counter() - began - known)
        began = time.perf_counter()
        self.law, self.member_laws = run.law, run.member_laws
        self.ends |= run.stopper.eos
        run.stopper.eos = frozenset()
        row, models = run.rows[0], range(len(run.members))
        # Every pair in turn, and soon several sizes of each model.
        again, at = divmod(self._turns, len(SIZES))
        wanted = SIZES[at] - 1
        proposer = models[(again + at) % len(models)]
        drafts = min(wanted, run.room(row) - 1)
        known = 0.0
        for _ in range(drafts):
            known += self._feed(run, proposer)
            spent, _log_probs = _timed(run, lambda: run.draw(proposer, run.rows))
            self.draws.append(spent)
            known += spent
        if len(models) == 1:  # it has read its own drafts one by one, as nobody's look-up is read
            run.members[0].rollback([row.length - 1])
        for model in models:
            known += self._feed(run, model)
        self._turns += 1
        self._open = run, began, known, drafts
        return [Verification(run.rows, [drafts], bonus=True)]

    def _feed(self, run: Run, model: int) -> float:
        count = run.rows[0].end - run.members[model].lengths[0]
        spent, _nothing = _timed(run, lambda: run.feed(model, run.rows))
        self.forwards.setdefault(model, {}).setdefault(count, []).append(spent)
        return spent


def _timed(run: Run, work: Callable[[], _T]) -> tuple[float, _T]:
    began = time.perf_counter()
    result = work()
    if run.device.type != "cpu":
        torch.accelerator.synchronize(run.device)
    return time.perf_counter() - began, result


@dataclass
class _Endless:
    """A schedule whose texts go on beyond their ends; ends: the tokens that would have been."""

    schedule: Speculative
    ends: frozenset[int] = frozenset()

    @property
    def most_pending(self) -> int:
        return self.schedule.most_pending

    def turn(self, run: Run) -> list[Verification]:
        self.ends |= run.stopper.eos
        run.stopper.eos = frozenset()
        return self.schedule.turn(run)


# --- acceptance -----------------------------------------------------------------------------------


class _Agreement:
    """What is collected of every pair of laws, position by position.

    overlaps: overlaps[m][v]: per text, (T,) sums of min(p, q) of models m and v; the last v is the
        ensemble.
    drawn: per model and text, drafts at each position.
    asking: per kind of stop, seconds to ask it about one.
    look_ups: per text. looking: seconds of each.
    """

    def __init__(self, num_models: int, num_members: int, most: int) -> None:
        self.overlaps: list[list[list[Tensor]]] = [
            [[] for _ in range(num_models + 1)] for _ in range(num_models)
        ]
        self.drawn: list[list[_Drawn]] = [[] for _ in range(num_models)]
        self.asking: dict[str, list[float]] = {kind: [] for kind in STOPS}
        self.look_ups: list[_LookUps] = []
        self.looking: list[float] = []
        self.most = most
        # One member alone has nobody to propose to.
        self.proposers = range(0 if num_members > 1 else 1, num_models)

    def kept(self) -> tuple[tuple[Kept, ...], ...]:
        """As in `Profile`."""
        return tuple(tuple(_curve(texts, self.most) for texts in one) for one in self.overlaps)

    def blocks(self) -> tuple[tuple[Kept, ...], ...]:
        """As in `Profile`."""
        return tuple(_curves(one[-1], self.most) for one in self.overlaps)

    def fitted(self, model: int) -> tuple[float, float, float, float]:
        """Coefficients of the model's `LearnedStop`."""
        texts = self.drawn[model]
        return fit_stop(
            torch.cat([one.features.flatten(0, 1) for one in texts]),
            torch.cat([one.chances.flatten() for one in texts]),
        )

    def stopped(self, learned: Sequence[LearnedStop]) -> tuple[Stopped, ...]:
        """As in `Profile`: each kind of stop, of every model that may propose."""
        found = []
        for m in self.proposers:
            texts = self.drawn[m]
            for kind, ready in {**_READY, "learned": learned[m]}.items():
                chances = [one.chances.mean(-1) for one in texts]
                goes = [~one.asked(kind, ready) for one in texts]
                both = [(one.chances * go).mean(-1) for one, go in zip(texts, goes, strict=True)]
                going = [go.double().mean(-1) for go in goes]
                kept, on = _stopped_curves(chances, both, going, self.most)
                stop = {"kind": kind, **asdict(ready)}
                asking = statistics.median(self.asking[kind])
                found.append(Stopped(m, stop, on, kept, asking))
        return tuple(found)


@dataclass(frozen=True)
class _Drawn:
    """Drafts drawn from a model's law at each position of a text.

    features: (T, D, 4), as in `stop_features`. chances: (T, D). That the ensemble keeps them.
    stops: kind -> (T, D) bool. Whether a stop that is ready asks for an end after them.
    """

    features: Tensor
    chances: Tensor
    stops: dict[str, Tensor]

    @staticmethod
    def joined(parts: "Sequence[_Drawn]") -> "_Drawn":
        return _Drawn(
            torch.cat([one.features for one in parts]),
            torch.cat([one.chances for one in parts]),
            {kind: torch.cat([one.stops[kind] for one in parts]) for kind in parts[0].stops},
        )

    def asked(self, kind: str, stop: Any) -> Tensor:
        """(T, D) bool: whether the stop asks for an end."""
        if kind in self.stops:
            return self.stops[kind]
        expected = self.features @ torch.tensor(stop.coefficients, dtype=torch.float64)
        asks: Tensor = torch.sigmoid(expected) < stop.least
        return asks


def _curves(texts: Sequence[Tensor], most: int) -> tuple[Kept, ...]:
    """A `_curve` for blocks of 1, 2, ... drafts."""
    return tuple(_curve(texts, size, size) for size in range(1, most + 1))


def _curve(texts: Sequence[Tensor], most: int, size: int | None = None) -> Kept:
    """Chances that the first 1, 2, ... of a block are kept, of the blocks that begin in the texts.

    Blocks begin where others ended: where drafts are refused often, they begin often.

    Args:
        texts: (T,) chances that a draft is kept at each position.
        most: tokens of the longest block.
        size: of the blocks before; None is a middling one, for blocks of many sizes.
    """
    before = max(most // 2, 1) if size is None else size
    starts = [_starts(text, text, before) for text in texts]
    return _averaged(texts, texts, starts, most)


def _stopped_curves(
    chances: Sequence[Tensor], both: Sequence[Tensor], going: Sequence[Tensor], most: int
) -> tuple[Kept, Kept]:
    """Of blocks that stop by themselves, `kept` and `going` as in `Stopped`.

    Args:
        chances: per text, (T,) chances that a draft is kept.
        both: that it is kept and the proposer goes on. going: that the proposer goes on.
        most: tokens of the longest block.
    """
    starts = [_starts(one, more, most) for one, more in zip(chances, both, strict=True)]
    return _averaged(chances, both, starts, most), _averaged(going, going, starts, most)


def _averaged(
    last: Sequence[Tensor], before: Sequence[Tensor], starts: Sequence[Tensor], most: int
) -> Kept:
    """Means over blocks, weighted by where they begin, of the product of chances in a row.

    last: per text, (T,) chances of the block's last place. before: of the places before it.
    """
    found: list[float] = []
    for count in range(1, most + 1):
        part = total = 0.0
        for end, going, weights in zip(last, before, starts, strict=True):
            if len(end) >= count:
                reached = going.unfold(0, count, 1)[:, :-1].prod(-1)
                chances = reached * end[count - 1 :]
                part += float(chances @ weights[: len(chances)])
                total += float(weights[: len(chances)].sum())
        # Ends of blocks that are as long as a text say nothing.
        if total == 0:
            break
        found.append(min(part / total, found[-1] if found else 1.0))
    return tuple(found)


def _starts(kept: Tensor, both: Tensor, size: int) -> Tensor:
    """(T,) chances that a block of `size` drafts begins at each position, one at the first.

    Args:
        kept: (T,) chances that a draft is kept.
        both: (T,) that it is kept, and another follows if the block has room.
        size: drafts of a block at most.
    """
    chances, follows = kept.tolist(), both.tolist()
    length = len(chances)
    begins = [1.0] + [0.0] * (length + size)
    for start in range(length):
        going = begins[start]
        for place in range(start, min(start + size, length)):
            begins[place + 1] += going * (1 - chances[place])
            last = place == start + size - 1
            # After a draft that is kept and is the last one, the ensemble adds a token.
            begins[place + 2] += going * (chances[place] - (0.0 if last else follows[place]))
            going *= follows[place]
    return torch.tensor(begins[:length], dtype=torch.float64)


# --- what is looked up ----------------------------------------------------------------------------


class _LookUps:
    """What `schedules.Lookup` would have proposed at each place of a text that was written.

    What it proposes is kept if the ensemble's token is the same, so that the text tells how many:
    of the first one that it does not tell, and of the last that it does, the law tells the chance.
    """

    def __init__(self, text: Sequence[int], begin: int, most: int) -> None:
        self.seconds: list[float] = []
        self._tokens = text[begin:]
        self._occurrences = Occurrences()
        self._found = [self._look_up(text[:at], most) for at in range(begin, len(text))]
        self._longest = max(map(len, self._found), default=0)
        # Per place, the chances of as many proposals as are known to follow the text, and one more.
        self._chances: list[list[float]] = [[] for _ in self._found]

    def _look_up(self, text: Sequence[int], most: int) -> list[int]:
        began = time.perf_counter()
        found = self._occurrences.continuation(text, Lookup(most).longest, most)
        self.seconds.append(time.perf_counter() - began)
        return found

    def read(self, place: int, law: Tensor) -> None:
        """Note what the ensemble's law (V,) at a place says; place by place."""
        for start in range(max(place - self._longest + 1, 0), place + 1):
            found, depth = self._found[start], place - start
            if depth < len(found) and found[:depth] == self._tokens[start:place]:
                self._chances[start].append(float(law[found[depth]]))

    def turns(self, gamma: int) -> Iterator[tuple[int, float]]:
        """(drafts, how many of them are expected to be kept) of each turn of this very text."""
        place = 0
        while place < len(self._tokens):
            drafts = self._found[place][:gamma]
            if place + len(drafts) > len(self._tokens):
                return  # what the text does not tell
            yield len(drafts), sum(self._chances[place][:gamma])
            same = 0
            while same < len(drafts) and drafts[same] == self._tokens[place + same]:
                same += 1
            place += same + 1


def _replayed(texts: Sequence[_LookUps], gamma: int) -> Found:
    """What looking up at most gamma tokens would have found."""
    turns: dict[int, list[float]] = {}
    for text in texts:
        for drafts, kept in text.turns(gamma):
            turns.setdefault(drafts, []).append(kept)
    count = sum(map(len, turns.values()))
    return tuple((n, len(kept) / count, sum(kept) / len(kept)) for n, kept in sorted(turns.items()))


# --- reading --------------------------------------------------------------------------------------


def _read(
    decoder: SpeculativeDecoder, sweep: _Sweep, agreement: _Agreement, text: Tensor, begin: int
) -> None:
    """Let every model read a text (1, S) and compare their laws from the token at `begin` on."""
    assert sweep.law is not None
    law, size = sweep.law, decoder.num_ensemble
    greedy = bool(law.temperature == 0)
    length = text.shape[1] - 1  # the last token leads to no law
    overlaps: dict[tuple[int, int], list[Tensor]] = {}
    drawn: list[list[_Drawn]] = [[] for _ in decoder.members]
    looked = _LookUps(text[0].tolist(), begin, agreement.most)
    place = 0
    try:
        for logits in _chunks(decoder.members, text[:, :length], begin - 1):
            bare = [_law([one], own) for one, own in zip(logits, sweep.member_laws, strict=True)]
            bare.append(_law(logits[:size], law))
            laws = [_collapsed(one) for one in bare] if greedy else bare
            for m in range(len(logits)):
                for v, other in enumerate(laws):
                    overlap = torch.minimum(laws[m], other).sum(-1).clamp(max=1)
                    overlaps.setdefault((m, v), []).append(overlap.double().cpu())
                columns = logits[m][0, :, : laws[m].shape[-1]]
                drawn[m].append(_drafts(columns, laws[m], laws[-1], greedy))
            for kind, seconds in _asking(logits[0][0, :1, : laws[0].shape[-1]]).items():
                agreement.asking[kind].append(seconds)
            for row in laws[-1].cpu():
                looked.read(place, row)
                place += 1
    finally:
        for one in decoder.members:
            one.release()
    for (m, v), pieces in overlaps.items():
        agreement.overlaps[m][v].append(torch.cat(pieces))
    for m, chunks in enumerate(drawn):
        agreement.drawn[m].append(_Drawn.joined(chunks))
    agreement.look_ups.append(looked)
    agreement.looking += looked.seconds


def _relaxation(
    decoder: SpeculativeDecoder,
    sweep: _Sweep,
    rule: Acceptance,
    proposer: int,
    most: int,
    write: Callable[[], list[tuple[Tensor, int]]],
) -> Relaxed:
    """What a lossy rule keeps of a proposer's drafts, in texts that the two of them write.

    Where the text is another one, so is what is kept: the exact text would not tell.
    """
    assert sweep.law is not None
    law, size = sweep.law, decoder.num_ensemble
    schedule = _Endless(Speculative(proposer, _PROPOSED))
    decoder.schedule, decoder.acceptances = schedule, [rule]
    models = [*decoder.members[:size], decoder.members[proposer]]
    # A member that proposes reads once.
    models = models[:size] if proposer < size else models
    chances, distances = [], []
    for text, begin in _up_to_ends(write(), schedule.ends):
        found = []
        try:
            for logits in _chunks(models, text[:, :-1], begin - 1):
                draft = _law([logits[min(proposer, size)]], sweep.member_laws[proposer])
                target = _law(logits[:size], law)
                found.append(relaxed(rule, target, draft, greedy=bool(law.temperature == 0)))
        finally:
            for one in decoder.members:
                one.release()
        kept, far = (torch.cat(parts) for parts in zip(*found, strict=True))
        chances.append(kept)
        distances.append(far)
    mean = float(torch.cat(distances).mean())
    return Relaxed(proposer, written(rule), rule.rule.law, _curves(chances, most), mean)


def _law(logits: Sequence[Tensor], law: Law) -> Tensor:
    """(T, V) probabilities of the next tokens; bare at temperature 0."""
    return mix(logits, law)[0][0].exp()


def _collapsed(law: Tensor) -> Tensor:
    """(T, V): all on the most probable token."""
    return torch.nn.functional.one_hot(law.argmax(-1), law.shape[-1]).to(law)


def _chunks(members: Sequence[Any], text: Tensor, skip: int) -> Iterator[list[Tensor]]:
    """Every model's logits (1, T, V) at some positions after another, from `skip` on."""
    length = text.shape[1]
    for one in members:
        one.start(1, length)
        if skip > 0:
            one.forward(text[:, :skip], [skip], keep_last=1)
    for first in range(skip, length, _CHUNK):
        tokens = text[:, first : first + _CHUNK]
        count = tokens.shape[1]
        yield [one.forward(tokens, [count]).to(text.device) for one in members]


def _drafts(logits: Tensor, law: Tensor, target: Tensor, greedy: bool) -> _Drawn:
    """Drafts from a law, as stops see them, and the chances that they are kept.

    Args:
        logits: (T, V) of the model, bare. law: (T, V) of the model. target: (T, V) of the ensemble.
        greedy: whether stops are told of the bare law, as the loop does at temperature 0.
    """
    dice = torch.Generator(law.device).manual_seed(0)
    drawn = torch.multinomial(law, _DRAWS, replacement=True, generator=dice)  # (T, D)
    proposed, wanted = (one.gather(-1, drawn) for one in (law, target))
    said = logits.float().log_softmax(-1).gather(-1, drawn) if greedy else proposed.log()
    columns = [one[:, None] for one in said.unbind(-1)]
    features = torch.stack([stop_features(one, logits) for one in columns], 1)
    stops = {
        kind: torch.tensor([stop.asks(one, logits) for one in columns]).T
        for kind, stop in _READY.items()
    }
    return _Drawn(features.double(), (wanted / proposed).clamp(max=1).double().cpu(), stops)


def _asking(logits: Tensor) -> dict[str, float]:
    """Kind of stop -> seconds to ask it about one draft, from the logits (1, V) it came from."""
    said = logits.new_zeros(1, 1).float()
    stops: dict[str, DraftStop] = {**_READY, "learned": LearnedStop((0.0, 0.0, 0.0, 0.0))}
    found = {}
    for kind, stop in stops.items():
        began = time.perf_counter()
        stop.asks(said, logits)
        found[kind] = time.perf_counter() - began
    return found


def fit_stop(features: Tensor, chances: Tensor) -> tuple[float, float, float, float]:
    """The coefficients of `LearnedStop`, by Newton's method.

    Args:
        features: (N, 4) of drafts. chances: (N,) in [0, 1]. That they are kept.
    """
    features, chances = features.double(), chances.double()
    found = features.new_zeros(features.shape[1])

    def loss(tried: Tensor) -> Tensor:
        logits = features @ tried
        errors = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, chances, reduction="sum"
        )
        # Features that always tell, or two that say the same, have no one best answer.
        return errors + _RIDGE / 2 * tried @ tried

    for _ in range(30):
        expected = torch.sigmoid(features @ found)
        slope = features.T @ (expected - chances) + _RIDGE * found
        curvature = (features.T * (expected * (1 - expected))) @ features
        curvature += _RIDGE * torch.eye(len(found), dtype=torch.float64)
        step = torch.linalg.solve(curvature, slope)
        while loss(found - step) > loss(found) and float(step.norm()) > 1e-9:
            step = step / 2
        found = found - step
        if float(step.norm()) < 1e-8:
            break
    one, two, three, four = found.tolist()
    return one, two, three, four
