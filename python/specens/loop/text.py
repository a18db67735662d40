# SPDX-License-Identifier: Apache-2.0
"""`Text`: what is known of each token of all rows, committed and pending, left-padded.

It lies on the device and grows by doubling. To keep something else of each token, add a tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specens.loop.rows import Row
from specens.members.capacity import capacity_for, widened
from specens_kernels import PADDING


class Text:
    """The tokens of all rows, on the device.

    tokens: (B, S) int64.
    log_probs: (B, S) float32. Of the committed tokens, under the ensemble; NaN where it has said
        nothing of one.
    """

    def __init__(self, input_ids: Tensor) -> None:
        """Start with prompts."""
        self.device = input_ids.device
        self.tokens = input_ids.long()
        self.log_probs = torch.full(input_ids.shape, torch.nan, device=self.device)
        self._reserve(input_ids.shape[1] + 1)

    def _reserve(self, columns: int) -> None:
        """Make room for so many columns."""
        if columns > self.tokens.shape[1]:
            capacity = capacity_for(columns)
            self.tokens = widened(self.tokens, 1, capacity)
            self.log_probs = widened(self.log_probs, 1, capacity, torch.nan)
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
        self._reserve(max([row.pad + b for row, b in zip(rows, begins, strict=True)]) + width)
        if len(rows) == 1:
            row = rows[0]
            self._rows[row.index].narrow(1, row.pad + begins[0], width).copy_(tokens)
        else:
            self.tokens[self._indices(rows)[:, None], self._columns(rows, begins, width)] = tokens

    def write_one(self, row: Row, place: int, tokens: Tensor, at: int) -> None:
        """Put tokens[at] (n,) at `place` of one row."""
        column = row.pad + place
        self._reserve(column + 1)
        self.tokens[row.index, column : column + 1] = tokens[at : at + 1]

    def note(self, row: Row, place: int, log_probs: Tensor) -> None:
        """Keep the log-probabilities (n,) of tokens that are written, from `place` on."""
        column = row.pad + place
        self.log_probs[row.index, column : column + len(log_probs)] = log_probs

    def _indices(self, rows: Sequence[Row]) -> Tensor:
        return torch.tensor([row.index for row in rows], device=self.device)

    def _columns(self, rows: Sequence[Row], begins: list[int], count: int) -> Tensor:
        at = torch.tensor([row.pad + b for row, b in zip(rows, begins, strict=True)])
        columns = at[:, None] + torch.arange(count)
        # Columns past the end are read and written where no row has a token.
        return columns.clamp_(max=self.tokens.shape[1] - 1).to(self.device)
