# SPDX-License-Identifier: Apache-2.0
"""`Layers`: `attention` of the layers of one forward, whose calls differ in little.

In a small model's layer the checks of a call take longer than the kernel. What they look at,
shapes, strides and types, is the same in all layers of a kind, forward after forward: a kind that
has passed once is remembered with the flat arguments that it led to, and a later call fills in
addresses. What else may come, a trace, another backend, a device, goes through `attention` itself.
"""

from typing import Any

from torch import Tensor, empty, float32, get_num_threads, strided

from . import cache_checks, dispatch, flat
from .call import AttentionCall
from .eager import is_eager_call
from .ops import attention
from .storage import is_readable, reach

# Layers that are remembered; with more, as from prompts of any length, remembering begins anew.
_MOST_KINDS = 512
# Of each its flat arguments, and the elements up to the last one of query, keys and values.
_kinds: dict[Any, tuple[list[Any], tuple[int, ...]]] = {}


class Layers:
    """One forward: what all of its layers attend to. A call is the `attention` of one layer.

    Args:
        lengths: as for `attention`, and so are the others. They are not written to while the
            forward lasts.
    """

    def __init__(
        self,
        lengths: Tensor,
        visible: Tensor,
        depths: Tensor | None = None,
        block_table: Tensor | None = None,
    ) -> None:
        self.lengths, self.visible, self.depths = lengths, visible, depths
        self.block_table = block_table
        given = [each for each in (lengths, visible, depths, block_table) if each is not None]
        self._is_plain = (
            is_eager_call(given)
            and all(map(is_readable, given))
            and all(tensor.is_cpu for tensor in given)
            and dispatch.first_backend("cpu") == "native"
        )
        layouts = [(each.shape, each.stride(), each.dtype) for each in given]
        self._kind = (*layouts, depths is None, block_table is None)
        # The kind of the last layer; what is known of it; a place for what nobody asks for.
        self._last: Any = None
        self._known: Any = None
        self._lse = lengths

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """(B, N+1, H, F): what `attention` returns first, arguments and refusals as there."""
        tensors = (query, keys, values)
        if sinks is None and self._is_plain and query.is_cpu and is_eager_call(tensors):
            options = (scale, softcap, window)
            kind = (self._kind, options, *_layout(query), *_layout(keys), *_layout(values))
            if kind != self._last:
                self._learn(kind, tensors, options)
            known, reaches = self._known
            if all(map(_holds, tensors, reaches)):
                return self._native(tensors, known, window)
        out, _ = attention(
            *(*tensors, self.lengths, self.visible),
            scale=scale,
            softcap=softcap,
            window=window,
            depths=self.depths,
            sinks=sinks,
            block_table=self.block_table,
        )
        return out

    def _learn(
        self, kind: Any, tensors: tuple[Tensor, Tensor, Tensor], options: tuple[float, float, int]
    ) -> None:
        """Check a kind of layer, unless one has passed, and whether its caches have the slots."""
        self._last = None
        depths = self.depths if options[2] > 0 else None
        same = (self.lengths, self.visible, depths)
        call = AttentionCall(*tensors, *same, None, self.block_table, *options)
        known = _kinds.get(kind)
        if known is None:
            cache_checks.check_attention(call)
        cache_checks.check_attention_slots(call)
        if known is None:
            known = flat.flattened_attention(call)[0], tuple(map(reach, tensors))
            if len(_kinds) >= _MOST_KINDS:
                _kinds.clear()
            _kinds[kind] = known
        batch, heads, nodes, _ = call.query.shape
        self._lse = empty(batch, heads, nodes, dtype=float32)
        self._last, self._known = kind, known

    def _native(
        self, tensors: tuple[Tensor, Tensor, Tensor], known: list[Any], window: int
    ) -> Tensor:
        query, _, values = tensors
        batch, heads, nodes, _ = query.shape
        out = query.new_empty((batch, nodes, heads, values.shape[3]))
        depths = self.depths if window > 0 else None
        same = (self.lengths, self.visible, depths, self.block_table)
        arguments = flat.readdressed_attention(known, tensors, same, (out, self._lse))
        arguments.append(get_num_threads())
        flat.MODULE.attention(arguments)
        return out


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """All that tells two tensors apart but what is in them."""
    if tensor.is_nested or tensor.layout is not strided:
        return (tensor,)  # of no kind
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _holds(tensor: Tensor, reach: int) -> bool:
    """Whether a tensor that is dense holds its memory, aligned."""
    size = tensor.itemsize
    end = (tensor.storage_offset() + reach) * size
    return end <= tensor.untyped_storage().nbytes() and tensor.data_ptr() % size == 0
