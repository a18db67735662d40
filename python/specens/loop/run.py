# SPDX-License-Identifier: Apache-2.0
"""`Run`: one call of generate, from the first turn to the last: propose, score, verify, commit.

All lengths live on the host; tokens and laws stay on the device, and a turn copies from device to
host once, in `_commit`. What a member has computed is counted by its cache alone:

* a row has `length` committed tokens and `pending` proposed ones after them;
* a member whose cache holds `length - 1` tokens or fewer has no law for the next position; each
  token beyond gives one law more. So the reference algorithm's invariant I1, `kv = N + |D| - 1`,
  is the definition of |D| here, and the asserts below are about the laws that are really stored.
* when a pending token is replaced, every cache goes back to at most `length - 1` tokens: an
  integer.

The loop is `turn`, `_verify`, `_commit` and `_forget`; what stands before them is what a
schedule may ask. What only one schedule needs stands in the schedule's file.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specens.loop.laws import MemberLaws
from specens.loop.numbers import Numbers
from specens.loop.processors import processed
from specens.loop.rows import Row
from specens.loop.schedule import DraftStop, Schedule, Verification
from specens.loop.statistics import RowStatistics, Statistics
from specens.loop.stopping import Stopper
from specens.loop.text import Text
from specens.loop.weights import PositionWeights
from specens.members.member import Member
from specens_kernels import (
    PADDING,
    POINT_MASS,
    Acceptance,
    Law,
    Stream,
    Verdict,
    sample,
    verify,
)
from specens_kernels.acceptance.gates import remember


@dataclass(frozen=True)
class Plan:
    """What one call of generate goes by, whatever its prompts.

    members: the ensemble's, then the separate drafts. num_ensemble: how many are the ensemble's.
    law: the ensemble's. member_law: each member's alone, warped the same way.
    schedule: who proposes and who verifies; bound to the models.
    acceptances: of each level that checks, the ensemble's last.
    weights: what the members weigh at each position; None is what the law says.
    """

    members: Sequence[Member]
    num_ensemble: int
    law: Law
    member_law: Law
    schedule: Schedule
    acceptances: Sequence[Acceptance] = field(default_factory=lambda: [Acceptance()])
    weights: PositionWeights | None = None


class Run:
    """The rows of one call of generate, and everything that a schedule may ask of them."""

    def __init__(
        self,
        plan: Plan,
        input_ids: Tensor,
        lengths: Sequence[int],
        seeds: Tensor,
        processors: Sequence[LogitsProcessorList],
        stopper: Stopper,
        statistics: Statistics,
    ) -> None:
        """Start from prompts.

        Args:
            plan: members, laws, schedule and rules.
            input_ids: (B, S) int64. Left-padded prompts. lengths: tokens of each prompt.
            seeds: (B,) int64, on the device of input_ids.
            processors: per row; empty lists where there is none.
            stopper: when rows end. statistics: what counts are added to.
        """
        self.plan, self.schedule = plan, plan.schedule
        self.members = list(plan.members)
        self.ensemble = range(plan.num_ensemble)
        self.drafts = range(plan.num_ensemble, len(self.members))
        self.law, self.member_law = plan.law, plan.member_law
        self.acceptances, self.acceptance = plan.acceptances, plan.acceptances[-1]
        self.processors = processors if any(len(p) > 0 for p in processors) else None
        self.stopper, self.statistics = stopper, statistics
        self.device = input_ids.device
        width = input_ids.shape[1]
        self.text = Text(input_ids)
        texts = input_ids.tolist()
        statistics.rows = [RowStatistics.of(len(statistics.members)) for _ in lengths]
        self.rows = [
            Row(b, width - n, n, texts[b][width - n :], statistics.rows[b])
            for b, n in enumerate(lengths)
        ]
        self.finished: list[Row] = []
        self.laws = [MemberLaws() for _ in self.members]
        self.scores = [MemberLaws() for _ in self.members]
        fresh = any(acceptance.rule.block for acceptance in self.acceptances)
        self.numbers = Numbers(seeds, self.rows, fresh=fresh)
        self._owner_tensors: dict[tuple[int, ...], Tensor] = {}
        self._prefill(input_ids)

    def _prefill(self, input_ids: Tensor) -> None:
        """Feed every member all but the last token of each prompt."""
        began = time.perf_counter()
        counts = [row.length - 1 for row in self.rows]
        # No more can be pending than there is room. A row's tokens, and as many of padding beside
        # one that is fed more, are what a member holds.
        pending = min(self.schedule.most_pending, max(map(self.room, self.rows)))
        capacity = self.stopper.max_length + 2 * (pending + 1)
        for model in self.members:
            model.start(len(self.rows), capacity)
            if max(counts) > 0:
                tokens = self.text.take(self.rows, [0] * len(counts), max(counts))
                model.forward(tokens, counts, keep_last=1)
        if self.device.type != "cpu":
            # Else its time would be counted where the loop first waits for the device.
            torch.accelerator.synchronize(self.device)
        self.statistics.prefill_seconds = time.perf_counter() - began

    def room(self, row: Row) -> int:
        """Tokens that may still be emitted after the pending ones."""
        return self.stopper.max_length - row.pad - row.end

    def length(self, member: int, row: Row) -> int:
        """Tokens of the row that the member has been fed and not rolled back."""
        return self.members[member].lengths[self.rows.index(row)]

    def propose(
        self,
        member: int,
        rows: Sequence[Row],
        counts: Sequence[int],
        stop: DraftStop | None = None,
    ) -> None:
        """Append counts[k] tokens drawn from the member one by one; fewer where the text ends.

        A row where `stop` says so proposes nothing after the token just drawn, which stays.
        """
        counts = [min(n, self.room(row)) for row, n in zip(rows, counts, strict=True)]
        going = [row for row, n in zip(rows, counts, strict=True) if n > 0]
        left = dict(zip(rows, counts, strict=True))
        while going:
            self.feed(member, going)
            log_probs = self.draw(member, going)
            for row in going:
                left[row] -= 1
            if stop is not None and any(left[row] > 0 for row in going):
                laws = self.laws[member].take(going, [row.end - 1 for row in going], 1)[:, 0]
                stops = stop.asks(log_probs, laws[:, : self.law.vocab_size])
                going = [row for row, stopped in zip(going, stops, strict=True) if not stopped]
            going = [row for row in going if left[row] > 0]

    def write(self, row: Row, tokens: list[int]) -> None:
        """Append tokens that no model has drawn."""
        if tokens:
            self.text.write([row], [row.end], torch.tensor([tokens], device=self.device))
            row.pending += [POINT_MASS] * len(tokens)
            row.statistics.drafted[POINT_MASS] += len(tokens)

    def feed(self, member: int, rows: Sequence[Row]) -> None:
        """One forward over all that the member's cache lacks of the rows' tokens."""
        model = self.members[member]
        places = self._places(rows)
        starts = [model.lengths[place] for place in places]
        counts = [row.end - start for row, start in zip(rows, starts, strict=True)]
        room = model.capacity - max(starts)
        if max(counts) > room:  # where one row's tokens end, another's padding would not fit
            near = [row for row, n in zip(rows, counts, strict=True) if n <= room]
            self.feed(member, near)
            self.feed(member, [row for row in rows if row not in near])
            return
        tokens = self.text.take(rows, starts, max(counts))
        subset = None if len(rows) == len(self.rows) else places
        logits = model.forward(tokens, counts, subset)
        if logits.device != self.device:
            # Asynchronous copies to the host would be read before they have arrived.
            logits = logits.to(self.device, non_blocking=self.device.type != "cpu")
        if self.processors is not None:
            narrowest = min(each.vocab_size for each in self.members)
            logits = processed(self.processors, self.text, rows, starts, counts, logits, narrowest)
        self.statistics.calls[member] += 1
        firsts = [start + 1 for start in starts]
        self.laws[member].add(rows, firsts, counts, logits)
        if model.scores is not None:
            scores = model.scores.to(self.device)[..., None]
            self.scores[member].add(rows, firsts, counts, scores)

    def draw(self, member: int, rows: Sequence[Row]) -> Tensor:
        """Append one token to each row that has room, drawn from the member's own law.

        Returns:
            (R, 1) log-probabilities of these tokens, of the rows that have room.
        """
        rows = [row for row in rows if self.room(row) > 0]
        if not rows:
            return torch.empty(0, 1)
        ends = [row.end for row in rows]
        laws = self.laws[member].take(rows, ends, 1)
        numbers = self.numbers(Stream.DRAFT, member, rows, ends, 1)
        drawn = sample([laws], numbers, self.member_law)
        self.text.write(rows, ends, drawn.tokens)
        for row in rows:
            row.pending.append(member)
            row.statistics.drafted[member] += 1
        return drawn.log_probs

    def proposal(
        self,
        rows: Sequence[Row],
        counts: Sequence[int],
        begins: list[int],
        among: Sequence[int],
    ) -> dict[str, Any]:
        """Arguments of `verify`: the laws that counts[k] drafts from begins[k] on were drawn from.

        A member `among` those whose logits are verified is named; another's are handed over.
        """
        spans = [slice(begin - row.length, None) for row, begin in zip(rows, begins, strict=True)]
        owners = [row.pending[span][:n] for row, span, n in zip(rows, spans, counts, strict=True)]
        proposers = {owner for each in owners for owner in each}
        if proposers <= {POINT_MASS}:
            return {}
        if proposers <= {POINT_MASS, *among}:
            return {"proposers": self._owners(owners, max(counts))}
        (proposer,) = proposers
        return {"draft_logits": self.laws[proposer].take(rows, begins, max(counts))}

    def roll_back(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """Every member forgets what it holds and has said beyond so many tokens of the rows."""
        for model, laws in zip(self.members, self.laws, strict=True):
            kept = list(model.lengths)
            for place, row, length in zip(self._places(rows), rows, lengths, strict=True):
                kept[place] = min(kept[place], length)
                laws.cut(row, kept[place])
            model.rollback(kept)

    def turn(self) -> dict[int, list[int]]:
        """Propose, score, verify, commit; returns the tokens emitted for each row of the batch."""
        emitted: dict[int, list[int]] = {}
        for verification in self.schedule.turn(self):
            emitted.update(self._commit(verification, self._verify(verification)))
        self._forget()
        self.statistics.turns += 1
        return emitted

    def _verify(self, verification: Verification) -> Verdict:
        """One call of the verify op over what the members have said."""
        rows, counts = verification.rows, verification.num_drafts
        begins = [row.length for row in rows]
        width = max(counts) + verification.bonus
        which = self.ensemble if verification.members is None else verification.members
        scored = which if verification.scored is None else verification.scored
        taken = {m: self.laws[m].take(rows, begins, width) for m in which if m in scored}
        anything = next(iter(taken.values()))  # for those whose weight is 0 everywhere
        law, proposal = verification.law, verification.proposal
        if law is None:
            law = self.law if verification.members is None else self.member_law
            if self.plan.weights is not None:
                law = self.plan.weights.law(law, self.scores, rows, counts, width)
        if proposal is None:
            proposal = self.proposal(rows, counts, begins, which)
        before = [begin - 1 for begin in begins]
        return verify(
            [taken.get(m, anything) for m in which],
            self.text.take_drafts(rows, begins, counts),
            self.numbers(Stream.VERIFY, 0, rows, before, max(counts) + 1),
            law,
            **proposal,
            acceptance=self.acceptance,
            memory=self._memory(rows) if self.acceptance.rule.remembers else None,
            bonus=verification.bonus,
        )

    def _commit(self, verification: Verification, verdict: Verdict) -> dict[int, list[int]]:
        """Append what was emitted, cut where a row ends, and take back what was not kept."""
        emitted: dict[int, list[int]] = {}
        on_host = zip(verification.rows, verification.num_drafts, *to_host(verdict), strict=True)
        for k, (row, drafts, tokens, num_accepted, status) in enumerate(on_host):
            new = tokens[: num_accepted + 1 if tokens[num_accepted] != PADDING else num_accepted]
            replaced = len(new) > num_accepted
            if replaced:
                self.text.write_one(row, row.length + num_accepted, verdict.tokens[k], num_accepted)
            kept, done = self.stopper.cut(new, self.text.tokens[row.index], row.pad + row.length)
            row.statistics.test(row.pending[:drafts], num_accepted)
            row.statistics.emit(row.pending[: min(kept, num_accepted)], kept, status)
            self._note(row, verdict.log_probs[k, :kept], verification.by_all)
            emitted[row.index] = new[:kept]
            row.tokens += new[:kept]
            row.judged += 1
            row.length += kept
            if replaced or done:
                row.pending.clear()
                row.ended = False
                for laws in (*self.laws, *self.scores):
                    laws.drop(row)
            else:
                del row.pending[:kept]
            if done:
                self.finished.append(row)
        return emitted

    def _forget(self) -> None:
        """Caches forget what is no longer pending; finished rows leave the batch."""
        for model in self.members:
            # A row with nothing pending keeps no law: every cache lags by a token at least.
            model.rollback(
                [
                    length if row.pending else min(length, row.length - 1)
                    for length, row in zip(model.lengths, self.rows, strict=True)
                ]
            )
        going = [place for place, row in enumerate(self.rows) if row not in self.finished]
        if len(going) < len(self.rows):
            self.rows = [self.rows[place] for place in going]
            if self.rows:
                for model in self.members:
                    model.select(going)
        for laws in (*self.laws, *self.scores):
            laws.forget()

    def _note(self, row: Row, log_probs: Tensor, by_all: bool) -> None:
        """Keep the log-probabilities of what was emitted, and what the rule remembers of them."""
        if self.acceptance.rule.remembers:
            for log_prob in log_probs.tolist():
                row.memory = remember(row.memory, log_prob, self.acceptance.parameters[-1])
        # Of a token drawn from one member not all have said how likely it is.
        if by_all:
            self.text.note(row, row.length, log_probs)

    def _memory(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.memory for row in rows], device=self.device)

    def _places(self, rows: Sequence[Row]) -> list[int]:
        """Where the rows stand in the members' caches."""
        if len(rows) == len(self.rows):
            return list(range(len(rows)))
        return [self.rows.index(row) for row in rows]

    def _owners(self, owners: list[list[int]], width: int) -> Tensor:
        """(R or 1, width) int32: which member each draft was drawn from."""
        if any(each != owners[0] for each in owners):
            padded = [each + [PADDING] * (width - len(each)) for each in owners]
            return torch.tensor(padded, dtype=torch.int32, device=self.device)
        # One pattern for all rows is one of a few that come again.
        key = tuple(owners[0])
        if key not in self._owner_tensors:
            tensor = torch.tensor(owners[:1], dtype=torch.int32, device=self.device)
            self._owner_tensors[key] = tensor
        return self._owner_tensors[key]


def to_host(verdict: Verdict) -> tuple[list[list[int]], list[int], list[int]]:
    """Tokens, accepted counts and status as lists: the turn's one copy from device to host."""
    tokens, num_accepted, status = verdict.tokens, verdict.num_accepted, verdict.status
    if tokens.is_cpu:
        return tokens.tolist(), num_accepted.tolist(), status.tolist()
    packed = torch.cat((tokens, num_accepted[:, None], status[:, None]), 1).tolist()
    return [row[:-2] for row in packed], [row[-2] for row in packed], [row[-1] for row in packed]
