# SPDX-License-Identifier: Apache-2.0
"""`compact` against a gather: random and adversarial paths, pages, dtypes, strides, neighbours."""

from typing import Any

import pytest
import torch
from slabs import DTYPES, moved, random_compaction, same, slab, table
from torch import Tensor

from specens_kernels import Refusal, compact

PATHS = {
    "nothing": [[-1, -1, -1]],
    "all in place": [[1, 2, 3]],
    "every other": [[2, 4, 6, 8, 10]],
    "one step": [[2, 3, 4, 5, 6, 7, 8, 9]],
    "far": [[10, 11, 12]],
    "ragged": [[2, 3, -1], [-1, -1, -1], [1, 4, 9]],
    "what follows an end is nothing": [[3, -1, 5], [-1, 7, 8], [1, 5, -1]],
    "no columns": [[], []],
    "no rows": [],
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_path_is_moved_and_all_else_stays(backend: str, path: list[list[int]]) -> None:
    nodes, lengths = table(path), torch.randint(20, (len(path),))
    slabs = [slab(3, len(path), 2, 40, 8), slab(2, len(path), 1, 33, 5)]
    before = [each.clone() for each in slabs]
    compact(slabs, lengths, nodes)
    for after, each in zip(slabs, before, strict=True):
        assert same(after, moved(each, lengths, nodes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 8, 64, 80])
def test_every_type_and_size(backend: str, dtype: torch.dtype, size: int) -> None:
    one, lengths = slab(2, 2, 3, 30, size, dtype=dtype), torch.tensor([4, 0])
    before, path = one.clone(), table([[2, 5], [7, 8]])
    compact([one], lengths, path)
    assert same(one, moved(before, lengths, path))


def test_random_paths(backend: str) -> None:
    for seed in range(20):
        one = random_compaction(seed)
        compact(*one[:3], block_table=one.block_table)
        assert all(map(same, one.slabs, one.expected)), seed


def test_many_layers_and_rows(backend: str) -> None:
    one, lengths = slab(6, 5, 4, 64, 64), torch.randint(0, 40, (5,))
    path = table([[3, 5, 9, 14, 20]] * 5)
    before = one.clone()
    compact([one], lengths, path)
    assert same(one, moved(before, lengths, path))


def test_strides_are_followed_and_gaps_stay(backend: str) -> None:
    whole = slab(4, 3, 60, 2, 24)  # (L, B, S, K, E) with gaps
    view = whole[1:, :2, 5:45].transpose(2, 3)[..., 3:19]
    before, part = whole.clone(), view.clone()
    lengths, path = torch.tensor([9, 2]), table([[4, 6, 7], [2, -1, -1]])
    compact([view], lengths, path)
    assert same(view, moved(part, lengths, path))
    before[1:, :2, 5:45].transpose(2, 3)[..., 3:19] = view
    assert same(whole, before)


@pytest.mark.parametrize("page", [1, 8, 16])
def test_pages(backend: str, page: int) -> None:
    batch, pages = 2, -(-48 // page)
    order = torch.randperm(batch * pages + 2)[: batch * pages].view(batch, pages).int()
    straight = slab(2, batch, 3, pages * page, 8)
    pool = slab(2, batch * pages + 2, 3, page, 8)
    pool[:, order.long()] = straight.unflatten(3, (pages, page)).transpose(2, 3)
    lengths, path = torch.tensor([13, 30]), table([[2, 9, 12], [4, 5, -1]])
    # A page that is not needed is not looked at.
    order_with_rest = torch.cat((order, torch.full((batch, 1), -7, dtype=torch.int32)), 1)
    expected = pool.clone()
    right = moved(straight, lengths, path).unflatten(3, (pages, page)).transpose(2, 3)
    expected[:, order.long()] = right
    compact([pool], lengths, path, block_table=order_with_rest)
    assert same(pool, expected)


def test_who_saved_a_slab_for_its_gradient_is_told(backend: str) -> None:
    one = torch.randn(1, 1, 1, 8, 4)
    before = one._version
    compact([one], torch.tensor([0]), table([[2]]))
    assert one._version > before


def test_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        one = torch.randn(1, 1, 1, 8, 4)
        before = one.clone()
        compact([one], torch.tensor([0]), table([[2]]))
        assert same(one, moved(before, torch.tensor([0]), table([[2]])))


@pytest.mark.slow
def test_it_compiles_without_a_graph_break(backend: str) -> None:
    def run(one: Tensor, other: Tensor, lengths: Tensor, path: Tensor) -> Tensor:
        compact([one, other], lengths, path)
        return one + 1

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for depth in (2, 3):
        slabs = [torch.randn(2, 2, 1, 20, 4), torch.randn(1, 2, 3, 20, 4)]
        before = [each.clone() for each in slabs]
        lengths, path = torch.tensor([3, 5]), table([[2, 5, 6][:depth]] * 2)
        result = compiled(*slabs, lengths, path)
        for after, each in zip(slabs, before, strict=True):
            assert same(after, moved(each, lengths, path))
        assert torch.equal(result, slabs[0] + 1)


SLAB, LENGTHS, PATH = torch.zeros(2, 2, 1, 10, 4), torch.tensor([1, 2]), table([[2, 3], [1, -1]])
PAGES = torch.zeros(2, 3, dtype=torch.int32)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"slabs": []}, "slabs: expected one tensor or more, got none"),
    ({"slabs": SLAB}, "slabs: expected a list of tensors, got a Tensor"),
    ({"slabs": [SLAB, None]}, "slabs[1]: expected a tensor, got None"),
    ({"path": None}, "path: expected a tensor, got None"),
    ({"block_table": 3}, "block_table: expected a tensor, got 3"),
    (
        {"slabs": [SLAB, SLAB[0]]},
        "slabs[1]: expected (L, B=2, K, S, E) on cpu, got (2, 1, 10, 4) float32 on cpu",
    ),
    ({"slabs": [SLAB[:, :1]]}, "slabs[0]: expected (L, B=2, K, S, E) on cpu, got (2, 1, 1, 10, 4)"),
    ({"slabs": [SLAB.to("meta")]}, "slabs[0]: expected (L, B=2, K, S, E) on cpu, got"),
    ({"slabs": [SLAB.mT.contiguous().mT]}, "slabs[0]: expected contiguous rows, got"),
    (
        {"slabs": [SLAB[:1].expand(2, -1, -1, -1, -1)]},
        "slabs[0]: expected memory of its own for each element, got",
    ),
    ({"lengths": LENGTHS.int()}, "lengths: expected (B=2,) int64 on cpu, got (2,) int32 on cpu"),
    ({"path": PATH.long()}, "path: expected (B, D) int32 on cpu, got (2, 2) int64 on cpu"),
    ({"path": PATH[0]}, "path: expected (B, D) int32 on cpu, got (2,) int32 on cpu"),
    (
        {"block_table": PAGES.long()},
        "block_table: expected (B=2, pages) int32 on cpu, got (2, 3) int64 on cpu",
    ),
    (
        {"slabs": [SLAB, SLAB[:, :1]], "block_table": PAGES},
        "slabs[1]: expected (L, P, K, page, E) on cpu, P and page as in slabs[0], got (2, 1, 1,",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: x if type(x) is str else "")
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"slabs": [SLAB], "lengths": LENGTHS, "path": PATH} | change
    with pytest.raises(Refusal) as refusal:
        compact(**given)
    assert str(refusal.value).startswith(f"compact: {message}")


