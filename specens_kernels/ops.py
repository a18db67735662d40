# SPDX-License-Identifier: Apache-2.0
"""The public ops: what each takes, what it returns, and its checks.

`dispatch.py` chooses the implementation and has `checks.py` refuse what does not fit; kernels
assume checked input. What is read here is what cannot cross the dispatcher as it is. To add an op:
write it in `reference/`, register it in `dispatch.py`, then its public function here, and a test
file and a benchmark of the same name.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import arguments, checks, dispatch, reference
from .acceptance import Acceptance
from .attended import attend as attend
from .call import PADDED, AttentionCall, Layout, VerifyCall
from .law import Law
from .refusal import Refusal, shown
from .storage import is_tensor

POINT_MASS = reference.PADDING
# Tensors that `verify` takes or leaves.
_OPTIONAL = (
    "parents",
    "proposers",
    "draft_logits",
    "draft_temperature",
    "lse",
    "draft_lse",
    "memory",
)
_LAYOUT = ("rows", "draft_rows", "num_drafts", "out")


class Stream(enum.IntEnum):
    """What a random number is for; numbers of different streams are independent.

    VERIFY: acceptance coins (word 0 of a block) and residual or bonus draws (words 1 to 3).
    DRAFT: a proposer's draws; the index is the member.
    COMPONENT: which member of a mixture a token is drawn from (word 0).
    """

    VERIFY = 0
    DRAFT = 1
    COMPONENT = 2


class Status(enum.IntFlag):
    """What a degenerate input did to a row; 0 for a healthy one. Only what was consulted counts."""

    NAN_LOGITS = reference.NAN_LOGITS
    INFINITE_LOGITS = reference.INFINITE_LOGITS
    EMPTY_LAW = reference.EMPTY_LAW
    INVALID_DRAFT = reference.INVALID_DRAFT
    EMPTY_RESIDUAL = reference.EMPTY_RESIDUAL


class Sample(NamedTuple):
    """What `sample` returns.

    tokens: (B, T) int64; (B, T, k) if k were asked for, -1 where the law has no more.
    log_probs: as tokens, float32. Log-probability of each token under the law that was asked for,
        of which no token is taken away; -inf for a token -1.
    lse: (B, T) float32. Log-sum-exp of that law's kept scores; 0 for several members of scope
        "member" in space "probabilities". NaN, which is not known, for one such member whose
        weights are a tensor.
    status: (B, T) int32. `Status` bits.
    """

    tokens: Tensor
    log_probs: Tensor
    lse: Tensor
    status: Tensor


class Verdict(NamedTuple):
    """What `verify` returns.

    tokens: (B, N+1) int64. Accepted tokens, then the residual or bonus token; padded with -1.
    log_probs: (B, N+1) float32. Of each emitted token under the ensemble (before a greedy
        collapse).
    num_accepted: (B,) int32. Draft tokens kept; the residual or bonus token is not counted.
    path: (B, N) int32. Nodes kept, from the root down; padded with -1.
    status: (B,) int32. `Status` bits.
    """

    tokens: Tensor
    log_probs: Tensor
    num_accepted: Tensor
    path: Tensor
    status: Tensor


def uniforms(seeds: Tensor, positions: Tensor, stream: Stream | int, *, index: int = 0) -> Tensor:
    """Random numbers that depend on nothing but their coordinates.

    Philox-4x32-10 with key `seeds` and counter (position, stream, index), so a token's randomness
    is the same in any batch slot, for any batch size, on every backend.

    Args:
        seeds: (B,) int64. One per sequence.
        positions: (B, T) or (1, T) int64. Absolute position of the token that each block is for.
        stream: a `Stream`, or any integer in [0, 2^32).
        index: an integer in [0, 2^32) that separates blocks of one stream, such as the member.
    Returns:
        (B, T, 4) float32 in [0, 1), multiples of 2^-24.
    Raises:
        Refusal: a shape or dtype disagrees.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    checks.tensors("uniforms", ("seeds", "positions"), (seeds, positions))
    words = arguments.count(stream), arguments.count(index)
    if not 0 <= words[0] < 2**32:
        raise Refusal("uniforms", "stream", "an integer in [0, 2^32)", shown(stream))
    if not 0 <= words[1] < 2**32:
        raise Refusal("uniforms", "index", "an integer in [0, 2^32)", shown(index))
    numbers: Tensor = dispatch.call_uniforms(seeds, positions, *words)
    return numbers


