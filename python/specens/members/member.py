# SPDX-License-Identifier: Apache-2.0
"""`Member`: one causal LM of an ensemble with its keys and values, for rows of different lengths.

A member is asked five things: start, forward, roll back, select, release. Three classes answer
alike and differ in what they ask of the model (`slot.py`, `by_row.py`); `probe.member` picks the
fastest that is exact. Lengths live on the host and nothing here waits for the device. A new way to
keep state is one more subclass of `Member`, one more entry in `probe.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specens.members.facts import check_causal_lm, forward_arguments, model_name, vocab_size
from specens.members.weight_head import last_hidden
from specens_kernels import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Member(ABC):
    """One causal LM and the keys and values it has computed for each row of a batch.

    Attributes:
        name: for statistics and messages.
        model: the user's model; never modified.
        device: of tokens and logits.
        vocab_size: columns of the logits.
        lengths: per row, tokens whose keys and values are in the cache, contiguous from 0.
        score_by: (H,) a row that the LM head's inputs are multiplied with; None is none.
        scores: (R, q) float32. The products, at the positions of the logits of the last forward;
            None if there is nothing to multiply with.
        calls: forwards of the model since `start`.
        tokens: tokens fed to the model since `start`; padding is not counted, replays are.
    """

    def __init__(self, model: "PreTrainedModel", *, logits_to_keep: str = "all") -> None:
        """`logits_to_keep`: the form the model's argument takes: "rows", "last" or "all"."""
        check_causal_lm(model)
        self.model = model
        self.name = model_name(model)
        self.device: torch.device = model.device
        self.vocab_size = vocab_size(model)
        self.lengths: list[int] = []
        self.capacity = 0
        self.calls = 0
        self.tokens = 0
        self.score_by: Tensor | None = None
        self.scores: Tensor | None = None
        self._logits_to_keep = logits_to_keep
        self._arguments = forward_arguments(model)

    def start(self, batch_size: int, capacity: int) -> None:
        """Empty `batch_size` rows of at most `capacity` tokens, speculative ones and padding too.

        Memory is taken for the tokens that there are.
        """
        if batch_size < 1 or capacity < 1:
            raise Refusal(
                "start", "batch_size, capacity", "at least 1", f"{batch_size}, {capacity}"
            )
        self.device = self.model.device
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self.calls = 0
        self.tokens = 0
        self._start()

    def release(self) -> None:
        """Give back the memory of all rows; there are none until the next `start`."""
        self.lengths = []
        self.capacity = 0
        self._allocate()

    def forward(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        rows: Sequence[int] | None = None,
        *,
        keep_last: int | None = None,
    ) -> Tensor:
        """Append tokens to rows and return the logits after each of them.

        Args:
            tokens: (R, q) int64 on any device. Right-padded with anything.
            counts: R ints in 0..q. Valid tokens of each row.
            rows: R distinct rows of the batch; None is all of them.
            keep_last: return only the logits of the last `keep_last` valid tokens of each row.
        Returns:
            (R, q, V) logits of the model's dtype, meaningless at j >= counts[r]; or
            (R, keep_last, V), the last valid token last, meaningless before the row's first token.
        Raises:
            ValueError: a shape disagrees, or a row has no room for q tokens more.
        """
        num_rows, q = tokens.shape
        lengths = self.lengths
        if rows is None:
            rows = range(len(lengths))
        else:
            self._check_rows("forward", rows)
        if len(rows) != num_rows or len(counts) != num_rows:
            raise Refusal(
                "forward",
                "tokens",
                f"one row for each of {len(rows)} rows and {len(counts)} counts",
                tuple(tokens.shape),
            )
        if num_rows == 0:
            raise Refusal("forward", "tokens", "at least one row", "0")
        starts = [lengths[row] for row in rows]
        low, high = min(counts), max(counts)
        if low < 0 or high > q:
            raise Refusal("forward", "counts", f"0..{q}", list(counts))
        if max(starts) + q > self.capacity:
            raise Refusal(
                "forward",
                "tokens",
                f"at most {self.capacity - max(starts)} more for a row (capacity {self.capacity})",
                q,
            )
        if keep_last is not None and keep_last < 1:
            raise Refusal("forward", "keep_last", "at least 1", keep_last)
        if high == 0:
            shape = (num_rows, q if keep_last is None else keep_last, self.vocab_size)
            return torch.zeros(shape, dtype=self.model.dtype, device=self.device)
        # To a GPU without waiting for it; to the host nothing may be read before it has arrived.
        tokens = tokens.to(self.device, non_blocking=self.device.type != "cpu")
        logits = self._forward(tokens, counts, rows, starts, keep_last)
        for row, count in zip(rows, counts, strict=True):
            lengths[row] += count
        return logits

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget the last tokens of rows: per row of the batch, its new length, at most the old."""
        if len(lengths) != len(self.lengths):
            raise Refusal("rollback", "lengths", f"{len(self.lengths)} ints", len(lengths))
        for new, old in zip(lengths, self.lengths, strict=True):
            if not 0 <= new <= old:
                raise Refusal("rollback", "lengths", f"0..{self.lengths}", list(lengths))
        self._rollback(lengths)
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these distinct rows, in this order; the others are gone."""
        self._check_rows("select", rows)
        self._select(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def _check_rows(self, op: str, rows: Sequence[int]) -> None:
        batch_size = len(self.lengths)
        if len(set(rows)) != len(rows) or not all(0 <= row < batch_size for row in rows):
            raise Refusal(op, "rows", f"distinct rows below {batch_size}", list(rows))

    def _start(self) -> None:
        self._allocate()

    @abstractmethod
    def _allocate(self) -> None:
        """Empty state for `lengths` and `capacity`, instead of what there is."""

    @abstractmethod
    def _forward(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        rows: Sequence[int],
        starts: Sequence[int],
        keep_last: int | None,
    ) -> Tensor: ...

    @abstractmethod
    def _rollback(self, lengths: Sequence[int]) -> None: ...

    @abstractmethod
    def _select(self, rows: Sequence[int]) -> None: ...

    def _call(self, tokens: Tensor, **arguments: Any) -> Tensor:
        """The model's logits; the one place where a model runs."""
        self.calls += 1
        if self.score_by is not None:
            return self._call_and_score(self.score_by, tokens, arguments)
        return self._logits(tokens, arguments)

    def _call_and_score(self, row: Tensor, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
        with last_hidden(self.model) as collected:
            logits = self._logits(tokens, arguments)
        hidden = collected[-1]
        if row.device != hidden.device:
            row = self.score_by = row.to(hidden.device)  # once
        self.scores = (hidden.float() * row).sum(-1)
        return logits

    def _logits(self, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                output: Any = self.model(tokens, return_dict=True, **arguments)
        else:
            output = self.model(tokens, return_dict=True, **arguments)
        logits: Tensor = output.logits
        return logits
