# SPDX-License-Identifier: Apache-2.0
"""One causal LM of an ensemble with its keys and values, for rows of different lengths.

A member is asked five things: start, forward, roll back, select, release. Three classes answer
alike and differ in what they ask of the model; `member` picks the fastest that `probe` found exact.
Lengths live on the host and nothing here waits for the device. A new way to keep state is one more
subclass of `Member`, one more entry in `probe.py`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specens.members.cache import (
    Masks,
    Signature,
    SlotCache,
    crop,
    fork,
    full_cache,
    native_cache,
    to_device,
)
from specens.members.weight_head import last_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

MODES = ("auto", "slot", "crop", "replay")

# Tokens a replayed row may lag behind before they are fed once and remembered: feeding a few
# tokens again, together with the new ones, costs less than a forward of their own.
REPLAY_LIMIT = 16


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

    def __init__(self, model: PreTrainedModel, *, logits_to_keep: str = "all") -> None:
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
        """Empty `batch_size` rows of `capacity` tokens, speculative ones and padding included."""
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"start: batch_size, capacity: expected at least 1, got {batch_size}, {capacity}"
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
            raise ValueError(
                f"forward: tokens: expected one row for each of {len(rows)} rows and "
                f"{len(counts)} counts, got {tuple(tokens.shape)}"
            )
        if num_rows == 0:
            raise ValueError("forward: tokens: expected at least one row, got 0")
        starts = [lengths[row] for row in rows]
        low, high = min(counts), max(counts)
        if low < 0 or high > q:
            raise ValueError(f"forward: counts: expected 0..{q}, got {list(counts)}")
        if max(starts) + q > self.capacity:
            raise ValueError(
                f"forward: tokens: expected at most {self.capacity - max(starts)} more for a row "
                f"(capacity {self.capacity}), got {q}"
            )
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"forward: keep_last: expected at least 1, got {keep_last}")
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
            raise ValueError(
                f"rollback: lengths: expected {len(self.lengths)} ints, got {len(lengths)}"
            )
        for new, old in zip(lengths, self.lengths, strict=True):
            if not 0 <= new <= old:
                raise ValueError(
                    f"rollback: lengths: expected 0..{self.lengths}, got {list(lengths)}"
                )
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
            raise ValueError(
                f"{op}: rows: expected distinct rows below {batch_size}, got {list(rows)}"
            )

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


class SlotMember(Member):
    """All rows in one forward: keys and values in per-row slots, explicit positions and masks.

    Rows need not have equal lengths. Padding is written after a row's valid tokens, where no
    valid query sees it, and overwritten by the row's next tokens.

    Args:
        model: the model.
        per_type: its masks are a dict by layer type, not one tensor.
        logits_to_keep: see `Member`.
        counts: what `layout` returned for another member of the same model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        per_type: bool = False,
        logits_to_keep: str = "all",
        counts: dict[Signature, int] | None = None,
    ) -> None:
        super().__init__(model, logits_to_keep=logits_to_keep)
        missing = {"attention_mask", "position_ids", "past_key_values"} - self._arguments
        if missing:
            raise NotImplementedError(f"slot: its forward takes no {', '.join(sorted(missing))}")
        self._per_type = per_type
        self._counts = counts or {}
        self._masks = self._new_masks()

    def _new_masks(self) -> Masks:
        config = text_config(self.model)
        implementation = config._attn_implementation
        # Eager attention adds its mask to the scores: a bool mask would be silently wrong there.
        if implementation not in ("sdpa", "eager"):
            raise NotImplementedError(f"slot: attention {implementation!r} takes no 4-D mask")
        additive = implementation == "eager"
        dtype = self.model.dtype
        return Masks(config, per_type=self._per_type, additive=additive, dtype=dtype)

    @property
    def layout(self) -> dict[Signature, int]:
        """Tensors the model's layers asked for, per signature; known after a forward."""
        return dict(self.cache.storage.taken)

    def _start(self) -> None:
        # The user may have changed the attention implementation since the last start.
        self._masks = self._new_masks()
        self._allocate()

    def _allocate(self) -> None:
        self.cache = SlotCache(len(self.lengths), self.capacity, self._counts)
        # Position of each slot, (1, capacity): positions of equal rows are a view of it.
        self._positions = torch.arange(self.capacity, device=self.device)[None]

    def _forward(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        rows: Sequence[int],
        starts: Sequence[int],
        keep_last: int | None,
    ) -> Tensor:
        q = tokens.shape[1]
        if min(counts) < q:
            tokens = tokens.clamp_min(0)  # padding may be -1, which no embedding has
        plan = self.cache.plan
        plan.set(starts, q, rows)
        if plan.start is not None:
            positions = self._positions.narrow(1, plan.start, q)
        else:
            first = to_device(starts, self.device)
            positions = first[:, None] + self._positions.narrow(1, 0, q)
            plan.slots = positions
        if min(counts) < q:
            # Padding takes its row's last position: the next ones may be more than the model has.
            lasts = [start + max(count, 1) - 1 for start, count in zip(starts, counts, strict=True)]
            positions = torch.minimum(positions, to_device(lasts, self.device)[:, None])
        if self._masks.skip(plan, q):
            mask = self._masks.nothing
        else:
            keys = self._positions.narrow(1, 0, plan.end)[0]
            mask = self._masks.build(positions, keys, plan.end)
        self.tokens += sum(counts)
        if keep_last is None:
            return self._run(tokens, mask, positions)
        return self._last(tokens, mask, positions, counts, keep_last)

    def forward_tree(self, tokens: Tensor, depths: Sequence[int], tree_mask: Tensor) -> Tensor:
        """Score a draft tree that hangs off each row; `lengths` stay as they are.

        Node i of row b is written at slot lengths[b] + i; the next forward overwrites it.

        Args:
            tokens: (B, n) int64. The nodes, parents before children.
            depths: n ints. Depth of each node; the first is 0.
            tree_mask: (n, n) bool. A node sees itself and its ancestors.
        Returns:
            (B, n, V) logits after each node.
        """
        _, n = tokens.shape
        starts = self.lengths
        plan = self.cache.plan
        plan.set(starts, n, range(len(starts)))
        first = to_device(starts, self.device)[:, None]
        slots = first + self._positions.narrow(1, 0, n)
        depth = to_device(depths, self.device)
        positions = first + depth
        plan.slots = slots
        # Of each slot, the node it holds: negative for committed tokens, n and more beyond.
        node = self._positions.narrow(1, 0, plan.end) - first  # (B, kv)
        inside = (node >= 0) & (node < n)
        in_tree = tree_mask[:, node.clamp(0, n - 1)].transpose(0, 1)  # (B, n, kv)
        visible = (node < 0)[:, None, :] | (inside[:, None, :] & in_tree)
        keys = torch.where(inside, first + depth[node.clamp(0, n - 1)], node + first)
        mask = self._masks.build(positions, keys[:, None, None, :], plan.end, visible[:, None])
        self.tokens += tokens.numel()
        return self._run(tokens, mask, positions)

    def _run(self, tokens: Tensor, mask: Any, positions: Tensor, **arguments: Any) -> Tensor:
        return self._call(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **arguments,
        )

    def _last(
        self, tokens: Tensor, mask: Any, positions: Tensor, counts: Sequence[int], keep_last: int
    ) -> Tensor:
        q = tokens.shape[1]
        # Every row's last valid tokens lie within the last `tail` columns.
        tail = min(q, q - min(counts) + keep_last)
        index = None
        if min(counts) < q or keep_last > q:
            index = to_device(
                [[max(count - keep_last + i, 0) for i in range(keep_last)] for count in counts],
                self.device,
            )
            if self._logits_to_keep == "rows":
                return self._run(tokens, mask, positions, logits_to_keep=index)
        if self._logits_to_keep == "all" or tail == q:
            logits = self._run(tokens, mask, positions)[:, q - tail :]
        else:
            logits = self._run(tokens, mask, positions, logits_to_keep=tail)
        if index is None:
            return logits
        index = (index - (q - tail)).clamp_min(0)
        return torch.take_along_dim(logits, index[:, :, None].to(logits.device), dim=1)

    def _rollback(self, lengths: Sequence[int]) -> None:
        pass  # the slots are hidden by the masks of the next forward, and overwritten by it

    def _select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows, max(self.lengths, default=0))


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

    def __init__(self, model: PreTrainedModel, *, logits_to_keep: str = "all") -> None:
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

    def __init__(self, cache: Cache | None) -> None:
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
        self, model: PreTrainedModel, *, continuation: str = "chunk", logits_to_keep: str = "all"
    ) -> None:
        super().__init__(model, logits_to_keep=logits_to_keep)
        self._continuation = continuation
        self._cached = continuation != "none"
        names = ("past_key_values", "cache_params")
        self._argument = next((name for name in names if name in self._arguments), "")
        if self._cached and not self._argument:
            raise NotImplementedError("replay: its forward takes no cache")

    def _new_cache(self) -> Cache | None:
        return native_cache(self.model.config) if self._cached else None

    def _allocate(self) -> None:
        shape = (len(self.lengths), self.capacity)
        # Not an inference tensor, which could not be written outside inference mode.
        with torch.inference_mode(False):
            self._history = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._rows = [_Replayed(self._new_cache()) for _ in self.lengths]

    def _forward_row(self, row: int, tokens: Tensor, kept: int) -> Tensor:
        start = self.lengths[row]
        end = start + tokens.shape[1]
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


