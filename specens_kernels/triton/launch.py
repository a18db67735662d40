# SPDX-License-Identifier: Apache-2.0
"""What every kernel takes, as named tuples of tensors, strides and compile-time constants.

Tensors of parameters are expanded views, so that a shared value has stride 0 and costs nothing. A
`source` is anything that has a maximum and a normaliser: member k is source k, the proposal source
M, and what is warped as a whole, a product or a mixture of scope "ensemble", source M + 1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..acceptance import ACCEPTANCE_RULES
from ..call import VerifyCall
from ..law import LawTensors
from ..reference import SUB_TILE, TILE
from ..refusal import Unsupported

MAX_MEMBERS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LawArguments(NamedTuple):
    """M members' logits and how they become one law.

    sources: M + 1, or M + 2 where there is one that is warped as a whole.
    kind: "mixture" (of warped members), "warped" (a mixture of bare members, warped as a whole) or
        "product" (a weighted sum of logits). by_member: whether members are warped.
    first, columns: the first member's column of the temperature, and how many there are.
    lse: (B, T, M) float32 log-sum-exps of the members; None if none is known. late: whether rows
        that are known, and the bonus row, are swept only where a token is drawn; `verify` says so.
    rows: of each sequence. wide: whether where one begins takes 64 bits. sub_tiles: of a row, in
        whole tiles of `width`; tiles: at least as many tiles, a power of two. narrow: sub-tiles of
        a program that computes in double precision.
    """

    logits: Any
    batch_strides: Any
    row_strides: Any
    weights: Any
    weights_batch: Any
    weights_row: Any
    weights_member: Any
    temperature: Any
    temperature_batch: Any
    temperature_member: Any
    top_k: Any
    top_k_batch: Any
    top_p: Any
    top_p_batch: Any
    min_p: Any
    min_p_batch: Any
    log_plausibility: Any
    lse: Any
    lse_batch: Any
    lse_row: Any
    lse_member: Any
    vocab_size: Any
    rows: Any
    sub_tiles: Any
    members: Any
    sources: Any
    kind: Any
    by_member: Any
    first: Any
    columns: Any
    filtered: Any
    plausible: Any
    late: Any
    wide: Any
    width: Any
    narrow: Any
    tiles: Any


class Proposal(NamedTuple):
    """What the draft tokens were drawn from: members, separate logits, or points.

    greedy: whether the rule collapses the target. at_zero: whether it asks for the draft's law at
        temperature 0, too; a draft is a point there otherwise. Only such a rule may ask for the
        probability of the draft's best token.
    lse: (B, N or N + 1) float32 log-sum-exps of separate logits; None if none is known.
    wide: whether where a row of separate logits begins takes 64 bits.
    """

    tokens: Any
    tokens_batch: Any
    tokens_node: Any
    proposers: Any
    proposers_batch: Any
    proposers_node: Any
    logits: Any
    batch_stride: Any
    row_stride: Any
    temperature: Any
    temperature_batch: Any
    lse: Any
    lse_batch: Any
    lse_row: Any
    nodes: Any
    greedy: Any
    at_zero: Any
    wide: Any


class Workspace(NamedTuple):
    """What the kernels of one call leave for one another; S = M + 2 sources.

    tops, sums: (rows, S, sub-tiles) largest value, and mass relative to it.
    flags: (rows, S, tiles) status bits.
    maxima: (rows, M, sub-tiles) of each member of a product.
    cutoffs: (rows, M + 3) float64. Least value that survives, of each source; last, the least
        plausible one.
    records: (rows, S, 4) float64. Top, inverse temperature, scale and cutoff of each source; of a
        member of a product, its coefficient is the scale.
    """

    tops: Any
    sums: Any
    flags: Any
    maxima: Any
    cutoffs: Any
    records: Any


def check_device(device: torch.device) -> None:
    """Refuse tensors that no kernel can reach."""
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise Unsupported("triton", "tensors", "tensors on a GPU, or TRITON_INTERPRET=1", device)


def law_arguments(
    logits: Sequence[Tensor], law: LawTensors, member: int = -1, lse: Tensor | None = None
) -> LawArguments:
    """The law of all members, or of one alone."""
    columns, alone = len(logits), member >= 0
    _refuse(logits, law, member)
    batch, rows = logits[0].shape[:2]
    if alone:
        logits = logits[member : member + 1]
    by_member = alone or law.scope == "member"
    kind = "mixture" if by_member else "warped"
    if law.space == "logits" and not alone:
        kind = "product"
    weights = None if alone else _expanded_weights(law.weights, batch, rows)
    temperature = law.temperature.expand(batch, columns)
    filters = (law.top_k, law.top_p, law.min_p)
    strides = [0 if value is None else _batch_stride(value) for value in filters]
    tiles = triton.cdiv(law.vocab_size, TILE)
    width = TILE // SUB_TILE
    if tiles == 1:
        width = triton.next_power_of_2(triton.cdiv(law.vocab_size, SUB_TILE))
    plausible = law.plausibility > 0 and not alone
    return LawArguments(
        logits=tuple(logits),
        batch_strides=tuple(tensor.stride(0) for tensor in logits),
        row_strides=tuple(tensor.stride(1) for tensor in logits),
        weights=weights,
        weights_batch=0 if weights is None else weights.stride(0),
        weights_row=0 if weights is None else weights.stride(1),
        weights_member=0 if weights is None else weights.stride(2),
        temperature=temperature,
        temperature_batch=temperature.stride(0),
        temperature_member=temperature.stride(1),
        top_k=law.top_k,
        top_k_batch=strides[0],
        top_p=law.top_p,
        top_p_batch=strides[1],
        min_p=law.min_p,
        min_p_batch=strides[2],
        log_plausibility=tl.constexpr(math.log(law.plausibility) if plausible else 0.0),
        lse=lse,
        lse_batch=0 if lse is None else lse.stride(0),
        lse_row=0 if lse is None else lse.stride(1),
        lse_member=0 if lse is None else lse.stride(2),
        vocab_size=law.vocab_size,
        rows=rows,
        sub_tiles=tiles * width,
        members=tl.constexpr(len(logits)),
        sources=tl.constexpr(len(logits) + (1 if kind == "mixture" else 2)),
        kind=tl.constexpr(kind),
        by_member=tl.constexpr(by_member),
        first=tl.constexpr(max(member, 0)),
        columns=tl.constexpr(columns),
        filtered=tl.constexpr(any(value is not None for value in filters)),
        plausible=tl.constexpr(plausible),
        late=tl.constexpr(False),
        wide=tl.constexpr(any(map(_is_wide, logits))),
        width=tl.constexpr(width),
        narrow=tl.constexpr(min(width, 2)),
        tiles=tl.constexpr(triton.next_power_of_2(tiles)),
    )


def _refuse(logits: Sequence[Tensor], law: LawTensors, member: int) -> None:
    """Raise `Unsupported` for what no kernel takes."""
    check_device(logits[0].device)
    if len(logits) > MAX_MEMBERS:
        raise Unsupported("triton", "logits", f"at most {MAX_MEMBERS} members", len(logits))
    if member < 0:
        law.refuse_fold("triton")
    for tensor in logits if member < 0 else logits[member : member + 1]:
        _check_dtype(tensor)


def workspace(law: LawArguments, batch: int) -> Workspace:
    """Uninitialised memory for a call."""
    device = law.logits[0].device
    members = law.members.value
    rows, sources = batch * law.rows, members + 2
    tiles = law.sub_tiles // law.width.value

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    pinned = law.kind.value == "product" and law.by_member.value
    cut = law.filtered.value or law.plausible.value
    return Workspace(
        tops=empty(rows, sources, law.sub_tiles, dtype=torch.float64),
        sums=empty(rows, sources, law.sub_tiles),
        flags=empty(rows, sources, tiles, dtype=torch.int32),
        maxima=empty(rows, members, law.sub_tiles) if pinned else None,
        cutoffs=empty(rows, members + 3, dtype=torch.float64) if cut else None,
        records=empty(rows, sources, 4, dtype=torch.float64),
    )


def proposal_arguments(call: VerifyCall) -> Proposal:
    """What `verify` knows of the draft."""
    rule = ACCEPTANCE_RULES[call.acceptance]
    tokens, logits, lse = call.draft_tokens, call.draft_logits, call.draft_lse
    batch, nodes = tokens.shape
    if logits is not None:
        _check_dtype(logits)
    temperature = call.draft_temperature
    temperature = call.law.temperature[:, 0] if temperature is None else temperature
    members = None if call.proposers is None else call.proposers.expand(batch, nodes)
    return Proposal(
        tokens=tokens,
        tokens_batch=tokens.stride(0),
        tokens_node=tokens.stride(1),
        proposers=members,
        proposers_batch=0 if members is None else members.stride(0),
        proposers_node=0 if members is None else members.stride(1),
        logits=logits,
        batch_stride=0 if logits is None else logits.stride(0),
        row_stride=0 if logits is None else logits.stride(1),
        temperature=temperature,
        temperature_batch=_batch_stride(temperature),
        lse=lse,
        lse_batch=0 if lse is None else lse.stride(0),
        lse_row=0 if lse is None else lse.stride(1),
        nodes=nodes,
        greedy=tl.constexpr(rule.greedy),
        at_zero=tl.constexpr(rule.needs_draft),
        wide=tl.constexpr(logits is not None and _is_wide(logits)),
    )


def _is_wide(logits: Tensor) -> bool:
    """Whether a row may begin further from the first than 32 bits say, as where transposed."""
    return (logits.shape[1] - 1) * logits.stride(1) >= 2**31


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise Unsupported("triton", "logits", "bfloat16, float16 or float32", tensor.dtype)


def _expanded_weights(weights: Tensor, batch: int, rows: int) -> Tensor:
    """(M,), (B, M) or (B, T, M) as (B, T, M)."""
    if weights.dim() == 2:
        weights = weights[:, None]
    return weights.expand(batch, rows, weights.shape[-1])


def _batch_stride(value: Tensor) -> int:
    return value.stride(0) if value.shape[0] > 1 else 0
