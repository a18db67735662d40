# SPDX-License-Identifier: Apache-2.0
"""`MemberLaws`: what one member has said about the tokens that are not committed yet.

The logits of its forwards are kept as they came; a row's laws are found in them when they are
asked for, as a view where one forward gave them all. Nothing is read back to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specens.loop.rows import Row


@dataclass(slots=True)
class Chunk:
    """The logits of one forward: row k's are the laws of tokens first[k] to first[k] + count[k]."""

    logits: Tensor  # (R, q, V)
    places: dict[Row, tuple[int, int, int]]  # row -> (k, first, count)


class MemberLaws:
    """What one member has said about the tokens that are not committed yet."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []

    def add(self, rows: Sequence[Row], first: list[int], counts: list[int], logits: Tensor) -> None:
        """What a forward said: row k's are the laws of tokens first[k] to first[k] + counts[k]."""
        places = {row: (k, first[k], counts[k]) for k, row in enumerate(rows)}
        self.chunks.append(Chunk(logits, places))

    def drop(self, row: Row) -> None:
        """Drop all that was said of the row: its pending tokens were replaced, or it ended."""
        for chunk in self.chunks:
            chunk.places.pop(row, None)

    def cut(self, row: Row, length: int) -> None:
        """Drop what was said after the row's first `length` tokens: the next one was replaced."""
        for chunk in self.chunks:
            if row in chunk.places:
                place, first, held = chunk.places[row]
                chunk.places[row] = (place, first, max(min(held, length + 1 - first), 0))

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
        if sum(size for *_, size in head) == count and all(
            len(pieces_of_row) == len(head)
            and all(
                a[0] is b[0] and a[2:] == b[2:] and a[1] == k and len(a[0].logits) == len(rows)
                for a, b in zip(pieces_of_row, head, strict=True)
            )
            for k, pieces_of_row in enumerate(pieces)
        ):
            parts = [chunk.logits[:, at : at + size] for chunk, _, at, size in head]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        sample_chunk = next(pieces_of_row for pieces_of_row in pieces if pieces_of_row)[0][0].logits
        laws = sample_chunk.new_empty(len(rows), count, sample_chunk.shape[-1])
        for k, pieces_of_row in enumerate(pieces):
            column = 0
            for chunk, place, at, size in pieces_of_row:
                laws[k, column : column + size] = chunk.logits[place, at : at + size]
                column += size
        return laws

    def _pieces(self, row: Row, begin: int, count: int) -> list[tuple[Chunk, int, int, int]]:
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
