# SPDX-License-Identifier: Apache-2.0
"""The front of constant weights, and what a learned head gains above it."""

from dataclasses import replace

import pytest
import torch
from trainings import LIKELIHOOD, TEXTS, TINY

from specens.members.weight_head import WeightHead
from specens.training import front
from specens.training.diversed import Pair

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_constant_head_is_on_the_front_and_a_better_one_above(pair: Pair) -> None:
    settings = replace(TINY, new_tokens=3)
    head = WeightHead.constant(128, 192, 0.4)
    found = front.compare_with_static(pair, head, TEXTS, LIKELIHOOD, settings, samples=2)
    for gain in found["above_front"].values():
        assert abs(gain["gain"]) < 1e-6
        assert gain["standard_error"] < 1e-6
    same = found["candidates"]["static 0.4"]
    assert found["candidates"]["learned"] == same
    assert same["target_log_likelihood"] == same["reward"]
    whole = found["candidates"]["static 0.0"]["closeness_to_target"]
    assert whole["mean"] == pytest.approx(0, abs=1e-5)  # the target alone
    acceptances = [
        found["candidates"][name]["text_acceptance"]["mean"]
        for name in ("static 0.0", "static 0.5", "static 1.0")
    ]
    assert acceptances[1] == pytest.approx((acceptances[0] + 1) / 2, abs=1e-5)  # linear, mixture
    assert acceptances[2] == pytest.approx(1, abs=1e-5)

    xs = [torch.tensor([0.0, 0.2]).double(), torch.tensor([0.8, 1.0]).double()]
    ys = [torch.tensor([1.0, 1.2]).double(), torch.tensor([0.0, 0.2]).double()]
    middle = torch.tensor([0.4, 0.6]).double()
    gain = front._above_front(xs, ys, middle, torch.tensor([1.0, 1.2]).double())
    assert gain["gain"] == pytest.approx(0.5)
    assert gain["static_at_same_acceptance"] == pytest.approx(0.6)


def test_interpolation_is_linear_between_neighbours() -> None:
    xs, ys = [0.5, 0.1, 0.9], [1.0, 3.0, 0.0]
    points = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert [front.interpolate(x, xs, ys) for x in points] == pytest.approx([3, 3, 2, 1, 0.5, 0, 0])


def test_examples_without_references_have_no_quality_of_text(pair: Pair) -> None:
    head = WeightHead.constant(128, 192)
    bare = [replace(one, reference="") for one in TEXTS]
    found = front.compare_with_static(pair, head, bare, LIKELIHOOD, TINY, samples=1)
    assert sorted(found["above_front"]) == [
        "closeness_to_target",
        "reward",
        "target_log_likelihood",
    ]
    assert "text_acceptance" not in found["candidates"]["learned"]
