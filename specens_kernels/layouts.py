# SPDX-License-Identifier: Apache-2.0
"""Draft trees and caches as SGLang and FlashInfer lay them out, for engines that have them so.

A tree here is the parents of its nodes (`tree.py`); there it is a mask, or links to the first child
and to the next sibling. Conversions of trees are tensor code for any device. The two adaptors of
`attention` plan on the host, as FlashInfer's `plan` does, so that no graph may hold them; an engine
of its own calls `attention` itself. Another engine's layout is one more function here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import tree
from .ops import attention
from .refusal import Refusal, shown
from .storage import wrong

# SGLang's QLEN_ONLY_BITPACKING: the type of a node's bits, by how many nodes it has room for.
_BITS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


class Links(NamedTuple):
    """A tree as SGLang's kernels walk it; -1 is none. There they begin with `retrive_`, its way.

    node_index: (B, N+1) int64. Row of each node among all rows of the batch: b * (N+1) + i.
    next_token: (B, N+1) int64. A node's first child.
    next_sibling: (B, N+1) int64. The child of the same parent that is tried after a node.
    """

    node_index: Tensor
    next_token: Tensor
    next_sibling: Tensor


def links(parents: Tensor) -> Links:
    """SGLang's links of trees; nobody links to a padding node.

    Args:
        parents: (N+1,), (1, N+1) or (B, N+1) int32 or int64. Parent of each node.

    Source: SGLang's build_tree_efficient.
    """
    seen = tree.ancestors(parents)  # checks shape and dtype
    parents = parents.reshape(seen.shape[:2])
    batch, count, _ = seen.shape
    nodes = torch.arange(count, device=parents.device)
    later = nodes > nodes[:, None]
    is_child = (parents[:, None, :] == nodes[:, None]) & later  # (B, parent, child)
    has_parent = ((parents >= 0) & (parents < nodes))[:, :, None]
    is_sibling = (parents[:, :, None] == parents[:, None, :]) & later & has_parent
    index = torch.arange(batch * count, device=parents.device).view(batch, count)
    return Links(index, _first(is_child), _first(is_sibling))


def _first(chosen: Tensor) -> Tensor:
    """The first of the last dimension that is chosen, or -1."""
    count = chosen.shape[-1]
    nodes = torch.arange(count, device=chosen.device)
    first = torch.where(chosen, nodes, count).amin(-1)
    return torch.where(first < count, first, -1)


def parents_of_links(next_token: Tensor, next_sibling: Tensor) -> Tensor:
    """The parents of trees that SGLang has linked.

    Args:
        next_token: (B, N+1) int64. A node's first child, higher than the node; -1 is none.
        next_sibling: (B, N+1) int64. The next child of a node's parent, higher than the node; -1 is
            none. `verify` tries siblings in this order, which is that of their numbers.
    Returns:
        (B, N+1) int64. -1 for node 0, and for a node that nobody links to: it is padding.
    Raises:
        Refusal: a shape or dtype disagrees; on a CPU, a link to no higher node, or two to one.
    """
    both = {"next_token": next_token, "next_sibling": next_sibling}
    for name, given in both.items():
        if given.dim() != 2 or given.shape != next_token.shape or given.dtype != torch.int64:
            raise wrong("layouts", name, "(B, N+1) int64", given)
    count, device = next_token.shape[1], next_token.device
    nodes = torch.arange(count, device=device)
    _check_links(both, nodes)
    parent, before = (_reversed(given, nodes) for given in both.values())
    # From each node to the first of its siblings: the one that its parent links to.
    first = torch.where(before >= 0, before, nodes)
    for _ in range((count - 1).bit_length()):
        first = first.gather(1, first)
    return parent.gather(1, first)


def _check_links(both: dict[str, Tensor], nodes: Tensor) -> None:
    if nodes.device.type != "cpu":
        return
    for name, given in both.items():
        wanted = (given == -1) | ((given > nodes) & (given < len(nodes)))
        if not wanted.all():
            node = int((~wanted).nonzero()[0, 1])
            fault = f"{int(given[~wanted][0])} of node {node}"
            raise Refusal("layouts", name, "a higher node than the node itself, or -1", fault)
    every = torch.cat(list(both.values()), 1)
    times = torch.zeros(len(every), len(nodes) + 1, dtype=torch.int64)
    times.scatter_add_(1, torch.where(every >= 0, every, len(nodes)), torch.ones_like(every))
    if (times[:, :-1] > 1).any():
        node = int((times[:, :-1] > 1).nonzero()[0, 1])
        raise Refusal("layouts", "next_sibling", "one link to a node", f"several to node {node}")


def _reversed(linked: Tensor, nodes: Tensor) -> Tensor:
    """Of each node, the one that links to it, or -1."""
    count = len(nodes)
    # What is no node goes to a column of its own.
    to = torch.where((linked > nodes) & (linked < count), linked, count)
    back = linked.new_full((len(linked), count + 1), -1)
    return back.scatter(1, to, nodes.expand_as(linked))[:, :count]


def parents_of_mask(seen: Tensor) -> Tensor:
    """(B, N+1) int64. The parents of trees of which (B, N+1, N+1) bool says who sees whom.

    A node's parent is the highest of the lower nodes that it sees, as in SGLang's
    reconstruct_indices_from_tree_mask; a node that sees no lower node has none.
    """
    if seen.dim() != 3 or seen.shape[1] != seen.shape[2] or seen.dtype != torch.bool:
        raise wrong("layouts", "seen", "(B, N+1, N+1) bool", seen)
    nodes = torch.arange(seen.shape[1], device=seen.device)
    return torch.where(seen & (nodes < nodes[:, None]), nodes, -1).amax(-1)


def draft_mask(parents: Tensor) -> Tensor:
    """(B * (N+1) * (N+1),) bool. SGLang's tree_mask of mode QLEN_ONLY: nodes alone."""
    return tree.ancestors(parents).flatten()


