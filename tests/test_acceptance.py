# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules in closed form: what each emits, and that `lossless` says the truth."""

import pytest
import torch
from laws import one_point, output_law
from torch import Tensor

from specens_kernels import ACCEPTANCE_RULES, AcceptanceRule

RULES = pytest.mark.parametrize("rule", ACCEPTANCE_RULES.values(), ids=lambda rule: rule.name)


def distance_to_target(kept: Tensor, target: Tensor, draft: Tensor) -> float:
    return (output_law(kept, target, draft) - target).abs().sum(-1).max().item() / 2


def distributions(vocab_size: int) -> tuple[Tensor, Tensor]:
    target, draft = torch.randn(2, 8, vocab_size, dtype=torch.float64).softmax(-1)
    return target, draft


@RULES
@pytest.mark.parametrize("vocab_size", [2, 17, 32_000])
def test_a_rule_emits_the_target_law_iff_it_says_lossless(
    rule: AcceptanceRule, vocab_size: int
) -> None:
    target, draft = distributions(vocab_size)
    distance = distance_to_target(rule.kept(target, draft, 0.5), target, draft)
    assert (distance < 1e-12) == rule.lossless
    assert rule.lossless or distance > 1e-3


@RULES
def test_a_lossless_rule_keeps_no_more_than_target_and_draft(rule: AcceptanceRule) -> None:
    target, draft = distributions(17)
    kept = rule.kept(target, draft, 1.0)
    assert (kept >= 0).all()
    if rule.lossless:
        assert (kept <= torch.minimum(target, draft)).all()


def test_any_mass_below_both_is_lossless() -> None:
    target, draft = distributions(17)
    kept = torch.rand_like(target) * torch.minimum(target, draft)
    assert distance_to_target(kept, target, draft) < 1e-12


def test_rejection_keeps_the_most_that_is_lossless() -> None:
    target, draft = distributions(17)
    kept = ACCEPTANCE_RULES["rejection"].kept(target, draft, 1.0)
    assert torch.equal(kept, torch.minimum(target, draft))
    assert distance_to_target(kept + 0.01 * (draft - kept), target, draft) > 1e-4


def test_lenience_1_is_rejection_and_less_is_lossier() -> None:
    target, draft = distributions(17)
    lenient = ACCEPTANCE_RULES["lenient"].kept
    rejection = ACCEPTANCE_RULES["rejection"].kept(target, draft, 1.0)
    assert torch.equal(lenient(target, draft, 1.0), rejection)
    distances = [
        distance_to_target(lenient(target, draft, lenience), target, draft)
        for lenience in (0.9, 0.6, 0.3)
    ]
    assert 0.001 < distances[0] < distances[1] < distances[2]


def test_greedy_emits_the_one_point_law_whatever_the_draft() -> None:
    target = one_point(torch.arange(8), 8)
    for token in range(8):
        draft = one_point(token, 8).expand(8, -1)
        kept = ACCEPTANCE_RULES["greedy"].kept(target, draft, 1.0)
        assert torch.equal(output_law(kept, target, draft), target)


def test_sources_name_a_paper() -> None:
    assert all("arXiv:" in rule.source for rule in ACCEPTANCE_RULES.values())
