# SPDX-License-Identifier: Apache-2.0
"""The specification: every op in plain torch, computed in float64, written to be read.

Other backends return the same tokens for the same uniforms. What an op means is what stands here;
speed is somebody else's business, but nothing here depends on a device. To add an op, write it here
first, then its schema in `ops.py`. Three ideas carry everything:

* `target_law` turns M members' logits into one law: clean, warp, fold, normalise.
* `draw` walks a hierarchical inverse CDF: tile, sub-tile, token, one uniform each. The geometry is
  part of the definition, so that every backend walks to the same token.
* `verify` walks from the root: a child is kept iff `coin * draft < kept`; otherwise what the rule
  leaves is the next child's target, and in the end the law of the emitted token.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .acceptance import (
    ACCEPTANCE_RULES,
    AcceptanceRule,
    Judgement,
    Situation,
    block_step,
    block_threshold,
    remember,
)
from .call import VerifyCall
from .ensembles import Ensemble
from .law import LawTensors
from .refusal import Refusal

TILE = 8192
SUB_TILE = 1024
PADDING = -1
# A residual of less mass than this, of a target of mass 1, is rounding: it is empty.
LEAST_RESIDUAL = 2.0**-40
# Log-probabilities closer than this, in nats, are tied where the most probable token is asked for.
TIE = 2.0**-40

# Status bits, one word a row: what a degenerate input did. Only what was consulted is reported.
NAN_LOGITS = 1  # a NaN logit; it counted as -inf
INFINITE_LOGITS = 2  # a +inf logit; it took all the mass
EMPTY_LAW = 4  # no token has mass; token 0 is emitted
INVALID_DRAFT = 8  # a draft id outside [0, vocab_size); it was rejected
EMPTY_RESIDUAL = 16  # rejected, yet target <= kept everywhere; the target stays the law

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


# --- uniforms -------------------------------------------------------------------------------------


def uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    """Philox-4x32-10: key = seed, counter = (position, stream, index); see `ops.uniforms`."""
    positions = positions.expand(len(seeds), -1)
    seeds = seeds[:, None].expand_as(positions)
    counter = [
        positions & _WORD,
        (positions >> 32) & _WORD,
        torch.full_like(positions, stream & _WORD),
        torch.full_like(positions, index & _WORD),
    ]
    key = [seeds & _WORD, (seeds >> 32) & _WORD]
    for _ in range(10):
        high0, low0 = _multiply_32(counter[0], _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_32(counter[2], _PHILOX_MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(word + weyl) & _WORD for word, weyl in zip(key, _PHILOX_WEYL, strict=True)]
    words = torch.stack(counter, -1)
    return (words >> 8).to(torch.float32) * 2.0**-24


def _multiply_32(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low halves of a 32 x 32-bit product, in int64 that would overflow at 2^63."""
    low_part = (words & 0xFFFF) * factor
    high_part = (words >> 16) * factor
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _WORD
    return high, low


# --- laws -----------------------------------------------------------------------------------------


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


def expand_weights(weights: Tensor, batch: int, rows: int) -> Tensor:
    """(M,), (B, M) or (B, T, M) -> (B, T, M) float64."""
    if weights.dim() == 2:
        weights = weights[:, None]
    return weights.double().expand(batch, rows, weights.shape[-1])


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


def _fold(values: Sequence[Tensor], weights: Tensor, law: LawTensors, lse: Tensor) -> Tensor:
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
    combined = ensemble.fold(laws, weights.movedim(-1, 0)[..., None])
    if not isinstance(combined, Tensor) or combined.shape != values[0].shape:
        got = tuple(combined.shape) if isinstance(combined, Tensor) else type(combined).__name__
        expected = f"{tuple(values[0].shape)} of laws {tuple(laws.shape)}"
        raise Refusal(ensemble.name, "fold", expected, got)
    combined = combined.double()
    if not is_law:
        return combined.masked_fill(torch.isnan(combined), -torch.inf)
    if not bool(((combined >= 0) & torch.isfinite(combined)).all()):
        least, most = combined.amin().item(), combined.amax().item()
        raise Refusal(ensemble.name, "fold", "finite numbers >= 0", f"{least:g} to {most:g}")
    return normalise(combined.log()).log_probs


