# SPDX-License-Identifier: Apache-2.0
"""Trees and caches of SGLang and FlashInfer: examples by hand, and there and back.

The links of `EXAMPLES` were written down from drawings; where a comment names SGLang, they are of
its own tests.
"""

import math

import pytest
import torch
from torch import Tensor
from trees import Problem, expected, paged, problem, random_parents

from specens_kernels import Refusal, layouts, tree

# parents: next_token, next_sibling
EXAMPLES = {
    (-1,): ([-1], [-1]),
    (-1, 0, 1): ([1, 2, -1], [-1, -1, -1]),
    (-1, 0, 0, 0): ([1, -1, -1, -1], [-1, 2, 3, -1]),
    # SGLang's test of greedy verification, first row.
    (-1, 0, 1, 0, 3, 4): ([1, 2, -1, 4, 5, -1], [-1, 3, -1, -1, -1, -1]),
    # 0 has 1 and 2, 1 has 3 and 4, 2 has 5; 6 is padding.
    (-1, 0, 0, 1, 1, 2, -1): ([1, 3, 5, -1, -1, -1, -1], [-1, 2, -1, 4, -1, -1, -1]),
}


@pytest.mark.parametrize("parents", EXAMPLES, ids=str)
def test_links_are_those_of_the_drawing(parents: tuple[int, ...]) -> None:
    linked = layouts.links(torch.tensor(parents))
    first, sibling = EXAMPLES[parents]
    assert linked.next_token.tolist() == [first]
    assert linked.next_sibling.tolist() == [sibling]
    assert linked.node_index.tolist() == [list(range(len(parents)))]
    assert layouts.parents_of_links(*linked[1:]).tolist() == [list(parents)]


@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 64, 65, 130])
def test_links_and_masks_lead_back_to_the_parents(nodes: int) -> None:
    torch.manual_seed(nodes)
    parents = random_parents(nodes, batch=3)
    linked = layouts.links(parents.int())
    assert torch.equal(layouts.parents_of_links(*linked[1:]), parents)
    assert torch.equal(linked.node_index[2], torch.arange(2 * nodes, 3 * nodes))
    assert torch.equal(layouts.parents_of_mask(tree.ancestors(parents)), parents)
    seen = layouts.seen_by_draft(layouts.draft_mask(parents), nodes)
    assert torch.equal(seen, tree.ancestors(parents))
    lengths = [0, 7, 3]
    full = layouts.full_mask(parents, lengths)
    assert full.shape == (nodes * (sum(lengths) + 3 * nodes),)
    assert torch.equal(layouts.seen_by_full(full, nodes, lengths), seen)
    if nodes <= 32:
        assert torch.equal(layouts.seen_by_bits(layouts.bit_mask(parents), nodes), seen)


def test_walking_the_links_tries_the_children_in_their_order() -> None:
    parents = random_parents(40)[0].tolist()
    linked = layouts.links(torch.tensor(parents))
    first, sibling = (each[0].tolist() for each in linked[1:])
    for node, children in enumerate(tree.children(parents)):
        walked, child = [], first[node]
        while child != -1:
            walked.append(child)
            child = sibling[child]
        assert walked == children


def drawn(text: str) -> list[bool]:
    return [bool(int(digit)) for digit in text]


def test_masks_are_those_of_the_drawing() -> None:
    """0 has 1 and 2, 2 has 3; two tokens of a prefix."""
    parents = torch.tensor([-1, 0, 0, 2])
    rows = ["1000", "1100", "1010", "1011"]
    assert layouts.draft_mask(parents).tolist() == drawn("".join(rows))
    full = layouts.full_mask(parents, [2])
    assert full.tolist() == drawn("".join(f"11{row}" for row in rows))
    bits = layouts.bit_mask(parents)
    assert (bits.dtype, bits.tolist()) == (torch.uint8, [0b0001, 0b0011, 0b0101, 0b1101])
    # 24 elements: three bytes, the first element the lowest bit.
    assert layouts.packed_mask(full, [24]).tolist() == [0b11000111, 0b01110011, 0b11011101]


def test_every_request_begins_a_byte() -> None:
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 0]).bool()
    packed = layouts.packed_mask(mask, [3, 4])
    assert packed.tolist() == [0b101, 0b0111]


@pytest.mark.parametrize(("nodes", "dtype"), [(9, torch.uint16), (17, torch.uint32)], ids=str)
def test_more_nodes_have_wider_bits(nodes: int, dtype: torch.dtype) -> None:
    bits = layouts.bit_mask(tree.chain(nodes - 1))
    assert bits.dtype == dtype
    assert bits.long().tolist() == [(2 << i) - 1 for i in range(nodes)]


def in_pages(one: Problem, page: int) -> tuple[Problem, Tensor, list[int]]:
    """The cache in pages, and of each request its table, as long as it has tokens, and tokens."""
    cut = paged(one, page)
    nodes = one.query.shape[2]
    totals = [int(length) + nodes for length in one.lengths]
    return cut, cut.options["block_table"], totals