def mix(logits: Sequence[Tensor], law: Law) -> tuple[Tensor, Tensor]:
    """The ensemble's law itself, for log-probabilities and debugging. It has no gradient.

    Args:
        logits: M tensors (B, T, V_m) bfloat16, float16, float32 or float64, any strides with
            contiguous rows. Each member's bare logits; columns from `vocab_size` on are ignored.
        law: how they become one distribution.
    Returns:
        log_probs: (B, T, V) float32 (float64 if a member is). Normalised, -inf where no mass is.
        status: (B, T) int32. `Status` bits.
    Raises:
        Refusal: a shape, dtype or device disagrees.

    Source: Fu et al. 2025, arXiv:2502.01662.
    """
    tensors, parameters = checks.members("mix", logits, law)
    log_probs, status = dispatch.call_mix(tensors, parameters)
    return log_probs, status


def sample(
    logits: Sequence[Tensor],
    uniforms: Tensor,
    law: Law,
    *,
    member: int | None = None,
    count: int | None = None,
    rows: Tensor | None = None,
) -> Sample:
    """Draw tokens of each row from the ensemble, or from one member's own warped law.

    The draw is a hierarchical inverse CDF over 8,192-token tiles and 1,024-token sub-tiles. A row
    whose temperatures are all 0 takes the law's most probable token, the lowest id on ties.

    Args:
        logits: M tensors (B, T, V_m), as for `mix`.
        uniforms: (B, T, 4) float32 in [0, 1); (B, T, k, 4) with a count. Words 1 to 3 of each block
            are used.
        law: how the members become one distribution.
        member: draw from this member alone, warped as `law` says; None draws from the ensemble.
        count: k >= 1 draws k tokens of a row without replacement, each from what the earlier ones
            have left of the law; the first is what is drawn without a count. Where the temperatures
            are all 0 they are the most probable ones, in that order. None draws one.
        rows: (B, T) int32 or int64. The logits are packed, (L, V_m) each, and row i of request b is
            logits[rows[b, i]]. On a CPU an index of no row is refused. None: (B, T, V_m).
    Returns:
        Sample: tokens, log_probs, lse and status.
    Raises:
        Refusal: a shape, dtype or device disagrees, or there is no such member.

    Source: Fu et al. 2025, arXiv:2502.01662.
    """
    tensors, parameters = checks.members("sample", logits, law)
    checks.tensors("sample", ("uniforms",), (uniforms,))
    _check_count(count, uniforms)
    if rows is not None:
        checks.tensors("sample", ("rows",), (rows,))
    if member is not None:
        place = arguments.count(member)
        if not 0 <= place < len(tensors):
            raise Refusal("sample", "member", f"None or 0 to {len(tensors) - 1}", shown(member))
        return Sample(*dispatch.call_sample(tensors, uniforms, parameters, place, rows))
    alone = len(tensors) == 1 and parameters.averages_members
    if not alone or not isinstance(law.weights, Tensor):
        # Alone it is the same law, but one that has a log-sum-exp, which `verify` can be told.
        only = 0 if alone else -1
        return Sample(*dispatch.call_sample(tensors, uniforms, parameters, only, rows))
    drawn = Sample(*dispatch.call_sample(tensors, uniforms, parameters, -1, rows))
    # The mixture's, 0, would pass for the member's.
    return drawn._replace(lse=torch.full_like(drawn.lse, torch.nan))


def _check_count(count: object, uniforms: Tensor) -> None:
    """Refuse a count that is none, or another one than the uniforms have blocks for."""
    many = arguments.count(count)
    if count is not None and many < 1:
        raise Refusal("sample", "count", "None or an integer >= 1", shown(count))
    if uniforms.dim() != 4 if count is not None else uniforms.dim() == 4:
        expected = "(B, T, 4)" if count is None else f"(B, T, {many}, 4)"
        raise Refusal("sample", "uniforms", expected, tuple(uniforms.shape))
    if count is not None and uniforms.shape[2] != many:
        raise Refusal("sample", "uniforms", f"(B, T, {many}, 4)", tuple(uniforms.shape))


