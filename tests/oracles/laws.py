# SPDX-License-Identifier: Apache-2.0
"""Laws in closed form, laws as an op shows them, and how far apart the two are.

Nothing here imports an implementation. `filtered` and `ensemble_law` restate the definitions by
brute force; `emitted_law` integrates exactly over everything that is random in `verify`: the draft
tokens by their law, every coin and every draw by *where the op changes its mind*. That place is
looked for next to the closed form and, where it is not there, by bisection, so a wrong op gets its
own, wrong law and not the right one. To add a situation, add a `Case` to test_verify_law.py.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import rules
import torch
from torch import Tensor

SEPARATE, POINT = -2, -1  # who proposes a node, if no member does
ROUNDING = 1e-15  # more than what float64 sums of a few probabilities are off by
Tokens = tuple[int, ...]
JointLaw = dict[Tokens, float]


def float32(number: float) -> float:
    """What a number is once the ops have stored it."""
    return torch.tensor(number, dtype=torch.float32).item()


def filtered(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """(V,) logits -> (V,) scores of the tokens that survive; each filter by its definition.

    Top-k: fewer than k tokens are larger. Top-p: the tokens that are larger have less than top_p
    together. Min-p: at least min_p times as probable as the largest. Tied tokens fare alike.
    """
    values = logits.double() / (float32(temperature) or 1.0)
    larger = values[None] > values[:, None]
    survives = torch.ones_like(values, dtype=torch.bool)
    if temperature == 0:
        survives &= ~larger.any(-1)
    if top_k > 0:
        survives &= larger.sum(-1) < top_k
    probs = values.masked_fill(~survives, -math.inf).softmax(-1)
    if top_p < 1:
        survives &= (larger * probs).sum(-1) < float32(top_p)
    if min_p > 0:
        survives &= probs >= float32(min_p) * probs.max()
    return values.masked_fill(~survives, -math.inf)


# What is combined, and one token's number from those of the members and the weights.
COMBINATIONS: dict[str, tuple[str, Callable[[list[float], Sequence[float]], float]]] = {
    "minimum": ("probabilities", lambda values, weights: min(values)),
    "maximum": ("probabilities", lambda values, weights: max(values)),
    "quadratic_mean": (
        "probabilities",
        lambda values, weights: math.sqrt(
            sum(w * x * x for w, x in zip(weights, values, strict=True))
        ),
    ),
    "highest_logit": ("logits", lambda values, weights: max(values)),
    "contrast": (
        "logits",
        lambda values, weights: values[0] + weights[-1] * (values[0] - values[-1]),
    ),
}


def _combined(name: str, scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    space, combine = COMBINATIONS[name]
    if space == "probabilities":
        scores = [values.softmax(-1).nan_to_num(0.0) for values in scores]
    numbers = [float32(weight) for weight in weights]
    by_token = torch.stack(list(scores), -1).tolist()
    combined = torch.tensor([combine(token, numbers) for token in by_token], dtype=torch.float64)
    return combined.log() if space == "probabilities" else combined.nan_to_num(-math.inf, math.inf)


def ensemble_law(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    ensemble: str = "mixture",
    temperature: float | Sequence[float] = 1.0,
    scope: str = "member",
    plausibility: float = 0.0,
    **filters: Any,
) -> Tensor:
    """(V,) law of M members' (V,) logits, one row, with no regard for speed or overflow."""
    members = len(logits)
    by_member = scope == "member"
    if isinstance(temperature, (int, float)):
        temperature = [temperature] * members
    elif len(temperature) == 1:
        temperature = list(temperature) * members
    scores = [value.double() for value in logits]
    implausible = torch.zeros_like(scores[0], dtype=torch.bool)
    if plausibility > 0:
        expert = (scores[0] / (float32(temperature[0]) if by_member else 1.0)).softmax(-1)
        implausible = expert < plausibility * expert.max()
    if by_member:
        scores = [filtered(v, t, **filters) for v, t in zip(scores, temperature, strict=True)]
    if ensemble in COMBINATIONS:
        folded = _combined(ensemble, scores, weights)
    elif ensemble == "mixture":
        law = sum(float32(w) * v.softmax(-1) for w, v in zip(weights, scores, strict=True) if w)
        folded = law.log()
    else:
        used = [(float32(w), v) for w, v in zip(weights, scores, strict=True) if w]
        vetoed = torch.stack([v == -math.inf for _, v in used]).any(0)
        folded = sum(w * v.masked_fill(vetoed, 0.0) for w, v in used)
        folded = folded.masked_fill(vetoed, -math.inf)
    folded = folded.masked_fill(implausible, -math.inf)
    if not by_member:
        folded = filtered(folded, temperature[0], **filters)
    return folded.softmax(-1).nan_to_num(0.0)  # a law without any mass is all zeros


