# SPDX-License-Identifier: Apache-2.0
"""`attention` and `compact` in CUDA, on the emulator: every variant of the kernels, and their cost.

What the ops mean is the subject of test_attention.py and test_compact.py, which run on CUDA, too.
To cover a new variant: the rows, sizes or dtype that choose it, in `VARIANTS`.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import simt
import torch
from trees import Problem, check, problem

import specens_kernels
from specens_kernels import compact, cuda, flat

pytestmark = [
    pytest.mark.skipif(flat.MODULE is None, reason=f"native: {flat.REASON}"),
    pytest.mark.skipif(simt.what_is_missing() != "", reason=f"simt: {simt.what_is_missing()}"),
]

# Head sizes, and heads times nodes of one key head.
VARIANTS = [
    *((64, rows) for rows in ((4, 4), (4, 8), (4, 16), (4, 32), (4, 33))),
    *((128, rows) for rows in ((4, 4), (4, 8), (4, 16), (4, 32))),
    (256, (2, 5)),
]


@pytest.fixture(autouse=True)
def emulator() -> Iterator[Any]:
    with simt.emulated() as module, specens_kernels.backend("cuda"):
        yield module
    for workspace in cuda._workspaces.values():
        tickets = workspace[: 4 * 65_535]
        assert not tickets.any(), "a partial result lies where tickets do"


def one_of(size: int, rows: tuple[int, int], **options: Any) -> Problem:
    heads, nodes = rows
    return problem(heads=(heads, 1), nodes=nodes, sizes=(size, size), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "rows"), VARIANTS)
def test_every_variant_is_attention_by_definition(
    size: int, rows: tuple[int, int], dtype: torch.dtype, emulator: Any
) -> None:
    check(one_of(size, rows, lengths=(290,), dtype=dtype))
    copied, conflicts = emulator.tiles()["attend_halves"]
    assert copied > 0
    assert conflicts == 0


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("rows", [(4, 2), (4, 9)])
def test_every_variant_for_float32(size: int, rows: tuple[int, int]) -> None:
    check(one_of(size, rows, lengths=(270,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_stages_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device whose blocks have 99 KiB of shared memory."""
    for size, rows in ((128, (4, 4)), (256, (2, 5))):
        one = one_of(size, rows, lengths=(200,), dtype=dtype, window=150)
        three = one.run()
        with monkeypatch.context() as patch:
            patch.setenv("SIMT_SHARED", "101376")
            two = one.run()
        assert all(torch.equal(a, b) for a, b in zip(three, two, strict=True))


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_order_of_blocks_does_not_show(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = one_of(64, (4, 8), lengths=(600,), dtype=torch.bfloat16)
    before = one.run()
    monkeypatch.setenv("SIMT_SEED", seed)
    monkeypatch.setenv("SIMT_WORKERS", "2")
    assert all(torch.equal(a, b) for a, b in zip(one.run(), before, strict=True))


def test_values_of_nan_spoil_who_sees_them_alone() -> None:
    """Keys that are finite: the log-sum-exp is, too."""
    for dtype in (torch.bfloat16, torch.float32):
        one = one_of(64, (4, 3), lengths=(70,), dtype=dtype)
        one = one._replace(parents=torch.tensor([[-1, 0, 0]]))
        right, right_lse = one.run()
        one.values[:, :, 71, 3] = math.nan  # of node 1
        one.values[:, :, 72, 3] = math.inf  # of node 2
        out, lse = one.run()
        assert torch.equal(lse, right_lse)
        assert torch.equal(out[:, 0], right[:, 0])
        assert out[:, 1:, :, 3].isnan().all()


@pytest.mark.parametrize("rows", [(4, 1), (4, 4), (4, 8), (4, 16)])
@pytest.mark.parametrize("window", [0, 300])
def test_two_launches_read_each_slot_once(
    rows: tuple[int, int], window: int, emulator: Any
) -> None:
    """Of a cache with room behind what is used, and of a window no more than it."""
    heads, nodes = rows
    one = one_of(64, rows, lengths=(1500,), room=2000, dtype=torch.bfloat16, window=window)
    emulator.reset_traffic()
    one.run()
    seen = emulator.traffic()
    launches = {name: each[0] for name, each in seen.items()}
    assert launches == {"attend_halves": 1, "join_splits": 1}
    packed = heads * nodes
    split = 256 if packed <= 32 else 512
    first = 1500 - window + 1 if window else 0
    splits = -(-(1500 + nodes) // split) - first // split
    query = splits * packed * 64 * 2
    floor = (1500 + nodes - first) * 2 * 64 * 2
    assert emulator.tiles()["attend_halves"][0] == floor + query
    assert query < 0.1 * floor or window
    assert seen["attend_halves"][2] == splits * packed * (64 + 2) * 4
    # A length comes to each lane at once, and a split's top and total to each of 16.
    parts = splits * packed * 64 * 4
    assert parts < seen["join_splits"][1] < parts + packed * (32 * 8 + splits * 50 * 4)


def test_one_launch_moves_each_row_once(emulator: Any) -> None:
    slabs = [torch.randn(30, 1, 3, 64, 64) for _ in range(2)]
    path = torch.tensor([[2, 3, 5, 9, 11]], dtype=torch.int32)
    emulator.reset_traffic()
    compact(slabs, torch.tensor([20]), path)
    launches, loaded, stored = emulator.traffic()["move_path"]
    rows = 2 * 30 * 3 * 5 * 64 * 4
    assert (launches, stored) == (1, rows)
    indices = 2 * 30 * 3 * 32 * (8 + 5 * 4)  # of every lane, which caches hold
    assert loaded <= rows + indices


def test_more_slabs_than_a_launch_takes(emulator: Any) -> None:
    slabs = [torch.randn(1, 2, 1, 9, 4) for _ in range(33)]
    before = [slab.clone() for slab in slabs]
    emulator.reset_traffic()
    compact(slabs, torch.tensor([1, 0]), torch.tensor([[3, -1], [2, 4]], dtype=torch.int32))
    assert emulator.traffic()["move_path"][0] == 2
    for slab, old in zip(slabs, before, strict=True):
        old[:, 0, :, 2] = old[:, 0, :, 4]
        old[:, 1, :, 1], old[:, 1, :, 2] = old[:, 1, :, 2].clone(), old[:, 1, :, 4].clone()
        assert torch.equal(slab, old)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"sizes": (257, 16)}, "keys: expected heads of at most 256, got 257"),
        ({"sizes": (16, 300)}, "values: expected heads of at most 256, got 300"),
        ({"dtype": torch.float64}, "expected bfloat16, float16 or float32, got torch.float64"),
    ],
)
def test_what_has_no_kernel_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(NotImplementedError, match=why):
        problem(**change).run()


def test_more_key_heads_than_a_grid_has_are_refused() -> None:
    one = problem(nodes=1, lengths=(0,), heads=(1, 1), sizes=(1, 1))
    many = {"query": one.query, "keys": one.keys, "values": one.values}
    many = {name: each.expand(65_536, -1, -1, -1) for name, each in many.items()}
    wide = one._replace(**many, lengths=one.lengths.expand(65_536))
    with pytest.raises(NotImplementedError, match="at most 65535 key heads of a batch, got 65536"):
        wide.run()


def test_a_workspace_that_is_too_small_is_refused(
    emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(
        cuda,
        "_launch",
        lambda function, _workspace, arguments, _device: function([*arguments, 0, 9, 0]),
    )
    with pytest.raises(RuntimeError, match="cuda: the workspace is too small"):
        problem().run()
