# SPDX-License-Identifier: Apache-2.0
"""Every ensemble is a distribution with the right limits, through `mix` on every backend.

The law by definition is `laws.ensemble_law`; here are the facts that hold without computing it.
"""

import math

import pytest
import torch
from torch import Tensor

from specens_kernels import ENSEMBLES, Ensemble, Law, Status, mix

INF = math.inf
EVERY = pytest.mark.parametrize("ensemble", ENSEMBLES.values(), ids=lambda e: e.name)
SCOPES = pytest.mark.parametrize("scope", ["member", "ensemble"])

# log_probs are float32: one part in 2^-24 for each of a few operations on numbers up to about 10.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def members(count: int = 3, vocab_size: int = 37) -> list[Tensor]:
    return [2 * torch.randn(2, 3, vocab_size) for _ in range(count)]


def probs(logits: list[Tensor], law: Law) -> Tensor:
    return mix(logits, law)[0].exp()


@EVERY
@SCOPES
def test_it_is_a_distribution(backend: str, ensemble: Ensemble, scope: str) -> None:
    law = Law((0.5, 0.3, 0.2), ensemble.name, temperature=0.7, scope=scope)
    mass = probs(members(), law)
    assert (mass >= 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)


@EVERY
def test_one_member_is_its_own_softmax(backend: str, ensemble: Ensemble) -> None:
    (logits,) = members(1)
    log_probs, status = mix([logits], Law((1.0,), ensemble.name, temperature=0.5))
    torch.testing.assert_close(log_probs, (logits / 0.5).log_softmax(-1), **CLOSE)
    assert not status.any()


@EVERY
@SCOPES
def test_the_order_of_members_does_not_matter(backend: str, ensemble: Ensemble, scope: str) -> None:
    first, second, third = members()
    options = {"ensemble": ensemble.name, "scope": scope, "top_k": 9}
    one = mix([first, second, third], Law((0.5, 0.3, 0.2), **options))[0]
    other = mix([third, first, second], Law((0.2, 0.5, 0.3), **options))[0]
    torch.testing.assert_close(one, other, **CLOSE)


@EVERY
@SCOPES
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
def test_weight_0_is_absence(backend: str, ensemble: Ensemble, scope: str, garbage: float) -> None:
    first, second = members(2)
    absent = torch.full_like(first, garbage)
    options = {"ensemble": ensemble.name, "scope": scope, "temperature": 0.8}
    with_it = mix([first, absent, second], Law((0.6, 0.0, 0.4), **options))
    without = mix([first, second], Law((0.6, 0.4), **options))
    assert torch.equal(with_it[0], without[0])
    assert not with_it[1].any()


def test_weight_0_may_hold_in_some_rows_only(backend: str) -> None:
    first, second = members(2)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]).expand(2, -1, -1)
    mass = probs([first, second], Law(weights))
    torch.testing.assert_close(mass[:, 0], first[:, 0].softmax(-1), **CLOSE)
    torch.testing.assert_close(mass[:, 1], second[:, 1].softmax(-1), **CLOSE)
    half = (first[:, 2].softmax(-1) + second[:, 2].softmax(-1)) / 2
    torch.testing.assert_close(mass[:, 2], half, **CLOSE)


def test_a_mixture_lies_between_its_members(backend: str) -> None:
    logits = members()
    alone = torch.stack([member.softmax(-1) for member in logits])
    mass = probs(logits, Law((0.5, 0.3, 0.2)))
    assert (mass >= alone.amin(0) - 1e-6).all()
    assert (mass <= alone.amax(0) + 1e-6).all()


