# SPDX-License-Identifier: Apache-2.0
"""Schedules: who proposes, how many tokens, who verifies, turn by turn.

A schedule is asked once a turn, with the run in hand (`run.Run`): it makes members propose and
score (`run.propose`, `run.feed`, `run.draw`, `run.check`, `run.compare`, `run.look_up`), or takes
back what they proposed (`run.drop`, `run.withdraw`), and returns what is to be verified. It never
looks at a token. To add a schedule, add a class here that can be made of what was `Asked`, and its
entry in `SCHEDULES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from specens.arguments import Asked, integers, is_integer, unknown, wrong
from specens.tuning.predict import best_ahead

if TYPE_CHECKING:
    from specens.loop.rows import Row
    from specens.loop.run import Run


@dataclass(frozen=True)
class Verification:
    """Rows to verify together.

    rows: the rows.
    num_drafts: per row, how many of its pending tokens are verified.
    bonus: whether a row whose drafts are all kept emits one token more.
    members: who the verifying law is made of; None is the whole ensemble.
    components: per row, the one member that each of its num_drafts + 1 tokens is drawn from; None
        is the whole ensemble at each.
    withdrawn: per row, whether the token proposed after its num_drafts was taken back for what it
        is (`run.withdraw`); None is nowhere.
    """

    rows: "Sequence[Row]"
    num_drafts: Sequence[int]
    bonus: bool
    members: Sequence[int] | None = None
    components: Sequence[list[int]] | None = None
    withdrawn: Sequence[bool] | None = None


class DraftStop(Protocol):
    """When a proposer had better let the others speak.

    It is asked after a token has been drawn, and that token stays proposed: to take it back because
    of what it is would change the law of the text.
    """

    def asks(self, log_probs: Tensor, logits: Tensor) -> list[bool]:
        """Whether each row stops.

        Args:
            log_probs: (R, 1) float32. Of the tokens just drawn, under the draft's law.
            logits: (R, V). The draft's bare logits that they were drawn from.
        """
        ...


@dataclass(frozen=True)
class ConfidenceStop:
    """Stops after a token that the draft itself found less likely than `least`: [0, 1].

    Source: transformers' `assistant_confidence_threshold`.
    """

    least: float = 0.4

    def asks(self, log_probs: Tensor, logits: Tensor) -> list[bool]:
        """See `DraftStop`."""
        return [one < self.least for one in log_probs[:, 0].exp().tolist()]


@dataclass(frozen=True)
class EntropyStop:
    """Stops where 1 - sqrt(scale H) < least, a bound of acceptance by the draft's entropy H.

    Source: AdaEDL, arXiv:2410.18351.
    """

    least: float = 0.2
    scale: float = 0.2

    def asks(self, log_probs: Tensor, logits: Tensor) -> list[bool]:
        """See `DraftStop`."""
        bound = 1 - (self.scale * _entropy(logits)).clamp(min=0).sqrt()
        return [one < self.least for one in bound.tolist()]


@dataclass(frozen=True)
class LearnedStop:
    """Stops where a logistic regression expects the token just drawn to be refused.

    coefficients: of 1, the token's log-probability, the largest one and the entropy, in nats;
        `specens tune` finds them, and what is best for `least`.
    least: stop below this chance of acceptance.

    Source: DISCO, arXiv:2405.04304, with one linear layer.
    """

    coefficients: tuple[float, float, float, float]
    least: float = 0.5

    def asks(self, log_probs: Tensor, logits: Tensor) -> list[bool]:
        """See `DraftStop`."""
        found = stop_features(log_probs, logits) @ torch.tensor(self.coefficients)
        return [one < self.least for one in torch.sigmoid(found).tolist()]


def stop_features(log_probs: Tensor, logits: Tensor) -> Tensor:
    """(R, 4) float32: what `LearnedStop` looks at."""
    best = logits.float().log_softmax(-1).amax(-1)
    ones = torch.ones_like(best)
    return torch.stack((ones, log_probs[:, 0].clamp(min=-30), best, _entropy(logits)), -1).cpu()


def _entropy(logits: Tensor) -> Tensor:
    """(R,) nats."""
    logs = logits.float().log_softmax(-1)
    return -torch.xlogy(logs.exp(), logs.exp()).sum(-1)


class Schedule(Protocol):
    """One way of taking turns."""

    @property
    def lookahead(self) -> int:
        """Most tokens that can be pending at once."""
        ...

    def turn(self, run: "Run") -> list[Verification]:
        """Propose and score; say what to verify."""
        ...


@dataclass(frozen=True)
class Plain:
    """Every member scores, one token is drawn from the ensemble: the baseline of all."""

    lookahead: int = 0

    @classmethod
    def of(cls, asked: Asked) -> "Plain":
        """See `Asked`."""
        return cls()

    def turn(self, run: "Run") -> list[Verification]:
        """Score the last committed token with every member."""
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [Verification(run.rows, [0] * len(run.rows), bonus=True)]


@dataclass(frozen=True)
class Component:
    """Draw a member by its weight, then the token from it alone: one call a token.

    Exact for mixtures of scope "member" at temperature > 0, since which member a token comes from
    does not depend on the text. Members catch up on what they have missed when they are next drawn.
    Where a member's law is empty, its logits NaN, the other schedules go by the other members; this
    one draws it all the same, and a bit of the status says so.

    Source: Mixture-model-like ensemble, arXiv:2605.00419.
    """

    lookahead: int = 0

    @classmethod
    def of(cls, asked: Asked) -> "Component":
        """See `Asked`."""
        return cls()

    def turn(self, run: "Run") -> list[Verification]:
        """Score with the members drawn."""
        drawn: dict[int, list[Row]] = {}
        for row in run.rows:
            drawn.setdefault(run.components(row, 1)[0], []).append(row)
        for member, rows in drawn.items():
            run.feed(member, rows)
        return [
            Verification(rows, [0] * len(rows), bonus=True, members=(member,))
            for member, rows in drawn.items()
        ]


@dataclass(frozen=True)
class LookAhead:
    """Component sampling that speculates: the members of the next tokens are drawn beforehand.

    Which member a token of a mixture comes from does not depend on the text. One member proposes: a
    token that was to come from it is the final one, and only the others can be refused, by the one
    member that they were to come from. A proposal ends right before a token of another member, who
    draws that one itself: nothing is proposed in vain at its end.

    proposer: who proposes; the cheapest member.
    aheads: how many tokens of other members it proposes before they are asked, by how likely one of
        them is kept: the first is for 0, the last for 1, the others in between. At 0 tokens none
        can be refused, and each costs one call, as in `Component`. A single number is for all.
    most: tokens that a proposal has at most.

    How likely a token is kept is learned from what became of the row's earlier ones, never from
    tokens that are still to be verified: the text stays exact.
    """

    proposer: int
    aheads: tuple[int, ...]
    most: int = 16

    @classmethod
    def of(cls, asked: Asked) -> "LookAhead":
        """See `Asked`."""
        proposer, most, ahead = asked.the_proposer, asked.token, asked.ahead
        if ahead is not None:
            if not is_integer(ahead) or ahead < 0:
                raise wrong("ahead", "a count >= 0", ahead)
            if asked.token_cost is not None:
                raise wrong("token_cost", "None beside ahead", asked.token_cost)
            return cls(proposer, (int(ahead),), most)
        costs = [size / max(asked.sizes) for size in asked.sizes]
        aheads = [
            best_ahead(asked.weights, costs, proposer, asked.the_token_cost, tenths / 10, most)
            for tenths in range(11)
        ]
        return cls(proposer, tuple(aheads), most)

    @property
    def lookahead(self) -> int:
        """Tokens proposed per turn."""
        return self.most

    def turn(self, run: "Run") -> list[Verification]:
        """Propose up to a token of another member; ask those whose tokens are among them."""
        components = []
        for row in run.rows:
            row.survival.learn(row.length)
            mine = run.components(row, max(min(self.most + 1, run.room(row)), 1))
            others = [at for at, member in enumerate(mine) if member != self.proposer]
            ahead = self._ahead(row)
            end = others[ahead] if len(others) > ahead else len(mine) - 1
            components.append(mine[: end + 1])
            said = [1.0 if member == self.proposer else KEPT for member in mine[:end]]
            row.survival.ask([(one, one) for one in said], row.length)
        counts = [len(mine) - 1 for mine in components]
        run.propose(self.proposer, run.rows, counts)
        for member in run.ensemble:
            # The proposer has no law yet after its last token, which only a token of its own needs.
            asked = [
                row
                for row, mine in zip(run.rows, components, strict=True)
                if member in (mine[-1:] if member == self.proposer else mine)
            ]
            if asked:
                run.feed(member, asked)
        return [Verification(run.rows, counts, bonus=True, components=components)]

    def _ahead(self, row: "Row") -> int:
        """Tokens of other members to propose to the row."""
        return self.aheads[round(row.survival.chance(KEPT) * (len(self.aheads) - 1))]


@dataclass(frozen=True)
class Lookup:
    """The text is the draft: what followed the last tokens when they occurred before.

    num_speculative_tokens: proposed at most. longest: tokens of the end that are looked for.

    Source: prompt lookup decoding; Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
    """

    num_speculative_tokens: int
    longest: int = 3

    @classmethod
    def of(cls, asked: Asked) -> "Lookup":
        """See `Asked`."""
        return cls(asked.token)

    @property
    def lookahead(self) -> int:
        """Tokens proposed per turn."""
        return self.num_speculative_tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Look up, then score with every member."""
        run.look_up(run.rows, self.num_speculative_tokens, self.longest)
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [Verification(run.rows, [len(row.pending) for row in run.rows], bonus=True)]


