# SPDX-License-Identifier: Apache-2.0
"""A second draft, the companion, says how much of the first one's proposal is worth verifying."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from specens.loop.named import argument, count, number, word
from specens.loop.schedule import Models, Schedule, Verification
from specens.loop.survival import BINS
from specens_kernels import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from specens.loop.rows import Row
    from specens.loop.run import Run


@dataclass(frozen=True)
class Companion(Schedule):
    """Speculative, where the companion scores the proposal in one forward before it is verified.

    Source: Speculative Verification, arXiv:2509.24328, whose own cut, by the token, draws what
    follows it as if nothing had been proposed; here the text stays exact.
    """

    name: ClassVar[str] = "companion"
    summary: ClassVar[str] = "a second draft says how much of a proposal is worth verifying"
    fewest_drafts: ClassVar[int] = 2
    most_drafts: ClassVar[float] = 2
    drafts_in_words: ClassVar[str] = "two models, the one that proposes and its companion,"
    tokens: int = argument(8, count(1), "Tokens proposed at most.")
    token_cost: float = argument(
        0.1, number(0), "Time that a token adds to a verification, relative to one without any."
    )
    cut: str = argument(
        "law",
        word("law", "token"),
        "What decides whether a token is worth its verification. 'law': the law that it was drawn "
        "from. 'token': the token itself, too, for the rule 'rejection' and without filters; it "
        "then counts as drawn from the part of the law that would have stayed.",
    )

    def bind(self, models: Models) -> "Companion":
        """See `Schedule`."""
        if self.cut == "token" and models.acceptance != "rejection":
            expected = "'law' for another rule than rejection"
            raise Refusal(self.name, "cut", expected, f"'token' for {models.acceptance!r}")
        return self

    @property
    def no_filters(self) -> str:
        """See `Schedule`."""
        reason = "a companion that cuts by the token, whose drafts' laws are not filtered again"
        return reason if self.cut == "token" else ""

    @property
    def most_pending(self) -> int:
        """Tokens proposed per turn."""
        return self.tokens

    def turn(self, run: "Run") -> list[Verification]:
        """Propose, have the companion score, and verify with every member what is worth it."""
        for row in run.rows:
            row.survival.learn(row.length)
        counts = [min(self.tokens, run.room(row) - 1) for row in run.rows]
        draft, companion = run.drafts
        run.propose(draft, run.rows, counts)
        rows = [row for row in run.rows if row.pending]
        staying: dict[Row, Tensor] = {}
        withdrawn: set[Row] = set()
        if rows:
            run.feed(companion, rows)
            laws = both_laws(run, draft, companion, rows)
            needed: list[list[list[float]]] = []
            for row, known in zip(rows, compared(run, rows, *laws), strict=True):
                if self.cut == "law":
                    kept = row.survival.cut(known, self.token_cost)
                else:
                    kept, ratios = row.survival.withdraw(known, self.token_cost)
                    needed.append(ratios)
                    if kept < len(known):
                        withdrawn.add(row)
                row.survival.ask(known[:kept], row.length)
                take_back(row, kept)
            # At temperature 0 the text is the ensemble's, whatever was proposed.
            if self.cut == "token" and run.law.temperature != 0:
                staying = staying_laws(run, rows, needed, *laws)
        for member in run.ensemble:
            run.feed(member, run.rows)
        counts = [len(row.pending) for row in run.rows]
        if not staying:
            return [Verification(run.rows, counts, bonus=True)]
        # A token taken back for what it is is verified, and refused.
        counts = [n + (row in withdrawn) for row, n in zip(run.rows, counts, strict=True)]
        proposal = proposal_of(run.rows, staying, max(counts))
        return [Verification(run.rows, counts, bonus=True, proposal=proposal)]


def both_laws(
    run: "Run", draft: int, companion: int, rows: "Sequence[Row]"
) -> "tuple[Tensor, Tensor]":
    """(R, N, V) log-probabilities at each pending token, the draft's and the companion's.

    At temperature 0 they are those of temperature 1.
    """
    from specens_kernels import mix

    begins, most = [row.length for row in rows], max(len(row.pending) for row in rows)
    law = run.member_law
    if law.temperature == 0:
        law = replace(law, temperature=1.0)
    draft_law, companion_law = (
        mix([run.laws[m].take(rows, begins, most)], law)[0] for m in (draft, companion)
    )
    return draft_law, companion_law


def compared(
    run: "Run", rows: "Sequence[Row]", draft_law: "Tensor", companion_law: "Tensor"
) -> list[list[tuple[float, float]]]:
    """Of each pending token, what the companion says of it and of the law it was drawn from.

    Returns:
        Per row and token: the mass that both laws share, sum min(P, P_companion), and
        min(1, P_companion / P) of the token.
    """
    import torch

    tokens = run.text.take(rows, [row.length for row in rows], draft_law.shape[1])[..., None]
    shared = draft_law.minimum(companion_law).exp().sum(-1)
    ratios = companion_law.gather(-1, tokens) - draft_law.gather(-1, tokens)
    ratios = ratios.clamp_(max=0).exp()[..., 0]
    # One copy to the host more: how much is verified decides the shapes of what follows.
    pairs = torch.stack((shared, ratios), -1).tolist()
    return [
        [(mass, ratio) for mass, ratio in known[: len(row.pending)]]
        for known, row in zip(pairs, rows, strict=True)
    ]


def take_back(row: "Row", kept: int) -> None:
    """Take back the row's pending tokens but the first `kept`, before the ensemble is fed.

    That must not depend on what the tokens taken back are. Their numbers, which belong to positions
    of the text, are used again once the text gets there, and may be: tokens taken back have decided
    nothing, and what decided the cut is the tokens before it. Of these, the ones after a refused
    token are dropped together with the cut that they have decided. Caches keep the tokens until the
    turn's rollback, after the token that every such turn adds.
    """
    del row.pending[kept:]


def staying_laws(
    run: "Run",
    rows: "Sequence[Row]",
    needed: Sequence[Sequence[Sequence[float]]],
    draft_law: "Tensor",
    companion_law: "Tensor",
) -> "dict[Row, Tensor]":
    """Of each row, (N, V) log-probabilities of what was drawn and could stay.

    A token that stays only where its ratio is high enough was drawn from q' = q where it is, and 0
    elsewhere, which sums to less than 1. One taken back has no mass in it: verified, it is refused,
    and what replaces it is drawn from max(p - q', 0). So the text is exact.

    Args:
        needed: per row, for its pending tokens and the one taken back after them, the ratio above
            which a token stays, for each of `BINS` cells of ratios.
    """
    import torch

    ratios = (companion_law - draft_law).clamp_(max=0).exp_().nan_to_num_()
    width = ratios.shape[1]
    padded = [[*each, *[[-1.0] * BINS] * (width - len(each))] for each in needed]
    cells = (ratios * BINS).long().clamp_(max=BINS - 1)
    least = torch.tensor(padded, dtype=torch.float64, device=run.device)
    stays = ratios > least.gather(-1, cells)
    drawn = run.text.take(rows, [row.length for row in rows], width)[..., None]
    kept = torch.tensor([len(row.pending) for row in rows], device=run.device)
    # Of the tokens themselves it has been decided, on the host.
    staying = torch.arange(width, device=run.device) < kept[:, None]
    stays.scatter_(-1, drawn, staying[..., None])
    return dict(zip(rows, draft_law.masked_fill(~stays, -torch.inf), strict=True))


def proposal_of(
    rows: "Sequence[Row]", staying: "dict[Row, Tensor]", width: int
) -> "dict[str, Tensor]":
    """Arguments of `verify`: what could stay, as log-probabilities that need no normaliser."""
    law = next(iter(staying.values()))
    laws = law.new_zeros(len(rows), width, law.shape[-1])
    for k, row in enumerate(rows):
        if row in staying:
            laws[k] = staying[row][:width]
    return {
        "draft_logits": laws,
        "draft_temperature": laws.new_ones(len(rows)),
        "draft_lse": laws.new_zeros(len(rows), width),
    }
