# SPDX-License-Identifier: Apache-2.0
"""The law that `verify` emits, by exact enumeration: the ensemble's, and a wrong rule's is not.

Two measurements of every case. The reference, in float64 with float64 numbers, to 1e-12. Every
backend through the public op, with numbers on the grid of 2^-24 that `uniforms` has, to 1e-6.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import folds
import laws
import pytest
import rules
import torch
from laws import POINT, SEPARATE, Call, Case
from mutants import with_bug
from torch import Tensor

from specens_kernels import (
    ACCEPTANCE_RULES,
    Acceptance,
    Law,
    Stream,
    dispatch,
    reference,
    sample,
    uniforms,
    verify,
)
from specens_kernels.call import VerifyCall

FINE = 2.0**-44  # spacing of float64 numbers that rounding in the ops does not blur
GRID = 2.0**-24

HALVES = (0.5, 0.5)
CHAIN_1, CHAIN_2, CHAIN_3 = (-1, 0), (-1, 0, 1), (-1, 0, 1, 2)

CASES = [
    Case("one member is its own draft", 4, CHAIN_2, (0, 0), (1.0,)),
    Case(
        "three members, temperatures of their own",
        5,
        CHAIN_1,
        (0,),
        (0.5, 0.3, 0.2),
        law={"temperature": (0.6, 1.0, 1.5)},
    ),
    Case("proposers take turns", 3, CHAIN_3, (1, 0, 1), (0.25, 0.75)),
    Case("weights for each position", 3, CHAIN_2, (0, 1), lambda d: (0.2 + 0.3 * d, 0.8 - 0.3 * d)),
    Case(
        "contrastive, separate draft",
        4,
        CHAIN_2,
        (SEPARATE, SEPARATE),
        (1.5, -0.5),
        law={"ensemble": "product", "plausibility": 0.1, "temperature": 0.75},
        draft_temperature=1.25,
    ),
    Case(
        "product after the fold, drafted by a member",
        4,
        CHAIN_2,
        (1, 0),
        (0.7, 0.4),
        law={"ensemble": "product", "scope": "ensemble", "temperature": 1.25, "top_k": 3},
    ),
    Case(
        "filters on every member",
        5,
        CHAIN_2,
        (0, 1),
        HALVES,
        law={"temperature": 0.75, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    ),
    Case(
        "filters on the mixture",
        5,
        CHAIN_2,
        (0, 1),
        HALVES,
        law={"temperature": 0.75, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "scope": "ensemble"},
    ),
    Case("laws with holes", 4, CHAIN_2, (0, 1), HALVES, zeros=0.5),
    Case("no bonus token", 3, CHAIN_2, (0, 1), (0.75, 0.25), bonus=False),
    Case("two drawn siblings, one with a child", 4, (-1, 0, 0, 1), (0, 0, 1), HALVES),
    Case("three drawn siblings", 4, (-1, 0, 0, 0), (1, 1, 1), (0.75, 0.25), seed=2),
    Case("siblings of three kinds", 4, (-1, 0, 0, 0), (0, 1, POINT), HALVES, points={3: 2}),
    Case(
        "siblings of a separate draft, then no bonus",
        3,
        (-1, 0, 0, 2),
        (SEPARATE,) * 3,
        (1.0,),
        bonus=False,
    ),
    Case(
        "a tree of points, one of them twice",
        4,
        (-1, 0, 0, 1, 1, 0),
        (POINT,) * 5,
        (0.5, 0.25, 0.25),
        points={1: 3, 2: 1, 3: 0, 4: 2, 5: 1},
        law={"temperature": 0.7, "top_p": 0.95},
    ),
    Case(
        "points under a product",
        4,
        (-1, 0, 1, 0),
        (POINT,) * 3,
        (2.0, -0.5, -0.5),
        points={1: 1, 2: 2, 3: 0},
        law={"ensemble": "product"},
    ),
    Case(
        "temperature 0, a random draft",
        3,
        (-1, 0, 0, 1),
        (SEPARATE,) * 3,
        HALVES,
        law={"temperature": 0.0, "top_k": 2},
        draft_temperature=1.0,
    ),
    Case(
        "three siblings without replacement",
        4,
        (-1, 0, 0, 0, 1),
        (0, 0, 0, 1),
        (0.3, 0.7),
        seed=4,
        draws="without",
    ),
    Case(
        "siblings of three kinds without replacement",
        4,
        (-1, 0, 0, 0, 0),
        (0, 1, POINT, 0),
        HALVES,
        points={3: 2},
        law={"temperature": (0.7, 1.2)},
        draws="without",
    ),
    Case(
        "siblings of a member, a separate draft and a point",
        4,
        (-1, 0, 0, 0, 2),
        (1, SEPARATE, POINT, SEPARATE),
        HALVES,
        points={3: 2},
        law={"temperature": 0.8},
        draft_temperature=1.2,
        draws="without",
    ),
    Case(
        "more siblings than the draft has tokens",
        3,
        (-1, 0, 0, 0),
        (SEPARATE,) * 3,
        HALVES,
        zeros=0.5,
        seed=1,
        draws="without",
    ),
    Case("the greedy rule", 3, CHAIN_2, (0, 1), HALVES, acceptance="greedy"),
]
# Folds of one's own, which the reference alone obeys.
FOLDED = [
    Case("the least of two members", 4, CHAIN_2, (0, 1), HALVES, law={"ensemble": "minimum"}),
    Case(
        "the greatest of three, warped after the fold",
        4,
        CHAIN_2,
        (SEPARATE, SEPARATE),
        (0.5, 0.25, 0.25),
        law={"ensemble": "maximum", "scope": "ensemble", "temperature": 0.75, "top_k": 3},
        draft_temperature=1.25,
    ),
    Case(
        "a power mean, weights for each position",
        3,
        CHAIN_2,
        (0, 1),
        lambda d: (0.2 + 0.3 * d, 0.8 - 0.3 * d),
        law={"ensemble": "quadratic_mean", "temperature": (0.75, 1.25)},
    ),
    Case(
        "a power mean, members with filters, without a bonus token",
        4,
        CHAIN_2,
        (1, 1),
        (0.7, 0.3),
        law={"ensemble": "quadratic_mean", "top_p": 0.9},
        bonus=False,
    ),
    Case(
        "the highest logit, drawn siblings and a point",
        4,
        (-1, 0, 0, 1, 0),
        (0, 0, 1, POINT),
        HALVES,
        points={4: 2},
        law={"ensemble": "highest_logit"},
    ),
    Case(
        "a contrast with plausibility",
        4,
        CHAIN_2,
        (0, 0),
        (1.0, 0.5),
        law={"ensemble": "contrast", "plausibility": 0.1, "temperature": 0.75},
    ),
    Case(
        "temperature 0 of a maximum",
        3,
        CHAIN_2,
        (0, 1),
        HALVES,
        law={"ensemble": "maximum", "temperature": 0.0},
    ),
]


def law_of(case: Case, batch: int, dtype: torch.dtype = torch.float32) -> Law:
    weights = case.weights
    if callable(weights):
        rows = len(case.parents) - (not case.bonus)
        by_row = [weights(case.depth(row)) for row in range(rows)]
        weights = torch.tensor(by_row).expand(batch, rows, -1)
    return folds.law_of(weights, vocab_size=case.vocab_size, **(case.law or {}))


def rule_of(case: Case) -> Acceptance:
    return Acceptance(case.acceptance, **(case.parameters or {}))


def in_float64(
    case: Case, module: ModuleType = reference, acceptance: Acceptance | str | None = None
) -> Callable:
    """`verify` of an implementation of the specification, past the checks of the public op."""
    chosen = Acceptance.of(acceptance or rule_of(case))

    def run(call: Call) -> tuple[Tensor, Tensor]:
        batch = len(call.logits[0])
        law = law_of(case, batch)
        device = call.draft_tokens.device
        temperature = case.draft_temperature
        verdict = module.verify(
            VerifyCall(
                call.logits,
                call.draft_tokens,
                call.uniforms,
                law.tensors("verify", device, case.vocab_size),
                parents=call.parents,
                proposers=call.proposers,
                draft_logits=call.draft_logits,
                draft_temperature=None if temperature is None else torch.tensor([temperature]),
                acceptance=chosen.rule.name,
                parameters=chosen.numbers,
                bonus=case.bonus,
                draws=case.draws,
            )
        )
        return verdict[0], verdict[3]

    return run


def through_the_op(case: Case) -> Callable:
    def run(call: Call) -> tuple[Tensor, Tensor]:
        temperature = case.draft_temperature
        verdict = verify(
            [tensor.float() for tensor in call.logits],
            call.draft_tokens,
            call.uniforms.float(),
            law_of(case, len(call.draft_tokens)),
            parents=call.parents,
            proposers=call.proposers,
            draft_logits=None if call.draft_logits is None else call.draft_logits.float(),
            draft_temperature=None if temperature is None else torch.tensor(temperature),
            acceptance=rule_of(case),
            bonus=case.bonus,
            draws=case.draws,
        )
        return verdict.tokens, verdict.path

    return run


# Each is one line of the specification gone wrong: (case, the line, what stands there instead).
# A wrong line is found in the text so that the test follows the specification.
BUGS = {
    "the residual is the target": (
        "weights for each position",
        "mass, chance, bits = self.left(",
        "_, chance, bits = self.left(",
    ),
    "the bonus token comes from the draft": (
        "weights for each position",
        "        return _Step(None, mass, log_probs, status | target.unread)",
        "        at = self.law.temperature[0].double(), self.law, torch.tensor([False])\n"
        "        draft = proposal_law(self.logits[0][:, row : row + 1], *at)[0].log_probs[0, 0]\n"
        "        return _Step(None, mass if children else draft.exp(), log_probs, status)",
    ),
    "siblings are tried against the target": (
        "three drawn siblings",
        "at = Situation(mass, draft,",
        "at = Situation(log_probs.exp(), draft,",
    ),
    "siblings share a coin": (
        "three drawn siblings",
        "at.token, self.coins[child]",
        "at.token, self.coins[self.parents[child] + 1]",
    ),
    "the residual is not normalised": (
        "three drawn siblings",
        "return residual / left, chance * left, 0",
        "return residual, chance * left, 0",
    ),
    "earlier siblings stay in the draft's law": (
        "three siblings without replacement",
        "mass[earlier] = 0.0",
        "pass",
    ),
    "what is left of the draft's law is not normalised": (
        "three siblings without replacement",
        "mass = mass / mass.sum() if mass.sum() > 0 else mass",
        "pass",
    ),
    "draws with replacement are taken for draws without": (
        "three drawn siblings",
        'self.draws == "with"',
        'self.draws == "neither"',
    ),
    "the draft's probability is left out": (
        "weights for each position",
        "coin * at.draft[token]",
        "coin",
    ),
    "the draft is not warped": (
        "three members, temperatures of their own",
        "temperature = self.law.temperature.expand(1, len(self.logits))[:, proposer]",
        "temperature = torch.ones(1)",
    ),
    "draws come from the sub-tile's number": (
        "weights for each position",
        "token = _pick(_take(grid, sub_tile), numbers[..., 2])",
        "token = _pick(_take(grid, sub_tile), numbers[..., 1])",
    ),
}


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", CASES + FOLDED, ids=str)
def test_the_emitted_law_is_the_ensembles(case: Case) -> None:
    law, surprise = laws.observed_law(case, in_float64(case), FINE)
    assert laws.joint_distance(case, law) < 1e-12
    assert max(laws.next_token_distances(case, law)) < 1e-12
    assert surprise <= FINE  # every decision flips within one step of the closed form


# Folds have no kernel, and Triton's interpreter is slow.
CASES_OF = {"reference": CASES + FOLDED, "triton": CASES[::4]}


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend in ("reference", *dispatch.MODULES)
        for case in CASES_OF.get(backend, CASES)
    ],
    indirect=["backend"],
)
def test_the_public_op_decides_where_the_closed_form_says(backend: str, case: Case) -> None:
    law, surprise = laws.observed_law(case, through_the_op(case), GRID)
    assert laws.joint_distance(case, law) < 1e-6
    if backend == "reference":
        assert surprise <= GRID


def with_coins(coins: tuple[int, ...], parents: tuple[int, ...]) -> Case:
    """A tree that the first of two members proposes; each depth's target is the coin's member."""
    one_hot = tuple(tuple(float(member == coin) for member in (0, 1)) for coin in coins)
    proposers = (0,) * (len(parents) - 1)
    return Case(f"{coins}", 3, parents, proposers, one_hot.__getitem__, seed=3)


@pytest.mark.parametrize("widths", [(1, 2), (2, 3)], ids=str)
def test_a_tree_whose_widths_follow_the_coins_has_the_mixtures_law(widths: tuple[int, int]) -> None:
    """The proposer's own levels have one child, which is kept for sure, the others more."""
    share, law = 0.3, defaultdict(float)
    for coins in itertools.product((0, 1), repeat=3):
        first, second = (widths[level] if coins[level] else 1 for level in (0, 1))
        case = with_coins(coins, (-1,) + (0,) * first + (1,) * second)
        emitted, _ = laws.observed_law(case, in_float64(case), FINE)
        chance = math.prod(1 - share if coin else share for coin in coins)
        for tokens, mass in laws.completed(case, emitted, 3).items():
            law[tokens] += chance * mass
    mixture = Case("the mixture", 3, (-1,), (), (share, 1 - share), seed=3)
    # Weights are stored in single precision.
    assert laws.total_variation(law, mixture.sequence_law(3)) < 1e-7


