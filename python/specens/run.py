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
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from specens_kernels import (
    PADDING,
    Acceptance,
    Law,
    Stream,
    Verdict,
    sample,
    uniforms,
    verify,
)

from .members import Member
from .processors import Stopper
from .schedules import Schedule, Verification
from .statistics import Statistics


@dataclass(eq=False)
class Row:
    """One sequence of the batch while it is being written.

    index: which row of the user's batch. pad: columns of left padding before its text.
    length: committed tokens, the prompt included. pending: proposer of each pending token.
    slot: place in the rotation of the member that scored last.
    """

    index: int
    pad: int
    length: int
    pending: list[int] = field(default_factory=list)
    slot: int = 0

    @property
    def end(self) -> int:
        """Tokens, pending ones included."""
        return self.length + len(self.pending)


@dataclass(slots=True)
class _Chunk:
    """The logits of one forward: row k's are the laws of tokens first[k] to first[k] + count[k]."""

    logits: Tensor  # (R, q, V)
    places: dict[Row, tuple[int, int, int]]  # row -> (k, first, count)


class _Laws:
    """What one member has said about the tokens that are not committed yet."""

    def __init__(self) -> None:
        self.chunks: list[_Chunk] = []

    def add(self, rows: Sequence[Row], first: list[int], counts: list[int], logits: Tensor) -> None:
        places = {row: (k, first[k], counts[k]) for k, row in enumerate(rows)}
        self.chunks.append(_Chunk(logits, places))

    def drop(self, row: Row) -> None:
        """Drop all that was said of the row: its pending tokens were replaced, or it ended."""
        for chunk in self.chunks:
            chunk.places.pop(row, None)

    def forget(self) -> None:
        """Drop the forwards that only speak of tokens committed since."""
        self.chunks = [
            chunk
            for chunk in self.chunks
            if any(first + n > row.length for row, (_, first, n) in chunk.places.items())
        ]

    def take(self, rows: Sequence[Row], begins: list[int], count: int) -> Tensor:
        """(R, count, V): the laws of tokens begins[k] on; a view where one forward gave them all.

        Where a row has fewer laws than `count`, the rest of its rows hold anything.
        """
        newest = self.chunks[-1]
        if len(rows) == newest.logits.shape[0] == 1:
            _, first, held = newest.places.get(rows[0], (0, 0, 0))
            if 0 <= (offset := begins[0] - first) <= held - count:
                logits = newest.logits
                return logits if logits.shape[1] == count else logits.narrow(1, offset, count)
        pieces = [self._pieces(row, begin, count) for row, begin in zip(rows, begins, strict=True)]
        head = pieces[0]
        if head and all(
            len(mine) == len(head)
            and all(
                a[0] is b[0] and a[2:] == b[2:] and a[1] == k and len(a[0].logits) == len(rows)
                for a, b in zip(mine, head, strict=True)
            )
            for k, mine in enumerate(pieces)
        ):
            parts = [chunk.logits[:, at : at + size] for chunk, _, at, size in head]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        sample_chunk = next(mine for mine in pieces if mine)[0][0].logits
        laws = sample_chunk.new_empty(len(rows), count, sample_chunk.shape[-1])
        for k, mine in enumerate(pieces):
            column = 0
            for chunk, place, at, size in mine:
                laws[k, column : column + size] = chunk.logits[place, at : at + size]
                column += size
        return laws

    def _pieces(self, row: Row, begin: int, count: int) -> list[tuple[_Chunk, int, int, int]]:
        """(chunk, its row, first column, columns) that give the laws from `begin`, newest wins."""
        pieces = []
        at = begin
        while at < begin + count:
            for chunk in reversed(self.chunks):
                place, first, held = chunk.places.get(row, (0, 0, 0))
                if first <= at < first + held:
                    size = min(first + held, begin + count) - at
                    pieces.append((chunk, place, at - first, size))
                    at += size
                    break
            else:
                break
        return pieces


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
        acceptance: Acceptance,
        input_ids: Tensor,
        lengths: Sequence[int],
        seeds: Tensor,
        processors: Sequence[LogitsProcessorList],
        stopper: Stopper,
        statistics: Statistics,
    ) -> None:
        """Start from prompts.

        Args:
            members: the ensemble's, then the separate draft if there is one.
            num_ensemble: how many of them make the ensemble.
            law: the ensemble's. member_laws: each member's alone, warped the same way.
            input_ids: (B, S) int64. Left-padded prompts. lengths: tokens of each prompt.
            seeds: (B,) int64, on the device of input_ids.
            processors: per row; empty lists where there is none.
        """
        self.members = list(members)
        self.ensemble = range(num_ensemble)
        self.law, self.member_laws = law, member_laws
        self.schedule, self.acceptance = schedule, acceptance
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
        self.rows = [Row(b, width - n, n) for b, n in enumerate(lengths)]
        self.finished: list[Row] = []
        self._laws = [_Laws() for _ in self.members]
        self._proposer_tensors: dict[tuple[tuple[int, ...], ...], Tensor] = {}
        self._start_random(seeds)
        self._prefill(input_ids)

    # --- random numbers: all of a call's, once --------------------------------------------------

    def _start_random(self, seeds: Tensor) -> None:
        """Blocks for every position from the last prompt token on; see `specens_kernels.Stream`."""
        self._base = [row.length - 1 for row in self.rows]
        span = self.text.shape[1] - self.rows[0].pad - self._base[0] + 1
        base = torch.tensor(self._base, device=self.device)
        positions = base[:, None] + torch.arange(span, device=self.device)
        self._verify_numbers = uniforms(seeds, positions, Stream.VERIFY)[:, None].unbind()
        self._draft_numbers = [
            uniforms(seeds, positions, Stream.DRAFT, index=m)[:, None].unbind()
            for m in range(len(self.members))
        ]
        coins = uniforms(seeds.cpu(), positions.cpu(), Stream.COMPONENT)[..., 0]
        weights = self.law.weights
        if isinstance(weights, Tensor) or len(self.members) == 1:
            self._components = torch.zeros_like(coins, dtype=torch.int64)
        else:
            shares = torch.tensor(weights, dtype=torch.float64).cumsum(0)
            self._components = torch.searchsorted(shares, coins.double(), right=True)
            self._components.clamp_(max=len(weights) - 1)

    def _numbers(
        self, numbers: Sequence[Tensor], rows: Sequence[Row], begins: list[int], count: int
    ) -> Tensor:
        """(R, count, 4) blocks for positions begins[k] on."""
        parts = [
            numbers[row.index].narrow(1, begin - self._base[row.index], count)
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

    def component(self, row: Row) -> int:
        """The member that the row's next token is drawn from."""
        at = row.length - 1 - self._base[row.index]
        return int(self._components[row.index, at])

    def propose(self, member: int, rows: Sequence[Row], counts: Sequence[int]) -> None:
        """Append counts[k] tokens drawn from the member one by one; fewer where the text ends."""
        counts = [min(n, self.room(row)) for row, n in zip(rows, counts, strict=True)]
        for step in range(max(counts, default=0)):
            active = [row for row, n in zip(rows, counts, strict=True) if step < n]
            self.feed(member, active)
            self.draw(member, active)

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
        self._laws[member].add(rows, [start + 1 for start in starts], counts, logits)

    def draw(self, member: int, rows: Sequence[Row]) -> None:
        """Append one token to each row that has room, drawn from the member's own law."""
        rows = [row for row in rows if self.room(row) > 0]
        if not rows:
            return
        ends = [row.end for row in rows]
        laws = self._laws[member].take(rows, ends, 1)
        numbers = self._numbers(self._draft_numbers[member], rows, ends, 1)
        drawn = sample([laws], numbers, self.member_laws[member]).tokens
        self._write(rows, ends, drawn)
        for row in rows:
            row.pending.append(member)
        self.statistics.drafted[member] += len(rows)

    # --- the loop ---------------------------------------------------------------------------------

    def turn(self) -> dict[int, list[int]]:
        """Propose, score, verify, commit; returns the tokens emitted for each row of the batch."""
        emitted: dict[int, list[int]] = {}
        for verification in self.schedule.turn(self):
            emitted.update(self._commit(verification, self._verify(verification)))
        self._roll_back()
        self.statistics.turns += 1
        for laws in self._laws:
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
        self.statistics.prefill_seconds = time.perf_counter() - began

    def _verify(self, verification: Verification) -> Verdict:
        """One call of the verify op over what the members have said."""
        rows, counts = verification.rows, verification.num_drafts
        num_drafts = max(counts)
        begins = [row.length for row in rows]
        width = num_drafts + verification.bonus
        which = self.ensemble if verification.members is None else verification.members
        logits = [self._laws[m].take(rows, begins, width) for m in which]
        drafts = self._tokens(rows, begins, num_drafts)
        if min(counts) < num_drafts:
            beyond = torch.arange(num_drafts) >= torch.tensor(counts)[:, None]
            drafts = drafts.masked_fill(beyond.to(self.device), PADDING)
        numbers = self._numbers(
            self._verify_numbers, rows, [begin - 1 for begin in begins], num_drafts + 1
        )
        proposers, draft_logits = None, None
        owners = {owner for row, n in zip(rows, counts, strict=True) for owner in row.pending[:n]}
        if owners and max(owners) in self.ensemble:
            proposers = self._proposers(rows, counts, num_drafts)
        elif owners:
            draft = len(self.members) - 1
            draft_logits = self._laws[draft].take(rows, begins, num_drafts)
        law = self.law if verification.members is None else self.member_laws[which[0]]
        return verify(
            logits,
            drafts,
            numbers,
            law,
            proposers=proposers,
            draft_logits=draft_logits,
            acceptance=self.acceptance,
            bonus=verification.bonus,
        )

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
            if verification.members is not None:  # drawn from one member, not scored by all
                log_probs = torch.full_like(log_probs, torch.nan)
            self.log_probs[row.index].append(log_probs)
            emitted[row.index] = new[:kept]
            row.length += kept
            if replaced or done:
                row.pending.clear()
                for laws in self._laws:
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

    def _proposers(self, rows: Sequence[Row], counts: Sequence[int], width: int) -> Tensor:
        """(R or 1, width) int32: which member each draft was drawn from."""
        owners = [row.pending[:n] for row, n in zip(rows, counts, strict=True)]
        if all(mine == owners[0] for mine in owners):
            owners = owners[:1]
        key = tuple(tuple(mine) for mine in owners)
        if key not in self._proposer_tensors:
            padded = [mine + [PADDING] * (width - len(mine)) for mine in owners]
            tensor = torch.tensor(padded, dtype=torch.int32, device=self.device)
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
