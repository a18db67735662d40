# SPDX-License-Identifier: Apache-2.0
"""`Text`: the tokens of all rows on the device, committed and pending, left-padded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specens.loop.rows import Row
from specens_kernels import PADDING


class Text:
    """The tokens of all rows: (B, S) int64 on the device."""

    def __init__(self, input_ids: Tensor, columns: int) -> None:
        """Prompts, and room for so many columns in all."""
        batch, width = input_ids.shape
        self.device = input_ids.device
        self.tokens = input_ids.new_zeros(batch, columns)
        self.tokens[:, :width] = input_ids
        self._rows = self.tokens[:, None].unbind()

    def take(self, rows: Sequence[Row], begins: list[int], count: int) -> Tensor:
        """(R, count) int64: the rows' tokens begins[k] on."""
        if len(rows) == 1:
            row = rows[0]
            return self._rows[row.index].narrow(1, row.pad + begins[0], count)
        return self.tokens[self._indices(rows)[:, None], self._columns(rows, begins, count)]

    def take_drafts(self, rows: Sequence[Row], begins: list[int], counts: Sequence[int]) -> Tensor:
        """(R, N) int64: counts[k] tokens of each row from begins[k] on, then PADDING."""
        drafts = self.take(rows, begins, max(counts))
        if min(counts) < max(counts):
            beyond = torch.arange(max(counts)) >= torch.tensor(counts)[:, None]
            drafts = drafts.masked_fill(beyond.to(self.device), PADDING)
        return drafts

    def write(self, rows: Sequence[Row], begins: list[int], tokens: Tensor) -> None:
        """Put tokens (R, n) at begins[k] on."""
        width = tokens.shape[1]
        if len(rows) == 1:
            row = rows[0]
            self._rows[row.index].narrow(1, row.pad + begins[0], width).copy_(tokens)
        else:
            self.tokens[self._indices(rows)[:, None], self._columns(rows, begins, width)] = tokens

    def write_one(self, row: Row, place: int, tokens: Tensor, at: int) -> None:
        """Put tokens[at] (n,) at `place` of one row."""
        column = row.pad + place
        self.tokens[row.index, column : column + 1] = tokens[at : at + 1]

    def _indices(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.index for row in rows], device=self.device)

    def _columns(self, rows: Sequence[Row], begins: list[int], count: int) -> Tensor:
        at = torch.tensor([row.pad + b for row, b in zip(rows, begins, strict=True)])
        columns = at[:, None] + torch.arange(count)
        # Columns past the end are read and written where no row has a token.
        return columns.clamp_(max=self.tokens.shape[1] - 1).to(self.device)