def full_mask(parents: Tensor, lengths: Sequence[int]) -> Tensor:
    """SGLang's tree_mask of mode FULL_MASK, which is FlashInfer's custom_mask, too.

    Args:
        parents: (N+1,), (1, N+1) or (B, N+1) int32 or int64. Parent of each node.
        lengths: B ints. Tokens before the root of each row.
    Returns:
        (sum over b of (N+1) * (lengths[b] + N+1),) bool. Row by row, node by node: the prefix, all
        of which is seen, and the nodes.
    """
    seen = tree.ancestors(parents)
    seen = seen.expand(len(lengths), -1, -1)
    rows = zip(seen, lengths, strict=True)
    return torch.cat([pad(row, (length, 0), value=True).flatten() for row, length in rows])


def bit_mask(parents: Tensor) -> Tensor:
    """SGLang's tree_mask of mode QLEN_ONLY_BITPACKING.

    Returns:
        (B * (N+1),) uint8, uint16 or uint32, for up to 8, 16 or 32 nodes. Bit j of node i says
            whether i sees j.
    Raises:
        Refusal: more than 32 nodes.
    """
    words = tree.visible(parents)
    nodes = words.shape[1]
    dtype = next((dtype for room, dtype in _BITS.items() if nodes <= room), None)
    if dtype is None:
        raise Refusal("layouts", "parents", "at most 32 nodes, the root counted", nodes)
    return words.flatten().to(dtype)


def seen_by_draft(mask: Tensor, nodes: int) -> Tensor:
    """(B, N+1, N+1) bool of a mask of mode QLEN_ONLY, (B * (N+1) * (N+1),) bool."""
    if mask.dim() != 1 or mask.dtype != torch.bool or mask.numel() % (nodes * nodes) != 0:
        raise wrong("layouts", "mask", f"(B * {nodes} * {nodes},) bool", mask)
    return mask.view(-1, nodes, nodes)


def seen_by_full(mask: Tensor, nodes: int, lengths: Sequence[int]) -> Tensor:
    """(B, N+1, N+1) bool of a mask of mode FULL_MASK; what it says of the prefix is not looked at.

    Args:
        mask: as `full_mask` makes it.
        nodes: N+1.
        lengths: B ints. Tokens before the root of each row.
    """
    parts = _parts(mask, [(nodes, length + nodes) for length in lengths])
    return torch.stack([part[:, -nodes:] for part in parts])