@pytest.mark.parametrize("bug", BUGS)
def test_the_enumeration_sees_a_wrong_line(bug: str, tmp_path: Path) -> None:
    name, line, instead = BUGS[bug]
    case = case_named(name)
    with with_bug(line, instead, tmp_path) as module:
        law, _ = laws.observed_law(case, in_float64(case, module), 2.0**-12)
    assert laws.joint_distance(case, law) > 1e-3


ONE_OF_EACH = [
    Case(
        f"{name} {parameters} {mode}",
        4,
        CHAIN_2,
        (1, SEPARATE) if name == "tv" else (1, 1),
        (0.7, 0.3),
        law={"temperature": 0} if mode == "greedy" else {"temperature": (0.8, 1.3)},
        acceptance=name,
        parameters=parameters,
        zeros=0.15 if mode == "sampled" else 0.0,
        seed=seed,
    )
    for name in ACCEPTANCE_RULES
    if name not in ("block", "greedy")
    for parameters in rules.parameters(name)
    for mode, seed in (("sampled", 1), ("sampled", 2), ("greedy", 3), ("greedy", 4))
]
SIBLINGS = [
    Case(
        f"{name}, {len(proposers)} siblings",
        3,
        (-1,) + (0,) * len(proposers),
        proposers,
        (0.7, 0.3),
        acceptance=name,
        parameters=rules.DEFINITIONS[name].parameters[0],
        seed=5,
    )
    for name in ("k_seq", "cactus", "js", "entropy_veto", "cascade_v3")
    for proposers in ((1, 1), (1, 1, 1))
]


