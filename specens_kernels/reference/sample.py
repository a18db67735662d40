# SPDX-License-Identifier: Apache-2.0
"""`sample`: one token a row, from the ensemble or from one member alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..law import LawTensors
from .draw import draw
from .laws import EMPTY_LAW, TargetLaw, first_argmax, greedy_rows, proposal_law, target_law


def sample(
    logits: Sequence[Tensor], uniforms: Tensor, law: LawTensors, member: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, log-sum-exps and status, each (B, T); see `ops.sample`."""
    batch = len(uniforms)
    if member >= 0:
        greedy = greedy_rows(law, batch)
        temperature = law.temperature.expand(batch, len(logits))[:, member]
        alone, status = proposal_law(logits[member], temperature, law, greedy)
        target = TargetLaw(
            alone.log_probs,
            alone.lse,
            status | alone.empty.int() * EMPTY_LAW,
            greedy,
            torch.zeros_like(status),
        )
    else:
        target = target_law(logits, law)
    best = first_argmax(target.log_probs)
    drawn = draw(target.log_probs.exp(), uniforms[..., 1:])
    token = torch.where(target.greedy[:, None], best, drawn)
    token = token.masked_fill((target.status & EMPTY_LAW) > 0, 0)
    log_prob = target.log_probs.gather(-1, token[..., None]).squeeze(-1)
    return token, log_prob.float(), target.lse.float(), target.status
