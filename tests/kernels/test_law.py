# SPDX-License-Identifier: Apache-2.0
"""`Law`: what it refuses, the tensors it makes, and that it makes them once."""

import copy
import dataclasses
import math
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specens_kernels import Law, mix

CPU = torch.device("cpu")


def tensors(law: Law, batch: int = 2, rows: int = 3, members: int = 2) -> tuple[Tensor | None, ...]:
    return law.tensors("mix", batch, rows, members, CPU, 7)[:5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ensemble": "mixtur"}, "ensemble: expected one of mixture, product, got 'mixtur'"),
        ({"scope": "row"}, "scope: expected one of member, ensemble, got 'row'"),
        ({"weights": ()}, r"weights: expected M >= 1 finite numbers, got \[\]"),
        ({"weights": (1.0, math.nan)}, "weights: expected M >= 1 finite numbers, got"),
        (
            {"weights": (math.inf,), "ensemble": "product"},
            "weights: expected M >= 1 finite numbers, got",
        ),
        (
            {"weights": (0.5, 0.6)},
            "weights: expected numbers >= 0 that sum to 1 for 'mixture', got",
        ),
        ({"weights": (1.5, -0.5)}, "weights: expected numbers >= 0 that sum to 1 for 'mixture'"),
        ({"temperature": -0.1}, r"temperature: expected finite numbers >= 0, got -0\.1"),
        ({"temperature": math.inf}, "temperature: expected finite numbers >= 0, got inf"),
        ({"temperature": math.nan}, "temperature: expected finite numbers >= 0, got nan"),
        ({"temperature": (1.0, -1.0)}, r"temperature: expected finite numbers >= 0, got \(1.0, -1"),
        (
            {"temperature": (1.0, 0.5), "scope": "ensemble"},
            "temperature: expected one number for scope 'ensemble', got",
        ),
        ({"top_k": -1}, r"top_k: expected a count in \[0, 2\^31\), got -1"),
        ({"top_k": 2.5}, r"top_k: expected a count in \[0, 2\^31\), got 2\.5"),
        ({"top_p": 0.0}, r"top_p: expected a mass in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, r"top_p: expected a mass in \(0, 1\], got 1\.1"),
        ({"top_p": math.nan}, r"top_p: expected a mass in \(0, 1\], got nan"),
        ({"min_p": 1.0}, r"min_p: expected a ratio in \[0, 1\), got 1\.0"),
        ({"min_p": -0.1}, r"min_p: expected a ratio in \[0, 1\), got -0\.1"),
        (
            {"plausibility": 1.5, "ensemble": "product"},
            r"plausibility: expected a number in \[0, 1\], got 1\.5",
        ),
        ({"plausibility": 0.1}, r"plausibility: expected 0 for 'mixture', got 0\.1"),
        ({"vocab_size": 0}, "vocab_size: expected a count >= 1, got 0"),
    ],
)
def test_a_wrong_number_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^law: {message}"):
        Law(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"weights": (1.0,)},
            r"weights: expected \(M=2,\), \(B=2, M\) or \(B, T=3, M\), got \(1,\)",
        ),
        ({"weights": torch.ones(3, 2)}, r"weights: expected .*, got \(3, 2\)"),
        ({"weights": torch.ones(2, 4, 2)}, r"weights: expected .*, got \(2, 4, 2\)"),
        ({"weights": torch.ones(1, 2, 3, 2)}, r"weights: expected .*, got \(1, 2, 3, 2\)"),
        ({"temperature": (1.0, 1.0, 1.0)}, r"temperature: expected .* \(B or 1, 2\), got \(1, 3\)"),
        (
            {"temperature": torch.ones(3)},
            r"temperature: expected \(\), \(B=2,\) or .*, got \(3, 1\)",
        ),
        (
            {"temperature": torch.ones(1, 2), "scope": "ensemble"},
            r"temperature: expected .* \(B or 1, 1\), got \(1, 2\)",
        ),
        ({"top_k": torch.ones(3, dtype=torch.int32)}, r"top_k: expected \(B=2,\), got \(3,\)"),
        ({"top_p": torch.ones(3)}, r"top_p: expected \(B=2,\), got \(3,\)"),
        ({"min_p": torch.ones(3)}, r"min_p: expected \(B=2,\), got \(3,\)"),
    ],
)
def test_a_shape_that_does_not_fit_the_call_names_the_op(
    arguments: dict[str, Any], message: str
) -> None:
    law = Law(**{"weights": (0.5, 0.5), **arguments})
    with pytest.raises(ValueError, match=f"^mix: {message}"):
        tensors(law)


