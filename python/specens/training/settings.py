# SPDX-License-Identifier: Apache-2.0
"""Every number and name that shapes a training, checked where it is written; needs no torch.

A resumed run must have the same settings, so all that shapes a run is a field here. To add one, add
the field, its check, and its option in `cli/train.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from specens_kernels import Refusal

BASELINES = ("ema", "group")


def _check(settings: Any, names: Iterable[str], least: float, *, above: bool = False) -> None:
    """Refuse fields that are not finite, or not at least, or not above, the least."""
    for name in names:
        value = getattr(settings, name)
        if not least <= value < math.inf or (above and value == least):
            raise Refusal("train", name, f"{'>' if above else '>='} {least:g}", value)


@dataclass(frozen=True)
class StepPlan:
    """How many steps, how long they are, and how often they are saved.

    steps: >= 1. rate: AdamW's, > 0, reached after `warmup_steps` and 0 in the end.
    clip: the gradient's largest norm, > 0. save_every: steps between checkpoints, >= 1.
    """

    steps: int
    rate: float
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    save_every: int = 20

    def __post_init__(self) -> None:
        """Check every number."""
        _check(self, ("steps", "save_every"), 1)
        _check(self, ("rate", "clip"), 0, above=True)
        _check(self, ("warmup_steps", "weight_decay"), 0)

    def rate_at(self, step: int) -> float:
        """Linear up to `rate` in the last step of the warm-up, then half a cosine towards 0."""
        if step < self.warmup_steps:
            return self.rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class HeadSettings:
    """All that shapes the training of a head, but for the models and the data.

    ensemble: "mixture" or "product". temperature: > 0, of both models.
    prompts_per_step, samples_per_prompt: their product is the batch B.
    prompt_tokens: the last of each prompt that are read. new_tokens: most that are written.
    baseline: "ema" is a running mean of the batches' rewards (momentum 0.9, starting from the first
        batch's own); "group" is the mean of the prompt's other samples.
    acceptance_scale: what one more accepted token is worth, in units of the reward; >= 0.
    """

    ensemble: str = "mixture"
    temperature: float = 1.0
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 32
    baseline: str = "group"
    acceptance_scale: float = 0.1
    seed: int = 0
    plan: StepPlan = field(default_factory=lambda: StepPlan(100, 0.02))

    def __post_init__(self) -> None:
        """Check every number and name."""
        counts = ("prompts_per_step", "samples_per_prompt", "prompt_tokens", "new_tokens")
        _check(self, counts, 1)
        _check(self, ("temperature",), 0, above=True)
        _check(self, ("acceptance_scale",), 0)
        if self.baseline not in BASELINES:
            raise Refusal.unknown("train", "baseline", self.baseline, BASELINES)
        if self.baseline == "group" and self.samples_per_prompt < 2:
            expected = ">= 2 for baseline 'group'"
            raise Refusal("train", "samples_per_prompt", expected, self.samples_per_prompt)
        _check_ensemble(self.ensemble)


@dataclass(frozen=True)
class DraftSettings:
    """All that shapes the training of a draft, but for the models and the data.

    divergence: an entry of `DIVERGENCES` with a gradient.
    ensemble, weights: how several targets are one; see `specens_kernels.Law`.
    select: (0, 1]. The fraction of a step's tokens that are trained on, by how far the draft's
        divergence is above the reference's.
    online: train on rejected positions of text that the targets write; else on the data's text.
    windows_per_step: texts in a step. prompt_tokens, new_tokens: of each, when online.
    """

    divergence: str = "tv"
    ensemble: str = "mixture"
    weights: tuple[float, ...] = (1.0,)
    select: float = 1.0
    online: bool = False
    windows_per_step: int = 6
    prompt_tokens: int = 64
    new_tokens: int = 64
    seed: int = 0
    plan: StepPlan = field(default_factory=lambda: StepPlan(500, 3e-3))

    def __post_init__(self) -> None:
        """Check every number and name."""
        if not 0 < self.select <= 1:
            raise Refusal("train", "select", "a fraction in (0, 1]", self.select)
        _check(self, ("windows_per_step", "prompt_tokens", "new_tokens"), 1)

        from specens_kernels import DIVERGENCES, Law

        known = [name for name, entry in DIVERGENCES.items() if entry.weighted_slope is not None]
        if self.divergence not in known:
            raise Refusal.unknown("train", "divergence", self.divergence, known)
        _check_ensemble(self.ensemble)
        Law(weights=self.weights, ensemble=self.ensemble)  # checks the weights


def _check_ensemble(name: str) -> None:
    from specens_kernels import ENSEMBLES

    if name not in ENSEMBLES:
        raise Refusal.unknown("train", "ensemble", name, ENSEMBLES)
