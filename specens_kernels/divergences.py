# SPDX-License-Identifier: Apache-2.0
"""Divergences between a target's and a draft's next-token laws, for training drafts.

One autograd function for all: forward keeps no tensor of the vocabulary's size, backward recomputes
a chunk of rows at a time and writes the gradient, the only one. Rows whose incoming gradient is 0
(tokens that were not selected) are not computed again. The gradient is with respect to the draft's
logits; the target has none.

| name | is | source |
|---|---|---|
| `kl` | KL(target ‖ draft), forward KL | DistillSpec, arXiv:2310.08461 |
| `reverse_kl` | KL(draft ‖ target) | DistillSpec |
| `js` | ½ KL(target ‖ m) + ½ KL(draft ‖ m), m = ½ (target + draft); at most ln 2 | DistillSpec |
| `js_fsd` | ½ KL(m ‖ target) + ½ KL(m ‖ draft), unbounded; values only | arXiv:2502.20704 |
| `tv` | ½ Σ abs(target - draft): the chance that a draft is rejected | DistillSpec |

To add a divergence, add an entry to `DIVERGENCES`; the tests iterate over it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import arguments
from .law import FLOATS
from .refusal import Refusal, shown
from .storage import viewable, wrong

# Rows x vocabulary of one chunk, in numbers: some 16 MiB in float32 for each intermediate.
_CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Divergence:
    """One divergence between two laws, given as log-probabilities.

    name: what users call it.
    value: (log_target, log_draft), each (R, V) -> (R,) nats.
    weighted_slope: the same arguments -> (R, V): each draft probability times the derivative by it,
        up to a multiple of the draft's law per row; None where there is no gradient.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    weighted_slope: Callable[[Tensor, Tensor], Tensor] | None


def _times(log_law: Tensor, other: Tensor) -> Tensor:
    """The law times another quantity, which counts nothing where the law has no mass."""
    law = log_law.exp()
    return torch.where(law == 0, 0, law * other)


def _kl(log_first: Tensor, log_second: Tensor) -> Tensor:
    return _times(log_first, log_first - log_second).sum(-1)


def _middle(log_target: Tensor, log_draft: Tensor) -> Tensor:
    return torch.logaddexp(log_target, log_draft) - math.log(2)


def _js(log_target: Tensor, log_draft: Tensor) -> Tensor:
    middle = _middle(log_target, log_draft)
    return 0.5 * (_kl(log_target, middle) + _kl(log_draft, middle))


def _js_fsd(log_target: Tensor, log_draft: Tensor) -> Tensor:
    middle = _middle(log_target, log_draft)
    return 0.5 * (_kl(middle, log_target) + _kl(middle, log_draft))


def _tv(log_target: Tensor, log_draft: Tensor) -> Tensor:
    return 0.5 * (log_target.exp() - log_draft.exp()).abs().sum(-1)


def _sign(difference: Tensor) -> Tensor:
    """-1, 0 or 1, and NaN of NaN."""
    return torch.where(torch.isnan(difference), difference, torch.sign(difference))


DIVERGENCES = {
    divergence.name: divergence
    for divergence in (
        Divergence("kl", _kl, lambda target, draft: -target.exp()),
        Divergence(
            "reverse_kl",
            lambda target, draft: _kl(draft, target),
            lambda target, draft: _times(draft, draft - target),
        ),
        Divergence(
            "js", _js, lambda target, draft: 0.5 * _times(draft, draft - _middle(target, draft))
        ),
        Divergence("js_fsd", _js_fsd, None),
        Divergence("tv", _tv, lambda target, draft: 0.5 * _times(draft, _sign(draft - target))),
    )
}


def divergence(target_logits: Tensor, draft_logits: Tensor, kind: str = "kl") -> Tensor:
    """How far the draft's law is from the target's, per row.

    Args:
        target_logits: (..., V) of any float dtype; log-probabilities of an ensemble (`mix`) are
            logits too. Takes no gradient.
        draft_logits: (..., V), the same shape. Differentiable, once.
        kind: an entry of `DIVERGENCES`.
    Returns:
        (...) nats, float32 (float64 if an argument is). NaN where the logits have no law.
    Raises:
        Refusal: shapes or devices differ, an unknown kind, or a gradient that is not there is
            wanted.
    """
    arguments.name("divergence", "kind", kind, sorted(DIVERGENCES))
    for name, value in (("target_logits", target_logits), ("draft_logits", draft_logits)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            raise wrong("divergence", name, "(..., V) float", value)
        viewable("divergence", name, value)
    if target_logits.device != draft_logits.device:
        expected = f"a tensor on {draft_logits.device}"
        raise wrong("divergence", "target_logits", expected, target_logits)
    if draft_logits.shape[-1:] in ((), (0,)):
        raise wrong("divergence", "draft_logits", "(..., V >= 1) float", draft_logits)
    if target_logits.shape != draft_logits.shape:
        expected = f"{tuple(draft_logits.shape)} as draft_logits"
        raise Refusal("divergence", "target_logits", expected, tuple(target_logits.shape))
    if target_logits.requires_grad and torch.is_grad_enabled():
        raise Refusal("divergence", "target_logits", "no gradient", "requires_grad")
    wants_gradient = draft_logits.requires_grad and torch.is_grad_enabled()
    if wants_gradient and DIVERGENCES[kind].weighted_slope is None:
        raise Refusal("divergence", "kind", "one with a gradient", shown(kind))
    shape, width = draft_logits.shape[:-1], draft_logits.shape[-1]
    rows: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        target_logits.reshape(-1, width), draft_logits.reshape(-1, width), kind
    )
    return rows.reshape(shape)


class _Divergence(torch.autograd.Function):
    """Values of all rows; the gradient by the draft's logits."""

    @staticmethod
    def forward(ctx: Any, target_logits: Tensor, draft_logits: Tensor, kind: str) -> Tensor:
        """(R, V), (R, V) -> (R,)."""
        ctx.save_for_backward(target_logits, draft_logits)
        ctx.kind = kind
        value = DIVERGENCES[kind].value
        values = [
            value(_log_law(target_logits[rows]), _log_law(draft_logits[rows]))
            for rows in _chunks(*draft_logits.shape)
        ]
        return torch.cat(values) if values else _log_law(draft_logits).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[None, Tensor, None]:
        """With w the weighted slope and q the draft's law: d/dz = w - q Σ w."""
        target_logits, draft_logits = ctx.saved_tensors
        weighted_slope = DIVERGENCES[ctx.kind].weighted_slope
        assert weighted_slope is not None  # `divergence` has refused it
        gradient = torch.zeros_like(draft_logits)
        wanted = incoming[0].nonzero().squeeze(-1)
        for chunk in _chunks(len(wanted), draft_logits.shape[-1]):
            rows = wanted[chunk]
            log_draft = _log_law(draft_logits[rows])
            slope = weighted_slope(_log_law(target_logits[rows]), log_draft)
            slope -= log_draft.exp() * slope.sum(-1, keepdim=True)
            gradient[rows] = (slope * incoming[0][rows, None]).to(gradient.dtype)
        return None, gradient, None


def _log_law(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK_NUMBERS // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))
