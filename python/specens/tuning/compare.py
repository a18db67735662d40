# SPDX-License-Identifier: Apache-2.0
"""Fair comparisons of decoders: the same work, interleaved, in one process.

A contestant is a function that does the work once and returns its `Statistics`, so that anything
that counts its tokens can take part. Machines slow down for a while and recover: contestants
therefore take turns, and a ratio is taken between neighbours of one round. `contestants` is where
the schedules that the command line and `benchmarks/` compare are listed: add one there.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.loop.generation_config import FIELDS, OPEN
from specens.loop.statistics import Statistics
from specens.schedules import Alternating, Speculative
from specens.tuning.finite import finite
from specens_kernels import Refusal


@dataclass(frozen=True)
class Comparison:
    """What `compare` found out about one contestant.

    tokens_per_second: median over the rounds, the prefill not counted; low, high: 10th and 90th
        percentile; best: the fastest round.
    ratio: median over the rounds of the speed against the first contestant's in the same round;
        ratio_low, ratio_high: 10th and 90th percentile.
    acceptance_rate: accepted / tested draft tokens of all rounds; NaN where nothing is drafted.
    calls_per_token: forwards of all members per emitted token.
    rounds: measured rounds.
    """

    name: str
    tokens_per_second: float
    low: float
    high: float
    best: float
    ratio: float
    ratio_low: float
    ratio_high: float
    acceptance_rate: float
    calls_per_token: float
    num_tokens: int
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: None in its place."""
        return {name: finite(value) for name, value in asdict(self).items()}


def compare(
    decoders: Mapping[str, Callable[[], Statistics]],
    repeats: int,
    *,
    limit_s: float | None = None,
    progress: Callable[[], None] | None = None,
) -> list[Comparison]:
    """Run the contestants in turn, round after round; the first round only warms up.

    Args:
        decoders: name to function; the first is what the others are compared to.
        repeats: measured rounds, >= 1.
        limit_s: begin no further round after this many seconds; one is always measured.
        progress: called after each contestant's turn.
    Returns:
        One comparison per contestant, in their order.
    Raises:
        Refusal: there are no contestants, or `repeats` is below 1.
    """
    if not decoders:
        raise Refusal("compare", "decoders", "at least one", "none")
    if repeats < 1:
        raise Refusal("compare", "repeats", "a count >= 1", repeats)
    began = time.perf_counter()
    rounds: list[dict[str, Statistics]] = []
    for number in range(repeats + 1):
        # Whoever runs after a slow neighbour finds other caches: the order changes every round.
        names = list(decoders) if number % 2 else list(decoders)[::-1]
        by_name = {}
        for name in names:
            by_name[name] = decoders[name]()
            if progress is not None:
                progress()
        if number > 0:
            rounds.append(by_name)
        late = limit_s is not None and time.perf_counter() - began > limit_s
        if rounds and late:
            break
    first = next(iter(decoders))
    return [
        _comparison(name, [(by_name[name], by_name[first]) for by_name in rounds])
        for name in decoders
    ]


def _comparison(name: str, rounds: list[tuple[Statistics, Statistics]]) -> Comparison:
    """Of a contestant, from (its statistics, the first one's) of each round."""
    speeds = [statistics.tokens_per_second for statistics, _ in rounds]
    ratios = [statistics.tokens_per_second / base.tokens_per_second for statistics, base in rounds]
    whole = total([statistics for statistics, _ in rounds])
    return Comparison(
        name,
        tokens_per_second=median(speeds),
        low=_percentile(speeds, 0.1),
        high=_percentile(speeds, 0.9),
        best=max(speeds),
        ratio=median(ratios),
        ratio_low=_percentile(ratios, 0.1),
        ratio_high=_percentile(ratios, 0.9),
        acceptance_rate=whole.acceptance_rate,
        calls_per_token=whole.calls_per_token,
        num_tokens=whole.num_tokens,
        rounds=len(rounds),
    )


