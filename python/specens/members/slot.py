# SPDX-License-Identifier: Apache-2.0
"""Members that run all rows in one forward: keys and values in per-row slots.

Layers attend through a kernel, which is told what the rows see (`kernel.py`), or get explicit masks
(`Masks` in `cache.py`). For another way to attend, see these two.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specens.members.cache import Masks, Signature, SlotCache, to_device
from specens.members.facts import text_config
from specens.members.kernel import MASKS, Attending, Slots, implementation_of
from specens.members.member import Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where no mask is needed, torch's own attention is faster: for longer prompts, as it leaves out
# what lies after each token; and for one token in float32 that sees fewer slots, by a call's cost.
LONGEST_PROMPT = 512
SHORT_TEXT = 1024


class SlotMember(Member):
    """All rows in one forward: keys and values in per-row slots, explicit positions.

    Rows need not have equal lengths. Padding is written after a row's valid tokens, where no
    valid query sees it, and overwritten by the row's next tokens.

    Args:
        model: the model.
        kernel: layers attend through `specens_kernels.attention`, without masks.
        per_type: its masks are a dict by layer type, not one tensor.
        logits_to_keep: see `Member`.
        counts: what `layout` returned for another member of the same model.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        kernel: bool = False,
        per_type: bool = False,
        logits_to_keep: str = "all",
        counts: dict[Signature, int] | None = None,
    ) -> None:
        super().__init__(model, logits_to_keep=logits_to_keep)
        missing = {"attention_mask", "position_ids", "past_key_values"} - self._arguments
        if missing:
            raise NotImplementedError(f"slot: its forward takes no {', '.join(sorted(missing))}")
        self.longest_prompt = LONGEST_PROMPT
        self._kernel = kernel
        self._per_type = per_type
        self._counts = counts or {}
        self._masks = self._new_masks()
        if kernel and None in self._masks.windows:
            raise NotImplementedError("kernel: its layers attend to chunks, which it is not told")

    def _new_masks(self) -> Masks:
        config = text_config(self.model)
        implementation = implementation_of(config)
        # Eager attention adds its mask to the scores: a bool mask would be silently wrong there.
        if implementation not in MASKS:
            raise NotImplementedError(f"slot: attention {implementation!r} takes no 4-D mask")
        self._attending = Attending(config)
        additive = implementation == "eager"
        # transformers makes no mask where one of four dimensions is given, and asks it nothing.
        self._no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device)
        dtype = self.model.dtype  # asked here, for the model looks through its parameters
        self._is_float32 = dtype == torch.float32
        return Masks(config, per_type=self._per_type, additive=additive, dtype=dtype)

    @property
    def layout(self) -> dict[Signature, int]:
        """Tensors the model's layers asked for, per signature; known after a forward."""
        return dict(self.cache.storage.taken)

    def _start(self) -> None:
        # The user may have changed the attention implementation since the last start.
        self._masks = self._new_masks()
        self._allocate()

    def release(self) -> None:
        """Give back the memory, and the name of the attention if an interrupt has kept it."""
        super().release()
        self._attending.leave()

    def _allocate(self) -> None:
        self.cache = SlotCache(len(self.lengths), self._counts)
        # Position of each slot, (1, slots): positions of equal rows are a view of it.
        self._positions = torch.arange(0, device=self.device)[None]

    def _reserve(self, size: int) -> None:
        """Make room for `size` tokens in every row."""
        if size > self.cache.capacity:
            self.cache.grow(size, len(self.lengths))
            self._positions = torch.arange(self.cache.capacity, device=self.device)[None]

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
        self._reserve(max(starts) + q)
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
        skip = self._masks.skip(plan, q)
        view: Any
        if self._kernel and not (skip and self._plain_is_faster(q, plan.end)):
            view = self._slots(starts, q)
        elif skip:
            view = self._masks.nothing
        else:
            keys = self._positions.narrow(1, 0, plan.end)[0]
            view = self._masks.build(positions, keys, plan.end)
        self.tokens += sum(counts)
        if keep_last is None:
            return self._run(tokens, view, positions)
        return self._last(tokens, view, positions, counts, keep_last)

    def _plain_is_faster(self, q: int, end: int) -> bool:
        """Whether torch's attention is, of `q` tokens that see `end` slots without a mask."""
        if end == q:
            return q > self.longest_prompt
        return end < SHORT_TEXT and self._is_float32

    def _slots(self, starts: Sequence[int], q: int, seen: Tensor | None = None) -> Slots:
        """What the tokens of this forward see, for layers that attend through a kernel."""
        plan = self.cache.plan
        plan.by_table = plan.rows is not None
        rows = plan.rows_on(self.device) if plan.by_table else None
        return Slots(to_device(starts, self.device), q, rows, seen)

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
        self._reserve(max(starts) + n)
        plan = self.cache.plan
        plan.set(starts, n, range(len(starts)))
        first = to_device(starts, self.device)[:, None]
        slots = first + self._positions.narrow(1, 0, n)
        depth = to_device(depths, self.device)
        positions = first + depth
        plan.slots = slots
        if self._kernel:
            self.tokens += tokens.numel()
            return self._run(tokens, self._slots(starts, n, tree_mask[None]), positions)
        # Of each slot, the node it holds: negative for committed tokens, n and more beyond.
        node = self._positions.narrow(1, 0, plan.end) - first  # (B, kv)
        inside = (node >= 0) & (node < n)
        in_tree = tree_mask[:, node.clamp(0, n - 1)].transpose(0, 1)  # (B, n, kv)
        visible = (node < 0)[:, None, :] | (inside[:, None, :] & in_tree)
        keys = torch.where(inside, first + depth[node.clamp(0, n - 1)], node + first)
        mask = self._masks.build(positions, keys[:, None, None, :], plan.end, visible[:, None])
        self.tokens += tokens.numel()
        return self._run(tokens, mask, positions)

    def _run(self, tokens: Tensor, view: Any, positions: Tensor, **arguments: Any) -> Tensor:
        """The logits of a forward that sees `view`: slots, or a mask in the model's form."""
        through_kernel = isinstance(view, Slots)
        if through_kernel:
            arguments |= {"specens": view, "attention_mask": self._no_mask}
        else:
            arguments["attention_mask"] = view
        with self._attending if through_kernel else nullcontext():
            logits = self._call(
                tokens,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                **arguments,
            )
        if through_kernel:
            self._check_layers(view)
        return logits

    def _check_layers(self, slots: Slots) -> None:
        """Refuse logits of layers that did not attend through the kernel, or with other windows."""
        layers, windows = self.cache.plan.layers, self._masks.windows
        if not 0 < layers <= len(slots.windows):
            asked = f"{len(slots.windows)} of {layers} layers ask for it"
            raise NotImplementedError(f"kernel: {asked}")
        if len(windows) == 1:
            windows = windows * len(slots.windows)
        if slots.windows != windows[: len(slots.windows)]:
            raise NotImplementedError(
                f"kernel: layers say windows of {slots.windows}, their configuration {windows}"
            )

    def _last(
        self, tokens: Tensor, view: Any, positions: Tensor, counts: Sequence[int], keep_last: int
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
                return self._run(tokens, view, positions, logits_to_keep=index)
        if self._logits_to_keep == "all" or tail == q:
            logits = self._run(tokens, view, positions)[:, q - tail :]
        else:
            logits = self._run(tokens, view, positions, logits_to_keep=tail)
        if index is None:
            return logits
        index = (index - (q - tail)).clamp_min(0)
        return torch.take_along_dim(logits, index[:, :, None].to(logits.device), dim=1)

    def _rollback(self, lengths: Sequence[int]) -> None:
        pass  # the slots are hidden by the masks of the next forward, and overwritten by it

    def _select(self, rows: Sequence[int]) -> None:
        self.cache.select(rows, max(self.lengths, default=0))
