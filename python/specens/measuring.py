# SPDX-License-Identifier: Apache-2.0
"""What `tuning.py` predicts from: forward times and acceptance, measured on the user's models.

The models write a text as the decoder would, with each as the proposer in turn and blocks of every
size, so that all times are taken in the loop and take turns. Where a text ends they write on: how
long a forward takes does not depend on what is read. Then they read the texts again up to their
ends, and each law is compared with the ensemble's at every position. To measure one thing more, add
it to `Profile`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from specens_kernels import Law, mix

from .benchmark import Row, compare, sampling, workload
from .decoder import SpeculativeDecoder
from .run import Run
from .schedules import LearnedStop, Verification, stop_features
from .tuning import Candidate, Kept, Profile, Times, candidates, least_chance, plain

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
# Candidates that are run to be checked, and tokens of a proposal that a learned stop ends.
_CHECKED, _STOPPED = 7, 8

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

    def stopping(self) -> Candidate | None:
        """The fastest proposer with a learned stop, for which there is no prediction."""
        one = next((c for c in self.candidates if c.schedule == "speculative"), None)
        if one is None:
            return None
        size = len(self.profile.weights)
        proposer = size + one.drafts[0] if one.drafts else one.arguments["proposer"]
        stop = asdict(self.stops[proposer])
        arguments = one.arguments | {"num_speculative_tokens": _STOPPED, "stop": stop}
        name = f"speculative {self.profile.names[proposer]} until it stops"
        return Candidate(name, "speculative", arguments, one.drafts, math.nan)

    def checked(self) -> list[Candidate]:
        """What `check` runs: plain first, the fastest candidates, the learned stop."""
        ways = sorted(self.candidates, key=lambda one: one.schedule != "plain")[: _CHECKED + 1]
        stopping = self.stopping()
        return ways if stopping is None else [*ways, stopping]

    def listed(self, rows: Sequence[Row] | None = None) -> list[Candidate]:
        """All candidates; with what was measured, that of the learned stop is among them."""
        stopping = self.stopping() if rows else None
        return [*self.candidates, *([stopping] if stopping else [])]

    def best(self, rows: Sequence[Row] | None = None) -> Candidate:
        """The one that was measured to be the fastest, or else is predicted to be."""
        if not rows:
            return self.candidates[0]
        fastest = max(rows, key=lambda row: row.ratio).name
        return next(one for one in self.listed(rows) if one.name == fastest)

    def as_dict(self, rows: Sequence[Row] | None = None) -> dict[str, Any]:
        """Everything, for JSON."""
        measured = {row.name: row.as_dict() for row in rows or ()}
        return {
            "best": asdict(self.best(rows)),
            "candidates": [
                {**asdict(one), "speedup": self.speedup(one), "measured": measured.get(one.name)}
                for one in self.listed(rows)
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
    **arguments: Any,
) -> Tuning:
    """Measure the models and predict every schedule.

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
        arguments: for `SpeculativeDecoder`: weights, ensemble, scope, plausibility.
    Raises:
        ValueError: an argument is out of range, or there was no room to time every model.
    """
    began = time.perf_counter()
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
    texts = []
    for i, prompt in enumerate(prompts):
        mask = torch.ones_like(prompt)
        limit = None if limit_s is None else limit_s / 2
        text = decoder.generate(
            prompt, attention_mask=mask, seed=seed + i, max_time=limit, **options
        )
        texts.append((text, prompt.shape[1]))
        if limit_s is not None and time.perf_counter() - began > limit_s:
            break
    if not sweep.complete:
        written = sum(text.shape[1] - begin for text, begin in texts)
        expected = "enough to time every model alone and in blocks"
        raise ValueError(f"tune: max_new_tokens: expected {expected}, got {written} tokens in all")
    texts = _up_to_ends(texts, sweep.ends)
    agreement = _Agreement(len(decoder.members), most)
    for text, begin in texts:
        _read(decoder, sweep, agreement, text, begin)
    profile = Profile(
        names=_names(decoder.members),
        weights=decoder.weights,
        forwards=tuple(_medians(sweep.forwards[m]) for m in range(len(decoder.members))),
        draw=statistics.median(sweep.draws),
        verify=_medians(sweep.rest),
        kept=agreement.kept(),
    )
    components = temperature > 0 and decoder.ensemble == "mixture" and decoder.scope == "member"
    found = candidates(profile, most=most, components=components)
    stops = [
        LearnedStop(
            fit_stop(torch.cat(agreement.features[m]), torch.cat(agreement.chances[m])),
            least_chance(profile, m, found[0].seconds),
        )
        for m in range(len(decoder.members))
    ]
    written = sum(text.shape[1] - begin for text, begin in texts)
    return Tuning(profile, found, stops, written, time.perf_counter() - began)


def decoder_of(
    candidate: Candidate,
    members: Sequence[Any],
    *,
    drafts: Sequence[Any] = (),
    tokenizers: Sequence[Any] | None = None,
    **arguments: Any,
) -> SpeculativeDecoder:
    """The decoder that a candidate stands for; the arguments are those of `tune`."""
    size, stop = len(members), candidate.arguments.get("stop")
    if tokenizers is not None:
        tokenizers = [*tokenizers[:size], *(tokenizers[size + i] for i in candidate.drafts)]
    return SpeculativeDecoder(
        members,
        schedule=candidate.schedule,
        draft=[drafts[i] for i in candidate.drafts] or None,
        tokenizers=tokenizers,
        **candidate.arguments | ({} if stop is None else {"stop": LearnedStop(**stop)}),
        **arguments,
    )


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

    lookahead: int = max(SIZES)
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


# --- acceptance -----------------------------------------------------------------------------------


class _Agreement:
    """What is collected of every pair of laws, position by position.

    overlaps: overlaps[m][v]: per text, (T,) sums of min(p, q) of models m and v; the last v is the
        ensemble.
    features, chances: per model, what `fit_stop` is fitted to.
    """

    def __init__(self, num_models: int, most: int) -> None:
        self.overlaps: list[list[list[Tensor]]] = [
            [[] for _ in range(num_models + 1)] for _ in range(num_models)
        ]
        self.features: list[list[Tensor]] = [[] for _ in range(num_models)]
        self.chances: list[list[Tensor]] = [[] for _ in range(num_models)]
        self._most = most

    def kept(self) -> tuple[tuple[Kept, ...], ...]:
        """As in `Profile`."""
        return tuple(tuple(_curve(texts, self._most) for texts in one) for one in self.overlaps)


def _curve(texts: Sequence[Tensor], most: int) -> Kept:
    """Chances that the first 1, 2, ... of a block are kept, of the blocks that begin in the texts.

    Blocks begin where others ended: where drafts are refused often, they begin often.

    Args:
        texts: (T,) chances that a draft is kept at each position.
        most: tokens of the longest block.
    """
    starts = [_starts(text.tolist(), max(most // 2, 1)) for text in texts]
    kept: list[float] = []
    for count in range(1, most + 1):
        part = total = 0.0
        for text, weights in zip(texts, starts, strict=True):
            if len(text) >= count:
                chances = text.unfold(0, count, 1).prod(-1)
                part += float(chances @ weights[: len(chances)])
                total += float(weights[: len(chances)].sum())
        # Ends of blocks that are as long as a text say nothing.
        if total == 0:
            break
        kept.append(min(part / total, kept[-1] if kept else 1.0))
    return tuple(kept)


def _starts(kept: Sequence[float], size: int) -> Tensor:
    """(T,) chances that a block of `size` drafts begins at each position, one at the first."""
    begins = [1.0] + [0.0] * (len(kept) + size)
    for start in range(len(kept)):
        going = begins[start]
        for place in range(start, min(start + size, len(kept))):
            begins[place + 1] += going * (1 - kept[place])
            going *= kept[place]
        begins[start + size + 1 if start + size < len(begins) - 1 else -1] += going
    return torch.tensor(begins[: len(kept)], dtype=torch.float64)


def _read(
    decoder: SpeculativeDecoder, sweep: _Sweep, agreement: _Agreement, text: Tensor, begin: int
) -> None:
    """Let every model read a text (1, S) and compare their laws from the token at `begin` on."""
    assert sweep.law is not None
    law, size = sweep.law, decoder.num_ensemble
    length = text.shape[1] - 1  # the last token leads to no law
    parts: dict[tuple[int, int], list[Tensor]] = {}
    try:
        for logits in _chunks(decoder.members, text[:, :length], begin - 1):
            laws = [_law([one], own) for one, own in zip(logits, sweep.member_laws, strict=True)]
            laws.append(_law(logits[:size], law))
            for m in range(len(logits)):
                for v, other in enumerate(laws):
                    overlap = torch.minimum(laws[m], other).sum(-1).clamp(max=1)
                    parts.setdefault((m, v), []).append(overlap.double().cpu())
                features, chances = _drafts(logits[m][0], laws[m], laws[-1])
                agreement.features[m].append(features)
                agreement.chances[m].append(chances)
    finally:
        for one in decoder.members:
            one.release()
    for (m, v), overlaps in parts.items():
        agreement.overlaps[m][v].append(torch.cat(overlaps))


def _law(logits: Sequence[Tensor], law: Law) -> Tensor:
    """(T, V) probabilities of the next tokens; greedily, all on one."""
    log_probs = mix(logits, law)[0][0]
    if law.temperature == 0:
        best = log_probs.argmax(-1)
        return torch.nn.functional.one_hot(best, log_probs.shape[-1]).to(log_probs)
    return log_probs.exp()


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


def _drafts(logits: Tensor, law: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts from a law, as `LearnedStop` sees them, and the chances that they are kept.

    Args:
        logits: (T, V) of the model. law: (T, V) of the model. target: (T, V) of the ensemble.
    Returns:
        (T * _DRAWS, 4) features, (T * _DRAWS,) chances.
    """
    dice = torch.Generator(law.device).manual_seed(0)
    drawn = torch.multinomial(law, _DRAWS, replacement=True, generator=dice)  # (T, _DRAWS)
    proposed, wanted = (one.gather(-1, drawn) for one in (law, target))
    bare = logits[:, : law.shape[-1]]
    features = [stop_features(one[:, None], bare) for one in proposed.log().unbind(-1)]
    chances = (wanted / proposed).clamp(max=1)
    return torch.cat(features).double(), chances.T.flatten().double().cpu()


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
