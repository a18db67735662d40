# SPDX-License-Identifier: Apache-2.0
"""The strict interpreter finds what it says it finds."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
import triton_guard
from triton_guard import KernelFault, counted

triton_guard.install()


@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < count, other=0.0))


@triton.jit
def add_up(source, target, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + offsets), 0)
    tl.store(target, tl.load(target) + total)


@triton.jit
def count_up(target):
    tl.atomic_add(target, 1.0)


@triton.jit
def scatter(target, BLOCK: tl.constexpr):
    tl.store(target + tl.arange(0, BLOCK) // 2, 1.0)


@triton.jit
def arithmetic(a, b, products, maxima, less, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(a + offsets), tl.load(b + offsets)
    tl.store(products + offsets, x * y + x)
    tl.store(maxima + offsets, tl.maximum(x, y))
    tl.store(less + offsets, x < y)


@triton.jit
def round_off(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets).to(tl.bfloat16))


def test_a_store_past_the_end_is_found_at_its_line() -> None:
    with pytest.raises(KernelFault, match=r"out-of-bounds store of 28 .*target.*tl\.store"):
        copy[(4,)](torch.zeros(100), torch.zeros(100), 100, BLOCK=32)


def test_a_load_past_a_view_is_found() -> None:
    whole = torch.zeros(128)
    with pytest.raises(KernelFault, match="out-of-bounds load of 1 "):
        copy[(4,)](whole[:127], torch.zeros(128), 128, BLOCK=32)


def test_a_tensor_inside_a_tuple_is_known() -> None:
    @triton.jit
    def first(pair, target):
        tl.store(target, tl.load(pair[1]))

    target = torch.zeros(1)
    first[(1,)]((torch.ones(1), torch.full((1,), 3.0)), target)
    assert target.item() == 3.0


def test_a_race_between_programs_is_found() -> None:
    with pytest.raises(KernelFault, match=r"race on target: program 1 loads .* program 0"):
        add_up[(4,)](torch.ones(128), torch.zeros(1), BLOCK=32)


def test_atomics_do_not_race() -> None:
    target = torch.zeros(1)
    count_up[(4,)](target)
    assert target.item() == 4.0


def test_two_lanes_that_store_to_one_element_are_found() -> None:
    with pytest.raises(KernelFault, match="two lanes store to the same element of target"):
        scatter[(1,)](torch.zeros(32), BLOCK=32)


def test_traffic_is_counted_by_lane() -> None:
    with counted() as traffic:
        copy[(4,)](torch.zeros(100), torch.zeros(128), 100, BLOCK=32)
        copy[(4,)](torch.zeros(100), torch.zeros(128), 100, BLOCK=32)
    found = traffic["copy"]
    assert (found.launches, found.programs, found.loaded, found.stored) == (2, 8, 800, 1024)


def test_bfloat16_arithmetic_is_that_of_torch() -> None:
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    products, maxima, less = torch.empty_like(a), torch.empty_like(a), torch.empty(64).bool()
    arithmetic[(1,)](a, b, products, maxima, less, BLOCK=64)
    assert torch.equal(products, a * b + a)
    assert torch.equal(maxima, torch.maximum(a, b))
    assert torch.equal(less, a < b)


def test_casts_to_bfloat16_round_to_the_nearest() -> None:
    source = torch.randn(4096) * torch.logspace(-38, 38, 4096)
    source[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    target = torch.empty(4096, dtype=torch.bfloat16)
    round_off[(1,)](source, target, BLOCK=4096)
    assert torch.equal(target.view(torch.int16)[3:], source.bfloat16().view(torch.int16)[3:])
    assert torch.equal(target[1:3], source[1:3].bfloat16())
    assert target[0].isnan()