@dataclass(frozen=True)
class Hierarchy:
    """Drafts of several sizes: each verifies the next smaller one's, the ensemble the last's.

    drafts: the drafting models, the smallest, which proposes, first.
    gammas: tokens that the smallest proposes at a time; then for each other the tokens that it has
        kept and added before it hands them up.

    With lossless rules the text has the ensemble's law, since what a level hands up has the level's
    own law; with gates it is PyramidSD: fuzzy at both stages (F) or at the last (A).

    Source: HSD, arXiv:2510.19705; PyramidSD, arXiv:2510.12966; ML-SpecQD, arXiv:2503.13565.
    """

    drafts: tuple[int, ...]
    gammas: tuple[int, ...]

    @classmethod
    def of(cls, asked: Asked) -> "Hierarchy":
        """See `Asked`."""
        drafts = range(asked.num_members, len(asked.sizes))
        levels = len(drafts)
        gammas = asked.tokens_for(levels, lambda one: [one * (i + 1) for i in range(levels)])
        return cls(tuple(drafts), gammas)

    @property
    def lookahead(self) -> int:
        """Every level's tokens can be pending at once, and one more each."""
        return sum(self.gammas) + len(self.gammas) + 1

    def turn(self, run: "Run") -> list[Verification]:
        """Fill the highest draft's share, then score with every member."""
        self._fill(run, len(self.drafts) - 1, run.rows)
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [Verification(run.rows, [len(row.pending) for row in run.rows], bonus=True)]

    def _fill(self, run: "Run", level: int, rows: "Sequence[Row]") -> None:
        """Give each row this level's share of tokens, or fewer where its text ends."""
        member, gamma = self.drafts[level], self.gammas[level]
        if level == 0:
            # A turn emits one token more than it proposes.
            run.propose(member, rows, [min(gamma, run.room(row) - 1) for row in rows])
            return
        while rows := [row for row in rows if self._wants(run, row, member, gamma)]:
            self._fill(run, level - 1, rows)
            run.check(level, member, rows, gamma)

    def _wants(self, run: "Run", row: "Row", member: int, gamma: int) -> bool:
        return not row.ended and row.pending.count(member) < gamma and run.room(row) > 1