def verify(
    logits: Sequence[Tensor],
    draft_tokens: Tensor,
    uniforms: Tensor,
    law: Law,
    *,
    parents: Tensor | None = None,
    proposers: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_temperature: Tensor | None = None,
    lse: Tensor | None = None,
    draft_lse: Tensor | None = None,
    acceptance: Acceptance | str = "rejection",
    memory: Tensor | None = None,
    bonus: bool = True,
    draws: str = "with",
    rows: Tensor | None = None,
    draft_rows: Tensor | None = None,
    num_drafts: Tensor | None = None,
    draft_filtered: bool = True,
    draft_space: str = "logits",
    out: Tensor | None = None,
) -> Verdict:
    """Keep the longest path of drafted tokens that the ensemble accepts, and emit one token more.

    From the root down, the children of a node are tried in order: a child is kept iff
    `coin * draft < kept`, and what the rule leaves of the target, for `rejection` the residual
    max(target - kept, 0), is the next child's target. Where no child is kept the last residual is
    drawn from; where there is none to try, the target (the bonus token). No (V,) probability tensor
    is written. The emitted law is the ensemble's, at every position, if the rule is lossless and
    each draft was drawn from the law it is said to be from.

    Args:
        logits: M tensors (B, N+1, V_m), as for `mix`. Row 0 is the law after the last committed
            token, row i the law after node i. (B, N, V_m) if not `bonus`.
        draft_tokens: (B, N) int32 or int64. Token of node i at i - 1; -1 where there is none.
        uniforms: (B, N+1, 4) float32 in [0, 1). Word 0 of row i is node i's coin; words 1 to 3 of
            row i draw the token after node i. The same uniforms give the same tokens everywhere.
        law: how the members become one distribution. The proposal is warped the same way.
        parents: (N+1,), (1, N+1) or (B, N+1) int32 or int64. Parent of each node, lower than the
            node; -1 for the root, node 0. None is a chain. A draft with another parent is lost: it
            is not tried, and the row's status says INVALID_DRAFT.
        proposers: (N,), (1, N) or (B, N) int32 or int64. The member whose law each node was drawn
            from; -1 for a point mass; M for `draft_logits`. None is those everywhere, or without
            them a point mass.
        draft_logits: (B, N, V_d) or (B, N+1, V_d). Bare logits of a separate draft; row i is the
            law that the children of node i were drawn from.
        draft_temperature: () or (B,) float. The draft's; None is the law's for the first member.
        lse: (B, N+1, M) float32; (B, N, M) if not `bonus`. Log-sum-exp of each member's logits over
            its temperature, as a fused LM head has found it, or `sample` of that member alone; what
            is not finite is not known. A row that is known is read only where a token is drawn, and
            what is wrong with it is reported there only. It is taken as it is: a wrong one, 0 for
            instance, makes a wrong law and sets no bit. For mixtures of scope "member" without
            filters; nothing is taken from it where the temperature is 0.
        draft_lse: (B, N) or (B, N+1) float32, as `draft_logits`. The same of the draft's. A larger
            one makes the draft's law sum to less than 1: that of drafts which could be withdrawn.
        acceptance: a rule with its parameters, or the name of an entry of `ACCEPTANCE_RULES`, with
            its defaults. In rows of temperature 0 a draft is kept iff it is the ensemble's most
            probable token or the rule trusts it. "block" takes chains only.
        memory: (B,) float. For rules that remember: what of the tokens before; None is 0.
        bonus: whether a path that ends without a rejection emits a bonus token.
        draws: "with": the siblings of one proposer were drawn independently. "without": without
            replacement, as `sample` draws with a count, so that a later sibling's law has none of
            the earlier ones' tokens; not for "k_seq", whose siblings are independent.
        rows: (B, N+1) int32 or int64; (B, N) if not `bonus`. The logits are packed, (L, V_m) each,
            and row i of request b is logits[rows[b, i]]. lse is then (L, M). On a CPU an index of
            no row is refused where a draft or the bonus token asks for it.
        draft_rows: (B, N) or (B, N+1) int32 or int64. The same of draft_logits, which are (L_d,
            V_d), or (slots, steps, V_d) of which row slot * steps + step is meant and which are not
            copied. draft_lse is (L_d,), or (slots, steps).
        num_drafts: (B,) int32 or int64, cut to [0, N]. Where a request's drafts end: node i is one
            of them if i <= num_drafts[b], and what is said of the others is not looked at. A draft
            -1 among them is refused and takes nothing from the target: where no sibling is kept a
            token is drawn, even if not `bonus`. None: a draft -1 is none.
        draft_filtered: whether drafts, of members too, were drawn after the law's filters. If not,
            after their temperature alone.
        draft_space: "logits" or "probabilities". The latter are the draft's law as it is: no
            temperature, filter or normalisation is applied; what is not finite or below 0 counts as
            0.
        out: (B, N+1) int32 or int64, contiguous rows of any stride, apart from the arguments'
            memory. The verdict's tokens, which are written there.
    Returns:
        Verdict: tokens, log_probs, num_accepted, path and status.
    Raises:
        Refusal: a shape, dtype or device disagrees, or the rule is unknown.

    Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318; Fu et al.
    2025, arXiv:2502.01662.
    """
    tensors, parameters = checks.members("verify", logits, law)
    checks.tensors("verify", ("draft_tokens", "uniforms"), (draft_tokens, uniforms))
    optional = (parents, proposers, draft_logits, draft_temperature, lse, draft_lse, memory)
    for name, value in zip(_OPTIONAL, optional, strict=True):
        if value is not None and not is_tensor(value):
            raise Refusal("verify", name, "a tensor or None", shown(value))
    chosen = Acceptance.of(acceptance)
    layout = PADDED
    if (
        rows is not None
        or draft_rows is not None
        or num_drafts is not None
        or out is not None
        or draft_filtered is not True
        or draft_space != "logits"
        or chosen.given
    ):
        for name, value in zip(_LAYOUT, (rows, draft_rows, num_drafts, out), strict=True):
            if value is not None and not is_tensor(value):
                raise Refusal("verify", name, "a tensor or None", shown(value))
        filtered = arguments.flag("verify", "draft_filtered", draft_filtered)
        several = chosen.of_requests(draft_tokens.device) if chosen.given else None
        layout = Layout(rows, draft_rows, num_drafts, filtered, draft_space, several, out)
    if draft_rows is not None and draft_logits is not None:
        draft_logits = checks.packed("draft_logits", draft_logits, 3)
        if draft_lse is not None:
            draft_lse = checks.packed("draft_lse", draft_lse, 2)
    call = VerifyCall(
        tensors,
        draft_tokens,
        uniforms,
        parameters,
        None if parents is None else checks.nodes("parents", parents),
        None if proposers is None else checks.nodes("proposers", proposers),
        draft_logits,
        None if draft_temperature is None else checks.draft_temperature(draft_temperature),
        lse,
        draft_lse,
        chosen.rule.name,
        chosen.numbers,
        None if memory is None else checks.memory(memory),
        arguments.flag("verify", "bonus", bonus),
        draws,
        layout,
    )
    verdict = Verdict(*dispatch.call_verify(call))
    return verdict if out is None else verdict._replace(tokens=_written(out, verdict.tokens))


