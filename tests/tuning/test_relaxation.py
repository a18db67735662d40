# SPDX-License-Identifier: Apache-2.0
"""What a lossy rule keeps, and how far it leads: against enumeration by the rules' definitions.

The definitions are those of `rules.py`, which share nothing with the implementation. To add a rule,
add it there.
"""

import pytest
import rules
import torch

from specens.tuning.lossy import check_lossy, spelled
from specens.tuning.relaxation import relaxed
from specens_kernels import ACCEPTANCE_RULES, Acceptance
from specens_kernels.acceptance.rules import Situation

REFUSED = ("rejection", "block", "k_seq", "greedy", "likelihood", "synthetic")
EACH = pytest.mark.parametrize("name", [n for n in ACCEPTANCE_RULES if n not in REFUSED])
SIZE, COUNT = 12, 24


def laws(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of laws from near to far, flat ones among them, in single precision."""
    dice = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.1, 3, COUNT)[:, None]
    target = torch.randn(COUNT, SIZE, generator=dice) * spread
    draft = target + torch.randn(COUNT, SIZE, generator=dice) * spread.flip(0) / 3
    return target.softmax(-1), draft.softmax(-1)


def enumerated(acceptance: Acceptance, p: list[float], q: list[float]) -> tuple[float, float]:
    """Every draft that there is: the chance that it is kept, and the divergence."""
    names = [parameter.name for parameter in acceptance.rule.parameters]
    parameters = dict(zip(names, acceptance.parameters, strict=True))
    chance, emitted = 0.0, [0.0] * len(p)
    for x, share in enumerate(q):
        keep, left = rules.DEFINITIONS[acceptance.rule.name].closed(p, q, x, 0.0, **parameters)
        chance += share * keep
        emitted[x] += share * keep
        rest = sum(left)
        for y, mass in enumerate(left):
            emitted[y] += share * (1 - keep) * (mass / rest if rest > 0 else p[y])
    return chance, sum(abs(a - b) for a, b in zip(emitted, p, strict=True)) / 2


@EACH
def test_acceptance_and_divergence_are_those_of_the_definition(name: str) -> None:
    seen = set()
    for seed, parameters in enumerate(rules.DEFINITIONS[name].parameters):
        acceptance = check_lossy(Acceptance(name, **parameters))
        target, draft = laws(seed)
        chances, distances = relaxed(acceptance, target, draft, greedy=False)
        for row in range(COUNT):
            p, q = target[row].double(), draft[row].double()
            expected = enumerated(acceptance, (p / p.sum()).tolist(), (q / q.sum()).tolist())
            # Single precision, over which a gate opens or not: thresholds are not met so nearly.
            found = float(chances[row]), float(distances[row])
            assert found == pytest.approx(expected, abs=2e-5), (parameters, row)
            seen.add(round(expected[1], 3))
    assert len(seen) > 1  # both gates open and closed, or laws that differ


def test_a_wrong_judgement_is_found_out() -> None:
    """As if what a rule says of one drafted token held for all of them."""
    target, draft = laws(0)
    for rule in (Acceptance("top_k", k=3), Acceptance("typical")):
        at = Situation(target, draft, draft.argmax(-1), torch.zeros(COUNT))
        wrong = torch.minimum(rule.rule.judge(at, *rule.parameters).kept, draft).sum(-1)
        right, _ = relaxed(rule, target, draft, greedy=False)
        assert float((wrong - right).abs().max()) > 0.05


@EACH
def test_which_rules_look_at_the_drafted_token(name: str) -> None:
    rule, depends = ACCEPTANCE_RULES[name], False
    for seed in range(4):
        for parameters in rules.DEFINITIONS[name].parameters:
            target, draft = laws(seed)
            masses = [
                rule.judge(
                    Situation(target, draft, torch.full((COUNT,), token), torch.zeros(COUNT)),
                    *Acceptance(name, **parameters).parameters,
                )
                for token in range(SIZE)
            ]
            depends |= any(
                not torch.equal(getattr(one, what), getattr(masses[0], what))
                for one in masses
                for what in ("kept", "left")
            )
    assert depends == ACCEPTANCE_RULES[name].by_token


@EACH
def test_greedily_the_verifier_decides_the_same(name: str) -> None:
    from specens_kernels import Law, Stream, uniforms, verify

    target, draft = laws(1)
    acceptance = Acceptance(name)
    chances, distances = relaxed(acceptance, target, draft, greedy=True)
    token = draft.argmax(-1)
    verdict = verify(
        [target.log()[:, None].expand(-1, 2, -1).contiguous()],
        token[:, None],
        uniforms(torch.arange(COUNT), torch.zeros(COUNT, 2, dtype=torch.int64), Stream.VERIFY),
        Law(temperature=0.0),
        draft_logits=draft.log()[:, None],
        acceptance=acceptance,
    )
    assert verdict.num_accepted.tolist() == chances.int().tolist()
    moved = verdict.tokens[:, 0] != target.argmax(-1)
    assert moved.tolist() == distances.bool().tolist()


def test_what_is_written_is_read_again() -> None:
    for name in ACCEPTANCE_RULES:
        for parameters in [{}, *rules.DEFINITIONS[name].parameters]:
            one = Acceptance(name, **parameters)
            other = Acceptance.parse(spelled(one))
            assert other.rule is one.rule
            assert other.parameters == pytest.approx(one.parameters, rel=1e-11)
    assert spelled(Acceptance("js", threshold=0.3)) == "js:threshold=0.3"


@pytest.mark.parametrize("name", REFUSED)
def test_rules_that_are_exact_or_look_at_more_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tune: acceptance: expected a lossy rule that judges"):
        check_lossy(Acceptance(name))
