# SPDX-License-Identifier: Apache-2.0
"""What `tree.py` makes of parents, against a walk up the tree."""

import pytest
import torch
from torch import Tensor

from specens_kernels import Refusal, tree


def random_parents(nodes: int, batch: int = 1) -> Tensor:
    """(B, nodes) int64; every fifth node but the first is padding."""
    below = (torch.rand(batch, nodes) * torch.arange(nodes)).long()
    below[:, 0] = -1
    return below.masked_fill(torch.arange(nodes) % 5 == 4, -1)


def walk(parents: list[int], node: int) -> list[int]:
    """The node and all above it."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


def bits(words: Tensor, nodes: int) -> Tensor:
    """(..., N+1, N+1) bool of (..., N+1, W) words."""
    unpacked = (words[..., None] >> torch.arange(64)) & 1
    return unpacked.flatten(-2)[..., :nodes].bool()


@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_words_and_depths_are_those_of_a_walk(nodes: int, dtype: torch.dtype) -> None:
    parents = random_parents(nodes, batch=3)
    seen = bits(tree.visible(parents.to(dtype)), nodes)
    depths = tree.depths(parents.to(dtype))
    assert (depths.dtype, depths.shape) == (torch.int32, (3, nodes))
    for b, row in enumerate(parents.tolist()):
        for i in range(nodes):
            path = walk(row, i)
            assert seen[b, i].nonzero().flatten().tolist() == sorted(path)
            assert depths[b, i] == len(path) - 1


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_a_window_hides_ancestors_further_away(window: int) -> None:
    parents = random_parents(70)
    seen = bits(tree.visible(parents, window), 70)[0]
    for i in range(70):
        path = walk(parents[0].tolist(), i)
        assert seen[i].nonzero().flatten().tolist() == sorted(path[:window])


def test_a_chain_sees_all_before_it() -> None:
    parents = tree.chain(66)
    assert torch.equal(tree.depths(parents), torch.arange(67, dtype=torch.int32)[None])
    assert torch.equal(bits(tree.visible(parents), 67)[0], torch.ones(67, 67).tril().bool())
    assert tree.visible(tree.chain(2)).flatten().tolist() == [0b1, 0b11, 0b111]
    assert tree.visible(tree.chain(0)).tolist() == [[[1]]]


def test_one_row_may_be_given_alone() -> None:
    parents = torch.tensor([-1, 0, 0])
    assert torch.equal(tree.visible(parents), tree.visible(parents[None]))
    assert torch.equal(tree.depths(parents), torch.tensor([[0, 1, 1]], dtype=torch.int32))


def test_children_stand_in_the_order_in_which_they_are_tried() -> None:
    assert tree.children([-1, 0, 0, 1, 0, -1]) == [[1, 2, 4], [3], [], [], [], []]
    assert tree.children([-1]) == [[]]


def test_what_is_no_lower_node_is_no_parent() -> None:
    odd = torch.tensor([5, 1, 9, -3, 2**31 - 1])
    assert torch.equal(bits(tree.visible(odd), 5)[0], torch.eye(5).bool())
    assert tree.children(odd.tolist()) == [[], [], [], [], []]


def test_it_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(tree.visible, fullgraph=True, backend="aot_eager")
    parents = random_parents(9, batch=2)
    assert torch.equal(compiled(parents), tree.visible(parents))


@pytest.mark.parametrize(
    ("parents", "window", "message"),
    [
        (
            torch.zeros(2, 3, 1).long(),
            0,
            r"^tree: parents: expected \(N\+1,\), .*, got \(2, 3, 1\)",
        ),
        (
            torch.zeros(3),
            0,
            r"^tree: parents: expected .* int32 or int64, got \(3,\) torch.float32",
        ),
        (torch.tensor([-1]), -1, r"^tree: window: expected an integer >= 0, got -1$"),
    ],
)
def test_what_is_refused(parents: Tensor, window: int, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        tree.visible(parents, window)
