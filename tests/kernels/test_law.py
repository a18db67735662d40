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

import numpy as np
import pytest
import torch
from torch import Tensor

from specens_kernels import Ensemble, Law, Refusal, Status, mix, sample, verify

CPU = torch.device("cpu")
HEAT = r"0 or numbers in \[1e-30, 1e\+30\]"


def tensors(law: Law) -> tuple[Tensor | None, ...]:
    return law.tensors("mix", CPU, 7)[:5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ensemble": "mixtur"}, "ensemble: expected one of mixture, product, got 'mixtur'"),
        ({"scope": "row"}, "scope: expected one of member, ensemble, got 'row'"),
        ({"weights": ()}, r"weights: expected M >= 1 finite numbers of float32, got \(\)"),
        ({"weights": (1.0, math.nan)}, "weights: expected M >= 1 finite numbers of float32, got"),
        ({"weights": (math.inf,), "ensemble": "product"}, "weights: expected M >= 1 finite numb"),
        ({"weights": (1e39,), "ensemble": "product"}, r"weights: expected .*, got \(1e\+39,\)"),
        ({"weights": (1.0, -1e-50), "ensemble": "product"}, "weights: expected 0 or numbers that"),
        (
            {"weights": (0.5, 0.6)},
            "weights: expected numbers >= 0 that sum to 1 for 'mixture', got",
        ),
        ({"weights": (1.5, -0.5)}, "weights: expected numbers >= 0 that sum to 1 for 'mixture'"),
        ({"temperature": -0.1}, rf"temperature: expected {HEAT}, got -0\.1"),
        ({"temperature": math.inf}, f"temperature: expected {HEAT}, got inf"),
        ({"temperature": math.nan}, f"temperature: expected {HEAT}, got nan"),
        ({"temperature": 3e38}, rf"temperature: expected {HEAT}, got 3e\+38"),
        ({"temperature": 1e-40}, f"temperature: expected {HEAT}, got 1e-40"),
        ({"temperature": 10**400}, f"temperature: expected {HEAT}, got a int"),
        ({"temperature": (1.0, -1.0)}, rf"temperature: expected {HEAT}, got \(1.0, -1"),
        (
            {"temperature": (1.0, 0.5), "scope": "ensemble"},
            "temperature: expected one number for scope 'ensemble', got",
        ),
        ({"top_k": -1}, r"top_k: expected a count in \[0, 2\^31\), got -1"),
        ({"top_k": 2.5}, r"top_k: expected a count in \[0, 2\^31\), got 2\.5"),
        ({"top_p": -0.1}, r"top_p: expected a mass in \[0, 1\], got -0\.1"),
        ({"top_p": 1.1}, r"top_p: expected a mass in \[0, 1\], got 1\.1"),
        ({"top_p": math.nan}, r"top_p: expected a mass in \[0, 1\], got nan"),
        ({"min_p": 1.1}, r"min_p: expected a ratio in \[0, 1\], got 1\.1"),
        ({"min_p": -0.1}, r"min_p: expected a ratio in \[0, 1\], got -0\.1"),
        (
            {"plausibility": 1.5, "ensemble": "product"},
            r"plausibility: expected a number in \[0, 1\], got 1\.5",
        ),
        ({"plausibility": 0.1}, r"plausibility: expected 0 for 'mixture', got 0\.1"),
        ({"vocab_size": 0}, r"vocab_size: expected a count in \[1, 2\^31\), got 0"),
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
        mix([torch.zeros(2, 3, 7) for _ in range(2)], law)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("weights", [None, 0.5, "ab", b"ab", {0.5}, {0.5: 1}, iter((1.0,)), (True,), ("1",)]),
        ("weights", [[[0.5, 0.5]], np.ones((1, 1)), np.array(1.0), (torch.tensor(1.0),), (1j,)]),
        ("weights", [torch.ones(1).int(), torch.ones(1).bool(), torch.ones(1) * 1j, (10**400,)]),
        ("temperature", [None, "1", True, [], [None], {1.0}, 1j, np.True_, np.array("a"), [[1.0]]]),
        ("temperature", [torch.tensor(1), torch.tensor(True)]),
        ("top_k", [None, "5", 5.0, True, [5], np.float64(5), np.True_, 2**31, 2**80]),
        ("top_k", [torch.tensor(5.0), torch.tensor(True)]),
        ("top_p", [None, "0.9", True, [0.9], np.array([0.9]), torch.tensor(1), 10**400, 1j]),
        ("min_p", [None, "0.9", False, (0.1,), torch.tensor(True)]),
        ("scope", [None, ["member"], 0, torch.zeros(2), np.array(["member", "ensemble"])]),
        ("ensemble", [None, ["mixture"], 0, torch.zeros(2), Ensemble]),
        ("plausibility", [None, "0", False, [0.0], torch.tensor(0.0)]),
        ("vocab_size", [True, 7.0, "7", [7], torch.tensor(7), -1]),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_in_one_line(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(Refusal, match=f"^law: {name}: expected ") as raised:
            Law(**{name: value})
        assert "\n" not in str(raised.value)


def test_numpys_numbers_are_numbers() -> None:
    law = Law(
        np.array([0.25, 0.75]),
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        top_p=np.float64(0.9),
        vocab_size=np.int32(7),
    )
    assert (law.weights, law.temperature, law.top_k) == ((0.25, 0.75), 0.5, 5)
    assert (law.top_p, law.vocab_size) == (0.9, 7)
    logits = [torch.randn(1, 1, 7) for _ in range(2)]
    expected = mix(logits, Law((0.25, 0.75), temperature=0.5, top_k=5, top_p=0.9))[0]
    assert torch.equal(mix(logits, law)[0], expected)


def test_a_list_that_changes_later_changes_no_law() -> None:
    weights, temperature = [0.5, 0.5], [1.0, 2.0]
    law = Law(weights, temperature=temperature)
    weights[0], temperature[0] = math.nan, -1.0
    assert tensors(law)[0].tolist() == [0.5, 0.5]  # type: ignore[union-attr]
    assert tensors(law)[1].tolist() == [[1.0, 2.0]]  # type: ignore[union-attr]


HARD_LOGITS = ([3.0, 1.0, -math.inf], [3.0, 1.0, -3.0e38], [3e38, -3e38, 0.0], [2.0, 2.0, 1.0])


def law_by_definition(logits: list[float], temperature: float) -> Tensor:
    scores = torch.tensor(logits, dtype=torch.float64) / temperature
    return scores.log_softmax(-1)


@pytest.mark.parametrize("temperature", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("scope", ["member", "ensemble"])
def test_the_ends_of_the_range_of_temperatures(
    backend: str, temperature: float, scope: str
) -> None:
    for logits in HARD_LOGITS:
        rows = torch.tensor([[logits]])
        for given in (temperature, torch.tensor(temperature)):
            log_probs, status = mix([rows], Law(temperature=given, scope=scope))
            expected = law_by_definition(logits, temperature).exp().float()
            torch.testing.assert_close(log_probs[0, 0].exp(), expected, atol=1e-6, rtol=1e-5)
            assert status.item() == 0


@pytest.mark.parametrize(
    ("given", "counts_as"),
    [(1e300, 1e30), (math.inf, 1e30), (3e38, 1e30), (1e-40, 1e-30), (math.nan, 0.0), (-2.0, 0.0)],
)
@pytest.mark.parametrize("scope", ["member", "ensemble"])
def test_a_temperature_beyond_the_range_counts_as_its_end(
    backend: str, given: float, counts_as: float, scope: str
) -> None:
    tokens, numbers = torch.tensor([[1]]), torch.full((1, 2, 4), 0.5)
    for logits in HARD_LOGITS:
        rows = torch.tensor([[logits, logits]])
        laws = [
            Law(temperature=torch.tensor([value], dtype=torch.float64), scope=scope)
            for value in (given, counts_as)
        ]
        answers = [
            (
                *mix([rows], law),
                *sample([rows], numbers, law),
                *verify([rows], tokens, numbers, law, proposers=torch.tensor([0])),
                *verify([rows], tokens, numbers, law, draft_logits=rows),
                *verify([rows], tokens, numbers, Law(), draft_logits=rows, draft_temperature=heat),
            )
            for law, heat in zip(laws, map(torch.tensor, (given, counts_as)), strict=True)
        ]
        for one, other in zip(*answers, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)
        assert not answers[0][0].isnan().any()


NO_WEIGHTS = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize(
    ("ensemble", "scope"), [("mixture", "member"), ("mixture", "ensemble"), ("product", "member")]
)
def test_a_number_that_is_no_weight_counts_as_0(backend: str, ensemble: str, scope: str) -> None:
    numbers = (*NO_WEIGHTS, -0.5) if ensemble == "mixture" else NO_WEIGHTS
    given = torch.tensor([[0.5, number, 0.5] for number in numbers])
    batch = len(given)
    laws = [
        Law(weights, ensemble, torch.full((batch,), 0.7), scope=scope)
        for weights in (given, given.new_tensor([0.5, 0.0, 0.5]).repeat(batch, 1))
    ]
    members = list(torch.randn(3, batch, 3, 19))
    tokens, uniforms = torch.randint(19, (batch, 2)), torch.rand(batch, 3, 4)
    proposers = torch.zeros(batch, 2, dtype=torch.int64)
    answers = [
        (
            *mix(members, law),
            *sample(members, uniforms, law),
            *verify(members, tokens, uniforms, law, proposers=proposers),
        )
        for law in laws
    ]
    for answer, expected in zip(*answers, strict=True):
        torch.testing.assert_close(answer, expected, atol=0, rtol=0, equal_nan=True)


def test_a_mixture_whose_numbers_are_no_weights_is_empty(backend: str) -> None:
    numbers = torch.tensor([*NO_WEIGHTS, -0.5, 0.0])
    law = Law(numbers[:, None].repeat(1, 2))
    members, uniforms = list(torch.randn(2, len(numbers), 1, 19)), torch.rand(len(numbers), 1, 4)
    drawn = sample(members, uniforms, law)
    assert drawn.tokens.flatten().tolist() == [0] * len(numbers)
    assert drawn.status.flatten().tolist() == [Status.EMPTY_LAW] * len(numbers)
    assert torch.isneginf(mix(members, law)[0]).all()


@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_p": 1e-50}], ids=str)
def test_what_transformers_takes_leaves_the_most_probable_tokens(
    backend: str, options: dict[str, float], scope: str
) -> None:
    rows = torch.randn(2, 3, 17)
    rows[0, 0, :2] = 9.0  # tied tokens stay together
    tensors = {name: torch.tensor(value) for name, value in options.items()}
    for given in (options, tensors):
        log_probs, status = mix([rows], Law(temperature=0.7, scope=scope, **given))  # type: ignore[arg-type]
        kept = rows == rows.amax(-1, keepdim=True)
        expected = (kept / kept.sum(-1, keepdim=True)).log()
        torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=0)
        assert not status.any()


def test_a_count_that_int32_does_not_hold_is_a_count(backend: str) -> None:
    rows = torch.randn(1, 1, 9)
    for count, counts_as in ((2**32 + 3, 0), (2**31 + 1, 0), (2**40, 0), (-(2**31) - 5, 0)):
        log_probs = mix([rows], Law(top_k=torch.tensor([count])))[0]
        assert torch.equal(log_probs, mix([rows], Law(top_k=counts_as))[0])


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
    assert all(a is b for a, b in zip(first, tensors(law), strict=True))
    there = law.tensors("mix", torch.device("meta"), 7)
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
    assert all(a is b for a, b in zip(first[1:], tensors(law)[1:], strict=True))
    law = Law((0.5, 0.5), temperature=torch.ones(2), min_p=0.1)
    first, again = tensors(law), tensors(law)
    assert first[0] is again[0]
    assert first[4] is again[4]


@pytest.mark.parametrize("name", ["weights", "temperature", "top_k", "top_p", "min_p"])
def test_a_tensor_on_another_device_is_refused(name: str) -> None:
    dtype = torch.int32 if name == "top_k" else torch.float32
    law = Law(**{"weights": (0.5, 0.5), name: torch.ones(2, device="meta", dtype=dtype)})
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
    here = law.tensors("mix", CPU, 50)
    there = other.tensors("mix", CPU, 50)
    assert here.weights.data_ptr() != there.weights.data_ptr()
    assert torch.equal(mix(logits, other)[0], expected)
    assert other.tensors("mix", CPU, 50).flat is not here.flat
    assert Law(**dataclasses.asdict(law)).weights == law.weights


@COPIES
def test_a_copy_of_a_law_with_a_tensor_makes_its_numbers_anew(copied: Callable[[Law], Law]) -> None:
    law = Law(torch.tensor([0.9, 0.1]), temperature=0.5)
    logits = [torch.randn(1, 1, 50) for _ in range(2)]
    expected = mix(logits, law)[0]
    other = copied(law)
    here = law.tensors("mix", CPU, 50)
    there = other.tensors("mix", CPU, 50)
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
