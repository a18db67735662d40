# SPDX-License-Identifier: Apache-2.0
"""`tune`: measure the user's models, predict every schedule, and say which is the fastest.

The models write a text and are timed (`measure.py`), read it and are compared (`agreement.py`); the
`Profile` of both is searched for the best candidates (`search.py`), which `check` runs for real. To
measure one thing more, add it to `Profile`.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.loop.profile import Candidate, Profile
from specens.schedules import LearnedStop, Plain
from specens.tuning.agreement import Agreement, read
from specens.tuning.compare import Comparison, compare, workload
from specens.tuning.lookups import replayed
from specens.tuning.lossy import check_lossy
from specens.tuning.measure import Sweep, count_tokens, medians, up_to_ends, write_texts
from specens.tuning.relaxation import measure_rule
from specens.tuning.search import candidates, least_chance
from specens_kernels import Acceptance, Refusal

# Candidates that are run to be checked.
_CHECKED = 8


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
        return Plain.seconds(self.profile) / candidate.seconds

    def checked(self) -> list[Candidate]:
        """What `check` runs: plain first, then the fastest candidates, and all that are lossy."""
        exact = [candidate for candidate in self.candidates if candidate.lossless]
        exact.sort(key=lambda candidate: not isinstance(candidate.schedule, Plain))
        lossy = [candidate for candidate in self.candidates if not candidate.lossless]
        return [*exact[: _CHECKED + 1], *lossy]

    def best(self, comparisons: Sequence[Comparison] | None = None) -> Candidate:
        """The one that was measured to be the fastest, or else is predicted to be; never lossy."""
        exact = [candidate for candidate in self.candidates if candidate.lossless]
        if not comparisons:
            return exact[0]
        ratios = {comparison.name: comparison.ratio for comparison in comparisons}
        measured = [candidate for candidate in exact if candidate.name in ratios]
        return max(measured, key=lambda candidate: ratios[candidate.name])

    def as_dict(self, comparisons: Sequence[Comparison] | None = None) -> dict[str, Any]:
        """Everything, for JSON."""
        measured = {comparison.name: comparison.as_dict() for comparison in comparisons or ()}
        return {
            "best": self.best(comparisons).as_dict(),
            "candidates": [
                {
                    **candidate.as_dict(),
                    "speedup": self.speedup(candidate),
                    "measured": measured.get(candidate.name),
                }
                for candidate in self.candidates
            ],
            "stops": dict(zip(self.profile.names, map(str, self.stops), strict=True)),
            "profile": self.profile.as_dict(),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
        }


def tune(
    members: Sequence[Any],
    prompts: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    drafts: Sequence[Any] = (),
    tokenizers: Sequence[Any] | None = None,
    most: int = 8,
    seed: int = 0,
    limit_s: float | None = None,
    acceptances: Sequence[Acceptance] = (),
    **arguments: Any,
) -> Tuning:
    """Measure the models and predict every schedule but "companion", which is for batches.

    Args:
        members: M >= 1 causal LMs whose ensemble writes.
        prompts: (1, S) int64 tensors that it continues.
        options: for `SpeculativeDecoder.generate`, as `compare.sampling` says them.
        drafts: causal LMs outside the ensemble, the smallest first.
        tokenizers: one per model, the drafts' last.
        most: highest number of speculative tokens that a model proposes at a time.
        seed: of the text.
        limit_s: seconds of writing after which no further prompt is begun, and half of which one
            may take; None is no limit.
        acceptances: lossy rules to measure as well, each with every proposer.
        arguments: for `SpeculativeDecoder`: weights, ensemble, scope, plausibility.
    Raises:
        Refusal: an argument is out of range, or there was no room to time every model.
    """
    began = time.perf_counter()
    rules = [check_lossy(acceptance) for acceptance in acceptances]
    if rules and len(members) == 1 and not drafts:
        raise Refusal("tune", "acceptance", "a draft or a second member to judge", "none")
    decoder = SpeculativeDecoder(
        members,
        schedule="hierarchy" if drafts else "plain",
        draft=list(drafts) or None,
        tokenizers=tokenizers,
        **arguments,
    )
    write = partial(write_texts, decoder, prompts, options, seed=seed, limit_s=limit_s)
    sweep, texts = _timed_texts(decoder, write)
    agreement = Agreement(len(decoder.members), decoder.num_ensemble, most)
    for text, begin in texts:
        read(decoder, sweep, agreement, text, begin)
    components = bool(options["do_sample"]) and decoder.averages_members
    search = partial(candidates, most=most, components=components)
    profile = _profile(decoder, sweep, agreement)
    stops = _stops(agreement, profile, search(profile)[0].seconds)
    lossy = [
        measure_rule(decoder, sweep, rule, m, most, write)
        for rule in rules
        for m in agreement.proposers
    ]
    profile = replace(profile, stopped=agreement.stopped(stops), relaxed=tuple(lossy))
    ranked = search(profile)
    return Tuning(profile, ranked, stops, count_tokens(texts), time.perf_counter() - began)


def _timed_texts(
    decoder: SpeculativeDecoder, write: Callable[[], list[tuple[Tensor, int]]]
) -> tuple[Sweep, list[tuple[Tensor, int]]]:
    """The texts up to their ends, and how long everything took as they were written."""
    decoder.schedule = sweep = Sweep()
    texts = write()
    if not sweep.complete:
        raise Refusal(
            "tune",
            "max_new_tokens",
            "enough to time every model alone and in blocks",
            f"{count_tokens(texts)} tokens in all",
        )
    return sweep, up_to_ends(texts, sweep.ends)


def _profile(decoder: SpeculativeDecoder, sweep: Sweep, agreement: Agreement) -> Profile:
    """What is known before stops are fitted and lossy rules are measured."""
    return Profile(
        names=_distinct_names(decoder.members),
        weights=decoder.weights,
        forwards=tuple(medians(sweep.forwards[m]) for m in range(len(decoder.members))),
        draw=statistics.median(sweep.draws),
        verify=medians(sweep.rest),
        kept=agreement.kept(),
        blocks=agreement.blocks(),
        found=tuple(replayed(agreement.look_ups, gamma) for gamma in range(1, agreement.most + 1)),
        look_up=statistics.median(agreement.looking),
    )


def _stops(agreement: Agreement, profile: Profile, seconds: float) -> list[LearnedStop]:
    """Of each model; `seconds`: what a token takes at best, so that a draft is worth its time."""
    return [
        LearnedStop(agreement.fitted(m), least_chance(profile, m, seconds))
        for m in range(len(profile.names))
    ]


def _distinct_names(members: Sequence[Any]) -> tuple[str, ...]:
    """Names that tell models apart."""
    names = [member.name for member in members]
    return tuple(f"{name}:{i}" if names.count(name) > 1 else name for i, name in enumerate(names))


def decoder_of(
    candidate: Candidate,
    members: Sequence[Any],
    *,
    drafts: Sequence[Any] = (),
    tokenizers: Sequence[Any] | None = None,
    **arguments: Any,
) -> SpeculativeDecoder:
    """The decoder that a candidate stands for; the arguments are those of `tune`."""
    size = len(members)
    if tokenizers is not None:
        tokenizers = [*tokenizers[:size], *(tokenizers[size + i] for i in candidate.drafts)]
    return SpeculativeDecoder(
        members,
        schedule=candidate.schedule,
        draft=[drafts[i] for i in candidate.drafts] or None,
        acceptance=Acceptance.parse(candidate.acceptance),
        tokenizers=tokenizers,
        **arguments,
    )


def check(
    tuning: Tuning,
    members: Sequence[Any],
    prompts: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
    **arguments: Any,
) -> list[Comparison]:
    """Run `tuning.checked()` for real: a comparison for each, plain the first.

    Options and arguments are those of `tune`, drafts and tokenizers among them.
    """
    works = {
        candidate.name: workload(
            decoder_of(candidate, members, **arguments), prompts, seed=seed, **options
        )
        for candidate in tuning.checked()
    }
    return compare(works, repeats, progress=progress)
