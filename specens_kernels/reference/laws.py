# SPDX-License-Identifier: Apache-2.0
"""From logits to laws: of the ensemble, and of one member or draft alone.

A filter is a step of `cutoff`; an ensemble's space is a case of `_combined`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ensembles import Ensemble
from ..law import LawTensors
from ..ranges import LEAST_TEMPERATURE, MOST_TEMPERATURE
from ..refusal import Refusal
from ..storage import is_readable, unreadable

# Log-probabilities closer than this, in nats, are tied where the most probable token is asked for.
TIE = 2.0**-40

# Status bits, one word a row: what a degenerate input did. Only what was consulted is reported.
NAN_LOGITS = 1  # a NaN logit; it counted as -inf
INFINITE_LOGITS = 2  # a +inf logit; it took all the mass
EMPTY_LAW = 4  # no token has mass; token 0 is emitted


class Normalised(NamedTuple):
    """A law: log_probs (..., V) float64, -inf without mass; lse (...,); empty (...,) bool."""

    log_probs: Tensor
    lse: Tensor
    empty: Tensor


class TargetLaw(NamedTuple):
    """The ensemble's law for (B, T) rows: log_probs (B, T, V), lse, status (B, T); greedy (B,).

    unread: (B, T) int32. Status bits of members whose log-sum-exp was given: nobody needs to read
        their rows but where a token is drawn.
    """

    log_probs: Tensor
    lse: Tensor
    status: Tensor
    greedy: Tensor
    unread: Tensor


def normalise(scores: Tensor) -> Normalised:
    """Softmax in which +inf takes all the mass and a row of -inf has none."""
    top = scores.amax(-1, keepdim=True)
    shifted = torch.where(scores == top, torch.zeros_like(scores), scores - top)
    empty = torch.isneginf(top)
    shifted = shifted.masked_fill(empty, -torch.inf)
    lse = shifted.exp().sum(-1, keepdim=True).log()
    log_probs = torch.where(empty, shifted, shifted - lse)
    return Normalised(log_probs, (top + lse).squeeze(-1), empty.squeeze(-1))


def given(lse: Tensor | None, scores: Tensor, temperature: Tensor, greedy: Tensor) -> Tensor:
    """(B, T) float64: the log-sum-exps that count, NaN where the row's own does.

    A given one counts if it is finite, where there is a temperature.
    """
    if lse is None:
        return torch.full_like(scores[..., 0], torch.nan)
    known = torch.isfinite(lse) & ((temperature > 0) & ~greedy)[:, None]
    return lse.double().masked_fill(~known, torch.nan)


def normalise_by(scores: Tensor, lse: Tensor) -> Normalised:
    """`normalise`, but by the log-sum-exps (...,) that are not NaN; such a row is never empty."""
    own = normalise(scores)
    known = ~torch.isnan(lse)
    return Normalised(
        torch.where(known[..., None], scores - lse[..., None], own.log_probs),
        torch.where(known, lse, own.lse),
        own.empty & ~known,
    )


def clean(logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(..., V) float64 with NaN as -inf, and the status bits (...,) that the row sets."""
    values = logits[..., :vocab_size].to(torch.float64)
    nan = torch.isnan(values)
    status = nan.any(-1).int() * NAN_LOGITS + torch.isposinf(values).any(-1).int() * INFINITE_LOGITS
    return values.masked_fill(nan, -torch.inf), status


