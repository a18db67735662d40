# SPDX-License-Identifier: Apache-2.0
"""The compiled module, and calls as the flat lists that it takes.

An op's tensors become addresses and strides in one list, in the order that csrc/ reads them in, and
its results are allocated. Lists go on with what only the CPU's kernels take (threads) or only
CUDA's (a workspace and a stream). What no compiled kernel takes raises `Unsupported`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, empty, float32, int32, int64

from .call import PADDED, AttentionCall, VerifyCall
from .law import LawTensors
from .refusal import Refusal, Unsupported

# torch has loaded the OpenMP runtime that `_C` needs, so `_C` comes after it.
try:
    from . import _C
except ImportError as error:
    MODULE: Any = None
    REASON = f"the native kernels are not built ({error})"
    RULES: dict[str, int] = {}
    _SPACES: dict[str, int] = {}
    _MAX_MEMBERS = 0
else:
    MODULE = _C
    REASON = ""
    RULES = _C.rules()
    _SPACES = _C.spaces()
    _MAX_MEMBERS = _C.MAX_MEMBERS

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_NO_VALUES = (0, 0, 0, 0)
# No parents, and no siblings that could be independent or drawn without replacement.
_CHAIN = (*_NO_VALUES, False, False)
_MAX_PARAMETERS = 4  # of a rule, in csrc/
_NO_OUT = (0, False, 0)


def flattened_uniforms(
    seeds: Tensor, positions: Tensor, stream: int, index: int
) -> tuple[list[Any], Tensor]:
    """Arguments and result of `uniforms`."""
    batch, rows = seeds.shape[0], positions.shape[1]
    out = empty(batch, rows, 4, dtype=float32, device=positions.device)
    batch_stride, row_stride = positions.stride()
    if positions.shape[0] == 1:
        batch_stride = 0
    flat = [seeds.data_ptr(), seeds.stride(0), 0, 0]
    flat += positions.data_ptr(), batch_stride, row_stride, 0
    flat += stream, index, batch, rows, out.data_ptr()
    return flat, out


def flattened_mix(logits: list[Tensor], law: LawTensors) -> tuple[list[Any], tuple[Tensor, Tensor]]:
    """Arguments and results of `mix`."""
    flat = flattened_logits(logits) + _law(law)
    batch, rows = logits[0].shape[:2]
    device = logits[0].device
    log_probs = empty(batch, rows, law.vocab_size, dtype=float32, device=device)
    status = empty(batch, rows, dtype=int32, device=device)
    flat += batch, rows, log_probs.data_ptr(), status.data_ptr()
    return flat, (log_probs, status)


def flattened_sample(
    logits: list[Tensor], numbers: Tensor, law: LawTensors, member: int, places: Tensor | None
) -> tuple[list[Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Arguments and results of `sample`."""
    flat = flattened_logits(logits) + _law(law)
    batch, rows, *count, _ = numbers.shape
    device = numbers.device
    tokens = empty(batch, rows, *count, dtype=int64, device=device)
    log_probs = empty(batch, rows, *count, dtype=float32, device=device)
    lse = empty(batch, rows, dtype=float32, device=device)
    status = empty(batch, rows, dtype=int32, device=device)
    batch_stride, row_stride, *block_stride, word_stride = numbers.stride()
    flat += member, batch, rows, numbers.data_ptr()
    flat += batch_stride, row_stride, word_stride
    flat += tokens.data_ptr(), log_probs.data_ptr(), lse.data_ptr(), status.data_ptr()
    flat += *(count or (0,)), *(block_stride or (0,))
    flat += _NO_VALUES if places is None else _integers(places)
    return flat, (tokens, log_probs, lse, status)