def one_point(token: int | Tensor, vocab_size: int) -> Tensor:
    """(V,) law with all its mass on one token."""
    return torch.nn.functional.one_hot(torch.as_tensor(token), vocab_size).double()


def output_law(kept: Tensor, target: Tensor, draft: Tensor) -> Tensor:
    """(..., V) law of the token that one acceptance step emits, in closed form."""
    accepted = torch.minimum(kept, draft)
    residual = (target - kept).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    replacement = torch.where(total > 0, residual / total, target)
    return accepted + (1 - accepted.sum(-1, keepdim=True)) * replacement


Predicates = Callable[[Tensor], Tensor]  # (K,) float64 points -> (K,) bool, true below each edge


def _true_at(holds: Predicates, points: Tensor, resolution: float) -> Tensor:
    return ((points < 0) | holds(points.clamp(0, 1 - resolution))) & (points < 1)


def confirms(holds: Predicates, guesses: Tensor, resolution: float) -> Tensor:
    """(K,) bool: whether each predicate turns false right at its guess, on a grid in [0, 1)."""
    above = ((guesses - ROUNDING) / resolution).ceil() * resolution
    return _true_at(holds, above - resolution, resolution) & ~_true_at(holds, above, resolution)


def bisect(holds: Predicates, count: int, resolution: float) -> Tensor:
    """(K,) float64: the first point of a grid in [0, 1] where each predicate is false."""
    low = torch.full((count,), -resolution, dtype=torch.float64)
    high = torch.ones(count, dtype=torch.float64)
    while (high - low).max() > resolution:
        middle = ((low + high) / 2 / resolution).floor() * resolution
        true = _true_at(holds, middle, resolution)
        low, high = torch.where(true, middle, low), torch.where(true, high, middle)
    return high