def _percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the others lie below, interpolated."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def total(statistics: Sequence[Statistics]) -> Statistics:
    """The statistics of several calls with the same members, as if they were one.

    Raises:
        Refusal: there are none, or their members differ.
    """
    names = [call.members for call in statistics]
    if not names or any(members != names[0] for members in names):
        raise Refusal("total", "statistics", "calls with the same members", names)
    whole = Statistics(list(statistics[0].members))
    for call in statistics:
        whole.rows += call.rows
        whole.calls = [a + b for a, b in zip(whole.calls, call.calls, strict=True)]
        whole.turns += call.turns
        whole.prefill_seconds += call.prefill_seconds
        whole.decode_seconds += call.decode_seconds
    return whole


def contestants(
    members: Sequence[Any],
    *,
    gammas: Iterable[int],
    draft: Any = None,
    sampled: bool = True,
    tokenizers: Sequence[Any] | None = None,
    **arguments: Any,
) -> dict[str, SpeculativeDecoder]:
    """One decoder per schedule and number of speculative tokens, the plain ensemble first.

    Component sampling takes part where it is exact: sampled mixtures of scope "member". One model
    alone has nobody to take turns with, so "alternating" needs two.

    Args:
        members: M >= 1 causal LMs.
        gammas: tokens per proposal of the speculative schedules.
        draft: a separate draft for "speculative"; None lets the cheapest member draft.
        sampled: whether the temperature is above 0.
        tokenizers: one per model, the draft's last.
        arguments: for `SpeculativeDecoder`: weights, ensemble, scope...
    """
    size = len(members)
    own = None if tokenizers is None else list(tokenizers)[:size]
    decoders = {"plain": SpeculativeDecoder(members, schedule="plain", tokenizers=own, **arguments)}
    if sampled and decoders["plain"].averages_members:
        decoders["component"] = SpeculativeDecoder(
            members, schedule="component", tokenizers=own, **arguments
        )
    for gamma in gammas:
        if size > 1 or draft is not None:
            decoders[f"speculative {gamma}"] = SpeculativeDecoder(
                members,
                schedule=Speculative(tokens=gamma),
                draft=draft,
                tokenizers=own if draft is None else tokenizers,
                **arguments,
            )
        if size > 1:
            decoders[f"alternating {gamma}"] = SpeculativeDecoder(
                members,
                schedule=Alternating(tokens=gamma),
                tokenizers=own,
                **arguments,
            )
    return decoders


def workload(
    decoder: SpeculativeDecoder, prompts: Sequence[Tensor], *, seed: int = 0, **arguments: Any
) -> Callable[[], Statistics]:
    """A contestant for `compare`: continues each prompt in turn.

    Args:
        decoder: what writes.
        prompts: (1, S) int64 tensors. Prompt i uses `seed` + i in the first round, and seeds that
            were not used before in the next: texts differ in how well they can be drafted, and a
            few of them say little.
        arguments: for `SpeculativeDecoder.generate`.
    """
    seeds = itertools.count(seed)

    def work() -> Statistics:
        calls = []
        for prompt in prompts:
            mask = torch.ones_like(prompt)
            decoder.generate(prompt, attention_mask=mask, seed=next(seeds), **arguments)
            assert decoder.statistics is not None
            calls.append(decoder.statistics)
        return total(calls)

    return work


# All that a generation config may say about the law, or about what `generate` returns, switched
# off. Said in the call, even None goes before what the model's own generation config has.
_NEUTRAL = {name: field.neutral for name, field in FIELDS.items() if field.neutral is not OPEN}


def sampling(
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[str, Any]:
    """Arguments of `generate` that say all there is to say about the law.

    Transformers fills what is left out from the first model's generation config (a repetition
    penalty, top-k 50, beams), which no two models share: every law here is the one that was asked
    for. Its end-of-sequence tokens alone are the first model's to say.

    Args:
        max_new_tokens: most tokens to write.
        temperature: >= 0; 0 is greedy.
        top_k, top_p, min_p: as in `specens_kernels.Law`.
    """
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        **_NEUTRAL,
    }
    if temperature > 0:
        arguments |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return arguments
