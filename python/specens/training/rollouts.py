# SPDX-License-Identifier: Apache-2.0
"""How the ensemble of draft and target writes, and all that a head's gradient needs of it.

Rollouts are drawn token by token from the ensemble's own law v, at a temperature: sampled, for the
gradient of REINFORCE is that of samples. What is differentiable comes from `ensemble_terms`, whose
derivative by the draft's weight u is a number per token in closed form:

    mixture  v = (1-u) p + u q:      d log v(y) = (q(y) - p(y)) / v(y);  d (1 - TV(q, v)) = TV(p, q)
    product  v = softmax(z_p + u D), D = z_q - z_p, D' = D - E_v D:
                                     d log v(y) = D'(y);  d (1 - TV(q, v)) = -1/2 sum sign(v-q) v D'

So nothing of the vocabulary's size is kept for the backward pass, and the base models see none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specens.members.evaluation import evaluating
from specens.members.facts import forward_arguments
from specens.members.weight_head import WeightHead, last_hidden
from specens_kernels import Law, Stream, sample, uniforms

# Rows x vocabulary that are computed at once, in numbers.
_CHUNK_NUMBERS = 1 << 22
# A logit that is -inf becomes this far below the others: differences stay finite, masses 0.
_FLOOR = -1e4


class Terms(NamedTuple):
    """Per token; the first two differentiable by the draft's weight.

    log_prob: log v(y). acceptance: 1 - TV(q, v). target_log_prob: log p(y).
    """

    log_prob: Tensor
    acceptance: Tensor
    target_log_prob: Tensor


def ensemble_terms(
    draft_weight: Tensor,
    draft_logits: Tensor,
    target_logits: Tensor,
    tokens: Tensor,
    ensemble: str,
) -> Terms:
    """What REINFORCE and the regulariser need of each position.

    Args:
        draft_weight: (R,) in [0, 1].
        draft_logits, target_logits: (R, V), divided by the temperature.
        tokens: (R,) int64.
        ensemble: "mixture" or "product".
    Returns:
        Terms: three (R,) tensors of draft_weight's dtype.
    """
    return Terms(
        *_Terms.apply(draft_weight, draft_logits, target_logits, tokens, ensemble)  # type: ignore[no-untyped-call]
    )


class _Terms(torch.autograd.Function):
    """Values, and their derivatives by the draft's weight, row by row."""

    @staticmethod
    def forward(
        ctx: Any,
        draft_weight: Tensor,
        draft_logits: Tensor,
        target_logits: Tensor,
        tokens: Tensor,
        ensemble: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute = _mixture_terms if ensemble == "mixture" else _product_terms
        step = max(1, _CHUNK_NUMBERS // draft_logits.shape[-1])
        parts = []
        for start in range(0, len(tokens), step):
            rows = slice(start, start + step)
            log_draft, log_target = (
                logits[rows].to(draft_weight.dtype).log_softmax(-1).clamp_min_(_FLOOR)
                for logits in (draft_logits, target_logits)
            )
            parts.append(compute(draft_weight[rows, None], log_draft, log_target, tokens[rows]))
        log_prob, acceptance, target_log_prob, *slopes = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(target_log_prob)
        return log_prob, acceptance, target_log_prob

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None, None, None, None]:
        log_prob_slope, acceptance_slope = ctx.saved_tensors
        gradient = incoming[0] * log_prob_slope + incoming[1] * acceptance_slope
        return gradient, None, None, None, None


def _mixture_terms(
    weight: Tensor, log_draft: Tensor, log_target: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    of_draft, of_target = _at(log_draft, tokens), _at(log_target, tokens)
    weight = weight.squeeze(-1)
    log_prob = torch.logaddexp(torch.log1p(-weight) + of_target, torch.log(weight) + of_draft)
    distance = 0.5 * (log_target.exp() - log_draft.exp()).abs().sum(-1)
    log_prob_slope = (of_draft - log_prob).exp() - (of_target - log_prob).exp()
    return log_prob, 1 - (1 - weight) * distance, of_target, log_prob_slope, distance


def _product_terms(
    weight: Tensor, log_draft: Tensor, log_target: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    difference = log_draft - log_target
    log_law = (log_target + weight * difference).log_softmax(-1)
    law, draft = log_law.exp(), log_draft.exp()
    difference -= (law * difference).sum(-1, keepdim=True)
    return (
        _at(log_law, tokens),
        torch.minimum(draft, law).sum(-1),
        _at(log_target, tokens),
        _at(difference, tokens),
        -0.5 * (torch.sign(law - draft) * law * difference).sum(-1),
    )


def _at(rows: Tensor, tokens: Tensor) -> Tensor:
    return rows.gather(-1, tokens[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Rollout:
    """Texts that the ensemble wrote, (B, T) each; what is after a stop token has mask 0.

    tokens: int64. mask: float, 1 for tokens that count.
    log_prob, acceptance: differentiable by the head, as of `Terms`. target_log_prob: of `Terms`.
    draft_weight: what the head said.
    """

    tokens: Tensor
    mask: Tensor
    log_prob: Tensor
    acceptance: Tensor
    target_log_prob: Tensor
    draft_weight: Tensor

    def mean(self, per_token: Tensor) -> Tensor:
        """(B,) mean over the tokens that count."""
        return (per_token * self.mask).sum(-1) / self.mask.sum(-1)


class _Reader:
    """A model with a cache that reads left-padded rows: the next logits and their hidden states."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.arguments = forward_arguments(model)

    def __call__(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n) new tokens under the mask (B, S) of all -> (B, 1, V), (B, 1, H)."""
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        options = {"position_ids": places, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self.arguments}
        with evaluating((self.model,)), torch.no_grad(), last_hidden(self.model) as states:
            output = self.model(
                tokens,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **options,
            )
        self.cache = output.past_key_values
        return output.logits[:, -1:], states[-1][:, -1:]


def roll_out(
    draft: Any,
    target: Any,
    head: WeightHead,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    seeds: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    stop_tokens: Sequence[int] = (),
) -> Rollout:
    """Continue the prompts by tokens drawn from the ensemble; gradients reach the head alone.

    Args:
        draft, target: causal LMs on one device.
        head: says the draft's weight before each token, and which ensemble it is.
        prompts: B lists of at least one token each.
        new_tokens: T >= 1.
        seeds: (B,) int64. Row b depends on nothing else but its prompt.
        vocab_size: columns of the logits that count.
        temperature: > 0. Of both models, applied once.
        stop_tokens: a row ends with the first of them.
    """
    device = target.device
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    positions = torch.arange(new_tokens, device=device)[None]
    numbers = uniforms(seeds.to(device), positions, Stream.VERIFY)
    readers = _Reader(draft), _Reader(target)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    columns: list[tuple[Tensor, ...]] = []
    for step in range(new_tokens):
        (draft_logits, draft_hidden), (target_logits, target_hidden) = (
            reader(tokens, mask) for reader in readers
        )
        weight = head.draft_weight(draft_hidden, target_hidden)  # (B, 1)
        shares = torch.stack((weight, 1 - weight), -1).detach()
        law = Law(shares, head.ensemble, temperature, vocab_size=vocab_size)
        tokens = sample([draft_logits, target_logits], numbers[:, step : step + 1], law).tokens
        terms = ensemble_terms(
            weight[:, 0],
            draft_logits[:, 0, :vocab_size] / temperature,
            target_logits[:, 0, :vocab_size] / temperature,
            tokens[:, 0],
            head.ensemble,
        )
        columns.append((tokens[:, 0], going.to(weight.dtype), *terms, weight.detach()[:, 0]))
        going = going & ~torch.isin(tokens[:, 0], stops)
        mask = torch.cat((mask, torch.ones_like(tokens)), -1)
        if not bool(going.any()):
            break
    return Rollout(*(torch.stack(column, -1) for column in zip(*columns, strict=True)))


def read_text(model: Any, tokens: Tensor, first: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Teacher-forced, of one text (S,): what is said before each of tokens `first` >= 1 on.

    Returns:
        logits: (S - first, V). hidden: (S - first, H).
    """
    with evaluating((model,)), torch.no_grad(), last_hidden(model) as states:
        logits = model(tokens[None], use_cache=False, return_dict=True).logits
    return logits[0, first - 1 : -1, :vocab_size], states[-1][0, first - 1 : -1]
