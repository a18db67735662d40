# SPDX-License-Identifier: Apache-2.0
"""`mix`: the law by definition, for every ensemble, scope and filter, and degenerate rows."""

import itertools
import math
from typing import Any

import laws
import pytest
import torch
from torch import Tensor

from specens_kernels import ENSEMBLES, Law, Status, mix, reference

INF, NAN = math.inf, math.nan

# float32 results of float32 logits: a few roundings of numbers up to about 20.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 999},
    {"top_p": 0.05},
    {"top_p": 0.8},
    {"min_p": 0.3},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 4, "top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.1, "temperature": 0.4},
]


def by_definition(logits: list[Tensor], weights: tuple[float, ...], **options: Any) -> Tensor:
    rows = [
        laws.ensemble_law([member[b, t] for member in logits], weights, **options).log()
        for b, t in itertools.product(*map(range, logits[0].shape[:2]))
    ]
    return torch.stack(rows).unflatten(0, logits[0].shape[:2]).float()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_it_is_the_law_by_definition(
    backend: str, ensemble: str, scope: str, filters: dict[str, Any]
) -> None:
    # Members that agree, roughly: where each drops tokens of its own, a product keeps some.
    shared = 2 * torch.randn(2, 2, 40)
    logits = [shared + torch.randn(2, 2, 40) / 2 for _ in range(3)]
    options = {"ensemble": ensemble, "scope": scope, **filters}
    weights = (0.5, 0.25, 0.25)
    log_probs, status = mix(logits, Law(weights, **options))
    torch.testing.assert_close(log_probs, by_definition(logits, weights, **options), **CLOSE)
    empty = torch.isneginf(log_probs).all(-1)
    assert torch.equal(status, empty * int(Status.EMPTY_LAW))
    assert not empty.all()


def test_in_float64_it_is_exact() -> None:
    logits = [torch.randn(1, 4, 30, dtype=torch.float64) for _ in range(2)]
    options: dict[str, Any] = {"temperature": (0.7, 1.2), "top_p": 0.9}
    log_probs, _ = mix(logits, Law((0.3, 0.7), **options))
    assert log_probs.dtype == torch.float64
    expected = torch.stack(
        [laws.ensemble_law([m[0, t] for m in logits], (0.3, 0.7), **options) for t in range(4)]
    )
    assert (log_probs[0].exp() - expected).abs().max() < 1e-14


@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}], ids=str)
def test_tied_tokens_stay_together(backend: str, scope: str, filters: dict[str, Any]) -> None:
    row = torch.tensor([[[1.0, 3.0, 3.0, 3.0, -1.0]]])
    log_probs, _ = mix([row, row], Law((0.5, 0.5), scope=scope, **filters))
    assert (log_probs[0, 0] > -INF).tolist() == [False, True, True, True, False]


def test_a_filter_may_differ_from_row_to_row(backend: str) -> None:
    logits = [torch.randn(3, 2, 20).contiguous()]
    law = Law(
        temperature=torch.tensor([0.5, 1.0, 2.0]),
        top_k=torch.tensor([0, 3, 7]),
        top_p=torch.tensor([0.7, 1.0, 0.9]),
        min_p=torch.tensor([0.0, 0.2, 0.0]),
    )
    log_probs, _ = mix(logits, law)
    options: list[dict[str, Any]] = [
        {"temperature": 0.5, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 3, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 7, "top_p": 0.9},
    ]
    for b, alone in enumerate(options):
        expected = by_definition([logits[0][b : b + 1]], (1.0,), **alone)
        torch.testing.assert_close(log_probs[b : b + 1], expected, **CLOSE)