@dataclass(frozen=True)
class Speculative:
    """One fixed proposer, a member or a separate draft; the ensemble verifies and adds a token.

    stop: when the proposer ends before its number of tokens; None is never.

    Source: Leviathan et al. 2023, arXiv:2211.17192, with the ensemble as the target.
    """

    proposer: int
    num_speculative_tokens: int
    stop: DraftStop | None = None

    @classmethod
    def of(cls, asked: Asked) -> "Speculative":
        """See `Asked`."""
        if asked.stop is not None and not callable(getattr(asked.stop, "asks", None)):
            raise wrong("stop", "a DraftStop", repr(asked.stop))
        return cls(asked.the_proposer, asked.token, asked.stop)

    @property
    def lookahead(self) -> int:
        """Tokens drafted per turn."""
        return self.num_speculative_tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Draft with the proposer, then score the drafts with every member.

        A proposer that is a member scores its own last draft too, which it would otherwise be fed
        next turn: that makes the bonus token's law the whole ensemble's.
        """
        # The last token of the text is never drafted: a turn emits one token more than it drafts.
        counts = [min(self.num_speculative_tokens, run.room(row) - 1) for row in run.rows]
        run.propose(self.proposer, run.rows, counts, self.stop)
        for member in run.ensemble:
            run.feed(member, run.rows)
        return [Verification(run.rows, [len(row.pending) for row in run.rows], bonus=True)]


@dataclass
class Survival:
    """How often drafts of one row are kept, given what is known of them before they are verified.

    Of a draft token with a companion, `shared` is the sum over the vocabulary of
    min(P_draft, P_companion), which the prefix decides alone, and `ratio` is
    min(1, P_companion / P_draft) of the token itself, whose mean over the draft's law is `shared`.
    Estimates start there, and outcomes move them, in cells of shared and ratio; the older an
    outcome is, the less. Each row has its own, so that its text does not depend on its batch.

    outcomes: (tested, kept) tokens of each cell.
    asked: (shared, ratio) of the tokens that were last verified; length: committed ones before.
    """

    outcomes: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    asked: Sequence[tuple[float, float]] = ()
    length: int = 0

    def ask(self, said: Sequence[tuple[float, float]], length: int) -> None:
        """Note what is verified after `length` committed tokens."""
        self.asked, self.length = said, length

    def learn(self, length: int) -> None:
        """Note its outcome, after which `length` tokens are committed, the one added among them."""
        self.outcomes = {
            cell: (tested * _FADING, kept * _FADING)
            for cell, (tested, kept) in self.outcomes.items()
        }
        accepted = length - self.length - 1
        # Nothing beyond the first refused token: what the text does not show must not decide what
        # becomes of it, for its numbers are used again.
        for at, (shared, ratio) in enumerate(self.asked[: accepted + 1]):
            cell = _bin(shared), _bin(ratio)
            tested, kept = self.outcomes.get(cell, (0, 0))
            self.outcomes[cell] = tested + 1, kept + (at < accepted)
        self.asked = ()

    def chance(self, shared: float, ratio: float | None = None) -> float:
        """That a token is kept once those before it are; without `ratio`, whatever token it is."""
        columns = range(BINS) if ratio is None else [_bin(ratio)]
        tested, kept = _PRIOR, _PRIOR * (shared if ratio is None else ratio)
        for column in columns:
            more_tested, more_kept = self.outcomes.get((_bin(shared), column), (0, 0))
            tested, kept = tested + more_tested, kept + more_kept
        return kept / tested

    def cut(self, said: Sequence[tuple[float, float]], token_cost: float) -> int:
        """How many of the tokens proposed to verify: while one more raises tokens per time.

        One at least, or nothing would be learned where nothing is expected.

        Whether a token is verified depends on the tokens before it and on the law that it was drawn
        from, never on which token it is nor on later ones. To take back a token because of what it
        is changes the law of the text: what replaces it is drawn as if nothing had been proposed.
        """
        reached = expected = 1.0
        for at, (shared, ratio) in enumerate(said):
            gain = reached * self.chance(shared)
            if at > 0 and gain * (1 + token_cost * at) <= token_cost * expected:
                return at
            expected += gain
            reached *= self.chance(shared, ratio)
        return len(said)

    def withdraw(
        self, said: Sequence[tuple[float, float]], token_cost: float
    ) -> tuple[int, list[list[float]]]:
        """The same, where each token itself has a say, and what any other would have needed.

        Returns:
            How many tokens to verify; and of each of these, and of the one after them that is taken
            back, the ratio above which a token stays: one for each cell of ratios.
        """
        reached = expected = 1.0
        needed: list[list[float]] = []
        for at, (shared, ratio) in enumerate(said):
            worth = reached * (1 + token_cost * at)
            least = token_cost * expected / worth if worth > 0 else math.inf
            cells = [self.outcomes.get((_bin(shared), column), (0, 0)) for column in range(BINS)]
            # `chance` rises with the ratio inside of a cell.
            needed.append([(least * (_PRIOR + n) - kept) / _PRIOR for n, kept in cells])
            if at == 0:
                needed = [[-1.0] * BINS]
            if ratio <= needed[at][_bin(ratio)]:
                return at, needed
            reached *= self.chance(shared, ratio)
            expected += reached
        return len(said), needed


# Cells of a `Survival`, along each side; how many outcomes its first estimates weigh; and what an
# outcome still weighs a turn later, so that texts may change.
BINS, _PRIOR, _FADING = 4, 4.0, 0.98
# How likely another member's token is kept, as long as nothing is known.
KEPT = 0.6
CUTS = ("law", "token")


def _bin(share: float) -> int:
    return min(int(share * BINS), BINS - 1)


@dataclass(frozen=True)
class Companion:
    """Speculative, and another draft says how much of the proposal is worth verifying.

    draft: who proposes. companion: who scores the proposal, in one forward.
    num_speculative_tokens: proposed at most.
    token_cost: time that a token adds to a verification, relative to one without any.
    cut: what decides whether a token is worth it. "law": the law that it was drawn from. "token":
        the token itself, too, as published; it then counts as drawn from the part of the law that
        would have stayed, which keeps the text exact.

    Source: Speculative Verification, arXiv:2509.24328, whose own cut draws what follows it as if
    nothing had been proposed.
    """

    draft: int
    companion: int
    num_speculative_tokens: int
    token_cost: float
    cut: str = "law"

    @classmethod
    def of(cls, asked: Asked) -> "Companion":
        """See `Asked`."""
        cut = "law" if asked.cut is None else asked.cut
        if cut not in CUTS:
            raise unknown("cut", cut, CUTS)
        if cut == "token" and asked.rule != "rejection":
            raise wrong("acceptance", "'rejection' for cut 'token'", asked.rule)
        draft = asked.num_members
        return cls(draft, draft + 1, asked.token, asked.the_token_cost, cut)

    @property
    def lookahead(self) -> int:
        """Tokens proposed per turn."""
        return self.num_speculative_tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Propose, have the companion score, and verify with every member what is worth it."""
        for row in run.rows:
            row.survival.learn(row.length)
        counts = [min(self.num_speculative_tokens, run.room(row) - 1) for row in run.rows]
        run.propose(self.draft, run.rows, counts)
        rows = [row for row in run.rows if row.pending]
        withdrawn: set[Row] = set()
        if rows:
            run.feed(self.companion, rows)
            compared = run.compare(self.draft, self.companion, rows)
            needed: list[list[list[float]]] = []
            for row, said in zip(rows, compared, strict=True):
                if self.cut == "law":
                    kept = row.survival.cut(said, self.token_cost)
                else:
                    kept, ratios = row.survival.withdraw(said, self.token_cost)
                    needed.append(ratios)
                    if kept < len(said):
                        withdrawn.add(row)
                row.survival.ask(said[:kept], row.length)
                run.drop(row, kept)
            if self.cut == "token":
                run.withdraw(rows, needed)
        for member in run.ensemble:
            run.feed(member, run.rows)
        counts = [len(row.pending) for row in run.rows]
        taken_back = [row in withdrawn for row in run.rows]
        return [Verification(run.rows, counts, bonus=True, withdrawn=taken_back)]


