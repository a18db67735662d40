# SPDX-License-Identifier: Apache-2.0
"""Members that run row by row, for models that take no mask of ours: crop the cache, or replay.

For another cache to crop or copy, see `crop` and `fork` in `cache.py`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specens.members.cache import crop, fork, full_cache, native_cache, to_device
from specens.members.capacity import capacity_for, widened
from specens.members.member import Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

# Tokens a replayed row may lag behind before they are fed once and remembered: feeding a few
# tokens again, together with the new ones, costs less than a forward of their own.
REPLAY_LIMIT = 16


class _RowMember(Member):
    """Rows run one at a time, without padding."""

    def _forward(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        rows: Sequence[int],
        starts: Sequence[int],
        keep_last: int | None,
    ) -> Tensor:
        num_rows, q = tokens.shape
        width = q if keep_last is None else keep_last
        result: Tensor | None = None
        scores = torch.zeros(num_rows, width, device=self.device)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if count == 0:
                continue
            kept = count if keep_last is None else min(keep_last, count)
            logits = self._forward_row(row, tokens[i : i + 1, :count], kept)
            if num_rows == 1 and kept == width:
                self.scores = None if self.scores is None else self.scores[:, -kept:]
                return logits
            if result is None:
                result = logits.new_zeros((num_rows, width, logits.shape[-1]))
            first = 0 if keep_last is None else keep_last - kept
            result[i, first : first + kept] = logits[0]
            if self.scores is not None:
                scores[i, first : first + kept] = self.scores[0, -kept:]
        assert result is not None  # forward returns early when no row has a token
        if self.scores is not None:
            self.scores = scores
        return result

    @abstractmethod
    def _forward_row(self, row: int, tokens: Tensor, kept: int) -> Tensor: ...

    def _run_row(self, tokens: Tensor, kept: int, **arguments: Any) -> Tensor:
        """(1, kept, V) logits of the last `kept` tokens; `tokens` is one unpadded row."""
        if kept < tokens.shape[1] and self._logits_to_keep != "all":
            arguments["logits_to_keep"] = kept
        self.tokens += tokens.shape[1]
        return self._call(tokens, **arguments)[:, -kept:]


class CropMember(_RowMember):
    """One stock cache per row, cropped to roll back."""

    def __init__(self, model: "PreTrainedModel", *, logits_to_keep: str = "all") -> None:
        super().__init__(model, logits_to_keep=logits_to_keep)
        if "past_key_values" not in self._arguments:
            raise NotImplementedError("crop: its forward takes no past_key_values")

    def _allocate(self) -> None:
        self._caches = [full_cache() for _ in self.lengths]

    def _forward_row(self, row: int, tokens: Tensor, kept: int) -> Tensor:
        cache = self._caches[row]
        return self._run_row(tokens, kept, past_key_values=cache, use_cache=True)

    def _rollback(self, lengths: Sequence[int]) -> None:
        for cache, new, old in zip(self._caches, lengths, self.lengths, strict=True):
            if new < old:
                crop(cache, old - new)

    def _select(self, rows: Sequence[int]) -> None:
        self._caches = [self._caches[row] for row in rows]


class _Replayed:
    """State of one replayed row: its live cache, and copies of it at earlier lengths."""

    def __init__(self, cache: "Cache | None") -> None:
        self.cache = cache
        self.fed = 0  # tokens in the live cache
        self.settled = False  # rolled back since the last forward: what is left is likely to stay
        self.snapshots: list[tuple[int, Cache]] = []


class ReplayMember(_RowMember):
    """Rows whose state cannot be cut back: an earlier copy is restored and tokens fed again.

    The copy is taken at lengths that are likely to stay; a rollback past every copy starts the
    row anew. So any rollback is exact, and the usual one, of a few tokens, is cheap.

    Args:
        model: the model.
        continuation: how its cache takes more tokens: "chunk" any number, "token" one at a time,
            "none" not at all, and every forward starts from the row's first token.
        logits_to_keep: see `Member`.
    """

    def __init__(
        self, model: "PreTrainedModel", *, continuation: str = "chunk", logits_to_keep: str = "all"
    ) -> None:
        super().__init__(model, logits_to_keep=logits_to_keep)
        self._continuation = continuation
        self._cached = continuation != "none"
        names = ("past_key_values", "cache_params")
        self._argument = next((name for name in names if name in self._arguments), "")
        if self._cached and not self._argument:
            raise NotImplementedError("replay: its forward takes no cache")

    def _new_cache(self) -> "Cache | None":
        return native_cache(self.model.config) if self._cached else None

    def _allocate(self) -> None:
        # Not an inference tensor, which could not be written outside inference mode.
        with torch.inference_mode(False):
            shape = (len(self.lengths), 0)
            self._history = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._rows = [_Replayed(self._new_cache()) for _ in self.lengths]

    def _forward_row(self, row: int, tokens: Tensor, kept: int) -> Tensor:
        start = self.lengths[row]
        end = start + tokens.shape[1]
        if end > self._history.shape[1]:
            self._history = widened(self._history, 1, capacity_for(end))
        self._history[row, start:end] = tokens[0]
        if not self._cached:
            extra = {"use_cache": False} if "use_cache" in self._arguments else {}
            return self._run_row(self._history[row : row + 1, :end], kept, **extra)
        state = self._rows[row]
        if start - state.fed > REPLAY_LIMIT:
            self._feed(row, start, 1)
        if state.fed == start:
            self._remember(state)
        state.settled = False
        return self._feed(row, end, kept)

    def _remember(self, state: _Replayed) -> None:
        last = state.snapshots[-1][0] if state.snapshots else 0
        if state.fed == last or not (state.settled or state.fed - last > REPLAY_LIMIT):
            return
        assert state.cache is not None
        # A settled length makes older copies useless; else the last one may still be needed.
        keep = [] if state.settled else state.snapshots[-1:]
        state.snapshots = [*keep, (state.fed, fork(state.cache))]

    def _feed(self, row: int, end: int, kept: int) -> Tensor:
        """Bring the live cache of a row to `end` tokens; (1, kept, V) logits of the last ones."""
        state = self._rows[row]
        arguments: dict[str, Any] = {self._argument: state.cache, "use_cache": True}
        begin, state.fed = state.fed, end
        # Recurrent states are overwritten in place, which inference tensors forbid outside
        # inference mode.
        with torch.inference_mode(False), torch.no_grad():
            tokens = self._history[row : row + 1, begin:end]
            if self._continuation == "chunk" or begin == 0:
                return self._run_row(tokens, kept, **arguments)
            single = tokens.chunk(end - begin, dim=1)
            logits = [self._run_row(token, 1, **arguments) for token in single]
            return torch.cat(logits[-kept:], dim=1)

    def _rollback(self, lengths: Sequence[int]) -> None:
        for state, new in zip(self._rows, lengths, strict=True):
            state.settled = True
            if new >= state.fed:
                continue
            state.snapshots = [snapshot for snapshot in state.snapshots if snapshot[0] <= new]
            if state.snapshots:
                state.fed, cache = state.snapshots[-1]
                state.cache = fork(cache)
            else:
                state.fed, state.cache = 0, self._new_cache()

    def _select(self, rows: Sequence[int]) -> None:
        self._history = self._history.index_select(0, to_device(rows, self.device))
        self._rows = [self._rows[row] for row in rows]
