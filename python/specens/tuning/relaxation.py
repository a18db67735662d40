# SPDX-License-Identifier: Apache-2.0
"""What a lossy acceptance rule keeps of a draft, and how far it leads from the law asked for.

`specens tune` asks this of the rules that the user names, at every position of a text: the chance
that a draft is kept, and the total variation between the law of what then stands at its place and
the target's. A rule is judged by its entry in `ACCEPTANCE_RULES` alone, one token at a time: rules
that judge whole blocks, or remember tokens before, are refused (`lossy.py`).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.loop.profile import Relaxed
from specens.schedules import Speculative
from specens.tuning.agreement import chunks, curves, law_of
from specens.tuning.lossy import spelled
from specens.tuning.measure import Endless, Sweep, up_to_ends
from specens_kernels import Acceptance
from specens_kernels.acceptance.rules import Judgement, Situation

# Rules whose masses depend on the drafted token are judged draft by draft, for as many of the most
# probable drafts, which stand for the rest.
_CANDIDATES = 64
# Tokens of a proposal where a lossy rule writes.
_PROPOSED = 4


def measure_rule(
    decoder: SpeculativeDecoder,
    sweep: Sweep,
    rule: Acceptance,
    proposer: int,
    most: int,
    write: Callable[[], list[tuple[Tensor, int]]],
) -> Relaxed:
    """What a lossy rule keeps of a proposer's drafts, in texts that the two of them write.

    Where the text is another one, so is what is kept: the exact text would not tell.

    Args:
        decoder: of all models; it is given the rule, and a schedule of this proposer.
        sweep: what has written with it before. rule: the rule. proposer: which model.
        most: tokens of the longest block.
        write: has the decoder write: (text, begin) as of `measure.write_texts`.
    """
    assert sweep.law is not None
    assert sweep.member_law is not None
    law, size = sweep.law, decoder.num_ensemble
    schedule = Endless(Speculative(_PROPOSED, proposer))
    decoder.schedule, decoder.acceptances = schedule, [rule]
    models = [*decoder.members[:size], decoder.members[proposer]]
    # A member that proposes reads once.
    models = models[:size] if proposer < size else models
    chances, distances = [], []
    for text, begin in up_to_ends(write(), schedule.ends):
        parts = []
        for logits in chunks(models, text[:, :-1], begin - 1):
            draft = law_of([logits[min(proposer, size)]], sweep.member_law)
            target = law_of(logits[:size], law)
            parts.append(relaxed(rule, target, draft, greedy=bool(law.temperature == 0)))
        kept, distance = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        chances.append(kept)
        distances.append(distance)
    mean = float(torch.cat(distances).mean())
    return Relaxed(proposer, spelled(rule), rule.rule.law, curves(chances, most), mean)


def relaxed(
    acceptance: Acceptance, target: Tensor, draft: Tensor, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """The chance that a draft is kept, and the divergence of what stands at its place.

    Args:
        acceptance: a rule that `check_lossy` has let pass.
        target, draft: (T, V) laws; bare, if `greedy`.
        greedy: whether the temperature is 0.
    Returns:
        (T,) float64 chances, (T,) float64 total variations.
    """
    if greedy:
        return _greedily(acceptance, target, draft)
    chances = torch.zeros(len(target), dtype=torch.float64, device=target.device)
    emitted = torch.zeros_like(target, dtype=torch.float64)
    for shares, judgement in _judged(acceptance, target, draft):
        kept = torch.minimum(judgement.kept, draft).double()
        # Of drafts: how many are kept, each with its share, and what replaces the others.
        stays = (kept / draft).nan_to_num(0.0) * shares
        total = stays.sum(-1)
        left = judgement.left.double()
        rest = left.sum(-1, keepdim=True)
        replaced = torch.where(rest > 0, left / rest, target.double())
        emitted += stays + (shares.sum(-1) - total).clamp(min=0)[:, None] * replaced
        chances += total
    distances = (emitted - target).abs().sum(-1) / 2
    return chances.clamp(max=1).cpu(), distances.cpu()


def _judged(
    acceptance: Acceptance, target: Tensor, draft: Tensor
) -> Iterator[tuple[Tensor, Judgement]]:
    """Judgements, and the (T, V) shares of the drafts that each is about; all shares sum to 1."""
    memory = draft.new_zeros(len(draft))
    best = draft.topk(min(_CANDIDATES, draft.shape[-1]), -1)
    if not acceptance.rule.by_token:
        at = Situation(target, draft, best.indices[:, 0], memory)
        yield draft.double(), acceptance.rule.judge(at, *acceptance.parameters)
        return
    shares = best.values.double() / best.values.double().sum(-1, keepdim=True)
    for token, share in zip(best.indices.unbind(-1), shares.unbind(-1), strict=True):
        only = torch.zeros_like(draft, dtype=torch.float64)
        only.scatter_(-1, token[:, None], share[:, None])
        at = Situation(target, draft, token, memory)
        yield only, acceptance.rule.judge(at, *acceptance.parameters)


def _greedily(acceptance: Acceptance, target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """The draft is one token: kept if it is the target's most probable one, or is trusted."""
    best, token = target.argmax(-1), draft.argmax(-1)
    if not acceptance.rule.needs_draft:
        draft = torch.nn.functional.one_hot(token, draft.shape[-1]).to(draft)
    at = Situation(target, draft, token, draft.new_zeros(len(draft)))
    judgement = acceptance.rule.judge(at, *acceptance.parameters)
    kept, emitted = token == best, best
    if judgement.trusted is not None:
        kept = kept | judgement.trusted[:, 0]
    if judgement.vetoed is not None:
        vetoed = judgement.vetoed[:, 0]
        kept, emitted = kept & ~vetoed, torch.where(vetoed, judgement.left.argmax(-1), best)
    emitted = torch.where(kept, token, emitted)
    return kept.double().cpu(), (emitted != best).double().cpu()