@dataclass(frozen=True)
class Case:
    """One situation: a language of `members` conditional laws, and how a call is drafted.

    parents: of node 0 (the root, -1) to node N.
    proposers: of node i at i - 1: a member, POINT, or SEPARATE for draft logits of their own.
    points: tokens of the POINT nodes, by node.
    weights: numbers, or how they depend on the depth (a weight at each position of a chain).
    law: the other arguments of `Law`.
    acceptance, parameters: the rule.
    zeros: probability that a logit of the language is -inf.
    seed: of the language.
    draws: how siblings of one proposer are drawn, "with" or "without" replacement.
    draft_filtered: whether drafts are drawn after the law's filters.
    draft_space: of the draft logits; "probabilities" are those of their softmax, as it is.
    refused: nodes whose draft is -1, among drafts that are counted.
    num_drafts: nodes that exist, if they are counted.
    """

    name: str
    vocab_size: int
    parents: Tokens
    proposers: Tokens
    weights: tuple[float, ...] | Callable[[int], tuple[float, ...]]
    points: dict[int, int] | None = None
    law: dict[str, Any] | None = None
    acceptance: str = "rejection"
    parameters: dict[str, Any] | None = None
    draft_temperature: float | None = None
    bonus: bool = True
    zeros: float = 0.0
    seed: int = 0
    draws: str = "with"
    draft_filtered: bool = True
    draft_space: str = "logits"
    refused: Tokens = ()
    num_drafts: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def members(self) -> int:
        return len(self.weights_at(0))

    def weights_at(self, depth: int) -> tuple[float, ...]:
        return self.weights(depth) if callable(self.weights) else self.weights

    def children(self, row: int) -> list[int]:
        return [node for node in self.below(row) if node not in self.refused]

    def below(self, row: int) -> list[int]:
        """Nodes that hang off a row, also those to refuse."""
        last = len(self.parents) - 1 if self.num_drafts is None else self.num_drafts
        return [node for node in range(1, last + 1) if self.parents[node] == row]

    def emits_at(self, row: int) -> bool:
        """Whether a token is drawn where none of the row's children is kept."""
        return self.bonus or len(self.below(row)) > 0

    def depth(self, node: int) -> int:
        return 0 if node == 0 else 1 + self.depth(self.parents[node])

    def logits(self, member: int, prefix: Tokens) -> Tensor:
        """(V,) float64; what any model of this language would say after `prefix`."""
        dice = random.Random(f"{self.seed} {member} {prefix}")
        row = [dice.gauss(0, 1.5) for _ in range(self.vocab_size)]
        for token in range(1, self.vocab_size):  # token 0 always has mass, for every member
            if dice.random() < self.zeros:
                row[token] = -math.inf
        return torch.tensor(row).double()  # exact in float32

    @property
    def greedy(self) -> bool:
        return self.acceptance == "greedy" or (self.law or {}).get("temperature") == 0

    def target(self, prefix: Tokens) -> Tensor:
        """(V,) law that the token after `prefix` must have."""
        members = [self.logits(m, prefix) for m in range(self.members)]
        if self.greedy:
            return one_point(self.bare_target(prefix).argmax(), self.vocab_size)
        return ensemble_law(members, self.weights_at(len(prefix)), **(self.law or {}))

    def bare_target(self, prefix: Tokens) -> Tensor:
        """(V,) law of the ensemble as it is asked for a most probable token."""
        members = [self.logits(m, prefix) for m in range(self.members)]
        settings = dict(self.law or {})
        if settings.get("temperature") == 0:  # temperature 1, unfiltered
            bare = ("ensemble", "scope", "plausibility")
            settings = {key: settings[key] for key in bare if key in settings}
        return ensemble_law(members, self.weights_at(len(prefix)), **settings)

    def bare_draft(self, node: int, prefix: Tokens) -> Tensor:
        """(V,) law of the proposer at temperature 1, unfiltered."""
        proposer = self.proposers[node - 1]
        if proposer == POINT:
            return one_point((self.points or {})[node], self.vocab_size)
        proposer = self.members if proposer == SEPARATE else proposer
        return self.logits(proposer, prefix).softmax(-1)

    def memory(self, prefix: Tokens) -> float:
        """What the rule "likelihood" remembers after `prefix`."""
        smoothing = (self.parameters or {}).get("smoothing", 0.0)
        memory = 0.0
        for position, token in enumerate(prefix):
            law = (
                self.bare_target(prefix[:position])
                if self.greedy
                else self.target(prefix[:position])
            )
            memory = smoothing * memory - (1 - smoothing) * law[token].log().item()
        return memory

    def draft(self, node: int, prefix: Tokens) -> Tensor:
        """(V,) law that the token of `node` is drawn from."""
        proposer = self.proposers[node - 1]
        if proposer == POINT:
            return one_point((self.points or {})[node], self.vocab_size)
        settings = self.law or {}
        temperature = settings.get("temperature", 1.0)
        if not isinstance(temperature, (int, float)):
            temperature = (list(temperature) * self.members)[max(proposer, 0)]
        if proposer == SEPARATE:
            temperature = temperature if self.draft_temperature is None else self.draft_temperature
            proposer = self.members  # one more model of the language
            if self.draft_space == "probabilities":
                return self.logits(proposer, prefix).softmax(-1)
        filters = {key: settings[key] for key in ("top_k", "top_p", "min_p") if key in settings}
        filters = filters if self.draft_filtered else {}
        return filtered(self.logits(proposer, prefix), temperature, **filters).softmax(-1)

    def sibling(self, node: int, prefix: Tokens, tried: "Sequence[Tried]") -> Tensor:
        """(V,) law that the token of `node` is drawn from, after what was tried before it."""
        law = self.draft(node, prefix)
        if self.draws == "without" and self.proposers[node - 1] != POINT:
            for other, token, _ in tried:
                siblings = self.parents[other] == self.parents[node]
                if siblings and self.proposers[other - 1] == self.proposers[node - 1]:
                    law = law.index_fill(0, torch.tensor(token), 0.0)
        return law / law.sum() if law.sum() > 0 else law

    def sequence_law(self, length: int) -> JointLaw:
        """The target's joint law of the next `length` tokens."""
        law = {(): 1.0}
        for _ in range(length):
            law = {
                (*prefix, token): mass * probability
                for prefix, mass in law.items()
                for token, probability in enumerate(self.target(prefix).tolist())
            }
        return law