@pytest.mark.parametrize("vocab_size", [2, 17, 1023, 1025, 8193, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_width_and_type_agrees_with_the_reference(
    backend: str, vocab_size: int, dtype: torch.dtype
) -> None:
    logits = [(3 * torch.randn(2, 3, vocab_size)).to(dtype) for _ in range(2)]
    law = Law((0.4, 0.6), temperature=(0.8, 1.1), top_k=50)
    log_probs, status = mix(logits, law)
    parameters = law.tensors("mix", log_probs.device, vocab_size)
    expected, _ = reference.mix([member.double() for member in logits], parameters)
    torch.testing.assert_close(log_probs, expected.float(), **CLOSE)
    assert not status.any()


def test_padding_and_strides_are_not_looked_at(backend: str) -> None:
    logits = [torch.randn(2, 3, 17), torch.randn(2, 3, 17).bfloat16()]
    expected, _ = mix(logits, Law((0.5, 0.5)))
    padded = [
        torch.full((4, 6, 17 + extra), NAN, dtype=m.dtype)
        for m, extra in zip(logits, (3, 8), strict=True)
    ]
    for wide, member in zip(padded, logits, strict=True):
        wide[::2, ::2, :17] = member
    views = [wide[::2, ::2] for wide in padded]
    log_probs, status = mix(views, Law((0.5, 0.5), vocab_size=17))
    assert torch.equal(log_probs, expected)
    assert not status.any()
    narrowest, _ = mix([logits[0], views[1]], Law((0.5, 0.5)))
    assert torch.equal(narrowest, expected)


def test_temperature_0_is_the_law_at_1_without_filters(backend: str) -> None:
    logits = [torch.randn(2, 3, 17) for _ in range(2)]
    greedy = Law((0.5, 0.5), temperature=0.0, top_k=2, top_p=0.3, min_p=0.5)
    assert torch.equal(mix(logits, greedy)[0], mix(logits, Law((0.5, 0.5)))[0])


def test_temperature_0_of_some_members_is_their_argmax(backend: str) -> None:
    logits = [torch.randn(1, 3, 17) for _ in range(2)]
    log_probs, _ = mix(logits, Law((0.25, 0.75), temperature=(0.0, 0.5)))
    best = laws.one_point(logits[0].argmax(-1), 17).float()
    expected = 0.25 * best + 0.75 * (logits[1] / 0.5).softmax(-1)
    torch.testing.assert_close(log_probs.exp(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_degenerate_rows(backend: str, scope: str, filters: dict[str, Any]) -> None:
    logits = torch.zeros(1, 5, 6)
    logits[0, 0, 2] = NAN
    logits[0, 1, 3] = INF
    logits[0, 2, 1:3] = INF
    logits[0, 3] = -INF
    logits[0, 4] = NAN
    log_probs, status = mix([logits], Law(scope=scope, **filters))
    probs = log_probs[0].exp()
    torch.testing.assert_close(probs[0], torch.tensor([0.2, 0.2, 0.0, 0.2, 0.2, 0.2]))
    assert probs[1].tolist() == [0, 0, 0, 1, 0, 0]
    torch.testing.assert_close(probs[2], torch.tensor([0, 0.5, 0.5, 0, 0, 0]))
    assert torch.equal(log_probs[0, 3:], torch.full((2, 6), -INF))
    assert status[0].tolist() == [
        Status.NAN_LOGITS,
        Status.INFINITE_LOGITS,
        Status.INFINITE_LOGITS,
        Status.EMPTY_LAW,
        Status.NAN_LOGITS | Status.EMPTY_LAW,
    ]


def test_disjoint_vetoes_leave_a_product_empty(backend: str) -> None:
    first = torch.tensor([[[0.0, -INF]]])
    log_probs, status = mix([first, first.flip(-1)], Law((1.0, 1.0), "product"))
    assert log_probs.flatten().tolist() == [-INF, -INF]
    assert status.item() == Status.EMPTY_LAW


def test_huge_and_tiny_logits_do_not_overflow(backend: str) -> None:
    row = torch.tensor([[[3e38, 0.0, -3e38], [1e-38, 0.0, -1e-38], [60000.0, 59999.0, 0.0]]])
    for law in (Law(), Law((1.0,), "product"), Law(scope="ensemble")):
        probs = mix([row], law)[0][0].exp()
        assert probs[0].tolist() == [1, 0, 0]
        torch.testing.assert_close(probs[1], torch.full((3,), 1 / 3))
        torch.testing.assert_close(probs[2], torch.tensor([1.0, 0.0, -INF]).softmax(-1))


def test_inputs_are_not_modified(backend: str) -> None:
    logits = [torch.randn(2, 3, 17) for _ in range(2)]
    logits[0][0, 0, 0] = NAN
    before = [member.clone() for member in logits]
    weights = torch.tensor([0.5, 0.5])
    mix(logits, Law(weights, temperature=0.7, top_k=3))
    for member, copy in zip(logits, before, strict=True):
        torch.testing.assert_close(member, copy, equal_nan=True, atol=0, rtol=0)
    assert weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5)])
def test_empty_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    log_probs, status = mix([torch.zeros(shape)], Law())
    assert log_probs.shape == shape
    assert status.shape == shape[:2]


def test_it_has_no_gradient(backend: str) -> None:
    logits = torch.randn(1, 1, 5, requires_grad=True)
    assert not mix([logits], Law())[0].requires_grad