def _written(out: Tensor, tokens: Tensor) -> Tensor:
    """What the caller gave for the tokens, with the tokens in it."""
    if tokens is not out:
        return out.copy_(tokens)
    if not out.is_inference():
        increment_version(out)
    return out


def attention(
    query: Tensor,
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
    """Attention of a tree's nodes to a cache of slots, which holds the nodes themselves, too.

    Node i of row b sees every slot below lengths[b], the prefix, and of the nodes, which lie at
    slots lengths[b] to lengths[b] + N, those that `visible` says: no mask tensor is made. What lies
    beyond is never read. A chain is `tree.visible(tree.chain(N))`, plain decoding N = 0. A node
    that sees nothing gets 0, and a log-sum-exp of -inf.

    Args:
        query: (B, H, N+1, E) bfloat16, float16, float32 or float64, any strides with contiguous
            rows. Row i belongs to node i; node 0 is the root.
        keys: (B, K, S, E), of the query's dtype, any strides with contiguous rows. K divides H:
            heads h * H / K to (h + 1) * H / K - 1 share key head h. (P, K, page, E) with a
            block table.
        values: (B, K, S, F), as `keys`; F may be another size than E.
        lengths: (B,) int64. Slots that every node sees, at most S - N - 1. On devices other than a
            CPU it is not looked at on the host, and what it says beyond the cache is not read.
        visible: (B, N+1, W) or (1, N+1, W) int64, W = ceil((N+1) / 64), as `tree.visible` makes it.
            Bit j of node i: i sees node j. Bits beyond node N are ignored.
        scale: what scores are multiplied by; None is E^-0.5.
        softcap: c > 0 makes of a score s the score c * tanh(s / c); 0 is none.
        window: with a sliding window of so many positions, node i sees the slots s of the prefix
            with s > lengths + depths[i] - window; 0 is none. `visible` is made for it, too.
        depths: (B, N+1) or (1, N+1) int32, as `tree.depths` makes it. Needed with a window.
        sinks: (H,) float32. A score of each head that joins the softmax, and has no value.
        block_table: (B, pages) int32. Page of slots page * i to page * (i + 1) - 1 of each row.
    Returns:
        out: (B, N+1, H, F), contiguous, of the query's dtype.
        lse: (B, H, N+1) float32. Log-sum-exp of the scores that a node sees, and of its sink.
    Raises:
        Refusal: a shape, dtype, stride or device disagrees; on a CPU, lengths that the cache does
            not hold, or a page that does not exist.

    Source: Miao et al. 2024, arXiv:2305.09781; Dao et al. 2023, "Flash-Decoding".
    """
    given = {"depths": depths, "sinks": sinks, "block_table": block_table}
    given = {name: value for name, value in given.items() if value is not None}
    names = ("query", "keys", "values", "lengths", "visible", *given)
    checks.tensors("attention", names, (query, keys, values, lengths, visible, *given.values()))
    reach = arguments.count(window)
    if reach < 0:
        raise Refusal("attention", "window", "an integer >= 0", shown(window))
    call = AttentionCall(
        query,
        keys,
        values,
        lengths,
        visible,
        depths if reach > 0 else None,
        sinks,
        block_table,
        max(query.shape[-1:].numel(), 1) ** -0.5 if scale is None else arguments.number(scale),
        arguments.number(softcap),
        reach,
    )
    out, lse = dispatch.call_attention(call)
    return out, lse


def compact(
    slabs: Sequence[Tensor],
    lengths: Tensor,
    path: Tensor,
    *,
    block_table: Tensor | None = None,
) -> None:
    """Move the keys and values of an accepted path to the end of the prefix, in place.

    Slot lengths[b] + path[b, i] is moved to slot lengths[b] + 1 + i, in every slab: the root, which
    every path begins with, lies where it belongs. Then lengths + 1 + accepted is the prefix. All
    else is left as it is.

    Args:
        slabs: tensors (L, B, K, S, E) of any dtype, any strides with contiguous rows: keys and
            values of L layers. Each may have its own L, K, S and E. (L, P, K, page, E) with a block
            table.
        lengths: (B,) int64. Slots before the root's.
        path: (B, D) int32, as `verify` returns it: nodes from the root down, each higher than the
            one before; -1 ends a path.
        block_table: (B, pages) int32, as for `attention`.
    Raises:
        Refusal: a shape, dtype, stride or device disagrees; on a CPU, a path that does not ascend
            or leaves the cache.

    Source: SGLang's and TensorRT-LLM's moves of accepted keys and values.
    """
    if not isinstance(slabs, (list, tuple)):
        raise Refusal("compact", "slabs", "a list of tensors", f"a {type(slabs).__name__}")
    written = list(slabs)
    given = [lengths, path, *written] + [block_table] * (block_table is not None)
    if not all(map(is_tensor, given)):
        names = ["lengths", "path", *(f"slabs[{i}]" for i in range(len(written))), "block_table"]
        checks.tensors("compact", names[: len(given)], given)
    dispatch.call_compact(written, lengths, path, block_table)