def member(model: PreTrainedModel, *, mode: str = "auto") -> Member:
    """A member for this model: the fastest kind that reproduces the model's own logits.

    Args:
        model: a causal LM of transformers; it is not modified.
        mode: "slot", "crop" or "replay" insists on one kind; "auto" lets `probe` choose.
    Raises:
        ValueError: not a causal LM, an unknown mode, or one that is not exact for this model.
    """
    # `probe` runs members to test them, so it imports this module.
    from specens.members.probe import probe

    if mode not in MODES:
        raise ValueError(f"member: mode: unknown {mode!r}; known modes: {', '.join(MODES)}")
    return probe(model, mode=mode).member(model)


def check_causal_lm(model: Any) -> None:
    """Refuse what is not a decoder-only language model with a head, in one line."""
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "get_output_embeddings", None)):
        fault = f"{type(model).__name__}, which is no transformers model"
    elif getattr(config, "is_encoder_decoder", False):
        fault = f"{type(model).__name__}, an encoder-decoder"
    elif model.get_output_embeddings() is None or not model.can_generate():
        fault = f"{type(model).__name__}, which has no causal LM head"
    else:
        return
    raise ValueError(f"member: model: expected a causal LM, got {fault}")


def model_name(model: Any) -> str:
    """The last part of the model's path or repository, else its class name."""
    path = str(getattr(model.config, "_name_or_path", "") or "").rstrip("/")
    return path.rsplit("/", 1)[-1] or type(model).__name__


def vocab_size(model: Any) -> int:
    """Columns of the model's logits, padding included."""
    head: Any = model.get_output_embeddings()
    size = getattr(head, "out_features", None)  # quantised weights have packed shapes
    return int(size if size is not None else head.weight.shape[0])


def text_config(model: Any) -> Any:
    """The configuration of the language model inside, which is the model's own as a rule."""
    return model.config.get_text_config(decoder=True)


def unwrapped(model: Any) -> Any:
    """The transformers model inside the wrappers of torch.compile and PEFT, or the model itself.

    For names and identity only: what runs is the wrapper.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def forward_arguments(model: Any) -> set[str]:
    """Names the model's forward takes; a wrapper's are those of the model inside."""
    return set(inspect.signature(unwrapped(model).forward).parameters)
