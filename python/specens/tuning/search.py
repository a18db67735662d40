# SPDX-License-Identifier: Apache-2.0
"""The search: the best candidate of each kind of schedule, by predicted time per token.

Pure functions of a `Profile`. Numbers of tokens are tried one by one for few models, else some of
them. To add a kind of schedule, add a function that lists its candidates and call it in
`candidates`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specens.tuning.predict import (
    _MOST_AHEAD,
    Profile,
    _Counts,
    _filled,
    _proposed,
    _verified,
    alternating,
    component,
    lookahead,
    lookup,
    plain,
    relaxing,
    speculative,
    stopping,
)

# Drafts, their numbers of tokens, what they hand up, and its time.
_Path = tuple[tuple[int, ...], tuple[int, ...], _Counts, float]

# As many models whose orders, or whose numbers of tokens, are all tried.
_FEW = 3


@dataclass(frozen=True)
class Candidate:
    """One way to decode, and what it is expected to take.

    name: for tables. schedule, arguments: for `SpeculativeDecoder`.
    drafts: which of the models outside the ensemble take part, counted from 0.
    seconds: predicted, per token.
    law: of the text: "target" where it is what was asked for, else what it is instead.
    divergence: from the law asked for, at the place of a draft; as in `Relaxed`.
    """

    name: str
    schedule: str
    arguments: dict[str, Any]
    drafts: tuple[int, ...]
    seconds: float
    law: str = "target"
    divergence: float = 0.0

    @property
    def lossless(self) -> bool:
        """Whether the text has exactly the law that was asked for."""
        return self.law == "target"


def candidates(profile: Profile, *, most: int = 8, components: bool = True) -> list[Candidate]:
    """The best of each kind, the fastest first: of each proposer, and of each chain of drafts.

    All are lossless but those with a rule of `profile.relaxed`.

    Args:
        profile: the models.
        most: highest number of tokens that a model proposes at a time.
        components: whether the law is a sampled mixture of members, each of which can write alone.
    """
    listed = [Candidate("plain", "plain", {}, (), plain(profile))]
    listed += _alternations(profile, most)
    listed += _proposers(profile, most)
    listed += _chains(profile, most)
    listed += _lookups(profile)
    listed += _stops(profile, most)
    listed += _relaxations(profile, most)
    if components and len(profile.weights) > 1:
        listed.append(Candidate("component", "component", {}, (), component(profile)))
        listed += _lookaheads(profile)
    return sorted(listed, key=lambda candidate: candidate.seconds)


def _alternations(profile: Profile, most: int) -> list[Candidate]:
    size = len(profile.weights)
    if size < 2:
        return []
    orders: list[tuple[int, ...]]
    if size <= _FEW:
        orders = list(itertools.permutations(profile.members))
        steps = range(1, most + 1) if size < _FEW else _some(most)
        tokens = list(itertools.product(steps, repeat=size))
    else:
        orders = [tuple(sorted(profile.members, key=lambda m: profile.forward(m, 1)))]
        tokens = [(gamma, *[1] * (size - 1)) for gamma in range(1, most + 1)]
    seconds, order, gammas = min(
        (alternating(profile, order, gammas), order, gammas)
        for order in orders
        for gammas in tokens
    )
    name = f"alternating {_joined(order)} {_joined(gammas)}"
    arguments = {"num_speculative_tokens": list(gammas), "order": list(order)}
    return [Candidate(name, "alternating", arguments, (), seconds)]


def _proposers(profile: Profile, most: int) -> list[Candidate]:
    """Members that draft for the ensemble they belong to."""
    listed = []
    for proposer in profile.members if len(profile.weights) > 1 else ():
        seconds, gamma = min((speculative(profile, proposer, g), g) for g in range(1, most + 1))
        name = f"speculative {profile.names[proposer]} {gamma}"
        arguments = {"num_speculative_tokens": gamma, "proposer": proposer}
        listed.append(Candidate(name, "speculative", arguments, (), seconds))
    return listed


def _chains(profile: Profile, most: int) -> list[Candidate]:
    """Every chain of drafts with its best numbers of tokens; one draft alone is "speculative"."""
    steps = list(range(1, most + 1)) if len(profile.drafts) <= _FEW else _some(most)
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
    for chain, gammas, counts, proposing in _paths(profile, steps):
        if len(chain) == 1:
            seconds = speculative(profile, chain[0], gammas[0])
        else:
            seconds = _verified(profile, chain[-1], counts, proposing)
        best[chain] = min(best.get(chain, (seconds, gammas)), (seconds, gammas))
    return [_chain(profile, chain, gammas, seconds) for chain, (seconds, gammas) in best.items()]


def _chain(
    profile: Profile, chain: Sequence[int], gammas: Sequence[int], seconds: float
) -> Candidate:
    names = " ".join(profile.names[m] for m in chain)
    drafts = tuple(m - len(profile.weights) for m in chain)
    if len(chain) == 1:
        arguments: dict[str, Any] = {"num_speculative_tokens": gammas[0]}
        name = f"speculative {names} {gammas[0]}"
        return Candidate(name, "speculative", arguments, drafts, seconds)
    arguments = {"num_speculative_tokens": list(gammas)}
    return Candidate(
        f"hierarchy {names} {_joined(gammas)}", "hierarchy", arguments, drafts, seconds
    )


def _paths(profile: Profile, steps: Sequence[int]) -> Iterator[_Path]:
    """All chains of drafts with all numbers of tokens; each extends one seen before."""
    paths: list[_Path] = []
    for level in profile.drafts:
        longer: list[_Path] = [
            ((level,), (gamma,), *_proposed(profile, level, gamma)) for gamma in steps
        ]
        for chain, gammas, counts, seconds in paths:
            for gamma in steps:
                filled = _filled(profile, chain[-1], level, gamma, counts, seconds)
                longer.append(((*chain, level), (*gammas, gamma), *filled))
        yield from longer
        paths += longer


def _lookaheads(profile: Profile) -> list[Candidate]:
    listed = []
    for proposer in profile.members:
        if not 0 < profile.weights[proposer] < 1:
            continue
        seconds, ahead = min((lookahead(profile, proposer, a), a) for a in range(_MOST_AHEAD + 1))
        name = f"lookahead {profile.names[proposer]} {ahead}"
        arguments = {"proposer": proposer, "ahead": ahead}
        listed.append(Candidate(name, "lookahead", arguments, (), seconds))
    return listed


def _lookups(profile: Profile) -> list[Candidate]:
    if not profile.found:
        return []
    seconds, gamma = min((lookup(profile, g), g) for g in range(1, len(profile.found) + 1))
    arguments = {"num_speculative_tokens": gamma}
    return [Candidate(f"lookup {gamma}", "lookup", arguments, (), seconds)]


def _relaxations(profile: Profile, most: int) -> list[Candidate]:
    """For each rule, whose drafts it is best for."""
    best: dict[str, Candidate] = {}
    for rule in profile.relaxed:
        seconds, gamma = min((relaxing(profile, rule, g), g) for g in range(1, most + 1))
        arguments = {"num_speculative_tokens": gamma, "acceptance": rule.acceptance}
        proposer, drafts = _proposer(profile, rule.model)
        candidate = Candidate(
            f"speculative {profile.names[rule.model]} {gamma} {rule.acceptance}",
            "speculative",
            arguments | proposer,
            drafts,
            seconds,
            rule.law,
            rule.divergence,
        )
        earlier = best.get(rule.acceptance, candidate)
        best[rule.acceptance] = min(earlier, candidate, key=lambda each: each.seconds)
    return list(best.values())


def _stops(profile: Profile, most: int) -> list[Candidate]:
    """For each kind of stop, whose drafts it had better end."""
    best: dict[str, Candidate] = {}
    for stopped in profile.stopped:
        seconds, gamma = min((stopping(profile, stopped, g), g) for g in range(2, max(most, 2) + 1))
        arguments: dict[str, Any] = {"num_speculative_tokens": gamma, "stop": stopped.stop}
        proposer, drafts = _proposer(profile, stopped.model)
        kind = stopped.stop["kind"]
        name = f"speculative {profile.names[stopped.model]} {gamma} {kind} stop"
        candidate = Candidate(name, "speculative", arguments | proposer, drafts, seconds)
        best[kind] = min(best.get(kind, candidate), candidate, key=lambda each: each.seconds)
    return list(best.values())


def _proposer(profile: Profile, model: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments and drafts by which a candidate says who proposes."""
    separate = model - len(profile.weights)
    return ({"proposer": model}, ()) if separate < 0 else ({}, (separate,))


def _some(most: int) -> list[int]:
    return [gamma for gamma in (1, 2, 3, 4, 6, 8, 12, 16) if gamma <= most]


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
