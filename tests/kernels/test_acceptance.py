# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules in closed form: what each emits, and that what it claims of it is true.

That `verify` does what these closed forms say is shown in test_verify_law.py.
"""

import itertools
import math
import re
import subprocess
import sys

import pytest
import rules
import torch
from torch import Tensor

from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES, Acceptance, AcceptanceRule
from specens_kernels.acceptance.blocks import block_step, block_threshold
from specens_kernels.acceptance.gates import DIVERGENCES
from specens_kernels.acceptance.mentored import mentored_law
from specens_kernels.acceptance.rules import Situation

NAMES = sorted(set(ACCEPTANCE_RULES) - {"block", "greedy", "k_seq"})
CASES = [(name, parameters) for name in NAMES for parameters in rules.parameters(name)]
EACH = pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)


def distributions(vocab_size: int, seed: int = 0, zeros: float = 0.0) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(2, 16, vocab_size, dtype=torch.float64, generator=dice)
    hidden = torch.rand(scores.shape, generator=dice) < zeros
    hidden[..., 0] = False
    target, draft = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return target, draft


def output_law(acceptance: Acceptance, target: Tensor, draft: Tensor) -> Tensor:
    """(..., V) law of the token that one step emits: the sum over every drafted token."""
    law = torch.zeros_like(target)
    for x in range(target.shape[-1]):
        token = torch.full(target.shape[:-1], x)
        at = Situation(target, draft, token, torch.zeros(token.shape, dtype=torch.float64))
        judgement = acceptance.rule.judge(at, *acceptance.parameters)
        q = draft[..., x]
        kept = torch.minimum(judgement.kept[..., x], q)
        left = judgement.left.sum(-1, keepdim=True)
        replacement = torch.where(left > 0, judgement.left / left, target)
        law[..., x] += kept
        law += (q - kept)[..., None] * replacement
    return law


@EACH
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_a_rule_judges_as_its_definition_says(
    name: str, parameters: dict[str, float], zeros: float
) -> None:
    target, draft = distributions(5, zeros=zeros)
    acceptance = Acceptance(name, **parameters)
    kinds = set()
    for p, q in zip(target, draft, strict=True):
        for x in range(5):
            if q[x] == 0:
                continue
            at = Situation(p, q, torch.tensor(x), torch.tensor(0.3, dtype=torch.float64))
            kept, left, *_ = acceptance.rule.judge(at, *acceptance.parameters)
            definition = rules.DEFINITIONS[name].closed
            keep, expected = definition(p.tolist(), q.tolist(), x, 0.3, **parameters)
            assert (kept[x] / q[x]).clamp(max=1).item() == pytest.approx(keep, abs=1e-9)
            if keep < 1 - 1e-12:
                assert left.tolist() == pytest.approx(expected, abs=1e-9)
            kinds.add(keep > 0.5)
    # Both outcomes were seen, unless the coin decides alone.
    assert zeros or kinds == {True, False} or acceptance.rule.by_coin


@EACH
def test_a_rule_emits_the_target_law_iff_it_says_lossless(
    name: str, parameters: dict[str, float]
) -> None:
    acceptance = Acceptance(name, **parameters)
    if acceptance.parameters == (1.0,) and name == "lenient":
        return  # nothing but `rejection`
    target, draft = distributions(5)
    law = output_law(acceptance, target, draft)
    assert torch.allclose(law.sum(-1), torch.ones(16, dtype=torch.float64))
    distance = (law - target).abs().sum(-1).max().item() / 2
    assert (distance < 1e-12) == acceptance.rule.lossless
    assert acceptance.rule.lossless or distance > 1e-3


@pytest.mark.parametrize("name", [n for n, rule in rules.DEFINITIONS.items() if rule.law])
def test_a_rule_with_a_law_of_its_own_emits_it(name: str) -> None:
    target, draft = distributions(9, zeros=0.2)
    for parameters in rules.DEFINITIONS[name].parameters:
        law = output_law(Acceptance(name, **parameters), target, draft)
        for p, q, found in zip(target.tolist(), draft.tolist(), law.tolist(), strict=True):
            assert found == pytest.approx(rules.DEFINITIONS[name].law(p, q, **parameters), abs=1e-8)


def test_what_lossy_rules_promise_is_kept() -> None:
    target, draft = distributions(17)
    for lenience in (0.9, 0.5):
        law = output_law(Acceptance("lenient", lenience=lenience), target, draft)
        assert (law <= target / lenience + 1e-12).all()
    for divergence in (0.05, 0.3):
        law = output_law(Acceptance("mentored", divergence=divergence), target, draft)
        nats = (target * (target / law).log()).sum(-1)
        assert (nats <= divergence + 1e-9).all()
        assert (nats > divergence / 2).any()
    for rule in ("js", "tv", "kl"):
        strict = output_law(Acceptance(rule, threshold=0), target, draft)
        assert torch.allclose(strict, target)
    everything = output_law(Acceptance("tv", threshold=1), target, draft)
    assert torch.allclose(everything, draft)
    cautious = output_law(Acceptance("cactus", divergence=0), target, draft)
    assert torch.allclose(cautious, target)


def test_what_a_bounded_rule_keeps_where_its_bound_is_0_or_the_largest_number() -> None:
    for target, draft in (distributions(17), distributions(17, zeros=0.4)):
        strict = output_law(Acceptance("mentored", divergence=0), target, draft)
        assert torch.allclose(strict, target, atol=1e-14)
    target, draft = distributions(17)
    loose = output_law(Acceptance("mentored", divergence=1e308), target, draft)
    assert torch.allclose(loose, draft, atol=1e-14)


@pytest.mark.parametrize("p", [0.0, 1.0, 0.25])
def test_cactus_without_a_bound_keeps_what_the_target_has_at_all(p: float) -> None:
    law = torch.tensor([p, 1 - p, 0.0], dtype=torch.float64)
    draft = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    at = Situation(law, draft, torch.tensor(0), torch.tensor(0.0))
    kept, left, *_ = Acceptance("cactus", divergence=1e308).rule.judge(at, 1e308)
    assert kept[0] == (0.5 if p > 0 else 0)
    assert left.tolist() == pytest.approx([0, 0.8, 0] if p == 0 else [0, 0, 0])


def law_of(log_ratios: list[float], masses: list[float]) -> tuple[Tensor, Tensor]:
    """A target and a draft with these ratios, by the target's masses."""
    target = torch.tensor(masses, dtype=torch.float64)
    draft = target / torch.tensor(log_ratios, dtype=torch.float64).exp()
    return target / target.sum(), draft / draft.sum()


