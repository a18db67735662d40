# SPDX-License-Identifier: Apache-2.0
"""Train a `WeightHead` by REINFORCE on what draft and target write together (arXiv:2604.07622).

Each step lets the ensemble write, at a temperature, and lowers

    loss = -(1/B) sum_b (R_b - baseline) sum_t log v(y_t)  -  scale * (1/B) sum_b S_b,
    S_b  = sum_t (1 - TV(q_t, v_t)),

so rewarded texts become more likely, and drafts are accepted more often: `scale` is what one more
accepted token is worth, in units of the reward. (The published code gives the second term the other
sign, which lowers acceptance.) Draft and target are frozen and see no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specens.members.weight_head import WeightHead, hidden_size
from specens.training.examples import Example, in_turn, row_seeds
from specens.training.loop import Schedule, optimise
from specens.training.rewards import Reward
from specens.training.rollouts import Rollout, roll_out

BASELINES = ("ema", "group")
_MOMENTUM = 0.9
CURVES = ("loss", "reward", "acceptance", "draft_weight")


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
    schedule: Schedule = field(default_factory=lambda: Schedule(100, 0.02))

    def __post_init__(self) -> None:
        """Check every number and name."""
        for name in ("prompts_per_step", "samples_per_prompt", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name}: expected >= 1, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"train: temperature: expected > 0, got {self.temperature}")
        if not 0 <= self.acceptance_scale < float("inf"):
            raise ValueError(f"train: acceptance_scale: expected >= 0, got {self.acceptance_scale}")
        if self.baseline not in BASELINES:
            known = ", ".join(BASELINES)
            raise ValueError(
                f"train: baseline: unknown name {self.baseline!r}; known names: {known}"
            )
        if self.baseline == "group" and self.samples_per_prompt < 2:
            raise ValueError(
                f"train: samples_per_prompt: expected >= 2 for baseline 'group', "
                f"got {self.samples_per_prompt}"
            )


@dataclass(frozen=True)
class Pair:
    """Draft and target with what they share.

    stop_tokens: ids that end a text. names: of draft and target, for the head's metadata.
    """

    draft: Any
    target: Any
    tokenizer: Any
    vocab_size: int
    stop_tokens: Sequence[int] = ()
    names: Sequence[str] = ("draft", "target")

    def encode(self, prompt: str, tokens: int) -> list[int]:
        """The last tokens of a prompt; at least one.

        Raises:
            ValueError: there is none.
        """
        ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"][-tokens:]
        if not ids:
            raise ValueError(f"train: data: expected a prompt with tokens, got {prompt[:40]!r}")
        return ids

    def judge(self, reward: Reward, examples: Sequence[Example], rollout: Rollout) -> Tensor:
        """(B,) float32. What the texts are worth; example b is row b's."""
        likelihoods = rollout.mean(rollout.target_log_prob).tolist()
        found = []
        for example, row, mask, likelihood in zip(
            examples, rollout.tokens, rollout.mask, likelihoods, strict=True
        ):
            text = self.tokenizer.decode(row[mask > 0].tolist(), skip_special_tokens=True)
            found.append(reward.score(example, text, likelihood))
        return torch.tensor(found, dtype=torch.float32, device=rollout.tokens.device)


def advantages(
    rewards: Tensor, samples_per_prompt: int, baseline: str, memory: dict[str, float]
) -> Tensor:
    """(B,) rewards less a baseline that does not depend on the row's own text.

    Rows of one prompt are neighbours. The running mean is kept in `memory`; the first batch has no
    past, and is compared with its own mean.
    """
    if baseline == "group":
        groups = rewards.reshape(-1, samples_per_prompt)
        others = groups.sum(-1, keepdim=True) - groups
        return (groups - others / (samples_per_prompt - 1)).reshape(-1)
    mean = rewards.mean().item()
    before = memory.get("baseline", mean)
    memory["baseline"] = _MOMENTUM * before + (1 - _MOMENTUM) * mean
    return rewards - before


def head_loss(rollout: Rollout, advantage: Tensor, acceptance_scale: float) -> Tensor:
    """() The loss of the module's docstring."""
    log_prob = (rollout.log_prob * rollout.mask).sum(-1)
    accepted = (rollout.acceptance * rollout.mask).sum(-1)
    return -(advantage * log_prob).mean() - acceptance_scale * accepted.mean()


def train_head(
    pair: Pair,
    examples: Sequence[Example],
    reward: Reward,
    settings: HeadSettings,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[WeightHead, list[dict[str, float]]]:
    """Train a head that starts at one half everywhere; save it, its curves and checkpoints.

    Args:
        pair: the models, which are not changed.
        examples: prompts, and what the reward needs of them.
        reward: what a text is worth.
        settings: everything else.
        folder: where all is written; it exists.
        resume: go on from the folder's checkpoint.
        progress: called with the number of steps done, after each.
    Returns:
        The head, and one row of numbers for each step.
    """
    sizes = hidden_size(pair.draft), hidden_size(pair.target)
    head = WeightHead.constant(*sizes, ensemble=settings.ensemble).to(pair.target.device)
    head.delta.requires_grad_()
    head.bias.requires_grad_()
    prompts = [pair.encode(example.prompt, settings.prompt_tokens) for example in examples]
    batch = settings.prompts_per_step * settings.samples_per_prompt

    def step_of(step: int, memory: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        chosen = in_turn(len(examples), settings.prompts_per_step, step, settings.seed)
        chosen = [place for place in chosen for _ in range(settings.samples_per_prompt)]
        rollout = roll_out(
            pair.draft,
            pair.target,
            head,
            [prompts[place] for place in chosen],
            new_tokens=settings.new_tokens,
            seeds=row_seeds(settings.seed, step, batch),
            vocab_size=pair.vocab_size,
            temperature=settings.temperature,
            stop_tokens=pair.stop_tokens,
        )
        rewards = pair.judge(reward, [examples[place] for place in chosen], rollout)
        advantage = advantages(rewards, settings.samples_per_prompt, settings.baseline, memory)
        loss = head_loss(rollout, advantage, settings.acceptance_scale)
        return loss, {
            "reward": rewards.mean().item(),
            "acceptance": rollout.mean(rollout.acceptance.detach()).mean().item(),
            "draft_weight": rollout.mean(rollout.draft_weight).mean().item(),
        }

    said = {**asdict(settings), "reward": reward.name, "models": list(pair.names)}
    rows = optimise(
        {"delta": head.delta, "bias": head.bias},
        step_of,
        settings.schedule,
        folder,
        settings={**said, "examples": len(examples)},
        resume=resume,
        progress=progress,
    )
    trained = WeightHead(
        head.delta.detach(),
        head.bias.detach(),
        settings.ensemble,
        *sizes,
        metadata={
            "draft": pair.names[0],
            "target": pair.names[1],
            "task": reward.name,
            "temperature": settings.temperature,
            "steps": settings.schedule.steps,
        },
    )
    trained.save(folder)
    return trained, rows