# Triton's interpreter takes minutes for one case: test_conformance.py compares its tokens instead.
KERNELS = sorted({*dispatch.MODULES} - {"triton"})


def mixed_draft(case: Case) -> Case:
    """With one kind of proposal throughout, as one call takes it."""
    return case if SEPARATE not in case.proposers else replace(case, proposers=(SEPARATE,) * 2)


@pytest.mark.parametrize("case", [*map(mixed_draft, ONE_OF_EACH), *SIBLINGS], ids=str)
def test_every_rule_emits_what_its_definition_says(case: Case) -> None:
    law, surprise = laws.observed_law(case, in_float64(case), 2.0**-40)
    expected = laws.emitted_law(case, lambda question: laws.predicted(case, question))
    assert laws.total_variation(law, expected) < 1e-9
    assert surprise < 1e-9
    if ACCEPTANCE_RULES[case.acceptance].lossless:
        assert laws.joint_distance(case, law) < 1e-9


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, mixed_draft(case), id=f"{backend}-{case}")
        for backend in KERNELS
        for case in ONE_OF_EACH
        if backend != "cuda" or case.seed == 1  # the emulator is slow, too
    ],
    indirect=["backend"],
)
def test_every_kernel_emits_what_the_rules_definition_says(backend: str, case: Case) -> None:
    law, _ = laws.observed_law(case, through_the_op(case), GRID)
    expected = laws.emitted_law(case, lambda question: laws.predicted(case, question))
    assert laws.total_variation(law, expected) < 1e-6


