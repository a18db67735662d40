# SPDX-License-Identifier: Apache-2.0
"""`Numbers`: the random numbers of a call, by stream and by position of the text.

A number belongs to a seed, a stream and a position (`specens_kernels.Stream`), so a row's text
depends neither on its batch nor on how many tokens were proposed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specens.loop.rows import Row
from specens.members.capacity import capacity_for
from specens_kernels import Stream, uniforms

# Where numbers may not be used again, how often a row was judged is in these bits of a position.
_JUDGED = 32


class Numbers:
    """The random numbers of a call."""

    def __init__(self, seeds: Tensor, rows: Sequence[Row], *, fresh: bool) -> None:
        """For positions from each row's last prompt token on.

        Args:
            seeds: (B,) int64, on the device of the text. rows: B rows at their start.
            fresh: whether a position that is judged again needs other numbers. A rule that judges
                several tokens at once has looked at numbers of tokens that it did not keep: what
                replaces them needs others.
        """
        self._seeds = seeds
        self._fresh = fresh
        self._begins = [row.length - 1 for row in rows]
        # Positions, and the blocks of each row for them.
        self._rows: dict[tuple[Stream, int], tuple[int, Sequence[Tensor]]] = {}

    def __call__(
        self, stream: Stream, index: int, rows: Sequence[Row], begins: list[int], count: int
    ) -> Tensor:
        """(R, count, 4) blocks of a stream for positions begins[k] on."""
        if self._fresh:
            at = [begin + (row.judged << _JUDGED) for row, begin in zip(rows, begins, strict=True)]
            positions = (torch.tensor(at)[:, None] + torch.arange(count)).to(self._seeds.device)
            indices = torch.tensor([row.index for row in rows], device=self._seeds.device)
            return uniforms(self._seeds[indices], positions, stream, index=index)
        places = [b - self._begins[row.index] for row, b in zip(rows, begins, strict=True)]
        size = max(places) + count
        known, blocks = self._rows.get((stream, index), (0, ()))
        if size > known:
            numbers = self.first(stream, index, size)
            known, blocks = numbers.shape[1], numbers[:, None].unbind()
            self._rows[stream, index] = known, blocks
        parts = [
            blocks[row.index].narrow(1, place, count)
            for row, place in zip(rows, places, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def first(self, stream: Stream, index: int, size: int) -> Tensor:
        """(B, S, 4) blocks of a stream for the first S >= `size` positions of all rows."""
        begins = torch.tensor(self._begins, device=self._seeds.device)
        positions = torch.arange(capacity_for(size), device=self._seeds.device)
        return uniforms(self._seeds, begins[:, None] + positions, stream, index=index)