EXTREME = {
    "as a point": (torch.tensor([0.6, 0.4, 0.0]), torch.tensor([0.0, 1.0, 0.0])),
    "where the target has nothing": (torch.tensor([0.6, 0.4, 0.0]), torch.tensor([0.1, 0.1, 0.8])),
    "apart": (torch.tensor([0.6, 0.4, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])),
    "nowhere": (torch.tensor([0.6, 0.4]), torch.zeros(2)),
    "by hundreds of nats": law_of([-300.0, 2.0, 40.0, 0.0], [0.3, 0.3, 1e-20, 0.4]),
    "but for next to nothing": law_of([0.0, 0.1, 35.0, -0.2], [0.3, 0.3, 1e-13, 0.4]),
}


@pytest.mark.parametrize("divergence", [1e-4, 0.05, 2.0])
@pytest.mark.parametrize("name", EXTREME)
def test_mentored_finds_a_law_where_the_draft_is_far(name: str, divergence: float) -> None:
    target, draft = (law.double() / law.double().sum().clamp(min=0.1) for law in EXTREME[name])
    law = mentored_law(target, draft, divergence)
    nats = torch.where(target > 0, target * (target / law).log(), 0.0).sum()
    assert law.sum().item() == pytest.approx(1, abs=1e-9)
    assert nats <= divergence + 1e-9