@dataclass(frozen=True)
class Alternating:
    """Speculative Ensemble: members take turns, and a scorer's extra law is its next proposal.

    order: the members in rotation, the default proposer first.
    gammas: tokens that each proposes when its turn comes, in that order.

    A member that scores the L pending tokens has also its own law for the next position. That law
    is not the ensemble's, so its token is not emitted but proposed. When a block is kept whole, the
    member that scored last completes its own proposal and the next in rotation scores; when a token
    is replaced, everything pending is dropped and the default proposer starts afresh.

    Source: Fu et al. 2025, arXiv:2502.01662, algorithm 2, continued on the text that includes the
    block just kept (the published code continues without it).
    """

    order: tuple[int, ...]
    gammas: tuple[int, ...]

    @classmethod
    def of(cls, asked: Asked) -> "Alternating":
        """See `Asked`."""
        size = asked.num_members
        order = asked.cheapest_first if asked.order is None else integers(asked.order)
        if order is None or sorted(order) != list(range(size)):
            raise wrong("order", f"every member 0 to {size - 1} once", asked.order)
        return cls(tuple(order), asked.tokens_for(size, lambda one: [one] + [1] * (size - 1)))

    @property
    def lookahead(self) -> int:
        """Every slot's proposal can be pending at once, and one more."""
        return sum(self.gammas) + 1

    def turn(self, run: "Run") -> list[Verification]:
        """Bring every row to the point where all members have scored its next block."""
        fresh = [row for row in run.rows if not row.pending]
        going = [row for row in run.rows if row.pending]
        if fresh:
            run.propose(self.order[0], fresh, [self.gammas[0]] * len(fresh))
            for slot in range(1, len(self.order)):
                run.feed(self.order[slot], fresh)
                run.draw(self.order[slot], fresh)
                if slot < len(self.order) - 1:
                    self._extend(run, slot, fresh)
            for row in fresh:
                row.slot = len(self.order) - 1
        by_slot = [[row for row in going if row.slot == s] for s in range(len(self.order))]
        for slot, rows in enumerate(by_slot):
            if rows:
                self._continue(run, slot, rows)
        block = [min(run.num_scored(row), len(row.pending)) for row in run.rows]
        return [Verification(run.rows, block, bonus=False)]

    def _extend(self, run: "Run", slot: int, rows: "Sequence[Row]") -> None:
        """Complete the slot's proposal, whose first token was drawn when it scored."""
        run.propose(self.order[slot], rows, [self.gammas[slot] - 1] * len(rows))

    def _continue(self, run: "Run", slot: int, rows: "Sequence[Row]") -> None:
        """The last scorer completes its proposal; the next in rotation scores what is pending."""
        self._extend(run, slot, rows)
        following = (slot + 1) % len(self.order)
        assert all(run.lag(self.order[following], row) == 1 for row in rows), "invariant I2"
        run.feed(self.order[following], rows)
        run.draw(self.order[following], rows)
        for row in rows:
            row.slot = following


