# SPDX-License-Identifier: Apache-2.0
"""`Layers`: `attention` of the layers of one forward, whose calls differ in little.

In a small model's layer the checks of a call take longer than the kernel. What they look at,
shapes, strides and types, is the same in all layers of a kind, forward after forward: a kind that
has passed once is remembered with the flat arguments that it led to, and a later call fills in
addresses. What else may come, a trace, another backend, a device, goes through `attention` itself.
"""

from typing import Any

from torch import Tensor, empty, float32, get_num_threads

from . import cache_checks, dispatch, flat
from .call import AttentionCall
from .eager import is_eager_call
from .ops import attention
from .storage import is_readable

# Layers that are remembered; with more, as from prompts of any length, remembering begins anew.
_MOST_KINDS = 512
_kinds: dict[Any, list[Any]] = {}


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
        # Caches whose slots hold these lengths, and a place for what nobody asks for.
        self._fitting: set[tuple[int, ...]] = set()
        self._lse: Tensor | None = None

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
        if (
            sinks is None
            and self._is_plain
            and is_eager_call(tensors)
            and query.is_cpu
            and is_readable(query)
            and is_readable(keys)
            and is_readable(values)
        ):
            return self._native(tensors, scale, softcap, window)
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

    def _native(
        self, tensors: tuple[Tensor, Tensor, Tensor], scale: float, softcap: float, window: int
    ) -> Tensor:
        query, keys, values = tensors
        options = (scale, softcap, window)
        shape = query.shape
        kind = (
            *(self._kind, options, shape, query.stride(), query.dtype),
            *(keys.shape, keys.stride(), keys.dtype, keys.device),
            *(values.shape, values.stride(), values.dtype, values.device),
        )
        known = _kinds.get(kind)
        fitting = (shape[2], keys.shape[2], keys.shape[0], window)
        depths = self.depths if window > 0 else None
        same = (self.lengths, self.visible, depths, self.block_table)
        if known is None or fitting not in self._fitting:
            call = AttentionCall(*tensors, *same[:3], None, self.block_table, *options)
            cache_checks.check_attention(call)
            cache_checks.check_attention_slots(call)
            if known is None:
                known, _ = flat.flattened_attention(call)
                if len(_kinds) >= _MOST_KINDS:
                    _kinds.clear()
                _kinds[kind] = known
            self._fitting.add(fitting)
        batch, heads, nodes, _ = shape
        out = query.new_empty((batch, nodes, heads, values.shape[3]))
        if self._lse is None or self._lse.numel() != batch * heads * nodes:
            self._lse = empty(batch, heads, nodes, dtype=float32)
        arguments = flat.readdressed_attention(known, tensors, same, (out, self._lse))
        arguments.append(get_num_threads())
        flat.MODULE.attention(arguments)
        return out
