# SPDX-License-Identifier: Apache-2.0
"""The learned stop: its fit recovers what made the data, and is calibrated."""

import math

import pytest
import torch

from specens.tuning.stops import fit_stop

pytestmark = pytest.mark.usefixtures("one_thread")


def regression(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    dice = torch.Generator().manual_seed(seed)
    features = torch.randn(20_000, 4, generator=dice, dtype=torch.float64)
    features[:, 0] = 1
    truth = (0.4, 1.0, -0.7, 0.2)
    chances = torch.sigmoid(features @ torch.tensor(truth, dtype=torch.float64))
    return features, torch.bernoulli(chances, generator=dice), truth


def test_the_fit_recovers_the_coefficients() -> None:
    features, kept, truth = regression()
    found = fit_stop(features, kept)
    curvature = (features.T * 0.25) @ features  # no less than the information it stands for
    error = 1 / curvature.diagonal().sqrt()
    assert all(abs(a - b) < 8 * e for a, b, e in zip(found, truth, error.tolist(), strict=True))
    # With the chances themselves nothing is left to chance.
    chances = torch.sigmoid(features @ torch.tensor(truth, dtype=torch.float64))
    assert fit_stop(features, chances) == pytest.approx(truth, abs=1e-5)


def test_the_fit_is_calibrated() -> None:
    """Newton's condition: among all drafts, as many are expected to be kept as are."""
    features, kept, _ = regression(1)
    expected = torch.sigmoid(features @ torch.tensor(fit_stop(features, kept), dtype=torch.float64))
    assert float(expected.mean()) == pytest.approx(float(kept.mean()), abs=1e-5)
    for low in (0.1, 0.3, 0.5, 0.7):
        some = (expected >= low) & (expected < low + 0.2)
        error = math.sqrt(0.25 / int(some.sum()))
        assert abs(float((expected - kept)[some].mean())) < 4.5 * error
        assert abs(float((expected / 2 - kept)[some].mean())) > 4.5 * error  # a wrong one fails


def test_the_fit_survives_what_has_no_answer() -> None:
    always = torch.ones(50, 4)
    assert all(map(math.isfinite, fit_stop(always, torch.ones(50))))
    apart = torch.linspace(-30, 0, 40)[:, None] * torch.tensor([0.0, 1, 1, 0]) + 1
    found = fit_stop(apart, (torch.arange(40) > 20).double())
    assert all(map(math.isfinite, found))