@dataclass(frozen=True)
class Entry:
    """A schedule by its name.

    make: what makes it of what was asked.
    tokens: `num_speculative_tokens` where none is given; None where none can be.
    takes: the decoder's arguments that it goes by, beside that one.
    fewest_drafts, most_drafts: models outside the ensemble that it takes.
    drafts: how many these are, in words.
    levels: whether its drafts verify one another, each by a rule of its own.
    mixture: whether it draws members, which makes sense for sampled mixtures of scope "member".
    by_position: whether the members' weights may change from position to position.
    """

    make: Callable[[Asked], Schedule]
    tokens: int | None = None
    takes: tuple[str, ...] = ()
    fewest_drafts: int = 0
    most_drafts: float = 0
    drafts: str = "None"
    levels: bool = False
    mixture: bool = False
    by_position: bool = False


SCHEDULES = {
    "plain": Entry(Plain.of, by_position=True),
    "component": Entry(Component.of, mixture=True),
    "lookahead": Entry(LookAhead.of, 16, ("proposer", "ahead", "token_cost"), mixture=True),
    "speculative": Entry(
        Speculative.of, 4, ("proposer", "stop"), 0, 1, "one model at most", by_position=True
    ),
    "companion": Entry(
        Companion.of,
        8,
        ("token_cost", "cut"),
        2,
        2,
        "two models, the one that proposes and its companion,",
    ),
    "lookup": Entry(Lookup.of, 4, by_position=True),
    "hierarchy": Entry(Hierarchy.of, 4, (), 1, math.inf, "one model at least", levels=True),
    "alternating": Entry(Alternating.of, 1, ("order",)),
}


def made(name: str, asked: Asked) -> Schedule:
    """The schedule of that name.

    Raises:
        ValueError: it does not take an argument that was given, or takes another value of it.
    """
    entry = SCHEDULES[name]
    takes = entry.takes if entry.tokens is None else ("tokens", *entry.takes)
    for argument in (one.name for one in fields(asked) if one.default is None):
        value = getattr(asked, argument)
        if value is not None and argument not in takes:
            argument = "num_speculative_tokens" if argument == "tokens" else argument
            raise wrong(argument, f"None for schedule {name!r}", value)
    return entry.make(replace(asked, tokens=entry.tokens) if asked.tokens is None else asked)