def seen_by_bits(mask: Tensor, nodes: int) -> Tensor:
    """(B, N+1, N+1) bool of a mask of mode QLEN_ONLY_BITPACKING."""
    if mask.dim() != 1 or mask.dtype not in _BITS.values() or mask.numel() % nodes != 0:
        raise wrong("layouts", "mask", f"(B * {nodes},) uint8, uint16 or uint32", mask)
    words = mask.to(torch.int64).view(-1, nodes, 1)
    return (words >> torch.arange(nodes, device=mask.device)) & 1 == 1


def packed_mask(mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """FlashInfer's packed_custom_mask of a custom_mask.

    Args:
        mask: (sum of sizes,) bool.
        sizes: elements of each request: queries * (keys and values).
    Returns:
        (sum over b of ceil(sizes[b] / 8),) uint8. Every request begins a byte; the lowest bit is
        the first element.

    Source: FlashInfer's segment_packbits with bitorder "little".
    """
    parts = _parts(mask, [(1, size) for size in sizes])
    return torch.cat([_bytes_of(part[0]) for part in parts])


def _bytes_of(elements: Tensor) -> Tensor:
    padded = pad(elements, (0, -len(elements) % 8)).view(-1, 8)
    shifts = torch.arange(8, device=elements.device)
    return (padded.to(torch.int64) << shifts).sum(-1).to(torch.uint8)


def _unpacked(packed: Tensor, sizes: Sequence[int]) -> Tensor:
    """The way back from `packed_mask`."""
    bits = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1 == 1
    parts = torch.split(bits, [math.ceil(size / 8) for size in sizes])
    return torch.cat([part.flatten()[:size] for part, size in zip(parts, sizes, strict=True)])


def _parts(mask: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The matrices of which a flat mask is made."""
    sizes = [rows * columns for rows, columns in shapes]
    if mask.dim() != 1 or mask.dtype != torch.bool or mask.numel() != sum(sizes):
        raise wrong("layouts", "mask", f"({sum(sizes)},) bool", mask)
    return [part.view(shape) for part, shape in zip(torch.split(mask, sizes), shapes, strict=True)]


class FlashInferPlan(NamedTuple):
    """Where FlashInfer's BatchPrefillWithPagedKVCacheWrapper finds the requests of a batch.

    qo_indptr: (B+1,) int32. Rows of the query of request b: qo_indptr[b] to qo_indptr[b + 1] - 1.
    paged_kv_indptr: (B+1,) int32. The same of its pages in `paged_kv_indices`.
    paged_kv_indices: (pages,) int32. Pages in the cache.
    paged_kv_last_page_len: (B,) int32. Tokens in a request's last page, its new ones among them.
    """

    qo_indptr: Tensor
    paged_kv_indptr: Tensor
    paged_kv_indices: Tensor
    paged_kv_last_page_len: Tensor


def flashinfer_attention(
    query: Tensor,
    paged_kv_cache: tuple[Tensor, Tensor],
    plan: FlashInferPlan,
    custom_mask: Tensor,
    *,
    kv_layout: str = "NHD",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`attention` as FlashInfer lays out a batch prefill over pages with a custom mask.

    Args:
        query: (rows, H, E). The new tokens of all requests, which lie last in their caches.
        paged_kv_cache: keys and values, (P, page, K, E) "NHD" or (P, K, page, E) "HND".
        plan: where things are.
        custom_mask: (sum over b of queries * keys,) bool, or `packed_mask` of it, uint8. Every
            token sees all of the prefix: what does not is no draft tree, and refused.
        kv_layout: "NHD" or "HND".
        options: scale, softcap and sinks, as for `attention`.
    Returns:
        out: (rows, H, F).
        lse: (rows, H) float32, of base 2.
    Raises:
        Refusal: as `attention`; a mask that hides tokens of a prefix.

    Source: https://docs.flashinfer.ai/api/prefill.html.
    """
    if kv_layout not in ("NHD", "HND"):
        raise Refusal.unknown("layouts", "kv_layout", kv_layout, ("NHD", "HND"))
    caches = [cache.transpose(1, 2) if kv_layout == "NHD" else cache for cache in paged_kv_cache]
    page = caches[0].shape[2]
    tables = torch.split(plan.paged_kv_indices, _differences(plan.paged_kv_indptr))
    counts = _differences(plan.qo_indptr)
    totals = [
        (len(table) - 1) * page + last
        for table, last in zip(tables, plan.paged_kv_last_page_len.tolist(), strict=True)
    ]
    shapes = list(zip(counts, totals, strict=True))
    if custom_mask.dtype == torch.uint8:
        custom_mask = _unpacked(custom_mask, [rows * columns for rows, columns in shapes])
    parts = _parts(custom_mask, shapes)
    for part, (rows, columns) in zip(parts, shapes, strict=True):
        if not part[:, : columns - rows].all():
            raise Refusal("layouts", "custom_mask", "all of the prefix seen", "a hidden token")
    out, lse = _attended(query, caches, tables, parts, **options)
    return out, lse / math.log(2)


class SGLangBatch(NamedTuple):
    """Where SGLang's extend attention finds the requests of a batch.

    qo_indptr: (B+1,). Rows of the query of request b: qo_indptr[b] to qo_indptr[b + 1] - 1.
    kv_indptr: (B+1,). The same of its prefix in `kv_indices`.
    kv_indices: (tokens,). Places of the prefix in the buffers: pages of one token.
    out_cache_loc: (rows,). Places of the new tokens, which SGLang writes before it attends.
    """

    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    out_cache_loc: Tensor


def sglang_attention(
    query: Tensor,
    key_buffer: Tensor,
    value_buffer: Tensor,
    batch: SGLangBatch,
    custom_mask: Tensor,
    **options: Any,
) -> Tensor:
    """`attention` as SGLang lays out an extension of cached prefixes by draft trees.

    Args:
        query: (rows, H, E). The new tokens of all requests.
        key_buffer: (tokens, K, E). The cache, which holds the new tokens, too.
        value_buffer: (tokens, K, F).
        batch: where things are.
        custom_mask: (sum over b of queries * (prefix + queries),) bool, of mode FULL_MASK. Of the
            prefix it is not looked at, as with SGLang's skip_prefix_custom_mask.
        options: scale, softcap and sinks, as for `attention`.
    Returns:
        (rows, H, F).
    Raises:
        Refusal: as `attention`.

    Source: SGLang's extend_attention_fwd.
    """
    prefixes = torch.split(batch.kv_indices, _differences(batch.kv_indptr))
    counts = _differences(batch.qo_indptr)
    tables = [
        torch.cat((prefix, new.to(prefix.dtype)))
        for prefix, new in zip(prefixes, torch.split(batch.out_cache_loc, counts), strict=True)
    ]
    shapes = [(count, len(table)) for count, table in zip(counts, tables, strict=True)]
    caches = [key_buffer[:, :, None], value_buffer[:, :, None]]
    return _attended(query, caches, tables, _parts(custom_mask, shapes), **options)[0]


def _attended(
    query: Tensor,
    caches: Sequence[Tensor],
    tables: Sequence[Tensor],
    parts: Sequence[Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Requests of other numbers of new tokens as rows of one batch, padded; and back."""
    device, page = query.device, caches[0].shape[2]
    counts, totals = ([part.shape[side] for part in parts] for side in (0, 1))
    nodes = max(counts)
    # Padding nodes have slots, too.
    pages = max(-(-(t - n + nodes) // page) for n, t in zip(counts, totals, strict=True))
    pages = max(pages, *(len(table) for table in tables))
    table = torch.stack([pad(each.int(), (0, pages - len(each))) for each in tables])
    seen = torch.eye(nodes, dtype=torch.bool, device=device).repeat(len(parts), 1, 1)
    rows = query.new_zeros((len(parts), nodes, *query.shape[1:]))
    for b, (part, own) in enumerate(zip(parts, torch.split(query, counts), strict=True)):
        n = len(part)
        seen[b, :n, :n] = part[:, -n:]
        rows[b, :n] = own
    lengths = torch.tensor([t - n for n, t in zip(counts, totals, strict=True)], device=device)
    arguments = (rows.transpose(1, 2), *caches, lengths, tree.words(seen))
    out, lse = attention(*arguments, block_table=table, **options)
    kept = torch.cat([out[b, :n] for b, n in enumerate(counts)])
    return kept, torch.cat([lse[b, :, :n].T for b, n in enumerate(counts)])


def _differences(indptr: Tensor) -> list[int]:
    if indptr.dim() != 1 or len(indptr) < 2 or (indptr.diff() < 0).any():
        raise Refusal("layouts", "indptr", "(B+1,) ascending integers", shown(indptr.tolist()))
    return [int(each) for each in indptr.diff().tolist()]
