# SPDX-License-Identifier: Apache-2.0
"""`verify`: a walk from the root of a draft tree to the emitted token, one sequence at a time."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..acceptance import ACCEPTANCE_RULES, AcceptanceRule
from ..acceptance.blocks import block_step, block_threshold
from ..acceptance.gates import remember
from ..acceptance.requests import within_ranges
from ..acceptance.rules import Judgement, Situation
from ..call import VerifyCall
from ..law import LawTensors
from ..tree import chain, children
from .draw import PADDING, draw
from .laws import collapse, first_argmax, given_law, greedy_rows, proposal_law, target_law
from .packed import padded

# A residual of less mass than this, of a target of mass 1, is rounding: it is empty. After several
# rejections, the target of mass 1 is the first.
LEAST_RESIDUAL = 2.0**-40

# Status bits beside those of laws.py.
# A draft id outside [0, vocab_size), or a draft whose parent is no earlier node; it was rejected.
INVALID_DRAFT = 8
EMPTY_RESIDUAL = 16  # rejected, yet target <= kept everywhere; the target stays the law


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
    at_zero: bool  # the row's temperature is 0: the law is the one at temperature 1, unfiltered
    greedy: bool  # its most probable token is what is emitted


class _Sequence(NamedTuple):
    """One batch row of `verify`: tensors keep a leading dimension of 1."""

    logits: list[Tensor]
    tokens: list[int]  # token of node i at i - 1
    parents: list[int]
    # Of node i at i - 1: a member, M for the draft logits, or PADDING for a point mass.
    proposers: list[int]
    at_zero: bool  # the row's temperatures are all 0
    coins: Tensor  # (N + 1,) float64
    draft_logits: Tensor | None
    draft_temperature: Tensor
    lse: Tensor | None
    draft_lse: Tensor | None
    law: LawTensors
    rule: AcceptanceRule
    parameters: Sequence[float]
    draws: str
    num_drafts: int | None  # where a draft PADDING is one to refuse
    draft_filtered: bool
    draft_space: str

    def target(self, row: int) -> _Target:
        here = slice(row, row + 1)
        lse = None if self.lse is None else self.lse[:, here]
        law = target_law([t[:, here] for t in self.logits], _at_row(self.law, row), lse)
        greedy = self.at_zero or self.rule.greedy
        return _Target(law.log_probs[0, 0], int(law.status), int(law.unread), self.at_zero, greedy)

    def children(self, row: int) -> list[int]:
        below = children(self.parents)[row]
        return [node for node in below if self.tokens[node - 1] != PADDING]

    def refuses(self, row: int) -> bool:
        """Whether a draft below is one to refuse, after which a token is drawn even if no bonus."""
        if self.num_drafts is None:
            return False
        below = children(self.parents)[row]
        return any(node <= self.num_drafts and self.tokens[node - 1] == PADDING for node in below)

    def is_a_tree(self) -> bool:
        """Whether every draft hangs off an earlier node, so that none is lost and none a cycle."""
        return all(
            0 <= parent < node or self.tokens[node - 1] == PADDING
            for node, parent in enumerate(self.parents)
            if node > 0
        )

    def step(self, row: int, memory: Tensor, bonus: bool) -> _Step | None:
        """Try the children of `row` in order; None if there is none to try and no bonus token."""
        children = self.children(row)
        if not children and not bonus and not self.refuses(row):
            return None
        target = self.target(row)
        log_probs, status = target.log_probs, target.status
        mass, chance = log_probs.exp(), 1.0  # the chance that all so far are rejected
        candidates = [child for child in children if self.is_valid(child)]
        for child in children:
            if child not in candidates:
                status |= INVALID_DRAFT
                continue
            draft, bits = self.proposal(child, row, target)
            status |= bits
            token = torch.tensor(self.tokens[child - 1], device=mass.device)
            at = Situation(mass, draft, token, memory, len(candidates))
            judgement = self.judge(at, self.depth(row))
            if self.keeps(child, at, judgement, target):
                return _Step(child, None, log_probs, status)
            if self.rule.independent and child != candidates[-1]:
                continue
            mass, chance, bits = self.left(mass, chance, judgement, target)
            status |= bits
        if target.greedy:
            mass = collapse(mass.log()).exp()
        return _Step(None, mass, log_probs, status | target.unread)

    def judge(self, at: Situation, depth: int) -> Judgement:
        if self.rule.by_position:
            return self.rule.judge(at, self.parameters[min(depth, len(self.parameters) - 1)])
        return self.rule.judge(at, *self.parameters)

    def depth(self, row: int) -> int:
        return 0 if row == 0 else 1 + self.depth(self.parents[row])

    def keeps(self, child: int, at: Situation, judgement: Judgement, target: _Target) -> bool:
        token, coin = at.token, self.coins[child]
        if not target.greedy or self.rule.by_coin:
            return bool(coin * at.draft[token] < judgement.kept[token])
        if coin >= 1 or (judgement.vetoed is not None and bool(judgement.vetoed)):
            return False
        if target.at_zero and judgement.trusted is not None and bool(judgement.trusted):
            return True
        return bool(at.target.sum() > 0) and bool(token == first_argmax(at.target.log()))

    def left(
        self, mass: Tensor, chance: float, judgement: Judgement, target: _Target
    ) -> tuple[Tensor, float, int]:
        """What the next child, or the draw, has for its target, its chance, and status bits."""
        if target.greedy:
            vetoed = judgement.vetoed is not None and bool(judgement.vetoed)
            return (judgement.left if vetoed else mass), chance, 0
        residual = judgement.left
        left = float(residual.sum())
        if chance * left > LEAST_RESIDUAL * float(mass.sum()):
            return residual / left, chance * left, 0
        return mass, chance, EMPTY_RESIDUAL if mass.sum() > 0 else 0

    def is_valid(self, child: int) -> bool:
        token, proposer = self.tokens[child - 1], self.proposers[child - 1]
        known = len(self.logits) + (self.draft_logits is not None)
        return 0 <= token < self.law.vocab_size and PADDING <= proposer < known

    def proposal(self, child: int, row: int, target: _Target) -> tuple[Tensor, int]:
        """The (V,) law that `child` was drawn from, and the status bits."""
        token, proposer = self.tokens[child - 1], self.proposers[child - 1]
        if proposer == PADDING or (
            target.greedy and not (target.at_zero and self.rule.needs_draft)
        ):
            point = torch.zeros(self.law.vocab_size, dtype=torch.float64, device=self.coins.device)
            point[token] = 1.0
            return point, 0
        lse = None
        if proposer == len(self.logits):
            assert self.draft_logits is not None
            if self.draft_space == "probabilities":
                law = given_law(self.draft_logits[0, row], self.law.vocab_size)
                return self.without_earlier(law, child), 0
            logits, temperature = self.draft_logits, self.draft_temperature
            lse = self.draft_lse
        else:
            logits = self.logits[proposer]
            temperature = self.law.temperature.expand(1, len(self.logits))[:, proposer]
            lse = None if self.lse is None else self.lse[..., proposer]
        here = slice(row, row + 1)
        at_zero = torch.full((1,), target.at_zero, device=logits.device)
        alone, status = proposal_law(
            logits[:, here],
            temperature,
            self.law,
            at_zero,
            None if lse is None else lse[:, here],
            self.draft_filtered,
        )
        return self.without_earlier(alone.log_probs[0, 0].exp(), child), int(status)

    def without_earlier(self, mass: Tensor, child: int) -> Tensor:
        """The law that is left of a proposer's when siblings are drawn without replacement."""
        earlier = self.earlier(child)
        if earlier:
            mass[earlier] = 0.0
            mass = mass / mass.sum() if mass.sum() > 0 else mass
        return mass

    def earlier(self, child: int) -> list[int]:
        """The tokens that a child's proposer could not draw again."""
        if self.draws == "with":
            return []
        siblings = self.children(self.parents[child])
        return [
            self.tokens[other - 1]
            for other in siblings[: siblings.index(child)]
            if self.proposers[other - 1] == self.proposers[child - 1] and self.is_valid(other)
        ]

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
            status |= target.status
            targets.append(target.log_probs)
            unread.append(target.unread)
            if not self.is_valid(row + 1):
                status |= INVALID_DRAFT
                break
            draft, bits = self.proposal(row + 1, row, target)
            status |= bits
            drafts.append(draft)
        count, reach, kept, kept_reach = len(drafts), 1.0, 0, 1.0
        if len(targets) == count and (bonus or self.refuses(count)):
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
    if sequence.rule.block and not sequence.at_zero:
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

    def of_row(value: Tensor | None) -> Tensor | None:
        return value if value is None or len(value) == 1 else value[b : b + 1]

    weights = law.weights
    weights = weights[None] if weights.dim() == 1 else weights[b : b + 1]
    return law._replace(
        weights=weights if weights.dim() == 3 else weights[:, None],
        temperature=law.temperature if len(law.temperature) == 1 else law.temperature[b : b + 1],
        top_k=of_row(law.top_k),
        top_p=of_row(law.top_p),
        min_p=of_row(law.min_p),
    )