class Tried(NamedTuple):
    """One child that was looked at on the way."""

    node: int
    token: int
    kept: bool


class Question(NamedTuple):
    """Below which number the op says yes, after what was `tried`.

    "Is `token` kept?" about the coin of `child`; where `child` is None, "is what you draw at `row`
    `token` or a lower id?" about the draw's last number.
    """

    row: int
    tried: tuple[Tried, ...]
    child: int | None
    token: int


def emitted_law(case: Case, answer: Callable[[Question], float]) -> JointLaw:
    """Probability of every token sequence that one call emits, given the op's edges."""
    law: JointLaw = defaultdict(float)

    def visit(row: int, emitted: Tokens, tried: tuple[Tried, ...], weight: float) -> None:
        children = case.children(row)
        if case.emits_at(row):
            attempt(row, children, emitted, tried, weight)
        else:
            law[emitted] += weight

    def attempt(
        row: int, children: list[int], emitted: Tokens, tried: tuple[Tried, ...], weight: float
    ) -> None:
        if weight < ROUNDING:
            return
        if not children:
            below = 0.0
            for token in range(case.vocab_size):
                last = token == case.vocab_size - 1
                edge = 1.0 if last else answer(Question(row, tried, None, token))
                law[(*emitted, token)] += weight * (edge - below)
                below = edge
            return
        child, *others = children
        law_of_child = case.sibling(child, emitted, tried).tolist()
        if not any(law_of_child):  # nothing is left to draw
            attempt(row, others, emitted, tried, weight)
        for token, probability in enumerate(law_of_child):
            if probability > 0:
                kept = answer(Question(row, tried, child, token))
                yes, no = (*tried, Tried(child, token, True)), (*tried, Tried(child, token, False))
                visit(child, (*emitted, token), yes, weight * probability * kept)
                attempt(row, others, emitted, no, weight * probability * (1 - kept))

    visit(0, (), (), 1.0)
    return law


def predicted(case: Case, question: Question) -> float:
    """The answer in closed form."""
    prefix = tuple(tried.token for tried in question.tried if tried.kept)
    siblings = case.children(question.row)
    target = mass = case.target(prefix)

    def judge(child: int, token: int, earlier: Sequence[Tried]) -> tuple[float, Tensor]:
        """The chance that the child is kept, and what is then left."""
        definition = rules.DEFINITIONS[case.acceptance]
        parameters = case.parameters or {}
        memory = case.memory(prefix)
        if definition.by_coin:
            rates = parameters["rate"]
            rates = rates if isinstance(rates, tuple) else (rates,)
            parameters = {"rate": rates[min(len(prefix), len(rates) - 1)]}
        if case.greedy:
            laws = (case.bare_target(prefix).tolist(), case.bare_draft(child, prefix).tolist())
            if definition.by_coin and definition.closed is not None:
                return definition.closed(*laws, token, memory, **parameters)[0], mass
            if definition.vetoes(*laws, token, memory, **parameters):
                left = case.bare_target(prefix).index_fill(0, torch.tensor(token), 0.0)
                return 0.0, one_point(left.argmax(), case.vocab_size)
            if definition.trusts(*laws, token, memory, **parameters):
                return 1.0, mass
            return mass[token].item(), mass
        if case.acceptance == "k_seq":
            parameters = {"k": len(siblings)}
        law = target if case.acceptance == "k_seq" else mass
        draft = case.sibling(child, prefix, earlier).tolist()
        assert definition.closed is not None
        kept, left = definition.closed(law.tolist(), draft, token, memory, **parameters)
        residual = torch.tensor(left, dtype=torch.float64)
        return kept, residual / residual.sum() if residual.sum() > 0 else mass

    for place, tried in enumerate(question.tried):
        if case.parents[tried.node] == question.row:
            mass = judge(tried.node, tried.token, question.tried[:place])[1]
    if question.child is None:
        return mass.cumsum(-1)[question.token].item()
    return judge(question.child, question.token, question.tried)[0]


