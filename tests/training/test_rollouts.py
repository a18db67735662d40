# SPDX-License-Identifier: Apache-2.0
"""Rollouts: their law, enumerated without cache and padding, and the gradient they estimate."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from toys import sequence_law, toy
from trainings import ENSEMBLES

from specens.members.weight_head import WeightHead
from specens.training import batches
from specens.training.diversed import advantages, head_loss
from specens.training.rollouts import Rollout, read_text, roll_out

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


def pair_of_toys(
    vocab_size: int = 11, kind: str = "llama", **config: Any
) -> tuple[Any, Any, WeightHead]:
    """Two models of different sizes and a head that is nowhere near a constant."""
    width = {"llama": "hidden_size", "gpt2": "n_embd"}[kind]
    draft = toy(1, vocab_size, kind=kind, **config)
    target = toy(2, vocab_size, kind=kind, **{width: 32}, **config)
    head = WeightHead(torch.randn(48) / 3, torch.tensor(0.2))
    return draft, target, head


def exact_laws(
    draft: Any, target: Any, head: WeightHead, text: Tensor, ensemble: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Weight and law after each token of one unpadded text (S,), read at once without a cache."""
    rows = [model(text[None], output_hidden_states=True) for model in (draft, target)]
    weight = head.draft_weight(*(row.hidden_states[-1] for row in rows))[0]
    q, p = (row.logits[0] / temperature for row in rows)
    share = weight[:, None]
    if ensemble == "mixture":
        return weight, share * q.softmax(-1) + (1 - share) * p.softmax(-1)
    return weight, (share * q + (1 - share) * p).softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # relative and absolute positions
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_rollouts_say_what_the_models_say_without_cache_and_padding(
    ensemble: str, kind: str
) -> None:
    draft, target, head = pair_of_toys(kind=kind)
    head.ensemble = ensemble
    seeds = torch.tensor([5, 6, 7])
    with torch.no_grad():
        got = roll_out(
            draft,
            target,
            head,
            PROMPTS,
            new_tokens=6,
            seeds=seeds,
            vocab_size=11,
            temperature=0.7,
        )
        for row, prompt in enumerate(PROMPTS):
            text = torch.cat([torch.tensor(prompt), got.tokens[row]])
            weight, law = exact_laws(draft, target, head, text, ensemble, 0.7)
            place = slice(len(prompt) - 1, -1)
            said = law[place].gather(1, got.tokens[row, :, None])[:, 0].log()
            # float32 models that see the same text in another order of sums.
            torch.testing.assert_close(got.log_prob[row], said, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.draft_weight[row], weight[place], atol=1e-5, rtol=0)
            alone = roll_out(
                draft,
                target,
                head,
                [prompt],
                new_tokens=6,
                seeds=seeds[row : row + 1],
                vocab_size=11,
                temperature=0.7,
            )
            assert alone.tokens[0].tolist() == got.tokens[row].tolist()


def test_models_in_training_mode_write_as_in_evaluation_and_stay_in_it() -> None:
    draft, target, head = pair_of_toys(attention_dropout=0.5)
    settings = {"new_tokens": 6, "seeds": torch.tensor([5, 6, 7]), "vocab_size": 11}
    text = torch.tensor(PROMPTS[2])
    evaluated = roll_out(draft, target, head, PROMPTS, **settings)  # type: ignore[arg-type]
    logits, hidden = read_text(target, text, 1, 11)
    draft.train()
    target.train()
    trained = roll_out(draft, target, head, PROMPTS, **settings)  # type: ignore[arg-type]
    assert torch.equal(trained.tokens, evaluated.tokens)
    assert torch.equal(trained.log_prob, evaluated.log_prob)
    for given, expected in zip(read_text(target, text, 1, 11), (logits, hidden), strict=True):
        assert torch.equal(given, expected)
    assert draft.training
    assert target.training


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_rollouts_are_samples_of_the_ensemble(ensemble: str) -> None:
    draft, target, head = pair_of_toys(5)
    head = WeightHead.constant(16, 32, 0.3, ensemble=ensemble)
    number = 4000
    with torch.no_grad():
        got = roll_out(
            draft,
            target,
            head,
            [[1, 2]] * number,
            new_tokens=2,
            seeds=batches.row_seeds(0, 0, number),
            vocab_size=5,
        )
    law = sequence_law(
        [draft, target], torch.tensor([[1, 2]]), 2, weights=(0.3, 0.7), ensemble=ensemble
    )
    seen = torch.bincount(got.tokens[:, 0] * 5 + got.tokens[:, 1], minlength=25)
    assert chisquare(seen.numpy(), number * law.flatten().numpy()).pvalue > 1e-4
    wrong = sequence_law(
        [draft, target], torch.tensor([[1, 2]]), 2, weights=(0.7, 0.3), ensemble=ensemble
    )
    assert chisquare(seen.numpy(), number * wrong.flatten().numpy()).pvalue < 1e-9


