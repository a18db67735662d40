# SPDX-License-Identifier: Apache-2.0
"""`Layers` gives what `attention` gives, and refuses what it refuses, whatever came before.

A kind of layer is remembered once it has passed: each test plays one first, so that what is
remembered must not hide what is wrong with the next.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from slabs import same
from torch import Tensor
from trees import Problem, problem, random_problem

from specens_kernels import Refusal, attention, backend, layers, native, tree
from specens_kernels.layers import Layers

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=native.REASON)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    layers._kinds.clear()
    yield
    layers._kinds.clear()


def layers_of(one: Problem) -> Layers:
    options = one.options
    return Layers(one.lengths, one.visible, options.get("depths"), options.get("block_table"))


def run(one: Problem, forward: Layers | None = None) -> Tensor:
    options = {k: v for k, v in one.options.items() if k not in ("depths", "block_table")}
    options.setdefault("scale", one.query.shape[-1] ** -0.5)
    return (forward or layers_of(one))(one.query, one.keys, one.values, **options)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_attention_to_the_bit(seed: int) -> None:
    """The first call of a kind, a second of another forward, and a second of the same one."""
    one = random_problem(seed)
    expected, _ = one.run()
    forward = layers_of(one)
    for result in (run(one), run(one, forward), run(one, forward)):
        assert same(result, expected)


def test_layers_of_one_forward_may_differ() -> None:
    parents = tree.chain(2)
    forward = Layers(torch.tensor([9]), tree.visible(parents))
    for size, key_heads, softcap in ((16, 1, 0.0), (32, 2, 0.0), (16, 1, 3.0), (32, 2, 0.0)):
        query, cache = torch.randn(1, 4, 3, size), torch.randn(1, key_heads, 20, size)
        out = forward(query, cache, cache, scale=0.3, softcap=softcap)
        expected, _ = attention(
            *(query, cache, cache, forward.lengths, forward.visible), scale=0.3, softcap=softcap
        )
        assert same(out, expected)


def chained(**changes: Any) -> dict[str, Any]:
    """Arguments of a forward and of a layer, in one."""
    given = {"lengths": torch.tensor([4]), "visible": tree.visible(tree.chain(2)), "scale": 1.0}
    given |= {"query": torch.randn(1, 2, 3, 8), "keys": torch.randn(1, 1, 7, 8)}
    return given | {"values": torch.randn(1, 1, 7, 8)} | changes


def called(given: dict[str, Any]) -> Tensor:
    forward = Layers(given["lengths"], given["visible"])
    return forward(given["query"], given["keys"], given["values"], scale=given["scale"])


def freed() -> Tensor:
    tensor = torch.randn(1, 1, 7, 8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda: {"lengths": torch.tensor([5])}, "lengths: expected 0 to S - N - 1 = 4, got 5"),
        (lambda: {"lengths": torch.tensor([-1])}, "lengths: expected 0 to S - N - 1 = 4, got -1"),
        (lambda: {"lengths": torch.tensor([4], dtype=torch.int32)}, "lengths: expected"),
        (lambda: {"keys": torch.randn(1, 1, 6, 8)}, "values: expected"),
        (lambda: {"keys": freed()}, "keys: expected a dense tensor"),
        (lambda: {"values": freed()}, "values: expected a dense tensor"),
        (lambda: {"values": torch.randn(1, 1, 7, 8).double()}, "values: expected"),
        (lambda: {"query": torch.randn(1, 2, 4, 8)}, "visible: expected|S >= N"),
        (lambda: {"query": torch.randn(1, 2, 8, 3).mT}, "query: expected contiguous rows"),
        (lambda: {"scale": float("inf")}, "scale: expected a finite number, got inf"),
    ],
)
def test_what_was_remembered_hides_nothing(change: Any, why: str) -> None:
    called(chained())
    with pytest.raises(Refusal, match=why):
        called(chained(**change()))
    called(chained())


def test_another_backend_is_asked() -> None:
    given = chained()
    with backend("reference"):
        expected = called(given)
    assert not layers._kinds
    assert torch.allclose(called(given), expected, atol=1e-5)
    assert len(layers._kinds) == 1


def test_kinds_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MOST_KINDS", 3)
    for nodes in range(1, 9):
        run(problem(nodes=nodes, lengths=(5,)))
        assert len(layers._kinds) <= 3
