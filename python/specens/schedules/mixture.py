# SPDX-License-Identifier: Apache-2.0
"""Schedules for sampled mixtures, which draw the member that each token comes from beforehand.

Which member a token of a mixture comes from does not depend on the text: it is a coin of its own.
So one member's call is enough for a token. Exact for mixtures of scope "member" at temperature > 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from specens.loop.named import argument, count, counts, number
from specens.loop.profile import Candidate, Profile
from specens.loop.schedule import Models, Schedule, Verification, one_each
from specens_kernels import Refusal

if TYPE_CHECKING:
    from specens.loop.rows import Row
    from specens.loop.run import Run
    from specens_kernels import Law

_MOST_AHEAD = 8
# Chances below which nothing is expected.
_NEVER = 1e-12
# How likely another member's token is kept, as long as nothing is known.
KEPT = 0.6


@dataclass(frozen=True)
class Component(Schedule):
    """Draw a member by its weight, then the token from it alone: one call a token.

    Members catch up on what they have missed when they are next drawn. Where a member's law is
    empty, its logits NaN, the other schedules go by the other members; this one draws it all the
    same, and a bit of the status says so.

    Source: Mixture-model-like ensemble, arXiv:2605.00419.
    """

    name: ClassVar[str] = "component"
    summary: ClassVar[str] = "a sampled mixture: each token from one member, drawn by weight"
    sampled_mixture: ClassVar[bool] = True

    def turn(self, run: "Run") -> list[Verification]:
        """Score with the members drawn."""
        drawn: dict[int, list[Row]] = {}
        for row in run.rows:
            drawn.setdefault(components(run, row, 1)[0], []).append(row)
        for member, rows in drawn.items():
            run.feed(member, rows)
        return [
            Verification(rows, [0] * len(rows), bonus=True, members=(member,))
            for member, rows in drawn.items()
        ]

    @staticmethod
    def seconds(profile: Profile) -> float:
        """Per token: a member reads what it has missed since it was last drawn."""
        total = profile.check(0)
        for member, weight in zip(profile.members, profile.weights, strict=True):
            left, missed = weight, 0
            while left > 1e-6:
                chance = weight * weight * (1 - weight) ** missed
                missed += 1
                if (1 - weight) ** missed < 1e-6:
                    chance = left
                total += chance * profile.forward(member, missed)
                left -= chance
        return total

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """The only one, of several members."""
        if len(profile.weights) > 1:
            yield Candidate(cls.name, cls(), cls.seconds(profile))


@dataclass(frozen=True)
class LookAhead(Schedule):
    """Component sampling that speculates: the members of the next tokens are drawn beforehand.

    One member proposes: a token that was to come from it is the final one, and only the others can
    be refused, by the one member that they were to come from. A proposal ends right before a token
    of another member, who draws that one itself: nothing is proposed in vain at its end.

    How likely a token is kept is learned from what became of the row's earlier ones, never from
    tokens that are still to be verified: the text stays exact.
    """

    name: ClassVar[str] = "lookahead"
    summary: ClassVar[str] = "component, where one member proposes for the others"
    sampled_mixture: ClassVar[bool] = True
    tokens: int = argument(16, count(1), "Tokens that a proposal has at most.")
    proposer: int | None = argument(
        None, count(0), "The member that proposes. None is the cheapest."
    )
    ahead: int | tuple[int, ...] | None = argument(
        None,
        counts(0),
        "Tokens of other members that are proposed before these are asked. Several numbers are by "
        "how likely one of them is kept, from 0 to 1. None goes by the members' sizes; members of "
        "one size then take 0.",
    )
    token_cost: float | None = argument(
        None,
        number(0),
        "Time that a token adds to another member's forward, relative to one without any; None is "
        "0.1. Only beside ahead=None.",
    )

    def bind(self, models: Models) -> "LookAhead":
        """See `Schedule`."""
        proposer = models.proposer(self.name, self.proposer)
        if self.ahead is not None:
            if self.token_cost is not None:
                raise Refusal(self.name, "token_cost", "None beside ahead", self.token_cost)
            return replace(self, proposer=proposer)
        costs = [size / max(models.sizes) for size in models.sizes]
        token_cost = 0.1 if self.token_cost is None else self.token_cost
        ahead = tuple(
            best_ahead(models.weights, costs, proposer, token_cost, tenths / 10, self.tokens)
            for tenths in range(11)
        )
        return replace(self, proposer=proposer, ahead=ahead, token_cost=None)

    @property
    def most_pending(self) -> int:
        """Tokens proposed per turn."""
        return self.tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Propose up to a token of another member; ask those whose tokens are among them."""
        assert self.proposer is not None, "bound"
        drawn = []
        for row in run.rows:
            row.survival.learn(row.length)
            owners = components(run, row, max(min(self.tokens + 1, run.room(row)), 1))
            others = [at for at, member in enumerate(owners) if member != self.proposer]
            ahead = self._ahead(row)
            end = others[ahead] if len(others) > ahead else len(owners) - 1
            drawn.append(owners[: end + 1])
            chances = [1.0 if member == self.proposer else KEPT for member in owners[:end]]
            row.survival.ask([(chance, chance) for chance in chances], row.length)
        counts = [len(owners) - 1 for owners in drawn]
        run.propose(self.proposer, run.rows, counts)
        for member in run.ensemble:
            # The proposer has no law yet after its last token, which only a token of its own needs.
            asked = [
                row
                for row, owners in zip(run.rows, drawn, strict=True)
                if member in (owners[-1:] if member == self.proposer else owners)
            ]
            if asked:
                run.feed(member, asked)
        scored = {member for owners in drawn for member in owners}
        scored |= {owner for row in run.rows for owner in row.pending}
        law = component_law(run, drawn)
        return [Verification(run.rows, counts, bonus=True, scored=scored, law=law)]

    def _ahead(self, row: "Row") -> int:
        """Tokens of other members to propose to the row."""
        assert self.ahead is not None, "bound"
        aheads = one_each(self.ahead)
        return aheads[round(row.survival.chance(KEPT) * (len(aheads) - 1))]

    @staticmethod
    def seconds(profile: Profile, proposer: int, ahead: int, tokens: int = 16) -> float:
        """Per token, with one number of tokens ahead.

        Another member's token is kept with the mean chance of all of them. Tokens that a member has
        missed while it was not asked are not counted.
        """
        share = profile.weights[proposer]
        others = {m: profile.weights[m] / (1 - share) for m in profile.members if m != proposer}
        kept = sum(part * profile.kept[proposer][m][0] for m, part in others.items())
        emitted = seconds = 0.0

        def end(drafts: int, foreign: int) -> float:
            asked = sum(
                (1 - (1 - part) ** foreign) * profile.forward(m, drafts + 1)
                for m, part in others.items()
            )
            return drafts * profile.proposal(proposer) + asked + profile.check(drafts)

        # Chances that so many of the tokens before this place are other members'.
        going = {0: 1.0}
        for place in range(tokens + 1):
            if sum(going.values()) < _NEVER:
                break
            emitted += sum(chance * kept**foreign for foreign, chance in going.items())
            following: dict[int, float] = {}
            for foreign, chance in going.items():
                own, other = chance * share, chance * (1 - share)
                if place == tokens:
                    seconds += own * (end(place, foreign) + profile.forward(proposer, 1))
                else:
                    following[foreign] = following.get(foreign, 0.0) + own
                if place == tokens or foreign == ahead:
                    seconds += other * end(place, foreign + 1)
                else:
                    following[foreign + 1] = following.get(foreign + 1, 0.0) + other
            going = following
        return seconds / emitted

    @classmethod
    def candidates(cls, profile: Profile, most: int) -> Iterator[Candidate]:
        """For each proposer, the best number of tokens ahead."""
        for proposer in profile.members if len(profile.weights) > 1 else ():
            if 0 < profile.weights[proposer] < 1:
                seconds, ahead = min(
                    (cls.seconds(profile, proposer, a), a) for a in range(_MOST_AHEAD + 1)
                )
                name = f"{cls.name} {profile.names[proposer]} {ahead}"
                yield Candidate(name, cls(proposer=proposer, ahead=ahead), seconds)