class Call(NamedTuple):
    """Arguments of `verify` for K questions at once."""

    logits: list[Tensor]
    draft_tokens: Tensor
    uniforms: Tensor
    parents: Tensor | None
    proposers: Tensor | None
    draft_logits: Tensor | None


def call(case: Case, questions: Sequence[Question], resolution: float) -> Call:
    """The call that brings the op to each question; the number asked about is left at 0."""
    nodes = len(case.parents) - 1
    rows = nodes + case.bonus
    count = len(questions)
    separate = SEPARATE in case.proposers
    alone = separate and {*case.proposers} == {SEPARATE}
    proposers = [case.members if each == SEPARATE else each for each in case.proposers]
    # What a question is not about must not matter, so it is filled with something arbitrary.
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case.vocab_size, (count, nodes), generator=dice)
    tokens[:, [node - 1 for node in case.refused]] = -1
    uniforms = torch.rand(count, nodes + 1, 4, generator=dice, dtype=torch.float64)
    uniforms = (uniforms / 2**-24).floor() * 2**-24
    logits = torch.zeros(case.members + separate, count, rows, case.vocab_size, dtype=torch.float64)
    for k, question in enumerate(questions):
        for tried in question.tried:
            tokens[k, tried.node - 1] = tried.token
            uniforms[k, tried.node, 0] = 0.0 if tried.kept else 1 - resolution
        if question.child is not None:
            tokens[k, question.child - 1] = question.token
        prefixes: list[Tokens] = [()]
        for node in range(1, rows):
            prefix = (*prefixes[case.parents[node]], int(tokens[k, node - 1]))
            prefixes.append(prefix)
        for row, prefix in enumerate(prefixes):
            for member in range(len(logits)):
                logits[member, k, row] = case.logits(member, prefix)
    chain = case.parents == tuple(range(-1, nodes))
    return Call(
        logits=list(logits[: case.members]),
        draft_tokens=tokens,
        uniforms=uniforms,
        parents=None if chain else torch.tensor([case.parents], dtype=torch.int32),
        proposers=None if alone else torch.tensor([proposers], dtype=torch.int32),
        draft_logits=logits[-1] if separate else None,
    )


class Observed(NamedTuple):
    """The law that an op emits, and how far its edges are at most from the closed form."""

    law: JointLaw
    surprise: float


def observed_law(
    case: Case,
    verify: Callable[[Call], tuple[Tensor, Tensor]],
    resolution: float,
) -> Observed:
    """The law that an op emits in `case`, by asking it.

    Args:
        verify: runs a `Call` and returns the emitted tokens (K, N+1) and the path (K, N).
        resolution: spacing of the numbers that the op is asked about; each edge is found to this.
    """
    known: dict[Question, float] = {}
    surprises = [0.0]

    def predicates(questions: list[Question]) -> Predicates:
        setup = call(case, questions, resolution)
        every = torch.arange(len(questions))
        draws = torch.tensor([question.child is None for question in questions])
        depth = torch.tensor([case.depth(question.row) for question in questions])
        child = torch.tensor([question.child or 0 for question in questions])
        token = torch.tensor([question.token for question in questions])
        row = torch.where(draws, torch.tensor([question.row for question in questions]), child)
        word = torch.where(draws, 3, 0)

        def holds(points: Tensor) -> Tensor:
            uniforms = setup.uniforms.clone()
            uniforms[every, row, word] = points
            tokens, path = verify(setup._replace(uniforms=uniforms))
            path = torch.nn.functional.pad(path, (0, 1), value=-1)
            return torch.where(draws, tokens[every, depth] <= token, path[every, depth] == child)

        return holds

    def ask(questions: list[Question]) -> None:
        guesses = torch.tensor([predicted(case, q) for q in questions], dtype=torch.float64)
        confirmed = confirms(predicates(questions), guesses, resolution)
        known.update(zip(questions, guesses.tolist(), strict=True))
        others = [question for question, yes in zip(questions, confirmed, strict=True) if not yes]
        if others:
            found = bisect(predicates(others), len(others), resolution)
            known.update(zip(others, found.tolist(), strict=True))
            surprises.append((found - guesses[~confirmed]).abs().max().item())

    while True:
        unknown: dict[Question, None] = {}

        def answer(question: Question, unknown: dict[Question, None] = unknown) -> float:
            if question not in known:
                unknown[question] = None
                return predicted(case, question)
            return known[question]

        law = emitted_law(case, answer)
        if not unknown:
            return Observed(law, max(surprises))
        ask(list(unknown))


