# SPDX-License-Identifier: Apache-2.0
"""Is a learned head better than a constant weight? Both are measured on the same held-out text.

Every constant weight is a point (acceptance, quality), together the static front. A head is
compared with the front at its own acceptance, by linear interpolation, and the standard error comes
from resampling the examples. Quality is measured in four ways, per token in nats where not said:

* `text_log_likelihood`: of the references, teacher-forced, under the ensemble: how good a model of
  real text the ensemble is.
* `target_log_likelihood`: of the ensemble's own texts, under the target. The target alone does not
  have the most: texts of few surprises have more.
* `closeness_to_target`: minus KL(ensemble || target), estimated on the ensemble's own texts: how
  little the target's law is bent.
* `reward`: of the ensemble's own texts.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from specens.members.weight_head import WeightHead, hidden_size
from specens.training.batches import row_seeds
from specens.training.diversed import Pair
from specens.training.examples import Example
from specens.training.rewards import Reward
from specens.training.rollouts import ensemble_terms, read_text, roll_out
from specens.training.settings import HeadSettings

STATIC_WEIGHTS = tuple(n / 10 for n in range(11))
# Each kind of quality, and the acceptance on the same text.
QUALITIES = {
    "text_log_likelihood": "text_acceptance",
    "target_log_likelihood": "acceptance",
    "closeness_to_target": "acceptance",
    "reward": "acceptance",
}
_RESAMPLES = 1000
_BATCH = 64


@torch.no_grad()
def compare_with_static(
    pair: Pair,
    head: WeightHead,
    examples: Sequence[Example],
    reward: Reward,
    settings: HeadSettings,
    *,
    samples: int = 4,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure the head and the static weights 0, 0.1, ... 1 on held-out examples.

    Args:
        pair: the models. head: the learned one.
        examples: not those the head was trained on; without references there is no text quality.
        reward: what a text is worth.
        settings: temperature, ensemble, lengths and seed.
        samples: texts per example and candidate, from the same random numbers for all.
        progress: called after each candidate.
    Returns:
        JSON: `candidates`, by name the mean and standard error of every measure; `above_front`, by
        quality how far the head lies above the static front at its own acceptance.
    """
    sizes = hidden_size(pair.draft), hidden_size(pair.target)
    device = pair.target.device
    heads = {
        f"static {weight:.1f}": WeightHead.constant(*sizes, weight, ensemble=head.ensemble)
        for weight in STATIC_WEIGHTS
    } | {"learned": head}
    heads = {name: candidate.to(device) for name, candidate in heads.items()}
    measures = _read_references(pair, heads, examples, settings)
    for name, candidate in heads.items():
        measures[name] |= _write(pair, candidate, examples, reward, settings, samples)
        progress()
    static = [name for name in heads if name != "learned"]
    above = {
        quality: _above_front(
            [measures[name][acceptance] for name in static],
            [measures[name][quality] for name in static],
            measures["learned"][acceptance],
            measures["learned"][quality],
        )
        for quality, acceptance in QUALITIES.items()
        if quality in measures["learned"]
    }
    return {
        "examples": len(examples),
        "samples_per_example": samples,
        "candidates": {
            name: {measure: _mean_and_error(values) for measure, values in by_measure.items()}
            for name, by_measure in measures.items()
        },
        "above_front": above,
    }