def indptr(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("packed", [False, True])
def test_flashinfers_layout_gives_the_attention_of_the_tree(layout: str, packed: bool) -> None:
    torch.manual_seed(0)
    one = problem(batch=3, nodes=7, lengths=(33, 0, 64), sizes=(32, 32), scale=0.2)
    cut, table, totals = in_pages(one, 16)
    pages = [-(-total // 16) for total in totals]
    indices = torch.cat([row[:count] for row, count in zip(table, pages, strict=True)])
    last = torch.tensor([total - (n - 1) * 16 for total, n in zip(totals, pages, strict=True)])
    caches = (cut.keys, cut.values)
    if layout == "NHD":
        caches = tuple(cache.transpose(1, 2).contiguous() for cache in caches)
    mask = layouts.full_mask(one.parents, one.lengths.tolist())
    if packed:
        mask = layouts.packed_mask(mask, [7 * total for total in totals])
    plan = layouts.FlashInferPlan(indptr([7] * 3), indptr(pages), indices, last)
    query = one.query.transpose(1, 2).flatten(0, 1)
    out, lse = layouts.flashinfer_attention(query, caches, plan, mask, kv_layout=layout, scale=0.2)
    right, right_lse = expected(one)
    assert torch.allclose(out.view(right.shape).double(), right, atol=1e-5)
    in_base_2 = right_lse.transpose(1, 2).flatten(0, 1) / math.log(2)
    assert torch.allclose(lse.double(), in_base_2, atol=1e-5)


def test_sglangs_layout_gives_the_attention_of_the_tree() -> None:
    """Requests of one number of nodes, and of several, whose padding is cut off again."""
    torch.manual_seed(1)
    one = problem(batch=2, nodes=6, lengths=(21, 40), sizes=(32, 16))
    cut, table, totals = in_pages(one, 1)
    for counts in ([6, 6], [6, 2]):
        prefixes = [total - 6 for total in totals]
        new = [table[b, p : p + n] for b, (p, n) in enumerate(zip(prefixes, counts, strict=True))]
        old = [table[b, :p] for b, p in enumerate(prefixes)]
        batch = layouts.SGLangBatch(
            indptr(counts), indptr(prefixes), torch.cat(old).long(), torch.cat(new).long()
        )
        masks = []
        for b, (p, n) in enumerate(zip(prefixes, counts, strict=True)):
            seen = tree.ancestors(one.parents[b])[0, :n, :n]
            # Whatever the mask says of the prefix, it is seen.
            masks.append(torch.cat((torch.rand(n, p) < 0.5, seen), 1).flatten())
        query = torch.cat([one.query[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)])
        buffers = (cut.keys[:, :, 0], cut.values[:, :, 0])
        out = layouts.sglang_attention(query, *buffers, batch, torch.cat(masks))
        right = torch.cat([expected(one)[0][b, :n] for b, n in enumerate(counts)])
        assert torch.allclose(out.double(), right, atol=1e-5)


def test_a_mask_that_is_no_trees_is_refused() -> None:
    one = problem(nodes=2, lengths=(3,))
    cut, table, _ = in_pages(one, 5)
    mask = layouts.full_mask(one.parents, [3])
    mask[1] = False
    last = torch.tensor([5])
    plan = layouts.FlashInferPlan(indptr([2]), indptr([1]), table[0], last)
    query = one.query.transpose(1, 2).flatten(0, 1)
    caches = (cut.keys, cut.values)
    with pytest.raises(Refusal, match=r"^layouts: custom_mask: expected all of the prefix seen"):
        layouts.flashinfer_attention(query, caches, plan, mask, kv_layout="HND")
    with pytest.raises(Refusal, match=r"^layouts: kv_layout: expected one of NHD, HND, got 'NDH'"):
        layouts.flashinfer_attention(query, caches, plan, mask, kv_layout="NDH")
    with pytest.raises(Refusal, match=r"^layouts: mask: expected \(10,\) bool, got \(9,\) bool"):
        layouts.flashinfer_attention(query, caches, plan, mask[1:], kv_layout="HND")


@pytest.mark.parametrize(
    ("next_token", "next_sibling", "message"),
    [
        ([[0]], [[-1]], r"next_token: expected a higher node .*, got 0 of node 0"),
        ([[3, -1, -1]], [[-1] * 3], r"next_token: expected .*, got 3 of node 0"),
        # SGLang's test of greedy verification, second row: 4 is tried before 1.
        (
            [[4, 2, 3, -1, 5, -1]],
            [[-1, -1, -1, -1, 1, -1]],
            r"next_sibling: expected .*, got 1 of node 4",
        ),
        ([[1, 2, -1]], [[-1, 2, -1]], r"next_sibling: expected one link to a node, got several to"),
        ([[1, -1]], [[-1]], r"next_sibling: expected \(B, N\+1\) int64, got \(1, 1\) int64"),
    ],
)
def test_links_that_are_no_trees_are_refused(
    next_token: list[list[int]], next_sibling: list[list[int]], message: str
) -> None:
    with pytest.raises(Refusal, match=f"^layouts: {message}"):
        layouts.parents_of_links(torch.tensor(next_token), torch.tensor(next_sibling))


def test_what_has_no_such_form_is_refused() -> None:
    with pytest.raises(Refusal, match=r"^layouts: parents: expected at most 32 nodes"):
        layouts.bit_mask(tree.chain(32))
    with pytest.raises(Refusal, match=r"^layouts: seen: expected \(B, N\+1, N\+1\) bool"):
        layouts.parents_of_mask(torch.zeros(1, 2, 3).bool())
    with pytest.raises(Refusal, match=r"^layouts: mask: expected \(B \* 3 \* 3,\) bool"):
        layouts.seen_by_draft(torch.zeros(8).bool(), 3)
    with pytest.raises(Refusal, match=r"^layouts: mask: expected \(B \* 3,\) uint8, uint16"):
        layouts.seen_by_bits(torch.zeros(3), 3)
    batch = layouts.SGLangBatch(*(torch.tensor([0, -1]),) * 4)
    with pytest.raises(Refusal, match=r"^layouts: indptr: expected \(B\+1,\) ascending integers"):
        layouts.sglang_attention(*(torch.zeros(1, 1, 1),) * 3, batch, torch.zeros(1).bool())