def cutoff(
    values: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """The smallest value that survives temperature 0, top-k, then top-p, then min-p: (B, T, 1).

    Filters are thresholds on the value, so tokens that tie stay or go together: top-k keeps values
    >= the k-th largest; top-p keeps a token iff the mass strictly above it is < top_p; min-p keeps
    values >= max + T log(min_p). The largest value always survives.

    Args:
        values: (B, T, V) float64. Logits or log-probabilities, before the temperature.
        temperature: (B, 1, 1) float64. 0 keeps the largest values only.
        top_k, top_p, min_p: (B or 1,). Off where top_k <= 0, top_p >= 1, min_p <= 0.
    """
    top = values.amax(-1, keepdim=True)
    lowest = torch.full_like(top, -torch.inf)
    vocab_size = values.shape[-1]
    ordered = values.sort(-1, descending=True).values
    if top_k is not None:
        k = top_k.view(-1, 1, 1).expand(*top.shape).long()
        kth = ordered.gather(-1, k.clamp(1, vocab_size) - 1)
        lowest = torch.where(k > 0, torch.maximum(lowest, kth), lowest)
    if top_p is not None:
        p = top_p.view(-1, 1, 1).double()
        survivors = ordered.masked_fill(ordered < lowest, -torch.inf)
        mass = normalise(survivors / _or_one(temperature)).log_probs.exp()
        above = mass.cumsum(-1) - mass
        inside = (above < p).sum(-1, keepdim=True).clamp(min=1)
        nucleus = ordered.gather(-1, inside - 1)
        lowest = torch.where(p < 1, torch.maximum(lowest, nucleus), lowest)
    if min_p is not None:
        p = min_p.view(-1, 1, 1).double()
        floor = top + _or_one(temperature) * p.clamp(min=0, max=1).log()
        lowest = torch.where(p > 0, torch.maximum(lowest, floor), lowest)
    lowest = torch.where(temperature > 0, lowest, top)
    return torch.where(torch.isposinf(top), top, lowest)


def _or_one(temperature: Tensor) -> Tensor:
    return torch.where(temperature > 0, temperature, torch.ones_like(temperature))


def warp(
    values: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """values / temperature, -inf where a filter removed the token; arguments as in `cutoff`."""
    lowest = cutoff(values, temperature, top_k, top_p, min_p)
    return (values / _or_one(temperature)).masked_fill(values < lowest, -torch.inf)


def counted_weights(law: LawTensors, batch: int, rows: int) -> Tensor:
    """(B, T, M) float64: the weights, 0 where a number is no weight; a fold takes what is given."""
    weights = law.weights.double()
    if weights.dim() == 2:
        weights = weights[:, None]
    weights = weights.expand(batch, rows, weights.shape[-1])
    if law.fold:
        return weights
    counts = torch.isfinite(weights)
    if law.space == "probabilities":
        counts &= weights > 0
    return weights.masked_fill(~counts, 0.0)


def bounded(temperature: Tensor) -> Tensor:
    """As float64; one beyond what a `Law` of numbers takes counts as the nearest that it does."""
    values = temperature.double()
    return torch.where(values > 0, values.clamp(LEAST_TEMPERATURE, MOST_TEMPERATURE), values)


def greedy_rows(law: LawTensors, batch: int) -> Tensor:
    """(B,) bool: rows whose temperatures are all 0."""
    return ~(law.temperature > 0).any(-1).expand(batch)


def _filters(law: LawTensors, greedy: Tensor) -> list[Tensor | None]:
    """top_k, top_p and min_p, each (B,), off in greedy rows."""
    off = (0, 1.0, 0.0)
    return [
        None if value is None else value.expand(len(greedy)).masked_fill(greedy, neutral)
        for value, neutral in zip((law.top_k, law.top_p, law.min_p), off, strict=True)
    ]


def _combined(values: Sequence[Tensor], weights: Tensor, law: LawTensors, lse: Tensor) -> Tensor:
    """(B, T, V) scores of the combined members: log-probabilities, or combined logits.

    Args:
        values: M tensors (B, T, V) float64. The members' scores, warped or bare.
        weights: (B, T, M) float64.
        lse: (B, T, M). Of members of a mixture, where it was given; else NaN.
    """
    if law.fold:
        return _obeyed(values, weights, Ensemble.by_key(law.fold))
    if law.space == "probabilities":
        return _weighted_laws(values, weights, lse)
    return _weighted_logits(values, weights)


def _weighted_laws(values: Sequence[Tensor], weights: Tensor, lse: Tensor) -> Tensor:
    """A member of weight 0 is absent; the weight of a member without mass goes to the others."""
    mass = torch.zeros_like(values[0])
    share = torch.zeros_like(weights[..., :1])
    for member, value in enumerate(values):
        weight = weights[..., member, None]
        alone = normalise_by(value, lse[..., member])
        share = torch.where(alone.empty[..., None], share, share + weight)
        mass = torch.where(weight != 0, mass + weight * alone.log_probs.exp(), mass)
    # Normalisers that were given are what is meant, though the sum be a little off 1.
    known = ~torch.isnan(lse).all(-1)
    total = torch.where(share > 0, share, 1.0).log().squeeze(-1)
    return normalise_by(mass.log(), total.masked_fill(~known, torch.nan)).log_probs


def _weighted_logits(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """A member of weight 0 is absent; a token that another one gives -inf has no mass.

    Whatever the sign of that member's weight.
    """
    total = torch.zeros_like(values[0])
    vetoed = torch.zeros_like(total, dtype=torch.bool)
    for member, value in enumerate(values):
        weight = weights[..., member, None]
        vetoed |= (weight != 0) & torch.isneginf(value)
        total = torch.where(weight != 0, total + weight * value, total)
    return total.masked_fill(vetoed | torch.isnan(total), -torch.inf)


def _obeyed(values: Sequence[Tensor], weights: Tensor, ensemble: Ensemble) -> Tensor:
    """What the ensemble's own fold makes of the members; see `Ensemble`."""
    assert ensemble.fold is not None
    is_law = ensemble.space == "probabilities"
    laws = torch.stack([normalise(value).log_probs.exp() if is_law else value for value in values])
    # Memory of its own: what a fold does to it is nobody else's business.
    combined = ensemble.fold(laws, weights.movedim(-1, 0)[..., None].clone())
    if isinstance(combined, Tensor) and not is_readable(combined):
        raise unreadable(ensemble.name, "fold", combined)
    if not isinstance(combined, Tensor) or combined.shape != values[0].shape:
        got = tuple(combined.shape) if isinstance(combined, Tensor) else type(combined).__name__
        expected = f"{tuple(values[0].shape)} of laws {tuple(laws.shape)}"
        raise Refusal(ensemble.name, "fold", expected, got)
    plain = combined.layout == laws.layout and not (combined.is_complex() or combined.is_quantized)
    if not plain or combined.device != laws.device:
        here = f"{combined.layout} {combined.dtype} on {combined.device}"
        raise Refusal(ensemble.name, "fold", f"real numbers on {laws.device}", here)
    combined = combined.double()
    if not is_law:
        return combined.masked_fill(torch.isnan(combined), -torch.inf)
    if not bool(((combined >= 0) & torch.isfinite(combined)).all()):
        least, most = combined.amin().item(), combined.amax().item()
        raise Refusal(ensemble.name, "fold", "finite numbers >= 0", f"{least:g} to {most:g}")
    return normalise(combined.log()).log_probs


def target_law(logits: Sequence[Tensor], law: LawTensors, lse: Tensor | None = None) -> TargetLaw:
    """The ensemble's law, not yet collapsed where it is greedy.

    Scope "member": each member is warped by its own temperature and by the filters, then combined.
    Scope "ensemble": the members are combined bare, then warped by the row's first temperature.
    A row is greedy iff all its temperatures are 0; its law is then the ensemble's at temperature 1
    without filters, and its token the law's argmax. Where only some members have temperature 0,
    those members' laws are uniform over their largest logits.

    Args:
        lse: (B, T, M) float. The members' log-sum-exps, where they are known; see `ops.verify`.
    """
    batch, rows = logits[0].shape[:2]
    weights = counted_weights(law, batch, rows)
    greedy = greedy_rows(law, batch)
    filters = _filters(law, greedy)
    temperatures = bounded(law.temperature).expand(batch, len(logits))
    temperatures = temperatures.masked_fill(greedy[:, None], 1.0)
    by_member = [temperature[:, None, None] for temperature in temperatures.unbind(-1)]
    values, known = [], []
    status = torch.zeros(batch, rows, dtype=torch.int32, device=logits[0].device)
    unread = torch.zeros_like(status)
    for member, tensor in enumerate(logits):
        value, bits = clean(tensor, law.vocab_size)
        member_lse = None if lse is None else lse[..., member]
        known.append(given(member_lse, value, temperatures[:, member], greedy))
        if not law.fold:  # a fold of one's own may read members of weight 0
            bits = torch.where(weights[..., member] != 0, bits, 0)
        status |= torch.where(torch.isnan(known[-1]), bits, 0)
        unread |= torch.where(torch.isnan(known[-1]), 0, bits)
        values.append(value)
    implausible = _implausible(values[0], by_member[0], law)
    if law.scope == "member":
        warped = [warp(v, t, *filters) for v, t in zip(values, by_member, strict=True)]
        combined = _combined(warped, weights, law, torch.stack(known, -1))
        scores = combined.masked_fill(implausible, -torch.inf)
    else:
        combined = _combined(values, weights, law, torch.stack(known, -1))
        scores = warp(combined.masked_fill(implausible, -torch.inf), by_member[0], *filters)
    any_known = ~torch.isnan(torch.stack(known)).all(0)
    zero = torch.zeros_like(any_known, dtype=torch.float64)
    log_probs, normaliser, _ = normalise_by(scores, zero.masked_fill(~any_known, torch.nan))
    status |= torch.isneginf(scores).all(-1).int() * EMPTY_LAW
    return TargetLaw(log_probs, normaliser, status, greedy, unread)


def _implausible(expert: Tensor, temperature: Tensor, law: LawTensors) -> Tensor:
    """Tokens that the first member (the expert) finds less than `plausibility` x its best."""
    if law.plausibility <= 0:
        return torch.zeros_like(expert, dtype=torch.bool)
    scale = _or_one(temperature) if law.scope == "member" else torch.ones_like(temperature)
    log_plausibility = math.log(law.plausibility)
    return expert < expert.amax(-1, keepdim=True) + scale * log_plausibility


def proposal_law(
    logits: Tensor,
    temperature: Tensor,
    law: LawTensors,
    greedy: Tensor,
    lse: Tensor | None = None,
    filtered: bool = True,
) -> tuple[Normalised, Tensor]:
    """The law of one member or draft alone, warped like the target, and the status bits.

    Args:
        logits: (B, T, V) float. temperature: (B,) float.
        greedy: (B,) bool. Rows whose law ignores the temperature and the filters.
        lse: (B, T) float. Where it is known; the law then sums to what it sums to.
        filtered: whether the law's filters apply.
    """
    value, status = clean(logits, law.vocab_size)
    temperature = bounded(temperature)
    known = given(lse, value, temperature, greedy)
    temperature = temperature.masked_fill(greedy, 1.0)[:, None, None]
    filters = _filters(law, greedy) if filtered else (None, None, None)
    scores = warp(value, temperature, *filters)
    return normalise_by(scores, known), torch.where(torch.isnan(known), status, 0)


def given_law(probabilities: Tensor, vocab_size: int) -> Tensor:
    """(..., V) float64: a draft's law as it is given; what is no probability counts as 0."""
    values = probabilities[..., :vocab_size].double()
    return torch.where((values > 0) & torch.isfinite(values), values, 0.0)


def collapse(log_probs: Tensor) -> Tensor:
    """The one-point law on the most probable token, lowest id on ties; empty rows stay empty."""
    token = first_argmax(log_probs)[..., None]
    one_point = torch.full_like(log_probs, -torch.inf).scatter(-1, token, 0.0)
    return torch.where(torch.isneginf(log_probs).all(-1, keepdim=True), log_probs, one_point)


def first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value, the lowest on ties, which torch.argmax does not promise.

    The order in which members are added up must not break a tie: values within TIE are equal.
    """
    ids = torch.arange(values.shape[-1], device=values.device)
    tied = values >= values.amax(-1, keepdim=True) - TIE
    # NaN, which a given log-sum-exp that is none can make, ties with nothing: then it is the last.
    return torch.where(tied, ids, values.shape[-1] - 1).amin(-1)