def test_rejection_keeps_the_most_that_is_lossless() -> None:
    target, draft = distributions(17)
    kept = torch.minimum(target, draft)
    more = kept + 0.01 * (draft - kept)
    residual = (target - more).clamp(min=0)
    law = more + (1 - more.sum(-1, keepdim=True)) * residual / residual.sum(-1, keepdim=True)
    assert (law - target).abs().sum(-1).max() / 2 > 1e-4


def test_lenience_1_is_rejection_and_less_is_lossier() -> None:
    target, draft = distributions(17)
    assert torch.allclose(output_law(Acceptance("lenient", lenience=1), target, draft), target)
    distances = [
        (output_law(Acceptance("lenient", lenience=lenience), target, draft) - target).abs().sum()
        for lenience in (0.9, 0.6, 0.3)
    ]
    assert 0.001 < distances[0] < distances[1] < distances[2]


def block_law(target: Tensor, draft: Tensor, *, uncapped_end: bool = False) -> Tensor:
    """(V, V) law of the next two tokens when blocks of two are drafted; laws at [0] and [1 + x]."""
    size = target.shape[-1]
    law = torch.zeros(size, size, dtype=torch.float64)

    def replaced(reach: float, row: int) -> Tensor:
        left = (reach * target[row] - draft[row]).clamp(min=0)
        return left / left.sum() if left.sum() > 0 else target[row]

    for x, y in itertools.product(range(size), repeat=2):
        chance = (draft[0, x] * draft[1 + x, y]).item()
        ratios = [
            (target[0, x] / draft[0, x]).item(),
            (target[1 + x, y] / draft[1 + x, y]).item(),
        ]
        first = block_step(1.0, ratios[0])
        both = block_step(first, ratios[1])
        if uncapped_end:
            both = min(1.0, math.prod(ratios))
        left = (first * target[1 + x] - draft[1 + x]).clamp(min=0).sum().item()
        one = (1 - both) * block_threshold(first, left)
        law[x, y] += chance * both
        law[x] += chance * one * replaced(first, 1 + x)
        law += chance * (1 - both - one) * replaced(1.0, 0)[:, None] * target[1:]
    return law


def test_block_verification_is_lossless_and_keeps_more() -> None:
    for seed in range(5):
        target, draft = (laws[:5] for laws in distributions(4, seed))
        right = target[0][:, None] * target[1:]
        assert (block_law(target, draft) - right).abs().max() < 1e-14
        # The released code of arXiv:2601.05724 does not cap the last ratio.
        assert (block_law(target, draft, uncapped_end=True) - right).abs().max() > 1e-3


def test_a_block_ends_no_earlier_than_token_by_token() -> None:
    gains = []
    for seed in range(50):
        target, draft = (laws[:5] for laws in distributions(4, seed))
        mine, theirs = 0.0, 0.0
        for x, y in itertools.product(range(4), repeat=2):
            chance = (draft[0, x] * draft[1 + x, y]).item()
            ratios = [
                (target[0, x] / draft[0, x]).item(),
                (target[1 + x, y] / draft[1 + x, y]).item(),
            ]
            first = block_step(1.0, ratios[0])
            both = block_step(first, ratios[1])
            left = (first * target[1 + x] - draft[1 + x]).clamp(min=0).sum().item()
            mine += chance * (2 * both + (1 - both) * block_threshold(first, left))
            one = min(1.0, ratios[0])
            theirs += chance * (one + one * min(1.0, ratios[1]))
        gains.append(mine / theirs)
    assert min(gains) >= 1 - 1e-12
    assert max(gains) > 1.01


@pytest.mark.parametrize("k", [1, 2, 4])
def test_k_seq_is_lossless_for_k_independent_drafts(k: int) -> None:
    target, draft = distributions(6)
    for p, q in zip(target, draft, strict=True):
        at = Situation(p, q, torch.tensor(0), torch.tensor(0.0), k)
        kept, left, *_ = ACCEPTANCE_RULES["k_seq"].judge(at)
        missed = 1 - kept.sum()
        some = (1 - missed**k) / kept.sum()  # times kept: the mass of a token that is kept
        law = kept * some + missed**k * left / left.sum()
        assert torch.allclose(law, p, atol=1e-12)


