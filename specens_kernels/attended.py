# SPDX-License-Identifier: Apache-2.0
"""`attend`: keys and values of a tree's nodes written to their slots, and `attention`, as one op.

One call a layer is all that a model's graph needs for its cache: nothing there has a length, and no
other length makes another graph. It has no kernel of its own: torch writes, and whichever backend
is chosen for `attention` attends.
"""

from typing import Any

import torch
from torch import Tensor

from . import arguments, cache_checks, checks, dispatch
from .call import AttentionCall
from .eager import is_eager_call
from .refusal import Refusal, shown
from .storage import wrong


def attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    depths: Tensor | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the nodes' keys and values into the cache, and then attend as `attention` does.

    Args:
        query: as for `attention`, and so are all that are not named here.
        new_keys: (B, K, N+1, E), any strides with contiguous rows. Node i's go to slot lengths + i.
        new_values: (B, K, N+1, F).
        keys: (B, K, S, E), or (P, K, page, E) with a block table; written to.
        values: (B, K, S, F), or (P, K, page, F); written to.
    Returns:
        out: (B, N+1, H, F), contiguous, of the query's dtype.
        lse: (B, H, N+1) float32.
    Raises:
        Refusal: as `attention`. Nothing has been written then.
    """
    given = {"depths": depths, "sinks": sinks, "block_table": block_table}
    named = {"query": query, "new_keys": new_keys, "new_values": new_values, "keys": keys}
    named |= {"values": values, "lengths": lengths, "visible": visible}
    named |= {name: value for name, value in given.items() if value is not None}
    checks.tensors("attend", tuple(named), tuple(named.values()))
    reach = arguments.count(window)
    if reach < 0:
        raise Refusal("attend", "window", "an integer >= 0", shown(window))
    flat = (
        *(query, new_keys, new_values, keys, values, lengths, visible),
        depths if reach > 0 else None,
        sinks,
        block_table,
        max(query.shape[-1:].numel(), 1) ** -0.5 if scale is None else arguments.number(scale),
        arguments.number(softcap),
        reach,
    )
    ops = getattr(torch.ops, dispatch.NAMESPACE)
    run = _attended if is_eager_call(named.values()) else ops.attend.default
    out, lse = run(*flat)
    return out, lse


def _call(query: Tensor, new_keys: Tensor, new_values: Tensor, *others: Any) -> AttentionCall:
    """What is attended to, after a check of all that the op takes."""
    call = AttentionCall(query, *others)
    cache_checks.check_attention(call)
    batch, _, nodes, _ = query.shape
    for name, new, cache in (
        ("new_keys", new_keys, call.keys),
        ("new_values", new_values, call.values),
    ):
        shape = (batch, cache.shape[1], nodes, cache.shape[3])
        if new.shape != shape or new.dtype != cache.dtype or new.device != cache.device:
            dtype = str(cache.dtype).removeprefix("torch.")
            raise wrong("attend", name, f"{tuple(shape)} {dtype} on {cache.device}", new)
    return call


@torch.no_grad()
def _attended(query: Tensor, new_keys: Tensor, new_values: Tensor, *others: Any) -> Any:
    call = _call(query, new_keys, new_values, *others)
    cache_checks.check_attention_slots(call)
    _write(call.keys, new_keys, call)
    _write(call.values, new_values, call)
    return dispatch.call_attention(call)


def _write(cache: Tensor, new: Tensor, call: AttentionCall) -> None:
    nodes, page, table = new.shape[2], cache.shape[2], call.block_table
    if table is None and call.lengths.device.type == "cpu":
        for row, states, length in zip(cache, new, call.lengths.tolist(), strict=True):
            row.narrow(1, length, nodes).copy_(states)
        return
    slots = call.lengths[:, None] + torch.arange(nodes, device=new.device)
    capacity = page if table is None else page * table.shape[1]
    # On a device nobody has looked at lengths: what lies beyond the cache is not written.
    inside = ((slots >= 0) & (slots < capacity))[:, :, None, None]
    slots = slots.clamp(0, capacity - 1)
    if table is None:
        rows = torch.arange(len(new), device=new.device)[:, None]
    else:
        rows = table.long().gather(1, slots // page)
    places = cache.transpose(1, 2)  # (B or P, slot, K, size)
    where = rows, slots % page
    places[where] = torch.where(inside, new.transpose(1, 2), places[where])


def _fake(query: Tensor, new_keys: Tensor, new_values: Tensor, *others: Any) -> Any:
    return dispatch.fake_attention(_call(query, new_keys, new_values, *others))


dispatch.register_written(
    "attend(Tensor query, Tensor new_keys, Tensor new_values, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor lengths, Tensor visible, Tensor? depths, Tensor? sinks, Tensor? block_table, "
    "float scale, float softcap, int window) -> (Tensor, Tensor)",
    _attended,
    _fake,
)