def test_equal_weights_of_a_product_are_the_geometric_mean(backend: str) -> None:
    logits = members()
    mean = torch.stack([member.double().log_softmax(-1) for member in logits]).mean(0).exp()
    expected = (mean / mean.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(probs(logits, Law((1 / 3,) * 3, "product")), expected, **CLOSE)


@pytest.mark.parametrize("strength", [0.1, 0.5, 2.0])
def test_contrastive_decoding_is_a_product_with_weights_of_both_signs(
    backend: str, strength: float
) -> None:
    expert, amateur = members(2)
    law = Law((1 + strength, -strength), "product", plausibility=0.1)
    kept = expert.softmax(-1) >= 0.1 * expert.softmax(-1).amax(-1, keepdim=True)
    contrast = (1 + strength) * expert.log_softmax(-1) - strength * amateur.log_softmax(-1)
    expected = contrast.masked_fill(~kept, -INF).softmax(-1)
    torch.testing.assert_close(probs([expert, amateur], law), expected, atol=1e-5, rtol=1e-4)
    assert (~kept).any()


@SCOPES
def test_plausibility_1_leaves_the_experts_best_token(backend: str, scope: str) -> None:
    expert, amateur = members(2)
    law = Law((1.5, -0.5), "product", plausibility=1.0, temperature=0.5, scope=scope)
    mass = probs([expert, amateur], law)
    assert torch.equal(mass.argmax(-1), expert.argmax(-1))
    assert torch.equal(mass.amax(-1), torch.ones(2, 3))


def test_plausibility_is_measured_at_the_temperature_of_its_scope(backend: str) -> None:
    expert = torch.tensor([[[0.0, -1.0, -2.0, -3.0]]])
    # exp(-1 / T): at T = 2 of the expert's own law 0.61, 0.37, 0.22; at T = 1 0.37, 0.14, 0.05.
    for scope, survivors in (("member", 3), ("ensemble", 2)):
        law = Law((1.0,), "product", temperature=2.0, plausibility=0.3, scope=scope)
        assert (probs([expert], law) > 0).sum() == survivors


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_any_member_vetoes_a_token_of_a_product(backend: str, weight: float) -> None:
    first, second = members(2)
    second[..., 5] = -INF
    mass = probs([first, second], Law((1.0, weight), "product"))
    assert (mass[..., 5] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)


def test_infinities_of_a_product_that_cancel_are_a_veto(backend: str) -> None:
    """+inf is all the mass for a positive weight, none for a negative one, and none for both."""
    first, second = members(2)
    law = Law((1.0, -0.5), "product", scope="ensemble")
    first[..., 3], second[..., 3] = INF, INF
    second[..., 4] = INF
    mass = probs([first, second], law)
    assert (mass[..., 3:5] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)
    first[..., 5] = INF
    mass = probs([first, second], law)
    assert (mass[..., 5] == 1).all()


def test_an_infinite_logit_takes_all_the_mass_of_its_member(backend: str) -> None:
    """Before the fold if members are warped, so the others' tokens are gone; else after it."""
    first, second = members(2)
    first[..., 3], second[..., 3] = INF, -INF
    log_probs, status = mix([first, second], Law((0.5, 0.5), "product"))
    assert torch.isneginf(log_probs).all()
    assert (status == Status.INFINITE_LOGITS | Status.EMPTY_LAW).all()
    mass = probs([first, second], Law((0.5, 0.5), "product", scope="ensemble"))
    assert (mass[..., 3] == 0).all()
    assert (mass[..., :3] > 0).all()


def test_no_member_vetoes_a_token_of_a_mixture(backend: str) -> None:
    first, second = members(2)
    second[..., 5] = -INF
    mass = probs([first, second], Law((0.75, 0.25)))
    torch.testing.assert_close(mass[..., 5], 0.75 * first.softmax(-1)[..., 5], **CLOSE)


def test_one_fold_serves_every_entry() -> None:
    """The kernels know `weighted_sum` only: a fold of another kind needs a line in csrc/rules.h."""
    value, weight = torch.tensor([2.0, -1.0]), torch.tensor(3.0)
    for ensemble in ENSEMBLES.values():
        assert ensemble.fold(torch.ones(2), value, weight).tolist() == [7.0, -2.0]
        assert ensemble.space in ("probs", "logits")
        assert "arXiv:" in ensemble.source