def target_law(logits: Sequence[Tensor], law: LawTensors, lse: Tensor | None = None) -> TargetLaw:
    """The ensemble's law, not yet collapsed where it is greedy.

    Scope "member": each member is warped by its own temperature and by the filters, then folded.
    Scope "ensemble": the members are folded bare, then warped by the row's first temperature.
    A row is greedy iff all its temperatures are 0; its law is then the ensemble's at temperature 1
    without filters, and its token the law's argmax. Where only some members have temperature 0,
    those members' laws are uniform over their largest logits.

    Args:
        lse: (B, T, M) float. The members' log-sum-exps, where they are known; see `ops.verify`.
    """
    batch, rows = logits[0].shape[:2]
    weights = expand_weights(law.weights, batch, rows)
    greedy = greedy_rows(law, batch)
    filters = _filters(law, greedy)
    temperatures = law.temperature.double().expand(batch, len(logits))
    temperatures = temperatures.masked_fill(greedy[:, None], 1.0)
    by_member = [temperature[:, None, None] for temperature in temperatures.unbind(-1)]
    values, known = [], []
    status = torch.zeros(batch, rows, dtype=torch.int32, device=logits[0].device)
    unread = torch.zeros_like(status)
    for member, tensor in enumerate(logits):
        value, bits = clean(tensor, law.vocab_size)
        one = None if lse is None else lse[..., member]
        known.append(given(one, value, temperatures[:, member], greedy))
        if not law.fold:  # a fold of one's own may read members of weight 0
            bits = torch.where(weights[..., member] != 0, bits, 0)
        status |= torch.where(torch.isnan(known[-1]), bits, 0)
        unread |= torch.where(torch.isnan(known[-1]), 0, bits)
        values.append(value)
    implausible = _implausible(values[0], by_member[0], law)
    if law.scope == "member":
        warped = [warp(v, t, *filters) for v, t in zip(values, by_member, strict=True)]
        folded = _fold(warped, weights, law, torch.stack(known, -1))
        scores = folded.masked_fill(implausible, -torch.inf)
    else:
        folded = _fold(values, weights, law, torch.stack(known, -1))
        scores = warp(folded.masked_fill(implausible, -torch.inf), by_member[0], *filters)
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
) -> tuple[Normalised, Tensor]:
    """The law of one member or draft alone, warped like the target, and the status bits.

    Args:
        logits: (B, T, V) float. temperature: (B,) float64.
        greedy: (B,) bool. Rows whose law ignores the temperature and the filters.
        lse: (B, T) float. Where it is known; the law then sums to what it sums to.
    """
    value, status = clean(logits, law.vocab_size)
    known = given(lse, value, temperature, greedy)
    temperature = temperature.masked_fill(greedy, 1.0)[:, None, None]
    scores = warp(value, temperature, *_filters(law, greedy))
    return normalise_by(scores, known), torch.where(torch.isnan(known), status, 0)


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
    return torch.where(tied, ids, values.shape[-1]).amin(-1)


# --- draws ----------------------------------------------------------------------------------------


