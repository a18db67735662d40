# SPDX-License-Identifier: Apache-2.0
"""The loss of the weight head: closed gradients against dense autograd, and the published sign."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trainings import ENSEMBLES

from specens.training.diversed import advantages, head_loss
from specens.training.rollouts import Rollout, ensemble_terms

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_terms(
    weight: Tensor, draft: Tensor, target: Tensor, tokens: Tensor, ensemble: str
) -> tuple[Tensor, Tensor]:
    """log v(y) and 1 - TV(q, v), with tensors of the vocabulary's size that autograd follows."""
    weight = weight[:, None]
    q, p = draft.softmax(-1), target.softmax(-1)
    if ensemble == "mixture":
        law = weight * q + (1 - weight) * p
    else:
        law = (weight * draft + (1 - weight) * target).softmax(-1)
    return law.gather(1, tokens[:, None])[:, 0].log(), 1 - 0.5 * (q - law).abs().sum(-1)


def random_rows(rows: int = 12, width: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    draft, target = 2 * torch.randn(2, rows, width, dtype=torch.float64)
    return weight, draft, target, torch.randint(width, (rows,))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_the_closed_gradients_are_autograds(ensemble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specens.training.rollouts._CHUNK_NUMBERS", 35)  # five rows
    weight, draft, target, tokens = random_rows()
    terms = ensemble_terms(weight, draft, target, tokens, ensemble)
    dense = dense_terms(weight, draft, target, tokens, ensemble)
    for got, expected in zip(terms, dense, strict=False):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
        direction = torch.randn(12, dtype=torch.float64)
        (of_got,) = torch.autograd.grad((got * direction).sum(), weight, retain_graph=True)
        (of_expected,) = torch.autograd.grad(
            (expected * direction).sum(), weight, retain_graph=True
        )
        torch.testing.assert_close(of_got, of_expected, atol=1e-12, rtol=0)
    expected = target.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(terms.target_log_prob, expected)
    assert not terms.target_log_prob.requires_grad
    assert torch.autograd.gradcheck(
        lambda u: ensemble_terms(u, draft, target, tokens, ensemble)[:2], (weight,)
    )


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_constant_weights_and_tokens_without_mass_are_no_special_case(ensemble: str) -> None:
    _, draft, target, tokens = random_rows()
    padded = [torch.nn.functional.pad(z, (0, 2), value=-torch.inf) for z in (draft, target)]
    for weight, alone in ((0.0, target), (1.0, draft)):
        terms = ensemble_terms(torch.full((12,), weight).double(), *padded, tokens, ensemble)
        law = alone.softmax(-1)
        torch.testing.assert_close(terms.log_prob, law.gather(1, tokens[:, None])[:, 0].log())
        expected = torch.minimum(law, draft.softmax(-1)).sum(-1)
        torch.testing.assert_close(terms.acceptance, expected)


def rollout_of(weight: Tensor, draft: Tensor, target: Tensor, tokens: Tensor) -> Rollout:
    """Rows of random_rows as texts of three tokens."""
    terms = ensemble_terms(weight, draft, target, tokens, "mixture")
    columns = (tokens, torch.ones_like(weight), *terms, weight.detach())
    return Rollout(*(column.reshape(-1, 3) for column in columns))


def published_loss(rollout: Rollout, advantage: Tensor, acceptance_scale: float) -> Tensor:
    """The sign of the published code, whose scale is 0.05 |L_r| / L_a with L_a < 0."""
    return head_loss(rollout, advantage, -acceptance_scale)


def raises_acceptance(loss_of: Callable[[Rollout, Tensor, float], Tensor]) -> bool:
    weight, *rest = random_rows()
    before = rollout_of(weight, *rest)
    (slope,) = torch.autograd.grad(loss_of(before, torch.zeros(4), 0.5), weight)
    after = rollout_of((weight - 0.1 * slope).detach().clamp(0, 1), *rest)
    return bool((after.acceptance > before.acceptance).all())


def test_the_regulariser_raises_acceptance_and_the_published_sign_does_not() -> None:
    assert raises_acceptance(head_loss)
    assert not raises_acceptance(published_loss)


def test_the_loss_counts_what_is_before_the_stop() -> None:
    weight, *rest = random_rows()
    rollout = rollout_of(weight, *rest)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).double()
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    got = head_loss(replace(rollout, mask=mask), advantage, 0.25)
    expected = -(advantage[:, None] * rollout.log_prob * mask).sum() / 4
    expected = expected - 0.25 * (rollout.acceptance * mask).sum() / 4
    torch.testing.assert_close(got, expected)


def test_baselines_do_not_look_at_the_row_itself() -> None:
    rewards_ = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    got = advantages(rewards_, 3, "group", {})
    assert got.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]
    memory: dict[str, float] = {}
    assert advantages(rewards_, 3, "ema", memory).tolist() == [-1, 0, 4, -2, -2, 1]
    assert memory == {"baseline": 2.0}
    got = advantages(rewards_ + 10, 3, "ema", memory)
    assert got.tolist() == [9, 10, 14, 8, 8, 11]
    assert memory["baseline"] == pytest.approx(0.9 * 2 + 0.1 * 12)