def test_numbers_become_small_tensors() -> None:
    weights, temperature, top_k, top_p, min_p = tensors(
        Law((0.5, 0.5), temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    )
    assert weights is not None
    assert weights.tolist() == [0.5, 0.5]
    assert temperature is not None
    assert temperature.shape == (1, 1)
    for value, dtype in ((top_k, torch.int32), (top_p, torch.float32), (min_p, torch.float32)):
        assert value is not None
        assert (value.shape, value.dtype) == ((1,), dtype)


def test_a_filter_that_is_off_has_no_tensor() -> None:
    assert tensors(Law((0.5, 0.5)))[2:] == (None, None, None)


@pytest.mark.parametrize(
    ("temperature", "shape"),
    [
        (1.0, (1, 1)),
        ((1.0, 0.5), (1, 2)),
        (torch.tensor(1.0), (1, 1)),
        (torch.ones(2), (2, 1)),
        (torch.ones(1, 2), (1, 2)),
        (torch.ones(2, 2), (2, 2)),
        (torch.ones(2, 1), (2, 1)),
    ],
)
def test_temperature_is_a_row_by_a_member(temperature: Any, shape: tuple[int, int]) -> None:
    made = tensors(Law((0.5, 0.5), temperature=temperature))[1]
    assert made is not None
    assert made.shape == shape


def test_tensors_are_made_once_for_each_device() -> None:
    law = Law((0.5, 0.5), temperature=0.7, top_p=0.9)
    first = tensors(law)
    assert all(a is b for a, b in zip(first, tensors(law, batch=5), strict=True))
    there = law.tensors("mix", 2, 3, 2, torch.device("meta"), 7)
    assert there[0] is not None
    assert there[0].device.type == "meta"
    assert all(a is b for a, b in zip(first, tensors(law), strict=True))


def test_a_tensor_is_taken_as_it_is_and_follows_its_owner() -> None:
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    law = Law(weights)
    tensors(law)
    weights[0] = torch.tensor([1.0, 0.0])
    made = tensors(law)[0]
    assert made is not None
    assert made[0].tolist() == [1.0, 0.0]


def test_the_numbers_beside_a_tensor_are_made_once_for_each_device() -> None:
    law = Law(torch.tensor([0.5, 0.5]), temperature=0.7, top_k=5, top_p=0.9)
    first = tensors(law)
    assert all(a is b for a, b in zip(first[1:], tensors(law, batch=5)[1:], strict=True))
    law = Law((0.5, 0.5), temperature=torch.ones(2), min_p=0.1)
    first, again = tensors(law), tensors(law)
    assert first[0] is again[0]
    assert first[4] is again[4]


@pytest.mark.parametrize("name", ["weights", "temperature", "top_k", "top_p", "min_p"])
def test_a_tensor_on_another_device_is_refused(name: str) -> None:
    law = Law(**{"weights": (0.5, 0.5), name: torch.ones(2, device="meta")})
    message = f"^mix: {name}: expected a tensor on cpu, got one on meta$"
    with pytest.raises(ValueError, match=message):
        tensors(law)


def test_a_law_used_under_fake_tensors_is_fit_for_use() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    law = Law((0.5, 0.5))
    with FakeTensorMode():
        tensors(law)
    made = tensors(law)[0]
    assert made is not None
    assert made.tolist() == [0.5, 0.5]


def test_a_law_is_frozen_and_hashable() -> None:
    law = Law()
    with pytest.raises(AttributeError):
        law.scope = "ensemble"  # type: ignore[misc]
    assert {law: 1}[law] == 1


COPIES = pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda law: pickle.loads(pickle.dumps(law)), dataclasses.replace],
    ids=["copy", "deepcopy", "pickle", "replace"],
)


@COPIES
def test_a_copy_of_a_used_law_has_memory_of_its_own(copied: Callable[[Law], Law]) -> None:
    law = Law((0.9, 0.1), temperature=0.5)
    logits = [torch.randn(1, 1, 50) for _ in range(2)]
    expected = mix(logits, law)[0]
    other = copied(law)
    here = law.tensors("mix", 1, 1, 2, CPU, 50)
    there = other.tensors("mix", 1, 1, 2, CPU, 50)
    assert here.weights.data_ptr() != there.weights.data_ptr()
    assert torch.equal(mix(logits, other)[0], expected)
    assert other.tensors("mix", 1, 1, 2, CPU, 50).flat is not here.flat
    assert Law(**dataclasses.asdict(law)).weights == law.weights


@COPIES
def test_a_copy_of_a_law_with_a_tensor_makes_its_numbers_anew(copied: Callable[[Law], Law]) -> None:
    law = Law(torch.tensor([0.9, 0.1]), temperature=0.5)
    logits = [torch.randn(1, 1, 50) for _ in range(2)]
    expected = mix(logits, law)[0]
    other = copied(law)
    here = law.tensors("mix", 1, 1, 2, CPU, 50)
    there = other.tensors("mix", 1, 1, 2, CPU, 50)
    assert here.temperature.data_ptr() != there.temperature.data_ptr()
    assert torch.equal(mix(logits, other)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_changed_tensor_is_seen_whatever_its_dtype(dtype: torch.dtype) -> None:
    temperature = torch.full((1,), 0.5, dtype=dtype)
    law = Law((0.9, 0.1), temperature=temperature)
    logits = [torch.randn(1, 1, 50) for _ in range(2)]
    before = mix(logits, law)[0]
    temperature.fill_(2.0)
    assert not torch.equal(mix(logits, law)[0], before)
    assert torch.equal(mix(logits, law)[0], mix(logits, Law((0.9, 0.1), temperature=2.0))[0])


def test_threads_may_share_a_new_law() -> None:
    logits = [torch.randn(1, 1, 50) for _ in range(2)]
    expected = mix(logits, Law((0.9, 0.1), temperature=0.5))[0]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            law = Law((0.9, 0.1), temperature=0.5)
            threads = [threading.Thread(target=mix, args=(logits, law)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert torch.equal(mix(logits, law)[0], expected)
    finally:
        sys.setswitchinterval(before)


def test_a_transformed_call_leaves_nothing_in_a_law() -> None:
    law, logits = Law((0.9, 0.1), temperature=0.5), torch.randn(1, 1, 8)

    def run(values: Tensor) -> Tensor:
        return mix([values, values], law)[0]

    torch.func.functionalize(run)(logits)
    expected = mix([logits, logits], Law((0.9, 0.1), temperature=0.5))[0]
    assert torch.equal(run(logits), expected)
