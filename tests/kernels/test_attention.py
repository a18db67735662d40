# SPDX-License-Identifier: Apache-2.0
"""`attention` against float64 node by node: trees, windows, caps, sinks, pages, dtypes, poison.

A result may be twice as far from float64 as torch's own attention is, on the same inputs; what lies
in slots that nobody may see is NaN. Bits do not depend on the batch, the slot, the capacity or the
pages.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from trees import Problem, check, expected, paged, problem

from specens_kernels import Refusal, attention, tree

SHAPES: dict[str, dict[str, Any]] = {
    "plain decoding": {"nodes": 1},
    "two nodes of heads of their own": {"nodes": 2, "heads": (3, 3)},
    "ragged rows": {"batch": 3, "lengths": (70, 0, 131)},
    "nothing before the root": {"nodes": 16, "lengths": (0,)},
    "seven heads a group": {"nodes": 3, "heads": (14, 2), "sizes": (80, 80)},
    "one key head": {"nodes": 16, "heads": (8, 1), "sizes": (32, 32)},
    "a word of nodes less one": {"nodes": 63, "heads": (1, 1), "sizes": (96, 96)},
    "a word of nodes": {"nodes": 64, "heads": (1, 1), "lengths": (64,)},
    "a word of nodes and one, in two tiles": {"nodes": 65, "heads": (2, 1), "lengths": (63,)},
    "three words": {"nodes": 130, "heads": (1, 1), "sizes": (32, 32), "lengths": (70,)},
    "two splits": {"nodes": 2, "lengths": (600,), "sizes": (32, 32)},
    "a tail in two splits": {"nodes": 9, "lengths": (509,), "sizes": (32, 32)},
    "three splits and one slot": {"nodes": 1, "lengths": (1536,), "sizes": (32, 32)},
    "values of another size": {"sizes": (48, 32)},
    "larger values": {"sizes": (32, 72)},
    "sizes that no vector divides": {"sizes": (37, 19), "heads": (6, 2)},
    "large heads": {"sizes": (256, 256), "heads": (2, 1), "nodes": 4},
    "one number a head": {"sizes": (1, 1)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "a scale": {"scale": 0.37},
    "a cap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-2, 6, 4)},
    "a window": {"window": 40},
    "a window shorter than the tree": {"window": 3, "nodes": 40},
    "a window of one": {"window": 1},
    "a window longer than the text": {"window": 10_000},
    "a window at a tile's border": {"window": 36, "lengths": (100, 128, 63), "batch": 3},
    "all of them": {
        "window": 33,
        "softcap": 2.0,
        "sinks": torch.linspace(-2, 6, 4),
        "scale": 0.3,
        "batch": 2,
        "lengths": (300, 41),
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_attention_by_definition(backend: str, shape: dict[str, Any]) -> None:
    check(problem(room=37, **shape))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_does_what_it_says(backend: str, options: dict[str, Any]) -> None:
    check(problem(room=3, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("nodes", "sizes"), [(1, (64, 64)), (5, (37, 19)), (9, (64, 64)), (33, (32, 128))], ids=str
)
def test_half_precision(
    backend: str, dtype: torch.dtype, nodes: int, sizes: tuple[int, int]
) -> None:
    shape: dict[str, Any] = {"heads": (2, 1), "nodes": nodes, "sizes": sizes, "dtype": dtype}
    check(problem(batch=2, lengths=(100, 259), room=5, **shape))
    check(problem(window=20, sinks=torch.ones(2), **shape))


@pytest.mark.parametrize("first", range(0, 64, 16))
def test_a_tree_may_begin_anywhere_in_a_tile(backend: str, first: int) -> None:
    step = 9 if backend in ("triton", "cuda") else 1  # whose emulators take their time
    for length in range(64 + first, 64 + first + 16, step):
        check(problem(nodes=17, heads=(2, 1), sizes=(16, 16), lengths=(length,), room=64))


@pytest.mark.parametrize("page", [1, 16, 100])
def test_pages_change_nothing(backend: str, page: int) -> None:
    one = problem(batch=2, lengths=(300, 77), nodes=6, sizes=(32, 24), window=250)
    check(one, paged(one, page))
    for whole, part in zip(one.run(), paged(one, page).run(), strict=True):
        assert torch.equal(whole, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_any_batch_slot_and_capacity(backend: str, dtype: torch.dtype) -> None:
    one = problem(batch=3, lengths=(700, 3, 290), nodes=7, room=60, dtype=dtype, window=400)
    whole = one.run()
    for b in range(3):
        capacity = int(one.lengths[b]) + 7
        alone = Problem(
            one.query[b : b + 1],
            one.keys[b : b + 1, :, :capacity],
            one.values[b : b + 1, :, :capacity],
            one.lengths[b : b + 1],
            one.parents[b : b + 1],
            {**one.options, "depths": one.options["depths"][b : b + 1]},
        )
        for full, part in zip(whole, alone.run(), strict=True):
            assert torch.equal(full[b : b + 1], part)


def test_strides_are_followed(backend: str) -> None:
    """Of a query as models have it, and of caches whose capacity is larger than what is used."""
    one = problem(batch=2, lengths=(90, 40), nodes=4, room=9)
    wide = torch.full((3, 4, 200, 2, 100), math.nan)  # (.., B, S, K, E) with gaps
    for place, cache in ((0, one.keys), (1, one.values)):
        wide[place, 1:3, 5 : 5 + cache.shape[2], :, 3:67] = cache.transpose(1, 2)
    views = [wide[i, 1:3, 5 : 5 + one.keys.shape[2], :, 3:67].transpose(1, 2) for i in (0, 1)]
    strided = one._replace(query=one.query.contiguous(), keys=views[0], values=views[1])
    assert not any(view.is_contiguous() for view in views)
    for straight, other in zip(one.run(), strided.run(), strict=True):
        assert torch.equal(straight, other)


def test_one_tree_may_serve_all_rows(backend: str) -> None:
    one = problem(batch=3, nodes=6, lengths=(20, 80, 50), window=30)
    parents = one.parents[:1].expand(3, -1)
    depths = tree.depths(parents)
    every = one._replace(parents=parents, options={**one.options, "depths": depths}).run()
    shared = one._replace(parents=parents[:1], options={**one.options, "depths": depths[:1]}).run()
    for a, b in zip(every, shared, strict=True):
        assert torch.equal(a, b)


def test_a_hidden_node_of_nan_spoils_its_descendants_alone(backend: str) -> None:
    parents = torch.tensor([[-1, 0, 0, 1, 2]])
    one = problem(nodes=5, lengths=(61,))._replace(parents=parents)
    right = one.run()[0]
    one.keys[:, :, 62] = one.values[:, :, 62] = math.nan  # node 1
    out, lse = one.run()
    for node, spoiled in enumerate((False, True, False, True, False)):
        assert out[0, node].isnan().all() == lse[0, :, node].isnan().all() == spoiled
        if not spoiled:
            assert torch.equal(out[0, node], right[0, node])


def test_a_window_passes_over_nan(backend: str) -> None:
    one = problem(lengths=(200,), nodes=3, window=70)
    right = one.run()
    one.keys[:, :, :131] = one.values[:, :, :131] = math.nan
    for a, b in zip(one.run(), right, strict=True):
        assert torch.equal(a, b)


def test_bits_beyond_the_last_node_are_ignored(backend: str) -> None:
    one = problem(nodes=5, lengths=(62,), room=80)
    arguments = (one.query, one.keys, one.values, one.lengths)
    for a, b in zip(
        attention(*arguments, one.visible), attention(*arguments, one.visible | -32), strict=True
    ):
        assert torch.equal(a, b)


def test_a_node_that_sees_nothing_gets_0(backend: str) -> None:
    one = problem(nodes=3, lengths=(0,))
    visible = torch.tensor([[[1], [0], [5]]])
    arguments = (one.query, one.keys, one.values, one.lengths, visible)
    out, lse = attention(*arguments)
    assert (out[0, 1] == 0).all()
    assert (lse[0, :, 1] == -math.inf).all()
    assert lse[0, :, [0, 2]].isfinite().all()
    sinks = torch.full((4,), 0.25)
    out, lse = attention(*arguments, sinks=sinks)
    assert (out[0, 1] == 0).all()
    assert torch.equal(lse[0, :, 1], sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    one = problem(lengths=(150,), dtype=dtype)
    one.query.mul_(1000)
    out, lse = one.run()
    right, right_lse = expected(one)
    # Nearly one slot decides, or a few that float32 scores of about 1e4 tell apart to 1e-3.
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-6, atol=0)
    assert (out.double() - right).abs().max() < 0.05


def test_log_sum_exps_join_two_caches(backend: str) -> None:
    """What a cascade does: attention to a prefix, attention to the rest, and their mean."""
    one = problem(nodes=4, lengths=(180,))
    whole, whole_lse = one.run()
    first = [cache[:, :, :100] for cache in (one.keys, one.values)]
    none = torch.zeros(1, 1, 1, dtype=torch.int64).expand(1, 4, 1)
    # A tree whose nodes see nothing of each other lies behind the first part.
    padded = [torch.cat((cache, cache.new_zeros(1, 2, 4, 64)), 2) for cache in first]
    parts = [attention(one.query, *padded, torch.tensor([100]), none)]
    rest = [cache[:, :, 100:] for cache in (one.keys, one.values)]
    parts.append(attention(one.query, *rest, torch.tensor([80]), one.visible))
    lse = torch.stack([each for _, each in parts]).logsumexp(0)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)
    joined = sum(out * (each - lse).exp().mT[..., None] for out, each in parts)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)


def test_in_float64_it_is_exact() -> None:
    one = problem(batch=2, lengths=(50, 7), window=20, sinks=torch.ones(4), softcap=3.0)
    wide = one._replace(**{k: getattr(one, k).double() for k in ("query", "keys", "values")})
    out, lse = wide.run()
    right, right_lse = expected(wide)
    assert out.dtype == torch.float64
    assert (out - right).abs().max() < 1e-14
    assert (lse - right_lse).abs().max() < 1e-6


def test_nothing_is_written_to(backend: str) -> None:
    one = problem(batch=2, lengths=(30, 9), sinks=torch.ones(4), window=9)
    given = [*one[:5], *(x for x in one.options.values() if isinstance(x, Tensor))]
    before = [tensor.clone() for tensor in given]
    one.run()
    for tensor, copy in zip(given, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_without_rows(backend: str) -> None:
    out, lse = problem(batch=0).run()
    assert out.shape == (0, 5, 4, 64)
    assert lse.shape == (0, 4, 5)


def test_it_has_no_gradient(backend: str) -> None:
    one = problem()
    assert not any(x.requires_grad for x in one._replace(query=one.query.requires_grad_()).run())


@pytest.mark.slow
def test_it_compiles_without_a_graph_break_for_any_shape(backend: str) -> None:
    def run(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, parents: Tensor) -> Any:
        visible, depths = tree.visible(parents, 50), tree.depths(parents)
        out, lse = attention(query, keys, values, lengths, visible, window=50, depths=depths)
        return out + 0, lse

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, nodes in ((2, 5), (3, 9)):
        one = problem(batch=batch, nodes=nodes, lengths=(70, 31))
        for a, b in zip(compiled(*one[:5]), run(*one[:5]), strict=True):
            assert torch.equal(a, b)


ONE = torch.zeros(2, 8, 3, 16)  # of 3 nodes
CACHE = torch.zeros(2, 4, 30, 16)
LENGTHS, WORDS = torch.tensor([5, 6]), torch.ones(1, 3, 1, dtype=torch.int64)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": ONE[0]}, "query: expected (B, H, N+1, E) float, got (8, 3, 16) float32 on cpu"),
    ({"query": ONE[:, :, :0]}, "query: expected (B, H, N+1, E) float, got (2, 8, 0, 16)"),
    ({"query": ONE.int()}, "query: expected (B, H, N+1, E) float, got (2, 8, 3, 16) int32"),
    ({"query": ONE.mT.contiguous().mT}, "query: expected contiguous rows, got (2, 8, 3, 16)"),
    (
        {"keys": CACHE[:1]},
        "keys: expected (B=2, K, S, E=16) float32 on cpu, K a divisor of H=8, got (1, 4, 30, 16)",
    ),
    ({"keys": CACHE[:, :3]}, "keys: expected (B=2, K, S, E=16) float32 on cpu, K a divisor of H=8"),
    ({"keys": CACHE[..., :8]}, "keys: expected (B=2, K, S, E=16) float32 on cpu, K a divisor"),
    ({"keys": CACHE.bfloat16()}, "keys: expected (B=2, K, S, E=16) float32 on cpu, K a divisor"),
    ({"keys": CACHE.to("meta")}, "keys: expected (B=2, K, S, E=16) float32 on cpu, K a divisor"),
    ({"values": CACHE[:, :, 1:]}, "values: expected (2, 4, 30, F) float32 on cpu, got (2, 4, 29,"),
    ({"values": CACHE.mT.contiguous().mT}, "values: expected contiguous rows, got"),
    (
        {"keys": CACHE[:, :, :2], "values": CACHE[:, :, :2]},
        "keys: expected S >= N+1=3 slots, got (2, 4, 2, 16)",
    ),
    ({"lengths": LENGTHS.int()}, "lengths: expected (B=2,) int64 on cpu, got (2,) int32 on cpu"),
    ({"lengths": LENGTHS[:1]}, "lengths: expected (B=2,) int64 on cpu, got (1,) int64 on cpu"),
    (
        {"visible": WORDS.expand(1, 3, 2)},
        "visible: expected (B=2 or 1, N+1=3, W=1) int64 on cpu, got (1, 3, 2) int64 on cpu",
    ),
    ({"visible": WORDS.int()}, "visible: expected (B=2 or 1, N+1=3, W=1) int64 on cpu, got"),
    ({"window": -1}, "window: expected an integer >= 0, got -1"),
    ({"window": 4}, "depths: expected a tensor with a window, got None"),
    (
        {"window": 4, "depths": torch.zeros(1, 3).long()},
        "depths: expected (B=2 or 1, N+1=3) int32 on cpu, got (1, 3) int64 on cpu",
    ),
    ({"sinks": torch.zeros(4)}, "sinks: expected (H=8,) float32 on cpu, got (4,) float32 on cpu"),
    ({"softcap": -1.0}, "softcap: expected a finite number >= 0, got -1.0"),
    ({"softcap": math.nan}, "softcap: expected a finite number >= 0, got nan"),
    ({"scale": math.inf}, "scale: expected a finite number, got inf"),
    ({"block_table": TABLE[0]}, "block_table: expected (B=2, pages) int32 on cpu, got (3,) int32"),
    (
        {"block_table": TABLE.long()},
        "block_table: expected (B=2, pages) int32 on cpu, got (2, 3) int64 on cpu",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: x if type(x) is str else "")
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"query": ONE, "keys": CACHE, "values": CACHE, "lengths": LENGTHS, "visible": WORDS}
    with pytest.raises(Refusal) as refusal:
        attention(**(given | change))
    assert str(refusal.value).startswith(f"attention: {message}")


def test_what_passes_the_public_function_by_is_refused_too(backend: str) -> None:
    op = torch.ops.specens.attention.default
    rest = (None, None, None, 0.25, 0.0, 0)
    whole = (ONE, CACHE, CACHE, LENGTHS, WORDS)
    op(*whole, *rest)
    freed = CACHE.clone()
    freed.untyped_storage().resize_(64)
    for place, wrong, message in (
        (4, WORDS[:, :2], "visible: expected"),
        (1, CACHE[..., :8], "keys: expected"),
        (2, CACHE.mT.contiguous().mT, "values: expected contiguous rows"),
        (2, freed, "values: expected a dense tensor that holds its memory"),
    ):
        with pytest.raises(Refusal, match=f"^attention: {message}"):
            op(*whole[:place], wrong, *whole[place + 1 :], *rest)
    with pytest.raises(Refusal, match=r"^attention: window: expected an integer >= 0, got -3$"):
        op(*whole, *rest[:-1], -3)
    zeros = torch._efficientzerotensor(CACHE.shape)
    assert (op(ONE, zeros, zeros, LENGTHS, WORDS, *rest)[0] == 0).all()


@pytest.mark.parametrize("given", [None, [1.0], "x", 3], ids=str)
def test_other_types_are_refused(given: Any) -> None:
    whole = {"query": ONE, "keys": CACHE, "values": CACHE, "lengths": LENGTHS, "visible": WORDS}
    for name in whole:
        with pytest.raises(Refusal, match=f"^attention: {name}: expected a tensor, got"):
            attention(**(whole | {name: given}))
    for name in {"depths", "sinks", "block_table"} if given is not None else ():
        with pytest.raises(Refusal, match=f"^attention: {name}: expected a tensor, got"):
            attention(**whole, **{name: given})
    for name in {"softcap", "scale", "window"} if given not in (None, 3) else ():
        with pytest.raises(Refusal, match=f"^attention: {name}: expected a"):
            attention(**whole, **{name: given})


@pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
def test_on_a_cpu_lengths_and_pages_are_looked_at(backend: str) -> None:
    for lengths in ([5, 28], [-1, 5]):
        with pytest.raises(Refusal) as refusal:
            attention(ONE, CACHE, CACHE, torch.tensor(lengths), WORDS)
        assert str(refusal.value).startswith("attention: lengths: expected 0 to S - N - 1 = 27")
    attention(ONE, CACHE, CACHE, torch.tensor([27, 0]), WORDS)
    for page in (-1, 2):
        table = torch.tensor([[0, 1, page], [1, 0, 0]], dtype=torch.int32)
        attention(ONE, CACHE, CACHE, torch.tensor([57, 87]), WORDS, block_table=table)
        with pytest.raises(Refusal) as refusal:
            attention(ONE, CACHE, CACHE, torch.tensor([58, 87]), WORDS, block_table=table)
        assert str(refusal.value).startswith("attention: block_table: expected pages of [0, 2)")


def test_pages_that_a_window_has_left_are_not_looked_at(backend: str) -> None:
    one = problem(lengths=(200,), nodes=4, sizes=(32, 32), window=50)
    right, pages = one.run(), paged(one, 16)
    # Slots from 151 on are seen, and those of the tenth page.
    pages.options["block_table"][:, :9] = torch.tensor([-1, 10_000, -(2**31)] * 3)
    for a, b in zip(pages.run(), right, strict=True):
        assert torch.equal(a, b)