def test_what_passes_the_public_function_by_is_refused_too(backend: str) -> None:
    op = torch.ops.specens.compact.default
    op([SLAB.clone()], LENGTHS, PATH, None)
    freed = SLAB.clone()
    freed.untyped_storage().resize_(64)
    with pytest.raises(Refusal, match=r"^compact: slabs\[1\]: expected a dense tensor that holds"):
        op([SLAB.clone(), freed], LENGTHS, PATH, None)
    with pytest.raises(Refusal, match=r"^compact: path: expected \(B, D\) int32"):
        op([SLAB.clone()], LENGTHS, PATH.long(), None)
    zeros = torch._efficientzerotensor(SLAB.shape)
    with pytest.raises(Refusal, match=r"^compact: slabs: expected tensors that can be written to"):
        op([zeros], LENGTHS, PATH, None)


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
@pytest.mark.parametrize(
    ("lengths", "path", "message"),
    [
        ([0], [[2, 2]], "path: expected nodes that ascend from 1, then -1, got 2 at 1, after 2"),
        ([0], [[3, 2]], "path: expected nodes that ascend from 1, then -1, got 2 at 1, after 3"),
        ([0], [[0, 2]], "path: expected nodes that ascend from 1, then -1, got 0 at 0, after 0"),
        (
            [5],
            [[2, 5]],
            "lengths: expected slots of 0 to S = 10 for the nodes of a path, got 5 and",
        ),
        (
            [-1],
            [[-1, -1]],
            "lengths: expected slots of 0 to S = 10 for the nodes of a path, got -1",
        ),
    ],
)
def test_on_a_cpu_paths_are_looked_at(
    backend: str, lengths: list[int], path: list[list[int]], message: str
) -> None:
    one = slab(1, 1, 1, 10, 4)
    before = one.clone()
    with pytest.raises(Refusal) as refusal:
        compact([one], torch.tensor(lengths), table(path))
    assert str(refusal.value).startswith(f"compact: {message}")
    assert same(one, before)


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
def test_on_a_cpu_pages_are_looked_at(backend: str) -> None:
    pages = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    one = slab(1, 2, 1, 10, 4)
    compact([one], torch.tensor([10]), table([[4, 9]]), block_table=pages)
    with pytest.raises(Refusal) as refusal:
        compact([one], torch.tensor([10]), table([[4, 10]]), block_table=pages)
    assert str(refusal.value).startswith("compact: block_table: expected pages of [0, 2)")