def components(run: "Run", row: "Row", count: int) -> list[int]:
    """The members that the row's next tokens are drawn from; known before any model runs."""
    at = row.length - row.prompt_length
    if len(row.components) < at + count:
        drawn = _drawn_components(run, at + count)
        for each in run.rows:
            each.components = drawn[each.index]
    return row.components[at : at + count]


def _drawn_components(run: "Run", size: int) -> list[list[int]]:
    """Of each row of the batch, the members that its first `size` tokens or more are drawn from."""
    import torch

    from specens_kernels import Stream

    weights = run.law.weights
    assert not isinstance(weights, torch.Tensor), "weights that are known beforehand"
    coins = run.numbers.first(Stream.COMPONENT, 0, size)[..., 0].double()
    shares = coins.new_tensor(weights).cumsum(0)
    drawn = torch.searchsorted(shares, coins, right=True)
    members: list[list[int]] = drawn.clamp_(max=len(weights) - 1).tolist()
    return members


def component_law(run: "Run", drawn: Sequence[list[int]]) -> "Law":
    """The law in which each position has the weights of one member."""
    import torch

    width = max(map(len, drawn))
    padded = [owners + owners[-1:] * (width - len(owners)) for owners in drawn]
    one_hot = torch.nn.functional.one_hot(torch.tensor(padded), len(run.ensemble))
    return replace(run.law, weights=one_hot.to(run.device, torch.float32))


def best_ahead(
    weights: Sequence[float],
    costs: Sequence[float],
    proposer: int,
    token_cost: float,
    acceptance: float,
    most: int,
) -> int:
    """How far `LookAhead` writes ahead with the least expected time per token.

    Args:
        weights: of the members. costs: time of a forward of each, in any unit.
        proposer: which of them proposes.
        token_cost: time that a proposed token adds to another's forward, relative to it.
        acceptance: chance that a token proposed for another member is kept.
        most: tokens proposed at most.
    """
    if weights[proposer] >= 1:
        return 0
    size = len(weights)
    profile = Profile(
        names=tuple(map(str, range(size))),
        weights=tuple(weights),
        forwards=tuple(((1, cost), (2, cost * (1 + token_cost))) for cost in costs),
        draw=0.0,
        verify=((0, 0.0),),
        kept=(((acceptance,),) * (size + 1),) * size,
    )
    aheads = range(_MOST_AHEAD + 1)
    return min(aheads, key=lambda ahead: LookAhead.seconds(profile, proposer, ahead, most))