def _existing(call: VerifyCall, b: int) -> list[int]:
    """Tokens of a request's drafts, PADDING where there is none."""
    tokens: list[int] = call.draft_tokens[b].tolist()
    if call.layout.num_drafts is None:
        return tokens
    end = min(max(int(call.layout.num_drafts[b]), 0), len(tokens))
    return tokens[:end] + [PADDING] * (len(tokens) - end)


def _parameters(call: VerifyCall, b: int) -> Sequence[float]:
    given = call.layout.request_parameters
    if given is None:
        return call.parameters
    own = given[b : b + 1] if len(given) > 1 else given
    numbers: list[float] = within_ranges(ACCEPTANCE_RULES[call.acceptance], own)[0].tolist()
    return numbers


def _at_row(law: LawTensors, row: int) -> LawTensors:
    weights = law.weights
    return law if weights.shape[1] == 1 else law._replace(weights=weights[:, row : row + 1])


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, accepted counts, path and status; see `ops.verify`."""
    call = padded(call)
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
        parents = chain(nodes, host)
    if proposers is None:
        everywhere = PADDING if call.draft_logits is None else len(call.logits)
        proposers = torch.full((1, nodes), everywhere, device=host)
    if temperature is None:
        temperature = law.temperature[:, 0]
    # Once for the call: on a GPU each question waits for the device.
    at_zero = greedy_rows(law, batch).tolist()
    for b in range(batch):
        here = slice(b, b + 1)
        sequence = _Sequence(
            logits=[tensor[here] for tensor in call.logits],
            tokens=_existing(call, b),
            parents=parents.expand(batch, nodes + 1)[b].tolist(),
            proposers=proposers.expand(batch, nodes)[b].tolist(),
            at_zero=at_zero[b],
            coins=numbers[b, :, 0].double(),
            draft_logits=None if call.draft_logits is None else call.draft_logits[here],
            draft_temperature=temperature.expand(batch)[here],
            lse=None if call.lse is None else call.lse[here],
            draft_lse=None if call.draft_lse is None else call.draft_lse[here],
            law=_at_batch(law, b),
            rule=ACCEPTANCE_RULES[call.acceptance],
            parameters=_parameters(call, b),
            draws=call.draws,
            num_drafts=None if call.layout.num_drafts is None else int(call.layout.num_drafts[b]),
            draft_filtered=call.layout.draft_filtered,
            draft_space=call.layout.draft_space,
        )
        if not sequence.is_a_tree():
            status[b] = INVALID_DRAFT
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