def test_the_enumeration_sees_a_lossy_rule() -> None:
    case = case_named("weights for each position")
    lossy = in_float64(case, acceptance=Acceptance("lenient", lenience=0.7))
    law, _ = laws.observed_law(case, lossy, 2.0**-12)
    assert laws.joint_distance(case, law) > 1e-3


# A narrow vocabulary and a draft that likes least what the target likes most: most drafts are
# rejected, so the residual law carries the result.
WIDE = torch.linspace(1.5, -1.5, 16)
REVERSED = [WIDE, WIDE.flip(0)]
P_VALUE = 1e-4

COUNTS = [
    pytest.param("native", 200_000, id="native"),
    pytest.param("reference", 2_000, id="reference", marks=pytest.mark.slow),
]


def drawn_tokens(count: int, **options: float | str) -> Tensor:
    """(count, 2) tokens of one call whose draft was drawn from member 1."""
    rows = [row.expand(count, 2, -1) for row in REVERSED]
    draft = torch.multinomial(REVERSED[1].softmax(-1), count, replacement=True)[:, None]
    proposers = torch.ones(1, dtype=torch.int32)
    numbers = uniforms(torch.arange(count), torch.arange(2)[None], Stream.VERIFY)
    return verify(rows, draft, numbers, Law((0.8, 0.2)), proposers=proposers, **options).tokens