def test_the_gradient_of_reinforce_is_the_rewards() -> None:
    """Against the gradient of the expected reward, all texts of two tokens enumerated."""
    draft, target, head = pair_of_toys(4)
    head.delta.requires_grad_()
    worth = torch.randn(4, 4)
    prompt = torch.tensor([1, 2])
    expected_reward = torch.zeros(())
    for first in range(4):
        text = torch.tensor([1, 2, first])
        with torch.no_grad():
            states = [model(text[None], output_hidden_states=True) for model in (draft, target)]
        weight = head.draft_weight(*(row.hidden_states[-1] for row in states))[0, 1:, None]
        q, p = (row.logits[0, 1:].softmax(-1) for row in states)
        law = weight * q + (1 - weight) * p
        expected_reward = expected_reward + (law[0, first] * law[1] * worth[first]).sum()
    (exact,) = torch.autograd.grad(expected_reward, head.delta)

    def estimates(loss_of: Callable[[Rollout, Tensor], Tensor]) -> Tensor:
        """(batches, H) of the gradient of minus the loss."""
        found = []
        for batch in range(40):
            rollout = roll_out(
                draft,
                target,
                head,
                [prompt.tolist()] * 128,
                new_tokens=2,
                seeds=batches.row_seeds(1, batch, 128),
                vocab_size=4,
            )
            reward = worth[rollout.tokens[:, 0], rollout.tokens[:, 1]]
            loss = loss_of(rollout, advantages(reward, 8, "group", {}))
            found.append(-torch.autograd.grad(loss, head.delta)[0])
        return torch.stack(found)

    def largest_z(found: Tensor) -> float:
        return float(((found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)).abs().max())

    # 48 correlated coordinates, each a t of 39 degrees: beyond 5 once in 2,000.
    assert largest_z(estimates(lambda rollout, a: head_loss(rollout, a, 0.0))) < 5
    # Credit for the last token alone is wrong, and is seen to be.
    last = torch.tensor([0.0, 1.0])
    wrong = estimates(
        lambda rollout, a: head_loss(replace(rollout, mask=rollout.mask * last), a, 0.0)
    )
    assert largest_z(wrong) > 7


def test_a_text_ends_with_its_stop_token() -> None:
    draft, target, head = pair_of_toys()
    with torch.no_grad():
        got = roll_out(
            draft,
            target,
            head,
            PROMPTS * 20,
            new_tokens=8,
            seeds=torch.arange(60),
            vocab_size=11,
            stop_tokens=[2, 7],
        )
    stopped = 0
    for tokens, mask in zip(got.tokens.tolist(), got.mask.tolist(), strict=True):
        stops = [place for place, token in enumerate(tokens) if token in (2, 7)]
        counted = stops[0] + 1 if stops else len(tokens)
        stopped += bool(stops)
        assert mask == [1.0] * counted + [0.0] * (len(tokens) - counted)
    assert 0 < stopped < 60
