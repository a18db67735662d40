# SPDX-License-Identifier: Apache-2.0
"""How far the text of a method is from the law that was asked for, computed and not sampled.

Every drafted place has a law of its own: what the acceptance rule keeps of the draft, and what
replaces the rest. It is compared with the target's, along text of the target's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specens import SpeculativeDecoder
from specens.members.weight_head import last_hidden
from specens.tuning.compare import sampling
from specens_kernels import Acceptance
from specens_kernels.acceptance.rules import Situation

# Tokens of the draft's law that are looked at; the rest of its mass is treated as they are.
_CANDIDATES = 128


def divergence(
    decoder: SpeculativeDecoder,
    models: Sequence[Any],
    drafts: Sequence[Any],
    prompts: Sequence[Tensor],
    *,
    joins: bool,
    tokens: int,
) -> float:
    """Mean total variation between what a drafted place emits and the law that was asked for.

    Args:
        decoder: of the method. models: the ensemble's. drafts: the smallest first.
        prompts: (1, S) int64. tokens: written after each.
        joins: whether the draft is a member of the ensemble.
    """
    distances = []
    plain = SpeculativeDecoder(models, schedule="plain")
    for i, prompt in enumerate(prompts):
        mask = torch.ones_like(prompt)
        text = plain.generate(prompt, attention_mask=mask, seed=i, **sampling(tokens))
        at = slice(prompt.shape[1] - 1, -1)
        target = torch.stack([law(model, text)[at] for model in models]).mean(0)
        memory = torch.zeros((), dtype=torch.float64)  # of rules that remember: as at the start
        if joins:
            draft = law(drafts[0], text)[at]
            weight = draft_weights(decoder, drafts[0], models[0], text)[at, None]
            distances += list(weight[:, 0] * (target - draft).abs().sum(-1) / 2)
            continue
        levels = [law(model, text)[at] for model in drafts] + [target]
        for row in zip(*levels, strict=True):
            emitted = row[0]
            for rule, q, p in zip(decoder.acceptances, row, row[1:], strict=False):
                emitted = emitted_law(rule, p, q, emitted, memory)
            distances.append((emitted - row[-1]).abs().sum() / 2)
    return float(torch.stack(distances).mean())


def law(model: Any, text: Tensor) -> Tensor:
    """(S, V) float64: the model's laws along (1, S) text."""
    with torch.no_grad():
        return model(text).logits[0].double().softmax(-1)


def draft_weights(decoder: SpeculativeDecoder, draft: Any, target: Any, text: Tensor) -> Tensor:
    """(S,): the draft's share of the mixture along the text."""
    if decoder.head is None:
        return torch.full((text.shape[1],), decoder.weights[0], dtype=torch.float64)
    hidden = []
    for model in (draft, target):
        with torch.no_grad(), last_hidden(model) as collected:
            model(text)
        hidden.append(collected[-1])
    return decoder.head.draft_weight(*hidden)[0].double()


def emitted_law(
    acceptance: Acceptance, target: Tensor, draft: Tensor, drawn: Tensor, memory: Tensor
) -> Tensor:
    """(V,): the law of what a rule emits for tokens that were `drawn` and pass for the draft's."""
    if acceptance.rule.lossless and drawn is draft:
        return target
    tokens = drawn.topk(min(_CANDIDATES, len(drawn))).indices
    shape = (len(tokens), len(target))
    at = Situation(target.expand(shape), draft.expand(shape), tokens, memory.expand(len(tokens)))
    judgement = acceptance.rule.judge(at, *acceptance.parameters)
    kept = judgement.kept.gather(-1, tokens[:, None])[:, 0]
    kept = (kept / draft[tokens]).clamp(max=1).nan_to_num(0.0)
    left = judgement.left / judgement.left.sum(-1, keepdim=True)
    left = torch.where(left.isfinite(), left, target)
    share = drawn[tokens] / drawn[tokens].sum()
    emitted = ((share * (1 - kept))[:, None] * left).sum(0)
    return emitted.scatter_add(0, tokens, share * kept)