def _read_references(
    pair: Pair,
    heads: dict[str, WeightHead],
    examples: Sequence[Example],
    settings: HeadSettings,
) -> dict[str, dict[str, Tensor]]:
    """Per candidate and measure, (E,): means over each reference's tokens."""
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in heads}
    for example in examples:
        prompt = pair.encode(example.prompt, settings.prompt_tokens)
        reference = pair.tokenizer(example.reference, add_special_tokens=False, verbose=False)
        if not reference["input_ids"]:
            return {name: {} for name in heads}
        tokens = torch.tensor([*prompt, *reference["input_ids"]], device=pair.target.device)
        (draft_logits, draft_hidden), (target_logits, target_hidden) = (
            read_text(model, tokens, len(prompt), pair.vocab_size)
            for model in (pair.draft, pair.target)
        )
        for name, head in heads.items():
            weight = head.draft_weight(draft_hidden, target_hidden)
            terms = ensemble_terms(
                weight,
                draft_logits / settings.temperature,
                target_logits / settings.temperature,
                tokens[len(prompt) :],
                head.ensemble,
            )
            means = [terms.log_prob.mean(), terms.acceptance.mean(), weight.mean()]
            rows[name].append(means)
    names = ("text_log_likelihood", "text_acceptance", "text_draft_weight")
    return {
        name: dict(zip(names, torch.tensor(means).double().T, strict=True))
        for name, means in rows.items()
    }


def _write(
    pair: Pair,
    head: WeightHead,
    examples: Sequence[Example],
    reward: Reward,
    settings: HeadSettings,
    samples: int,
) -> dict[str, Tensor]:
    """Per measure, (E,): means over the texts that the ensemble writes for each example."""
    # Seeds of their own: training takes those of steps from 0 on.
    seeds = row_seeds(settings.seed, -1, len(examples) * samples)
    rows: list[Tensor] = []
    for start in range(0, len(seeds), _BATCH):
        numbers = range(start, min(start + _BATCH, len(seeds)))
        chosen = [examples[number // samples] for number in numbers]
        rollout = roll_out(
            pair.draft,
            pair.target,
            head,
            [pair.encode(example.prompt, settings.prompt_tokens) for example in chosen],
            new_tokens=settings.new_tokens,
            seeds=seeds[start : start + len(chosen)],
            vocab_size=pair.vocab_size,
            temperature=settings.temperature,
            stop_tokens=pair.stop_tokens,
        )
        per_text = [
            rollout.mean(rollout.target_log_prob),
            rollout.mean(rollout.target_log_prob - rollout.log_prob),
            rollout.mean(rollout.acceptance),
            rollout.mean(rollout.draft_weight),
            pair.judge(reward, chosen, rollout),
        ]
        rows.append(torch.stack(per_text))
    names = (
        "target_log_likelihood",
        "closeness_to_target",
        "acceptance",
        "draft_weight",
        "reward",
    )
    means = torch.cat(rows, -1).reshape(len(names), len(examples), samples).double().mean(-1)
    return dict(zip(names, means.cpu(), strict=True))


def _mean_and_error(values: Tensor) -> dict[str, float]:
    """Over examples, which are independent; the texts of one example are not."""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": values.mean().item(), "standard_error": error}


def _above_front(
    front_acceptance: Sequence[Tensor],
    front_quality: Sequence[Tensor],
    acceptance: Tensor,
    quality: Tensor,
) -> dict[str, float]:
    """How far the head's quality is above the static one at its acceptance; examples resampled."""
    static = torch.stack([*front_acceptance, *front_quality, acceptance, quality])  # (2K + 2, E)
    count = len(front_acceptance)
    dice = torch.Generator().manual_seed(0)
    examples = static.shape[1]
    picks = torch.randint(examples, (_RESAMPLES, examples), generator=dice)
    weights = torch.stack([torch.bincount(pick, minlength=examples) for pick in picks]).double()
    weights = torch.cat([torch.ones(1, examples, dtype=torch.float64), weights]) / examples
    means = weights @ static.T  # (1 + resamples, 2K + 2)
    gains = torch.tensor(
        [
            row[-1] - interpolate(row[-2], row[:count], row[count : 2 * count])
            for row in means.tolist()
        ]
    )
    return {
        "acceptance": means[0, -2].item(),
        "learned": means[0, -1].item(),
        "static_at_same_acceptance": means[0, -1].item() - gains[0].item(),
        "gain": gains[0].item(),
        "standard_error": gains[1:].std().item() if examples > 1 else float("nan"),
    }


def interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """On the line through the points in order of x; constant beyond the ends."""
    points = sorted(zip(xs, ys, strict=True))
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1]