def wrong_laws() -> dict[str, Tensor]:
    """What the first token's law would be."""
    target = laws.ensemble_law(REVERSED, (0.8, 0.2))
    draft = REVERSED[1].double().softmax(-1)
    kept = torch.minimum(target, draft)
    lenient = torch.minimum(target / 0.7, draft)
    return {
        "lenient": laws.output_law(lenient, target, draft),
        "the residual is the target": kept + (1 - kept.sum()) * target,
        "the draft is kept whenever the target likes it": laws.output_law(
            target * draft, draft, draft
        ),
    }


@pytest.mark.parametrize(("backend", "count"), COUNTS, indirect=["backend"])
def test_the_first_token_fits_the_target(backend: str, count: int) -> None:
    target = laws.ensemble_law(REVERSED, (0.8, 0.2))
    first = drawn_tokens(count)[:, 0]
    assert laws.chi_square(torch.bincount(first, minlength=16), target).p_value > P_VALUE


@pytest.mark.parametrize(("backend", "count"), COUNTS, indirect=["backend"])
def test_the_same_fit_rejects_a_lossy_rule(backend: str, count: int) -> None:
    target = laws.ensemble_law(REVERSED, (0.8, 0.2))
    assert laws.power(wrong_laws()["lenient"], target, count, P_VALUE) > 0.999
    first = drawn_tokens(count, acceptance=Acceptance("lenient", lenience=0.7))[:, 0]
    assert laws.chi_square(torch.bincount(first, minlength=16), target).p_value < P_VALUE


@pytest.mark.parametrize("wrong", wrong_laws())
def test_the_fit_has_power(wrong: str) -> None:
    """2,000 draws tell each wrong law with a chance over 0.999, 200,000 a tenth of its distance."""
    target, law = laws.ensemble_law(REVERSED, (0.8, 0.2)), wrong_laws()[wrong]
    assert laws.power(law, target, 2_000, P_VALUE) > 0.999
    assert laws.power(target + 0.1 * (law - target), target, 200_000, P_VALUE) > 0.999
    counts = torch.bincount(torch.multinomial(law, 2_000, replacement=True), minlength=16)
    assert laws.chi_square(counts, target).p_value < P_VALUE


# Rejected drafts are mostly token 0, so where a residual reuses the draft's numbers it is drawn
# with small ones only.
DRAFT_PROBS = torch.tensor([0.6, 0.05, 0.2, 0.15])
OTHER_PROBS = torch.tensor([0.15, 0.25, 0.2, 0.4])


def two_tokens(count: int, draft_stream: Stream) -> tuple[Tensor, Tensor]:
    """(16,) counts of the first two tokens of `count` sequences, and their law.

    One token is drafted a turn. Where it is rejected the second token is the next turn's first.
    """
    generator = torch.Generator().manual_seed(1)
    tables = [  # (context, V); the last context is the empty one
        probs.log() + 0.3 * torch.randn(5, 4, generator=generator)
        for probs in (OTHER_PROBS, DRAFT_PROBS)
    ]
    law, seeds, proposers = Law((0.8, 0.2)), torch.arange(count), torch.ones(1, dtype=torch.int32)

    def turn(position: int, context: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(position, position + 2)[None]
        numbers = uniforms(seeds, positions[:, :1], draft_stream)
        draft = sample([table[context] for table in tables], numbers, law, member=1).tokens
        rows = [table[torch.cat([context, draft], -1)] for table in tables]
        numbers = uniforms(seeds, positions, Stream.VERIFY)
        verdict = verify(rows, draft, numbers, law, proposers=proposers)
        return verdict.tokens, verdict.num_accepted

    tokens, accepted = turn(0, torch.full((count, 1), 4))
    next_turn, _ = turn(1, tokens[:, :1])
    second = torch.where(accepted > 0, tokens[:, 1], next_turn[:, 0])
    rows = [laws.ensemble_law([table[c] for table in tables], (0.8, 0.2)) for c in range(5)]
    joint = rows[4][:, None] * torch.stack(rows[:4])
    return torch.bincount(tokens[:, 0] * 4 + second, minlength=16), joint.flatten()


FEWER = [("native", 200_000), ("reference", 800)]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), FEWER, indirect=["backend"])
def test_two_tokens_drafted_and_verified_with_one_seed_fit_the_target(
    backend: str, count: int
) -> None:
    counts, joint = two_tokens(count, Stream.DRAFT)
    assert laws.chi_square(counts, joint).p_value > P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "count"), FEWER, indirect=["backend"])
