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

A hierarchy verifies among the pending tokens, too (`check`): what a level has kept and added are
then its own proposals to the level above.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specens_kernels import (
    PADDING,
    POINT_MASS,
    Acceptance,
    Law,
    Stream,
    Verdict,
    mix,
    sample,
    uniforms,
    verify,
)
from specens_kernels.acceptance.gates import remember

from .laws import Laws
from .members import Member
from .processors import Stopper
from .rows import Row
from .schedules import BINS, DraftStop, Schedule, Verification
from .statistics import Statistics
from .weights import WeightHead

# Where numbers may not be used again, how often a row was judged is in these bits of a position.
_JUDGED = 32


class Run:
    """The rows of one call of generate, and everything that a schedule may ask of them."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        num_ensemble: int,
        law: Law,
        member_laws: Sequence[Law],
        schedule: Schedule,
        acceptances: Sequence[Acceptance],
        input_ids: Tensor,
        lengths: Sequence[int],
        seeds: Tensor,
        processors: Sequence[LogitsProcessorList],
        stopper: Stopper,
        statistics: Statistics,
        head: WeightHead | None = None,
        bonus_weights: Sequence[float] | None = None,
    ) -> None:
        """Start from prompts.

        Args:
            members: the ensemble's, then the separate drafts.
            num_ensemble: how many of them make the ensemble.
            law: the ensemble's. member_laws: each member's alone, warped the same way.
            acceptances: of each level that checks, the ensemble's last.
            input_ids: (B, S) int64. Left-padded prompts. lengths: tokens of each prompt.
            seeds: (B,) int64, on the device of input_ids.
            processors: per row; empty lists where there is none.
            head: gives the weights at each position; None is the law's.
            bonus_weights: of the law of bonus tokens; None is those of the position.
        """
        self.members = list(members)
        self.ensemble = range(num_ensemble)
        self.law, self.member_laws = law, member_laws
        self.schedule, self.acceptances = schedule, acceptances
        self.acceptance = acceptances[-1]
        self.head, self.bonus_weights = head, bonus_weights
        self._head_bias = None if head is None else head.bias.to(input_ids.device)
        self.processors = processors if any(len(p) > 0 for p in processors) else None
        self.stopper = stopper
        self.statistics = statistics
        batch, width = input_ids.shape
        self.device = input_ids.device
        # Columns past max_length are proposals that can never be committed.
        self.text = input_ids.new_zeros(batch, stopper.max_length + schedule.lookahead + 1)
        self.text[:, :width] = input_ids
        self._text_rows = self.text[:, None].unbind()
        self.log_probs: list[list[Tensor]] = [[] for _ in range(batch)]
        texts = input_ids.tolist()
        self.rows = [Row(b, width - n, n, texts[b][width - n :]) for b, n in enumerate(lengths)]
        self.finished: list[Row] = []
        self._laws = [Laws() for _ in self.members]
        self._scores = [Laws() for _ in self.members]
        # Of one turn: what `compare` has compared, and the laws of drafts that could stay.
        self._compared: tuple[Tensor, Tensor] | None = None
        self._staying: dict[Row, Tensor] = {}
        self._proposer_tensors: dict[tuple[int, ...], Tensor] = {}
        self._start_random(seeds)
        self._prefill(input_ids)

    # --- random numbers ---------------------------------------------------------------------------

    def _start_random(self, seeds: Tensor) -> None:
        """Blocks for every position from the last prompt token on; see `specens_kernels.Stream`."""
        self._seeds = seeds
        self._base = [row.length - 1 for row in self.rows]
        span = self.text.shape[1] - self.rows[0].pad - self._base[0] + 1
        base = torch.tensor(self._base, device=self.device)
        self._blocks_at = base[:, None] + torch.arange(span, device=self.device)
        self._blocks: dict[tuple[Stream, int], Sequence[Tensor]] = {}
        # A rule that judges several tokens at once has looked at numbers of tokens that it did not
        # keep: what replaces them needs others.
        self._fresh = any(acceptance.rule.block for acceptance in self.acceptances)
        self._components: list[list[int]] | None = None

    def _numbers(
        self, stream: Stream, index: int, rows: Sequence[Row], begins: list[int], count: int
    ) -> Tensor:
        """(R, count, 4) blocks of a stream for positions begins[k] on."""
        if self._fresh:
            at = [begin + (row.judged << _JUDGED) for row, begin in zip(rows, begins, strict=True)]
            positions = torch.tensor(at)[:, None] + torch.arange(count)
            return uniforms(
                self._seeds[self._indices(rows)], positions.to(self.device), stream, index=index
            )
        blocks = self._blocks.get((stream, index))
        if blocks is None:
            numbers = uniforms(self._seeds, self._blocks_at, stream, index=index)
            blocks = self._blocks[stream, index] = numbers[:, None].unbind()
        parts = [
            blocks[row.index].narrow(1, begin - self._base[row.index], count)
            for row, begin in zip(rows, begins, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # --- what schedules ask -----------------------------------------------------------------------

    def room(self, row: Row) -> int:
        """Tokens that may still be emitted after the pending ones."""
        return self.stopper.max_length - row.pad - row.end

    def lag(self, member: int, row: Row) -> int:
        """Committed tokens that the member has not been fed."""
        return row.length - self.members[member].lengths[self.rows.index(row)]

    def num_scored(self, row: Row) -> int:
        """Positions after the committed text that every member of the ensemble has a law for."""
        at = self.rows.index(row)
        return min(self.members[m].lengths[at] for m in self.ensemble) - row.length + 1

    def components(self, row: Row, count: int) -> list[int]:
        """The members that the row's next tokens are drawn from; known before any model runs."""
        if self._components is None:
            self._components = self._draw_components()
        at = row.length - 1 - self._base[row.index]
        return self._components[row.index][at : at + count]

    def _draw_components(self) -> list[list[int]]:
        """Of each row, the members that all of its tokens are drawn from."""
        weights = self.law.weights
        assert not isinstance(weights, Tensor), "weights that are known beforehand"
        shares = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        coins = uniforms(self._seeds.cpu(), self._blocks_at.cpu(), Stream.COMPONENT)[..., 0]
        drawn = torch.searchsorted(shares, coins.double(), right=True)
        found: list[list[int]] = drawn.clamp_(max=len(weights) - 1).tolist()
        return found

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
                laws = self._laws[member].take(going, [row.end - 1 for row in going], 1)[:, 0]
                stops = stop.asks(log_probs, laws[:, : self.law.vocab_size])
                going = [row for row, stopped in zip(going, stops, strict=True) if not stopped]
            going = [row for row in going if left[row] > 0]

    def look_up(self, rows: Sequence[Row], count: int, longest: int) -> None:
        """Append what followed the latest earlier occurrence of each row's last tokens."""
        for row in rows:
            most = min(count, self.room(row) - 1)
            found = row.occurrences.continuation(row.tokens, longest, most)
            if found:
                self._write([row], [row.end], torch.tensor([found], device=self.device))
                row.pending += [POINT_MASS] * len(found)
                self.statistics.drafted[POINT_MASS] += len(found)

    def check(self, level: int, member: int, rows: Sequence[Row], most: int) -> None:
        """The member verifies the latest proposals and adds a token: they are then its own.

        What it verifies are the pending tokens of smaller drafts, who are listed before it. Where
        blocks are verified it keeps no more than `most` tokens of its own: that a block is longer
        says something about its tokens, whose law would then not be the member's.
        """
        own = [sum(owner >= member for owner in row.pending) for row in rows]
        counts = [len(row.pending) - n for row, n in zip(rows, own, strict=True)]
        begins = [row.length + n for row, n in zip(rows, own, strict=True)]
        self.feed(member, rows)
        logits = self._laws[member].take(rows, begins, max(counts) + 1)
        verdict = verify(
            [logits],
            self._drafts(rows, begins, counts),
            self._numbers(
                Stream.VERIFY, level, rows, [begin - 1 for begin in begins], max(counts) + 1
            ),
            self.member_laws[member],
            **self._proposals(rows, own, counts, begins, among=()),
            acceptance=self.acceptances[level - 1],
        )
        on_host = zip(rows, own, *_to_host(verdict), strict=True)
        for k, (row, mine, tokens, num_accepted, status) in enumerate(on_host):
            at = row.pad + row.length + mine + num_accepted
            self.text[row.index, at : at + 1] = verdict.tokens[k, num_accepted : num_accepted + 1]
            self.statistics.test(row.pending[mine:], num_accepted)
            self.statistics.status |= status
            new = num_accepted + 1
            if self.acceptances[level - 1].rule.block:
                new = min(new, most - row.pending[:mine].count(member))
            row.pending[mine:] = [member] * new
            row.judged += 1
            # Of this level's tokens alone: a level that has refused the end goes on.
            row.ended = not self.stopper.eos.isdisjoint(tokens[:new])
        self.statistics.drafted[member] += len(rows)
        for model, laws in zip(self.members, self._laws, strict=True):
            # What was said after the token just added is about another one.
            lengths = list(model.lengths)
            for place, row in zip(self._places(rows), rows, strict=True):
                lengths[place] = min(lengths[place], row.end - 1)
                laws.cut(row, lengths[place])
            model.rollback(lengths)

    def compare(
        self, member: int, other: int, rows: Sequence[Row]
    ) -> list[list[tuple[float, float]]]:
        """Of each pending token, what another member says of it and of the law it was drawn from.

        Returns:
            Per row and token: the mass that both laws share, sum min(P, P_other), and
            min(1, P_other / P) of the token. At temperature 0 the laws are those of temperature 1.
        """
        begins, counts = [row.length for row in rows], [len(row.pending) for row in rows]
        law = self.member_laws[member]
        if law.temperature == 0:
            law = replace(law, temperature=1.0)
        mine, theirs = (
            mix([self._laws[m].take(rows, begins, max(counts))], law)[0] for m in (member, other)
        )
        self._compared = mine, theirs
        tokens = self._tokens(rows, begins, max(counts))[..., None]
        shared = torch.minimum(mine, theirs).exp().sum(-1)
        ratios = (theirs.gather(-1, tokens) - mine.gather(-1, tokens)).clamp_(max=0).exp()[..., 0]
        # One copy to the host more: how much is verified decides the shapes of what follows.
        found = torch.stack((shared, ratios), -1).tolist()
        return [
            [(s, a) for s, a in said[:count]] for said, count in zip(found, counts, strict=True)
        ]

    def drop(self, row: Row, kept: int) -> None:
        """Take back the row's pending tokens but the first `kept`, before the ensemble is fed.

        That must not depend on what the tokens taken back are. Their numbers, which belong to
        positions of the text, are used again once the text gets there, and may be: tokens taken
        back have decided nothing, and what decided the cut is the tokens before it. Of these, the
        ones after a refused token are dropped together with the cut that they have decided. Who
        drew or scored what is taken back forgets it with the row's other tokens, after the token
        that every such turn adds.
        """
        del row.pending[kept:]

    def withdraw(self, rows: Sequence[Row], needed: Sequence[Sequence[Sequence[float]]]) -> None:
        """After `compare` and `drop`: what the rows' tokens are then drawn from.

        A token that stays only where its ratio is high enough was drawn from q' = q where it is,
        and 0 elsewhere, which sums to less than 1. One taken back has no mass in it: verified, it
        is refused, and what replaces it is drawn from max(p - q', 0). So the text is exact.

        Args:
            needed: per row, for its pending tokens and the one taken back after them, the ratio
                above which a token stays, for each of `BINS` cells of ratios.
        """
        if self.law.temperature == 0:
            return  # then the text is the ensemble's, whatever was proposed
        assert self._compared is not None, "compare comes first"
        mine, theirs = self._compared
        ratios = (theirs - mine).clamp_(max=0).exp_().nan_to_num_()
        width = ratios.shape[1]
        padded = [[*one, *[[-1.0] * BINS] * (width - len(one))] for one in needed]
        cells = (ratios * BINS).long().clamp_(max=BINS - 1)
        least = torch.tensor(padded, dtype=torch.float64, device=self.device)
        stays = ratios > least.gather(-1, cells)
        begins = [row.length for row in rows]
        drawn = self._tokens(rows, begins, width)[..., None]
        kept = torch.tensor([len(row.pending) for row in rows], device=self.device)
        # Of the tokens themselves it has been decided, on the host.
        staying = torch.arange(width, device=self.device) < kept[:, None]
        stays.scatter_(-1, drawn, staying[..., None])
        self._staying = dict(zip(rows, mine.masked_fill(~stays, -torch.inf), strict=True))

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
        tokens = self._tokens(rows, starts, max(counts))
        subset = None if len(rows) == len(self.rows) else places
        logits = model.forward(tokens, counts, subset)
        if logits.device != self.device:
            # Asynchronous copies to the host would be read before they have arrived.
            logits = logits.to(self.device, non_blocking=self.device.type != "cpu")
        if self.processors is not None:
            logits = self._process(rows, starts, counts, logits)
        self.statistics.calls[member] += 1
        firsts = [start + 1 for start in starts]
        self._laws[member].add(rows, firsts, counts, logits)
        if model.scores is not None:
            scores = model.scores.to(self.device)[..., None]
            self._scores[member].add(rows, firsts, counts, scores)

    def draw(self, member: int, rows: Sequence[Row]) -> Tensor:
        """Append one token to each row that has room, drawn from the member's own law.

        Returns:
            (R, 1) log-probabilities of these tokens, of the rows that have room.
        """
        rows = [row for row in rows if self.room(row) > 0]
        if not rows:
            return torch.empty(0, 1)
        ends = [row.end for row in rows]
        laws = self._laws[member].take(rows, ends, 1)
        numbers = self._numbers(Stream.DRAFT, member, rows, ends, 1)
        drawn = sample([laws], numbers, self.member_laws[member])
        self._write(rows, ends, drawn.tokens)
        for row in rows:
            row.pending.append(member)
        self.statistics.drafted[member] += len(rows)
        return drawn.log_probs

    # --- the loop ---------------------------------------------------------------------------------

    def turn(self) -> dict[int, list[int]]:
        """Propose, score, verify, commit; returns the tokens emitted for each row of the batch."""
        emitted: dict[int, list[int]] = {}
        for verification in self.schedule.turn(self):
            emitted.update(self._commit(verification, self._verify(verification)))
        self._roll_back()
        self._compared = None  # as wide as the vocabulary
        self.statistics.turns += 1
        for laws in (*self._laws, *self._scores):
            laws.forget()
        return emitted

    def _prefill(self, input_ids: Tensor) -> None:
        """Feed every member all but the last token of each prompt."""
        began = time.perf_counter()
        counts = [row.length - 1 for row in self.rows]
        capacity = self.text.shape[1] + self.schedule.lookahead + 1
        for model in self.members:
            model.start(len(self.rows), capacity)
            if max(counts) > 0:
                tokens = self._tokens(self.rows, [0] * len(counts), max(counts))
                model.forward(tokens, counts, keep_last=1)
        if self.device.type != "cpu":
            # Else its time would be counted where the loop first waits for the device.
            torch.accelerator.synchronize(self.device)
        self.statistics.prefill_seconds = time.perf_counter() - began

    def _verify(self, verification: Verification) -> Verdict:
        """One call of the verify op over what the members have said."""
        rows, counts = verification.rows, verification.num_drafts
        if verification.withdrawn is not None and self._staying:
            counts = [n + taken for n, taken in zip(counts, verification.withdrawn, strict=True)]
        begins = [row.length for row in rows]
        width = max(counts) + verification.bonus
        which = self.ensemble if verification.members is None else verification.members
        # Those whose weight is 0 everywhere may have said nothing.
        asked = self._asked(verification)
        scored = [m for m in which if asked is None or m in asked]
        taken = {m: self._laws[m].take(rows, begins, width) for m in scored}
        logits = [taken.get(m, taken[scored[0]]) for m in which]
        law = self.law if verification.members is None else self.member_laws[which[0]]
        if verification.components is not None:
            law = self._component_law(verification, width)
        elif self.head is not None or self.bonus_weights is not None:
            law = self._weighted_law(verification, begins, width)
        return verify(
            logits,
            self._drafts(rows, begins, counts),
            self._numbers(Stream.VERIFY, 0, rows, [begin - 1 for begin in begins], max(counts) + 1),
            law,
            **self._proposals(rows, [0] * len(rows), counts, begins, among=which),
            acceptance=self.acceptance,
            memory=self._memory(rows) if self.acceptance.rule.remembers else None,
            bonus=verification.bonus,
        )

    def _asked(self, verification: Verification) -> set[int] | None:
        """Members whose laws are needed where tokens have components; None where they have not."""
        if verification.components is None:
            return None
        components = {member for mine in verification.components for member in mine}
        return components | {owner for row in verification.rows for owner in row.pending}

    def _drafts(self, rows: Sequence[Row], begins: list[int], counts: Sequence[int]) -> Tensor:
        """(R, N) int64: counts[k] tokens of each row from begins[k] on, then PADDING."""
        drafts = self._tokens(rows, begins, max(counts))
        if min(counts) < max(counts):
            beyond = torch.arange(max(counts)) >= torch.tensor(counts)[:, None]
            drafts = drafts.masked_fill(beyond.to(self.device), PADDING)
        return drafts

    def _proposals(
        self,
        rows: Sequence[Row],
        skip: Sequence[int],
        counts: Sequence[int],
        begins: list[int],
        *,
        among: Sequence[int],
    ) -> dict[str, Any]:
        """The laws that drafts were drawn from, skip[k] pending tokens left out.

        A member `among` those whose logits are verified is named; another's are handed over.
        """
        if self._staying:
            return self._staying_proposals(rows, max(counts))
        owners = [row.pending[s : s + n] for row, s, n in zip(rows, skip, counts, strict=True)]
        proposers = {owner for mine in owners for owner in mine}
        if proposers <= {POINT_MASS}:
            return {}
        if proposers <= {POINT_MASS, *among}:
            return {"proposers": self._proposers(owners, max(counts))}
        (proposer,) = proposers
        return {"draft_logits": self._laws[proposer].take(rows, begins, max(counts))}

    def _staying_proposals(self, rows: Sequence[Row], width: int) -> dict[str, Any]:
        """What was drawn and could stay, as log-probabilities that need no normaliser."""
        one = next(iter(self._staying.values()))
        laws = one.new_zeros(len(rows), width, one.shape[-1])
        for k, row in enumerate(rows):
            if row in self._staying:
                laws[k] = self._staying[row][:width]
        self._staying = {}
        return {
            "draft_logits": laws,
            "draft_temperature": laws.new_ones(len(rows)),
            "draft_lse": laws.new_zeros(len(rows), width),
        }

    def _component_law(self, verification: Verification, width: int) -> Law:
        """The law in which each position has the weights of one member."""
        assert verification.components is not None
        padded = [mine + mine[-1:] * (width - len(mine)) for mine in verification.components]
        one_hot = torch.nn.functional.one_hot(torch.tensor(padded), len(self.ensemble))
        return replace(self.law, weights=one_hot.to(self.device, torch.float32))

    def _weighted_law(self, verification: Verification, begins: list[int], width: int) -> Law:
        """The law with the head's weights at each position, and those of bonus tokens."""
        rows, counts = verification.rows, verification.num_drafts
        if self.head is None:
            weights = torch.tensor(self.law.weights, device=self.device)
            weights = weights.expand(len(rows), width, -1).clone()
        else:
            draft, target = (self._scores[m].take(rows, begins, width)[..., 0] for m in (0, 1))
            assert self._head_bias is not None
            draft_weight = torch.sigmoid(draft + target + self._head_bias)
            weights = torch.stack((draft_weight, 1 - draft_weight), -1)
        if self.bonus_weights is not None:
            places = torch.arange(len(rows)), torch.tensor(counts)
            weights[places] = torch.tensor(self.bonus_weights, device=self.device)
        return replace(self.law, weights=weights)

    def _memory(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.memory for row in rows], device=self.device)

    def _commit(self, verification: Verification, verdict: Verdict) -> dict[int, list[int]]:
        """Append what was emitted, cut where a row ends, and take back what was not kept."""
        emitted: dict[int, list[int]] = {}
        on_host = zip(verification.rows, verification.num_drafts, *_to_host(verdict), strict=True)
        for k, (row, drafts, tokens, num_accepted, status) in enumerate(on_host):
            new = tokens[: num_accepted + 1 if tokens[num_accepted] != PADDING else num_accepted]
            replaced = len(new) > num_accepted
            column = row.pad + row.length
            if replaced:
                at = column + num_accepted
                self.text[row.index, at : at + 1] = verdict.tokens[
                    k, num_accepted : num_accepted + 1
                ]
            kept, done = self.stopper.cut(new, self.text[row.index], column)
            self._count(row, drafts, num_accepted, status, kept, replaced and kept == len(new))
            log_probs = verdict.log_probs[k, :kept]
            if self.acceptance.rule.remembers:
                for log_prob in log_probs.tolist():
                    row.memory = remember(row.memory, log_prob, self.acceptance.parameters[-1])
            if verification.members is not None or verification.components is not None:
                # Drawn from one member, not scored by all.
                log_probs = torch.full_like(log_probs, torch.nan)
            self.log_probs[row.index].append(log_probs)
            emitted[row.index] = new[:kept]
            row.tokens += new[:kept]
            row.judged += 1
            row.length += kept
            if replaced or done:
                row.pending.clear()
                row.ended = False
                for laws in (*self._laws, *self._scores):
                    laws.drop(row)
            else:
                del row.pending[:kept]
            if done:
                self.finished.append(row)
        return emitted

    def _count(
        self, row: Row, drafts: int, num_accepted: int, status: int, kept: int, replaced: bool
    ) -> None:
        self.statistics.test(row.pending[:drafts], num_accepted)
        self.statistics.status |= status
        self.statistics.num_tokens += kept
        self.statistics.num_replaced += replaced

    def _roll_back(self) -> None:
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

    # --- text on the device -----------------------------------------------------------------------

    def _places(self, rows: Sequence[Row]) -> list[int]:
        """Where the rows stand in the members' caches."""
        if len(rows) == len(self.rows):
            return list(range(len(rows)))
        return [self.rows.index(row) for row in rows]

    def _indices(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.index for row in rows], device=self.device)

    def _columns(self, rows: Sequence[Row], begins: list[int], count: int) -> Tensor:
        at = torch.tensor([row.pad + b for row, b in zip(rows, begins, strict=True)])
        columns = at[:, None] + torch.arange(count)
        return columns.clamp_(max=self.text.shape[1] - 1).to(self.device)

    def _tokens(self, rows: Sequence[Row], begins: list[int], count: int) -> Tensor:
        """(R, count) int64: the rows' tokens begins[k] on."""
        if len(rows) == 1:
            row = rows[0]
            return self._text_rows[row.index].narrow(1, row.pad + begins[0], count)
        return self.text[self._indices(rows)[:, None], self._columns(rows, begins, count)]

    def _write(self, rows: Sequence[Row], begins: list[int], tokens: Tensor) -> None:
        """Put tokens (R, n) at begins[k] on."""
        width = tokens.shape[1]
        if len(rows) == 1:
            row = rows[0]
            self._text_rows[row.index].narrow(1, row.pad + begins[0], width).copy_(tokens)
        else:
            self.text[self._indices(rows)[:, None], self._columns(rows, begins, width)] = tokens

    def _proposers(self, owners: list[list[int]], width: int) -> Tensor:
        """(R or 1, width) int32: which member each draft was drawn from."""
        if any(mine != owners[0] for mine in owners):
            padded = [mine + [PADDING] * (width - len(mine)) for mine in owners]
            return torch.tensor(padded, dtype=torch.int32, device=self.device)
        # One pattern for all rows is one of a few that come again.
        key = tuple(owners[0])
        if key not in self._proposer_tensors:
            tensor = torch.tensor(owners[:1], dtype=torch.int32, device=self.device)
            self._proposer_tensors[key] = tensor
        return self._proposer_tensors[key]

    # --- logits processors ------------------------------------------------------------------------

    def _process(
        self, rows: Sequence[Row], starts: list[int], counts: list[int], logits: Tensor
    ) -> Tensor:
        """Run the processors on every new law, each on the prefix that leads to it."""
        assert self.processors is not None
        # Some processors remember the width that they saw first, so all members show them one.
        narrowest = min(model.vocab_size for model in self.members)
        logits = logits[..., :narrowest].to(torch.float32, copy=True)
        for k, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            processors: Any = self.processors[row.index]
            for j in range(max(0, row.length - start - 1), count):
                prefix = self.text[row.index : row.index + 1, : row.pad + start + 1 + j]
                scores = processors(prefix, logits[k : k + 1, j])
                if scores.shape != (1, narrowest):
                    raise ValueError(
                        f"generate: logits_processor: expected scores (1, {narrowest}) for the one "
                        f"row asked about, got {tuple(scores.shape)}"
                    )
                logits[k, j] = scores[0]
        return logits


def _to_host(verdict: Verdict) -> tuple[list[list[int]], list[int], list[int]]:
    """Tokens, accepted counts and status as lists: the turn's one copy from device to host."""
    tokens, num_accepted, status = verdict.tokens, verdict.num_accepted, verdict.status
    if tokens.is_cpu:
        return tokens.tolist(), num_accepted.tolist(), status.tolist()
    packed = torch.cat((tokens, num_accepted[:, None], status[:, None]), 1).tolist()
    return [row[:-2] for row in packed], [row[-2] for row in packed], [row[-1] for row in packed]
