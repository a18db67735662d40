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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specens.members.weight_head import WeightHead, hidden_size
from specens.training.batches import in_turn, row_seeds
from specens.training.examples import Example
from specens.training.files import writing
from specens.training.loop import optimise
from specens.training.rewards import Reward
from specens.training.rollouts import Rollout, roll_out
from specens.training.settings import HeadSettings
from specens_kernels import Refusal

_MOMENTUM = 0.9
CURVES = ("loss", "reward", "acceptance", "draft_weight")


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
            Refusal: there is none.
        """
        ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"][-tokens:]
        if not ids:
            raise Refusal("train", "data", "a prompt with tokens", repr(prompt[:40]))
        return ids

    def judge(self, reward: Reward, examples: Sequence[Example], rollout: Rollout) -> Tensor:
        """(B,) float32. What the texts are worth; example b is row b's."""
        likelihoods = rollout.mean(rollout.target_log_prob).tolist()
        scores = []
        for example, row, mask, likelihood in zip(
            examples, rollout.tokens, rollout.mask, likelihoods, strict=True
        ):
            text = self.tokenizer.decode(row[mask > 0].tolist(), skip_special_tokens=True)
            scores.append(reward.score(example, text, likelihood))
        return torch.tensor(scores, dtype=torch.float32, device=rollout.tokens.device)


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
    facts = {"reward": reward.name, "models": list(pair.names), "examples": len(examples)}
    rows = optimise(
        {"delta": head.delta, "bias": head.bias},
        _Steps(pair, head, examples, reward, settings),
        settings.plan,
        folder,
        settings={**asdict(settings), **facts},
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
            "steps": settings.plan.steps,
        },
    )
    with writing(folder):
        trained.save(folder)
    return trained, rows


class _Steps:
    """The loss of each step, and what its curves show."""

    def __init__(
        self,
        pair: Pair,
        head: WeightHead,
        examples: Sequence[Example],
        reward: Reward,
        settings: HeadSettings,
    ) -> None:
        self.pair, self.head, self.reward, self.settings = pair, head, reward, settings
        self.examples = examples
        self.prompts = [pair.encode(example.prompt, settings.prompt_tokens) for example in examples]

    def __call__(self, step: int, memory: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        settings = self.settings
        chosen = in_turn(len(self.examples), settings.prompts_per_step, step, settings.seed)
        chosen = [place for place in chosen for _ in range(settings.samples_per_prompt)]
        rollout = roll_out(
            self.pair.draft,
            self.pair.target,
            self.head,
            [self.prompts[place] for place in chosen],
            new_tokens=settings.new_tokens,
            seeds=row_seeds(settings.seed, step, len(chosen)),
            vocab_size=self.pair.vocab_size,
            temperature=settings.temperature,
            stop_tokens=self.pair.stop_tokens,
        )
        texts = [self.examples[place] for place in chosen]
        rewards = self.pair.judge(self.reward, texts, rollout)
        advantage = advantages(rewards, settings.samples_per_prompt, settings.baseline, memory)
        loss = head_loss(rollout, advantage, settings.acceptance_scale)
        return loss, {
            "reward": rewards.mean().item(),
            "acceptance": rollout.mean(rollout.acceptance.detach()).mean().item(),
            "draft_weight": rollout.mean(rollout.draft_weight).mean().item(),
        }