def test_that_fit_rejects_numbers_shared_by_draft_and_residual(backend: str, count: int) -> None:
    counts, joint = two_tokens(count, Stream.VERIFY)
    assert laws.chi_square(counts, joint).p_value < P_VALUE


def block_law(
    case: Case, verify: Callable[[Case], Callable] = in_float64, fine: float = 2.0**-40
) -> laws.JointLaw:
    """The law of what `verify` emits for a drafted chain of two, by asking it for its edges."""
    last = 1 - fine
    size = case.vocab_size
    law: laws.JointLaw = defaultdict(float)

    def ask(x: int, y: int, coins: tuple[Tensor, Tensor], draws: Tensor) -> tuple[Tensor, Tensor]:
        count = len(draws)
        prefixes = ((), (x,), (x, y))
        rows = [[case.logits(m, prefix) for prefix in prefixes] for m in range(case.members)]
        numbers = torch.zeros(count, 3, 4, dtype=torch.float64)
        numbers[:, 1, 0], numbers[:, 2, 0] = coins
        numbers[:, :, 3] = draws[:, None]
        call = Call(
            [torch.stack(row).expand(count, -1, -1) for row in rows],
            torch.tensor([[x, y]]).expand(count, -1),
            numbers,
            None,
            torch.tensor([case.proposers]),
            None,
        )
        tokens, path = verify(case)(call)
        return tokens, (path >= 0).sum(-1)

    def edge(x: int, y: int, node: int) -> float:
        """Below which coin of `node` exactly `node` drafts are kept, if no later one is."""

        def holds(points: Tensor) -> Tensor:
            coins = [torch.full_like(points, last), torch.full_like(points, last)]
            coins[node - 1] = points
            return ask(x, y, (coins[0], coins[1]), points)[1] == node

        return laws.bisect(holds, 1, fine).item()

    def drawn(x: int, y: int, kept: int) -> Tensor:
        """(V,) law of the token after `kept` drafts."""
        coins = [torch.full((size - 1,), 0.0 if kept == node else last) for node in (1, 2)]
        tokens = torch.arange(size - 1)

        def holds(points: Tensor) -> Tensor:
            emitted, found = ask(x, y, (coins[0].double(), coins[1].double()), points)
            assert (found == kept).all()
            return emitted[:, kept] <= tokens

        below = laws.bisect(holds, size - 1, fine)
        return (
            torch.nn.functional.pad(below, (1, 1), value=0.0)
            .index_fill_(0, torch.tensor([size]), 1.0)
            .diff()
        )

    for x, y in itertools.product(range(size), repeat=2):
        chance = (case.draft(1, ())[x] * case.draft(2, (x,))[y]).item()
        both, one = edge(x, y, 2), edge(x, y, 1)
        outcomes = ((2, both, (x, y)), (1, (1 - both) * one, (x,)))
        for kept, share, prefix in (*outcomes, (0, (1 - both) * (1 - one), ())):
            if chance * share > 1e-15:
                for token, mass in enumerate(drawn(x, y, kept).tolist()):
                    law[(*prefix, token)] += chance * share * mass
    return law


@pytest.mark.parametrize(
    ("seed", "law"), [(1, {}), (2, {}), (1, {"ensemble": "maximum", "temperature": 0.75})]
)
def test_a_block_has_the_targets_law(seed: int, law: dict[str, Any]) -> None:
    case = Case("block", 3, CHAIN_2, (1, 1), (0.7, 0.3), law=law, acceptance="block", seed=seed)
    assert laws.joint_distance(case, block_law(case)) < 1e-9


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_kernels_block_has_the_targets_law(backend: str, seed: int) -> None:
    case = Case("block", 3, CHAIN_2, (1, 1), (0.7, 0.3), acceptance="block", seed=seed)
    assert laws.joint_distance(case, block_law(case, through_the_op, GRID)) < 1e-6