def draw(mass: Tensor, numbers: Tensor) -> Tensor:
    """Hierarchical inverse CDF: a tile by the first number, a sub-tile, then a token.

    Args:
        mass: (..., V) float64. Non-negative, not necessarily normalised.
        numbers: (..., 3) float in [0, 1).
    Returns:
        (...,) int64 token; 0 where no token has mass.
    """
    numbers = numbers.double()
    vocab_size = mass.shape[-1]
    tiles = -(-vocab_size // TILE)
    grid = torch.nn.functional.pad(mass, (0, tiles * TILE - vocab_size))
    grid = grid.reshape(*mass.shape[:-1], tiles, TILE // SUB_TILE, SUB_TILE)
    tile = _pick(grid.sum((-1, -2)), numbers[..., 0])
    grid = _take(grid, tile)
    sub_tile = _pick(grid.sum(-1), numbers[..., 1])
    token = _pick(_take(grid, sub_tile), numbers[..., 2])
    return (tile * TILE + sub_tile * SUB_TILE + token).masked_fill(mass.sum(-1) <= 0, 0)


def _pick(mass: Tensor, number: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds number x total; the last with mass if none does."""
    cumulative = mass.cumsum(-1)
    index = (cumulative <= number[..., None] * cumulative[..., -1:]).sum(-1)
    ids = torch.arange(mass.shape[-1], device=mass.device)
    return torch.minimum(index, torch.where(mass > 0, ids, 0).amax(-1))


def _take(grid: Tensor, index: Tensor) -> Tensor:
    """grid[..., index, ...] along the first dimension that `index` does not have."""
    dim = index.dim()
    shape = (*index.shape, 1, *grid.shape[dim + 1 :])
    chosen = index.view(*index.shape, *([1] * (grid.dim() - dim))).expand(shape)
    return grid.gather(dim, chosen).squeeze(dim)


# --- ops ------------------------------------------------------------------------------------------


def mix(logits: Sequence[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """(B, T, V) log-probabilities and (B, T) status; see `ops.mix`."""
    target = target_law(logits, law)
    wide = any(tensor.dtype == torch.float64 for tensor in logits)
    return target.log_probs.to(torch.float64 if wide else torch.float32), target.status


def sample(
    logits: Sequence[Tensor], uniforms: Tensor, law: LawTensors, member: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, log-sum-exps and status, each (B, T); see `ops.sample`."""
    batch = len(uniforms)
    if member >= 0:
        greedy = greedy_rows(law, batch)
        temperature = law.temperature.double().expand(batch, len(logits))[:, member]
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


class _Step(NamedTuple):
    """What happened at one row of the walk: the child kept, or the law that is drawn from."""

    child: int | None
    emits_from: Tensor | None  # (V,) float64 mass
    log_probs: Tensor  # (V,) float64 of the target, for the log-probability of what is emitted
    status: int


class _Target(NamedTuple):
    """The target at one row."""

    log_probs: Tensor  # (V,) float64, not collapsed
    status: int
    unread: int  # what is reported where a token is drawn only
    bare: bool  # the row's temperature is 0: the law is the one at temperature 1, unfiltered
    greedy: bool  # its most probable token is what is emitted


class _Sequence(NamedTuple):
    """One batch row of `verify`: tensors keep a leading dimension of 1."""

    logits: list[Tensor]
    tokens: list[int]  # token of node i at i - 1
    parents: list[int]
    proposers: list[int]  # of node i at i - 1; a member, or PADDING for a point mass
    coins: Tensor  # (N + 1,) float64
    draft_logits: Tensor | None
    draft_temperature: Tensor
    lse: Tensor | None
    draft_lse: Tensor | None
    law: LawTensors
    rule: AcceptanceRule
    parameters: Sequence[float]

    def target(self, row: int) -> _Target:
        here = slice(row, row + 1)
        lse = None if self.lse is None else self.lse[:, here]
        law = target_law([t[:, here] for t in self.logits], _at_row(self.law, row), lse)
        bare = bool(law.greedy)
        greedy = bare or self.rule.greedy
        return _Target(law.log_probs[0, 0], int(law.status), int(law.unread), bare, greedy)

    def children(self, row: int) -> list[int]:
        return [
            node
            for node, parent in enumerate(self.parents)
            if node > 0 and parent == row and self.tokens[node - 1] != PADDING
        ]

    def step(self, row: int, memory: Tensor, bonus: bool) -> _Step | None:
        """Try the children of `row` in order; None if there is none to try and no bonus token."""
        children = self.children(row)
        if not children and not bonus:
            return None
        target = self.target(row)
        log_probs, status = target.log_probs, target.status
        mass = log_probs.exp()
        for child in children:
            draft, bits = self.proposal(child, row, target)
            status |= bits
            if draft is None:
                continue
            token = torch.tensor(self.tokens[child - 1], device=mass.device)
            at = Situation(mass, draft, token, memory, len(children))
            if self.keeps(child, at, judgement := self.judge(at), target):
                return _Step(child, None, log_probs, status)
            left, bits = self.left(mass, judgement, target)
            status |= bits
            if not self.rule.independent or child == children[-1]:
                mass = left
        if target.greedy:
            mass = collapse(mass.log()).exp()
        return _Step(None, mass, log_probs, status | target.unread)

    def judge(self, at: Situation) -> Judgement:
        return self.rule.judge(at, *self.parameters)

    def keeps(self, child: int, at: Situation, judgement: Judgement, target: _Target) -> bool:
        token, coin = at.token, self.coins[child]
        if not target.greedy:
            return bool(coin * at.draft[token] < judgement.kept[token])
        if coin >= 1 or (judgement.vetoed is not None and bool(judgement.vetoed)):
            return False
        if target.bare and judgement.trusted is not None and bool(judgement.trusted):
            return True
        return bool(at.target.sum() > 0) and bool(token == first_argmax(at.target.log()))

    def left(self, mass: Tensor, judgement: Judgement, target: _Target) -> tuple[Tensor, int]:
        """What the next child, or the draw, has for its target, and the status bits."""
        if target.greedy:
            vetoed = judgement.vetoed is not None and bool(judgement.vetoed)
            return (judgement.left if vetoed else mass), 0
        residual = judgement.left
        if residual.sum() > LEAST_RESIDUAL * mass.sum():
            return residual / residual.sum(), 0
        return mass, EMPTY_RESIDUAL if mass.sum() > 0 else 0

    def proposal(self, child: int, row: int, target: _Target) -> tuple[Tensor | None, int]:
        """The (V,) law that `child` was drawn from, None if it is invalid, and the status bits."""
        token, proposer = self.tokens[child - 1], self.proposers[child - 1]
        known_proposer = PADDING <= proposer < len(self.logits)
        if not 0 <= token < self.law.vocab_size or not known_proposer:
            return None, INVALID_DRAFT
        is_point = proposer == PADDING and self.draft_logits is None
        if is_point or (target.greedy and not (target.bare and self.rule.needs_draft)):
            point = torch.zeros(self.law.vocab_size, dtype=torch.float64, device=self.coins.device)
            point[token] = 1.0
            return point, 0
        lse = None
        if self.draft_logits is not None:
            logits, temperature = self.draft_logits, self.draft_temperature
            lse = self.draft_lse
        else:
            logits = self.logits[proposer]
            temperature = self.law.temperature.double().expand(1, len(self.logits))[:, proposer]
            lse = None if self.lse is None else self.lse[..., proposer]
        here = slice(row, row + 1)
        bare = torch.full((1,), target.bare, device=logits.device)
        alone, status = proposal_law(
            logits[:, here],
            temperature.double(),
            self.law,
            bare,
            None if lse is None else lse[:, here],
        )
        return alone.log_probs[0, 0].exp(), int(status)

    def block(self, bonus: bool) -> tuple[int, _Step | None, list[Tensor], int]:
        """Judge a chain as a whole: drafts kept, what is emitted after them, laws, status bits.

        Draft i is the last one kept with probability h_i, from the last to the first; c_i, the
        probability that the path so far is kept at all, caps how much of the target is left.
        """
        status = 0
        targets: list[Tensor] = []
        unread: list[int] = []
        drafts: list[Tensor] = []
        for row in range(len(self.tokens)):
            if self.tokens[row] == PADDING:
                break
            target = self.target(row)
            draft, bits = self.proposal(row + 1, row, target)
            status |= bits | target.status
            targets.append(target.log_probs)
            unread.append(target.unread)
            if draft is None:
                break
            drafts.append(draft)
        count, reach, kept, kept_reach = len(drafts), 1.0, 0, 1.0
        if len(targets) == count and bonus:
            target = self.target(count)
            status |= target.status
            targets.append(target.log_probs)
            unread.append(target.unread)
        for i, draft in enumerate(drafts):
            token = self.tokens[i]
            ratio = targets[i][token].exp() / draft[token] if draft[token] > 0 else 0.0
            reach = block_step(reach, float(ratio))
            threshold = reach
            if i + 1 < count:
                mass_left = (reach * targets[i + 1].exp() - drafts[i + 1]).clamp(min=0).sum()
                threshold = block_threshold(reach, float(mass_left))
            if self.coins[i + 1] < threshold:
                kept, kept_reach = i + 1, reach
        if kept == len(targets):  # everything was kept, and no bonus token is asked for
            return kept, None, targets, status
        mass = targets[kept].exp()
        if kept < count:
            residual = (kept_reach * mass - drafts[kept]).clamp(min=0)
            if residual.sum() > LEAST_RESIDUAL:
                mass = residual / residual.sum()
            elif mass.sum() > 0:
                status |= EMPTY_RESIDUAL
        status |= unread[kept]
        return kept, _Step(None, mass, targets[kept], status), targets, status


def _walk(sequence: _Sequence, memory: Tensor | None, bonus: bool) -> Iterator[_Step]:
    """The steps from the root to the emitted token."""
    if sequence.rule.block and not bool(greedy_rows(sequence.law, 1)):
        kept, last, targets, status = sequence.block(bonus)
        for row in range(kept):
            yield _Step(row + 1, None, targets[row], status)
        if last is not None:
            yield last
        return
    device = sequence.coins.device
    seen = (
        torch.zeros((), dtype=torch.float64, device=device) if memory is None else memory.double()
    )
    row = 0
    while (step := sequence.step(row, seen, bonus)) is not None:
        yield step
        if step.child is None:
            return
        row = step.child
        if sequence.rule.remembers:
            log_prob = step.log_probs[sequence.tokens[row - 1]]
            seen = remember(seen, log_prob, sequence.parameters[-1])


def _at_batch(law: LawTensors, b: int) -> LawTensors:
    """The law of batch row b, whose weights are (1, 1 or T, M)."""

    def one(value: Tensor | None) -> Tensor | None:
        return value if value is None or len(value) == 1 else value[b : b + 1]

    weights = law.weights
    weights = weights[None] if weights.dim() == 1 else weights[b : b + 1]
    return law._replace(
        weights=weights if weights.dim() == 3 else weights[:, None],
        temperature=law.temperature if len(law.temperature) == 1 else law.temperature[b : b + 1],
        top_k=one(law.top_k),
        top_p=one(law.top_p),
        min_p=one(law.min_p),
    )


def _at_row(law: LawTensors, row: int) -> LawTensors:
    weights = law.weights
    return law if weights.shape[1] == 1 else law._replace(weights=weights[:, row : row + 1])


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, accepted counts, path and status; see `ops.verify`."""
    law, numbers = call.law, call.uniforms
    batch, nodes = call.draft_tokens.shape
    device = call.draft_tokens.device
    host = torch.device("cpu")
    tokens = torch.full((batch, nodes + 1), PADDING, dtype=torch.int64, device=host)
    log_probs = torch.zeros(batch, nodes + 1, dtype=torch.float32, device=host)
    num_accepted = torch.zeros(batch, dtype=torch.int32, device=host)
    path = torch.full((batch, nodes), PADDING, dtype=torch.int32, device=host)
    status = torch.zeros(batch, dtype=torch.int32, device=host)
    parents, proposers, temperature = call.parents, call.proposers, call.draft_temperature
    if parents is None:  # a chain is a tree in which node i hangs off node i - 1
        parents = torch.arange(-1, nodes, device=host)[None]
    if proposers is None:
        proposers = torch.full((1, nodes), PADDING, device=host)
    if temperature is None:
        temperature = law.temperature[:, 0]
    for b in range(batch):
        here = slice(b, b + 1)
        sequence = _Sequence(
            logits=[tensor[here] for tensor in call.logits],
            tokens=call.draft_tokens[b].tolist(),
            parents=parents.expand(batch, nodes + 1)[b].tolist(),
            proposers=proposers.expand(batch, nodes)[b].tolist(),
            coins=numbers[b, :, 0].double(),
            draft_logits=None if call.draft_logits is None else call.draft_logits[here],
            draft_temperature=temperature.expand(batch)[here],
            lse=None if call.lse is None else call.lse[here],
            draft_lse=None if call.draft_lse is None else call.draft_lse[here],
            law=_at_batch(law, b),
            rule=ACCEPTANCE_RULES[call.acceptance],
            parameters=call.parameters,
        )
        memory = None if call.memory is None else call.memory[b]
        for accepted, step in enumerate(_walk(sequence, memory, call.bonus)):
            status[b] |= step.status
            if step.child is not None:
                token = sequence.tokens[step.child - 1]
                path[b, accepted] = step.child
                num_accepted[b] = accepted + 1
            else:
                assert step.emits_from is not None
                row = int(path[b, accepted - 1]) if accepted > 0 else 0
                token = int(draw(step.emits_from, numbers[b, row, 1:]))
            tokens[b, accepted] = token
            log_probs[b, accepted] = step.log_probs[token]
    return (
        tokens.to(device),
        log_probs.to(device),
        num_accepted.to(device),
        path.to(device),
        status.to(device),
    )
