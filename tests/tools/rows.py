# SPDX-License-Identifier: Apache-2.0
"""A member beside the token lists that it should hold, and the model itself as its oracle.

To make a member do something new, add a move to `Rows`, and it to `Rows.play` if decoders make it.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from zoo import VOCAB_SIZE, WINDOW

from specens.members.member import Member

# Errors are in units of the logits' standard deviation over the vocabulary. Both sides add the
# same products in another order. A rounding error of eps enters at some 30 places in each of 4
# layers, and a sum of 64 to 96 products carries at most 64 of it: 4 * 30 * 64 * eps, which is 5e-4
# in float32 and 1e-12 in float64.
TOLERANCE = {torch.float32: 5e-4, torch.float64: 1e-12}


def fresh(model: Any, row: list[int]) -> Tensor:
    """(len(row), V). What the model says of a row it sees for the first time."""
    with torch.no_grad():
        return model(torch.tensor([row]), use_cache=False).logits[0]


def error(logits: Tensor, expected: Tensor) -> float:
    """The largest error, in units of the spread of its position's logits; NaN is infinite."""
    errors = (logits - expected).abs() / expected.std(-1, keepdim=True)
    return errors.nan_to_num(nan=float("inf")).max().item()


class Rows:
    """A member next to the token lists it should hold; every forward is compared with `fresh`."""

    def __init__(self, member: Member, batch_size: int, capacity: int, seed: int = 0) -> None:
        self.member = member
        self.random = random.Random(seed)
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]
        self.worst = 0.0
        self.compared = 0
        member.start(batch_size, capacity)

    def forward(self, counts: list[int], rows: list[int] | None = None, keep: int | None = None):
        among = list(range(len(self.rows))) if rows is None else rows
        q = max(counts)
        # The decoder pads with -1, which no embedding has.
        tokens = torch.full((len(among), q), -1)
        for i, (row, count) in enumerate(zip(among, counts, strict=True)):
            # Not the padding token, whose embedding is zero: its logits would have no spread.
            new = [self.random.randrange(3, VOCAB_SIZE) for _ in range(count)]
            tokens[i, :count] = torch.tensor(new, dtype=torch.int64)
            self.rows[row] += new
        given = tokens.clone()
        logits = self.member.forward(tokens, counts, rows, keep_last=keep)
        assert torch.equal(tokens, given)
        assert logits.shape == (len(among), q if keep is None else keep, VOCAB_SIZE)
        for i, (row, count) in enumerate(zip(among, counts, strict=True)):
            if count == 0:
                continue
            shown = count if keep is None else min(keep, count)
            got = logits[i, :count] if keep is None else logits[i, keep - shown :]
            expected = fresh(self.member.model, self.rows[row])[-shown:]
            self.worst = max(self.worst, error(got, expected))
            self.compared += shown
        assert self.member.lengths == [len(row) for row in self.rows]

    def rollback(self, lengths: list[int]) -> None:
        self.member.rollback(lengths)
        for row, length in zip(self.rows, lengths, strict=True):
            del row[length:]

    def select(self, rows: list[int]) -> None:
        self.member.select(rows)
        self.rows = [self.rows[row] for row in rows]

    def play(self, turns: int) -> None:
        """Random moves: what a decoder does, and what it might do."""
        pick = self.random
        self.forward([pick.randint(1, 2 * WINDOW) for _ in self.rows])
        for turn in range(turns):
            batch_size = len(self.rows)
            q = pick.choice([1, 1, 2, 3, 5])
            move = pick.choice(["all", "equal", "some", "draft"])
            if move == "all":
                counts = [pick.randint(0, q) for _ in range(batch_size)]
                counts[pick.randrange(batch_size)] = q
                self.forward(counts, keep=pick.choice([None, None, 1, 3]))
            elif move == "equal":
                shortest = min(map(len, self.rows))
                self.rollback([shortest] * batch_size)
                self.forward([q] * batch_size)
            elif move == "some":
                some = pick.sample(range(batch_size), pick.randint(1, batch_size))
                self.forward([q] + [pick.randint(0, q) for _ in some[1:]], some)
            else:
                for _ in range(3):
                    self.forward([1] * batch_size)
            depth = 30 if turn % 7 == 6 else 5
            self.rollback([max(len(row) - pick.randint(0, depth), 0) for row in self.rows])
            if turn % 5 == 4 and batch_size > 1:
                self.select(pick.sample(range(batch_size), batch_size - turn % 2))