def total_variation(law: JointLaw, other: JointLaw) -> float:
    """Half the sum of absolute differences."""
    return sum(abs(law.get(key, 0.0) - other.get(key, 0.0)) for key in {*law, *other}) / 2


def completed(case: Case, law: JointLaw, length: int) -> JointLaw:
    """What is emitted, continued from the target up to `length` tokens."""
    whole: JointLaw = defaultdict(float)
    for tokens, mass in law.items():
        tails = {(): mass}
        for _ in range(length - len(tokens)):
            tails = {
                (*tail, token): weight * probability
                for tail, weight in tails.items()
                for token, probability in enumerate(case.target(tokens + tail).tolist())
            }
        for tail, weight in tails.items():
            whole[tokens + tail] += weight
    return whole


def joint_distance(case: Case, law: JointLaw) -> float:
    """Total variation of the emitted tokens, continued from the target, to the target's own law."""
    length = max(map(len, law))
    return total_variation(completed(case, law, length), case.sequence_law(length))


def next_token_distances(case: Case, law: JointLaw) -> Iterator[float]:
    """Total variation of the next token's law to the target's, after every prefix that occurs."""
    continued: dict[Tokens, Tensor] = defaultdict(
        lambda: torch.zeros(case.vocab_size, dtype=torch.float64)
    )
    for tokens, mass in law.items():
        for position, token in enumerate(tokens):
            continued[tokens[:position]][token] += mass
    for prefix, masses in continued.items():
        if masses.sum() > 1e-4:  # below, the quotient has fewer digits than the bound
            target = case.target(prefix)
            yield ((masses / masses.sum() - target).abs().sum() / 2).item()


class ChiSquare(NamedTuple):
    """A goodness-of-fit test: the statistic, its degrees of freedom and its p-value."""

    statistic: float
    freedom: int
    p_value: float


def chi_square(counts: Tensor, law: Tensor) -> ChiSquare:
    """Pearson's test of (K,) counts against a (K,) law; the law's zeros must not occur."""
    counts, law = counts.double().flatten(), law.double().flatten()
    if counts[law == 0].any():
        return ChiSquare(math.inf, 1, 0.0)
    expected = (law * counts.sum())[law > 0]
    assert expected.min() >= 5, "too few draws for a chi-square"
    statistic = ((counts[law > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2)
    return ChiSquare(statistic.item(), freedom, p_value.item())


def power(wrong: Tensor, law: Tensor, count: int, p_value: float) -> float:
    """Chance that `chi_square` of `count` draws from `wrong` finds less than `p_value`.

    The statistic has mean f + d and variance 2 (f + 2 d), d = count * sum (wrong - law)^2 / law;
    both it and the threshold are taken as normal.
    """
    wrong, law = wrong.double().flatten(), law.double().flatten()
    distance = count * ((wrong - law)[law > 0] ** 2 / law[law > 0]).sum().item()
    freedom = int((law > 0).sum()) - 1
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = freedom + math.sqrt(2 * freedom) * normal.icdf(torch.tensor(1 - p_value)).item()
    spread = math.sqrt(2 * (freedom + 2 * distance))
    return 1 - normal.cdf(torch.tensor((threshold - freedom - distance) / spread)).item()