def test_divergences_are_what_their_names_say() -> None:
    target, draft = distributions(7, zeros=0.3)
    for name, terms in DIVERGENCES.items():
        for p, q in zip(target, draft, strict=True):
            expected = rules.DIVERGENCES[name](p.tolist(), q.tolist())
            assert terms(p, q).sum().item() == pytest.approx(expected, abs=1e-12)


def test_js_is_bounded_and_the_published_formula_is_not() -> None:
    target, draft = torch.tensor([[1 - 1e-9, 1e-9], [1e-9, 1 - 1e-9]], dtype=torch.float64)
    assert DIVERGENCES["js"](target, draft).sum() <= math.log(2)
    assert DIVERGENCES["js_fsd"](target, draft).sum() > 2


@pytest.mark.parametrize("rule", ACCEPTANCE_RULES.values(), ids=lambda rule: rule.name)
def test_an_entry_says_where_it_comes_from_and_what_it_emits(rule: AcceptanceRule) -> None:
    assert re.search(r"(19|20)\d\d|arXiv:", rule.source)
    assert rule.law
    assert all(p.low <= p.default <= p.high for p in rule.parameters)
    assert rule.name in rules.DEFINITIONS, "expected a Definition in tests/oracles/rules.py"


def test_the_facts_of_every_rule_need_no_torch() -> None:
    """A command line reads names, ranges and mistakes before anything takes a second."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES, Acceptance, Refusal\n"
        "print(*ACCEPTANCE_RULES, *ENSEMBLES, Acceptance.parse('js:threshold=0.3'))\n"
        "try: Acceptance.parse('tv:threshold=2')\n"
        "except Refusal as refusal: print(refusal.argument)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    expected = (
        f"{' '.join([*ACCEPTANCE_RULES, *ENSEMBLES])} Acceptance('js', threshold=0.3, top_k=0)"
    )
    assert done.stdout.splitlines() == [expected, "threshold"], done.stderr


def test_the_published_defaults_of_typical_acceptance() -> None:
    # medusa_generate's, which its evaluate_posterior has the other way round.
    assert Acceptance("typical").parameters == (0.09, 0.3)


def test_a_rule_is_read_from_a_command_line() -> None:
    assert Acceptance.parse("js:threshold=0.3,top_k=50").parameters == (0.3, 50.0)
    assert Acceptance.parse("rejection").parameters == ()
    assert repr(Acceptance.parse("js:threshold=0.3")) == "Acceptance('js', threshold=0.3, top_k=0)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jz", r"acceptance: name: expected one of block, .*, got 'jz'"),
        ("js:thr=1", "acceptance: thr: expected threshold, top_k for 'js', got thr"),
        ("js:0.3", "acceptance: js: expected name=number, each name once, got '0.3'"),
        ("rejection:lenience=1", "expected no parameter for 'rejection'"),
        ("lenient:lenience=0", r"lenience: expected a number in \(0, 1\] for 'lenient', got 0"),
        ("lenient:lenience=nan", r"expected a number in \(0, 1\] for 'lenient', got nan"),
        ("tv:threshold=2", r"threshold: expected a number in \[0, 1\] for 'tv', got 2"),
        ("top_k:k=x", r"k: expected a whole number in \[1, .*\] for 'top_k', got 'x'"),
        ("top_k:k=1.5", r"k: expected a whole number in \[1, .*\] for 'top_k', got 1.5"),
        ("js:threshold=inf", r"threshold: expected a number in \[0, inf\) for 'js', got inf"),
        ("js:threshold=1e999", r"threshold: expected a number in \[0, inf\) for 'js', got inf"),
    ],
)
def test_what_a_rule_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Acceptance.parse(text)
