# SPDX-License-Identifier: Apache-2.0
"""Draft trees: from the parents of its nodes to all else that is asked of a tree.

Node 0 is the root, a node's parent is lower than the node, and -1 is the parent of a root: of node
0, and of a padding node, which sees itself alone. The functions of tensors run on any device and
read nothing on the host. What else is needed of a tree is one more function here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .refusal import Refusal

WORD = 64  # nodes in a word of `visible`


def chain(nodes: int, device: torch.device | None = None) -> Tensor:
    """(1, N+1) int64. The parents of N drafted nodes in a row, behind the root."""
    return torch.arange(-1, nodes, device=device)[None]


def children(parents: Sequence[int]) -> list[list[int]]:
    """The children of each node of one tree, in the order in which they are tried."""
    below: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if 0 <= parent < node:
            below[parent].append(node)
    return below


def ancestors(parents: Tensor) -> Tensor:
    """(B or 1, N+1, N+1) bool. Whether node i is node j or below it.

    Args:
        parents: (N+1,), (1, N+1) or (B, N+1) int32 or int64, as `verify` takes them.
    Raises:
        Refusal: the shape or the dtype is another one.
    """
    if parents.dim() not in (1, 2) or parents.dtype not in (torch.int32, torch.int64):
        expected = "(N+1,), (1, N+1) or (B, N+1) int32 or int64"
        raise Refusal("tree", "parents", expected, f"{tuple(parents.shape)} {parents.dtype}")
    if parents.dim() == 1:
        parents = parents[None]
    nodes = torch.arange(parents.shape[1], device=parents.device)
    # What is no lower node is no parent, and never an address.
    edges = (parents[:, :, None] == nodes) & (nodes < nodes[:, None])
    above = (edges | (nodes == nodes[:, None])).float()
    # Each product doubles the steps that are looked up the tree.
    for _ in range((parents.shape[1] - 1).bit_length()):
        above = (above @ above).clamp(max=1.0)
    return above > 0


def depths(parents: Tensor) -> Tensor:
    """(B or 1, N+1) int32. Steps from each node up to its root, of parents as for `ancestors`."""
    return (ancestors(parents).sum(-1) - 1).to(torch.int32)


def visible(parents: Tensor, window: int = 0) -> Tensor:
    """The nodes that each node sees, as the words that `attention` takes.

    Args:
        parents: (N+1,), (1, N+1) or (B, N+1) int32 or int64. Parent of each node.
        window: with a sliding window of so many positions, its own among them, a node sees its
            nearest window - 1 ancestors only; 0 is no window.
    Returns:
        (B or 1, N+1, W) int64, W = ceil((N+1) / 64). Bit j % 64 of word j // 64 of node i: i sees
        j.
    Raises:
        Refusal: a shape or a dtype disagrees, or the window is negative.
    """
    if window < 0:
        raise Refusal("tree", "window", "an integer >= 0", window)
    seen = ancestors(parents)
    if window > 0:
        steps = seen.sum(-1)
        seen = seen & (steps[:, :, None] - steps[:, None, :] < window)
    return words(seen)


def words(seen: Tensor) -> Tensor:
    """(B, N+1, W) int64 of (B, N+1, N+1) bool: whether node i sees node j, as `visible` says it."""
    batch, nodes, _ = seen.shape
    count = (nodes + WORD - 1) // WORD
    seen = torch.nn.functional.pad(seen, (0, count * WORD - nodes))
    bits = torch.tensor(1, device=seen.device) << torch.arange(WORD, device=seen.device)
    # Bits of one word are different ones: their sum is their union, the sign's bit included.
    union: Tensor = (seen.view(batch, nodes, count, WORD) * bits).sum(-1)
    return union
