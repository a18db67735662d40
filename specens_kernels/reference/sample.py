# SPDX-License-Identifier: Apache-2.0
"""`sample`: one token a row, or several that differ, from the ensemble or one member alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..law import LawTensors
from .draw import PADDING, draw
from .laws import EMPTY_LAW, TargetLaw, first_argmax, greedy_rows, proposal_law, target_law
from .packed import refuse_outside, unpacked


def sample(
    logits: Sequence[Tensor],
    uniforms: Tensor,
    law: LawTensors,
    member: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and log-probabilities of (B, T, 4) or (B, T, k, 4) uniforms; log-sum-exps, status.

    See `ops.sample`.
    """
    batch = len(uniforms)
    if rows is not None:
        refuse_outside("sample", "rows", rows, len(logits[0]))
        logits = [unpacked(tensor, rows) for tensor in logits]
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
    if uniforms.dim() == 4:
        token, log_prob = _without_replacement(target, uniforms)
        return token, log_prob.float(), target.lse.float(), target.status
    best = first_argmax(target.log_probs)
    drawn = draw(target.log_probs.exp(), uniforms[..., 1:])
    token = torch.where(target.greedy[:, None], best, drawn)
    token = token.masked_fill((target.status & EMPTY_LAW) > 0, 0)
    log_prob = target.log_probs.gather(-1, token[..., None]).squeeze(-1)
    return token, log_prob.float(), target.lse.float(), target.status


def _without_replacement(target: TargetLaw, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, k) tokens, each of what the earlier ones have left, and their log-probabilities."""
    left = target.log_probs
    tokens, log_probs = [], []
    for numbers in uniforms.unbind(2):
        drawn = draw(left.exp(), numbers[..., 1:])
        token = torch.where(target.greedy[:, None], first_argmax(left), drawn)[..., None]
        log_prob = left.gather(-1, token)
        none = log_prob.exp() == 0
        left = left.scatter(-1, token, -torch.inf)
        tokens.append(token.masked_fill(none, PADDING))
        log_probs.append(log_prob.masked_fill(none, -torch.inf))
    return torch.cat(tokens, -1), torch.cat(log_probs, -1)