def flattened_verify(
    call: VerifyCall,
) -> tuple[list[Any], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Arguments and results of a `verify` that `refuse` has let pass."""
    law, lse, draft_lse = call.law, call.lse, call.draft_lse
    flat = flattened_logits(call.logits) + _law(law)
    draft = _NO_VALUES if call.draft_logits is None else _logits(call.draft_logits)
    temperature = law.temperature if call.draft_temperature is None else call.draft_temperature
    batch, nodes = call.draft_tokens.shape
    device = call.draft_tokens.device
    tokens = call.layout.out
    if tokens is None:
        tokens = empty(batch, nodes + 1, dtype=int64, device=device)
    log_probs = empty(batch, nodes + 1, dtype=float32, device=device)
    num_accepted = empty(batch, dtype=int32, device=device)
    path = empty(batch, nodes, dtype=int32, device=device)
    status = empty(batch, dtype=int32, device=device)
    flat.append(RULES[call.acceptance])
    flat += *call.parameters, *(0.0,) * (_MAX_PARAMETERS - len(call.parameters))
    flat += _NO_VALUES if call.memory is None else _per_row(call.memory)
    flat += call.bonus, batch, nodes
    flat += _integers(call.draft_tokens)
    flat += _NO_VALUES if call.proposers is None else _integers(call.proposers)
    flat.append(call.uniforms.data_ptr())
    flat += call.uniforms.stride()
    flat += draft
    flat += _per_row(temperature)
    flat += _NO_VALUES if lse is None else _per_member(lse)
    flat += _NO_VALUES if draft_lse is None else _per_place(draft_lse)
    flat += tokens.data_ptr(), log_probs.data_ptr(), num_accepted.data_ptr(), path.data_ptr()
    flat.append(status.data_ptr())
    if call.parents is None:
        flat += _CHAIN
    else:
        flat += _integers(call.parents)
        flat += call.acceptance == "k_seq", call.draws == "without"
    if call.layout is PADDED:
        flat.append(False)
    else:
        flat.append(True)
        flat += _layout(call)
    return flat, (tokens, log_probs, num_accepted, path, status)


def _layout(call: VerifyCall) -> list[Any]:
    """What of a `verify` is not padded and plain."""
    flat: list[Any] = []
    for rows in (call.layout.rows, call.layout.draft_rows):
        flat += _NO_VALUES if rows is None else _integers(rows)
    flat += _NO_VALUES if call.layout.num_drafts is None else _per_request(call.layout.num_drafts)
    flat += call.layout.draft_filtered, call.layout.draft_space == "probabilities"
    parameters = call.layout.request_parameters
    flat += (*_NO_VALUES, 0) if parameters is None else (*_per_row(parameters), parameters.shape[1])
    out = call.layout.out
    flat += _NO_OUT if out is None else (out.data_ptr(), out.dtype == int64, out.stride(0))
    return flat


def refuse_outside(
    op: str,
    argument: str,
    rows: Tensor,
    count: int,
    columns: int,
    num_drafts: Tensor | None = None,
    more: int = 0,
) -> None:
    """Refuse an index of a row that will be looked at where there is none; on a CPU only.

    count: rows that there are. columns, num_drafts, more: those of a request that are looked at.
    """
    flat = [*_integers(rows), *(_NO_VALUES if num_drafts is None else _per_request(num_drafts))]
    place = MODULE.first_outside([*flat, more, len(rows), columns, count])
    if place >= 0:
        at = divmod(place, columns)
        got = f"{int(rows[at])} at {at}"
        raise Refusal(op, argument, f"indices in [0, {count})", got)


def flattened_attention(call: AttentionCall) -> tuple[list[Any], tuple[Tensor, Tensor]]:
    """Arguments and results of `attention`."""
    batch, heads, nodes, size = call.query.shape
    key_heads, page, value_size = call.values.shape[1:]
    out = call.query.new_empty((batch, nodes, heads, value_size))
    lse = empty(batch, heads, nodes, dtype=float32, device=out.device)
    flat: list[Any] = [*_heads(call.query), *_heads(call.keys), *_heads(call.values)]
    flat += _pages(call.block_table, page)
    flat += batch, heads, key_heads, nodes, size, value_size
    flat += call.lengths.data_ptr(), call.lengths.stride(0), 0, 0
    batch_stride, row_stride, word_stride = call.visible.stride()
    if call.visible.shape[0] == 1:
        batch_stride = 0
    flat += call.visible.data_ptr(), batch_stride, row_stride, word_stride
    flat += _NO_VALUES if call.depths is None else _per_node(call.depths)
    sinks = call.sinks
    flat += _NO_VALUES if sinks is None else (sinks.data_ptr(), 0, 0, sinks.stride(0))
    flat += call.scale, call.softcap, call.window
    flat += out.data_ptr(), lse.data_ptr()
    return flat, (out, lse)


def readdressed_attention(
    flat: list[Any],
    tensors: tuple[Tensor, Tensor, Tensor],
    same: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    results: tuple[Tensor, Tensor],
) -> list[Any]:
    """Arguments of another `attention` of the same kind, whose tensors have other addresses.

    Args:
        flat: as `flattened_attention` made them, without sinks.
        tensors: query, keys and values.
        same: lengths, visible, depths and block table.
        results: as `flattened_attention` returns them.
    """
    lengths, visible, depths, table = same
    again = flat.copy()
    again[0], again[5], again[10] = (tensor.data_ptr() for tensor in tensors)
    if table is not None:
        again[15] = table.data_ptr()
    again[26], again[30] = lengths.data_ptr(), visible.data_ptr()
    if depths is not None:
        again[34] = depths.data_ptr()
    again[45], again[46] = (result.data_ptr() for result in results)
    return again


def flattened_compact(
    slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None
) -> list[Any]:
    """Arguments of `compact`."""
    flat: list[Any] = [len(slabs)]
    for slab in slabs:
        layers, _, heads, _, size = slab.shape
        item = slab.itemsize
        layer, batch, head, row, _ = slab.stride()
        flat += slab.data_ptr(), layers, heads, size * item
        flat += layer * item, batch * item, head * item, row * item
    flat += _pages(block_table, slabs[0].shape[3])
    flat += path.shape
    flat += lengths.data_ptr(), lengths.stride(0), 0, 0
    flat += path.data_ptr(), *path.stride(), 0
    return flat


def _heads(tensor: Tensor) -> tuple[int, int, int, int, int]:
    """Address, dtype and strides over batch, head and row of (B, H, S, E)."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise Unsupported("kernels", "query", "bfloat16, float16 or float32", tensor.dtype)
    batch_stride, head_stride, row_stride, _ = tensor.stride()
    return tensor.data_ptr(), dtype, batch_stride, head_stride, row_stride


def _pages(table: Tensor | None, size: int) -> tuple[int, int, int, int, int]:
    """Address and strides over batch and page of (B, pages), and the slots of a page."""
    if table is None:
        return *_NO_VALUES, size
    batch_stride, page_stride = table.stride()
    return table.data_ptr(), batch_stride, page_stride, 0, size


def _per_node(value: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch and node of (B or 1, N+1)."""
    batch_stride, node_stride = value.stride()
    return value.data_ptr(), batch_stride if value.shape[0] != 1 else 0, node_stride, 0


def _logits(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address, dtype and strides over batch and row of (B, T, V), or of (L, V), packed."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise Unsupported("kernels", "logits", "bfloat16, float16 or float32", tensor.dtype)
    *batch_stride, row_stride, _ = tensor.stride()
    return tensor.data_ptr(), dtype, *(batch_stride or (0,)), row_stride


def flattened_logits(logits: Sequence[Tensor]) -> list[Any]:
    """How many members, and of each its address, dtype and strides over batch and row."""
    if len(logits) > _MAX_MEMBERS:
        raise Unsupported("kernels", "logits", f"at most {_MAX_MEMBERS} members", len(logits))
    flat: list[Any] = [len(logits)]
    for tensor in logits:
        flat += _logits(tensor)
    return flat


def _law(law: LawTensors) -> list[Any]:
    if law.flat:
        return law.flat
    flat: list[Any] = [*_weights(law.weights), *_per_row(law.temperature)]
    for value in (law.top_k, law.top_p, law.min_p):
        flat += _NO_VALUES if value is None else _per_row(value)
    flat += _SPACES[law.space], law.scope == "member", law.plausibility, law.vocab_size
    if law.flat is not None:
        law.flat[:] = flat  # at once: threads may share a law
    return flat


def _weights(weights: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch, row and member of (M,), (B, M) or (B, T, M)."""
    if weights.dtype != float32:
        raise Unsupported("kernels", "weights", "float32", weights.dtype)
    strides = weights.stride()
    if len(strides) == 1:
        return weights.data_ptr(), 0, 0, strides[0]
    if len(strides) == 2:
        return weights.data_ptr(), strides[0], 0, strides[1]
    return weights.data_ptr(), strides[0], strides[1], strides[2]


def _per_row(value: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch and member of (B or 1,) or (B or 1, M or 1)."""
    shape, strides = value.shape, value.stride()
    batch_stride = strides[0] if shape[0] != 1 else 0
    member_stride = strides[1] if len(shape) == 2 and shape[1] != 1 else 0
    return value.data_ptr(), batch_stride, 0, member_stride


def _per_member(lse: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch, row and member of (B, T, M), or of (L, M), packed."""
    *batch_stride, row_stride, member_stride = lse.stride()
    return lse.data_ptr(), *(batch_stride or (0,)), row_stride, member_stride


def _per_place(lse: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch and row of (B, T), or of (L,), packed."""
    *batch_stride, row_stride = lse.stride()
    return lse.data_ptr(), *(batch_stride or (0,)), row_stride, 0


def _integers(value: Tensor) -> tuple[int, bool, int, int]:
    """Address, width and strides of (B or 1, columns)."""
    batch_stride, column_stride = value.stride()
    if value.shape[0] == 1:
        batch_stride = 0
    return value.data_ptr(), value.dtype == int64, batch_stride, column_stride


def _per_request(value: Tensor) -> tuple[int, bool, int, int]:
    """Address, width and strides of (B,)."""
    return value.data_ptr(), value.dtype == int64, value.stride(0), 0


def refuse(backend: str, call: VerifyCall) -> None:
    """Raise `Unsupported` for a verification that no compiled kernel takes."""
    if call.acceptance not in RULES:
        raise Unsupported.unknown(backend, "acceptance", call.acceptance, RULES)
    call.law.refuse_fold(backend)
