# SPDX-License-Identifier: Apache-2.0
"""`verify` on trees: every backend that takes them against the reference, token by token.

A few hundred random trees run with the tests. With VERIFY_TREE_CASES=10000 so many run on each
backend, and how many were equal is printed. The same trees tell a wrong specification from a
kernel. A failure names its seed. To add a hard tree, add a test.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import SMALL, TILES, Call, check, check_but_near
from draft_trees import CHAINS_ONLY, tree_call
from mutants import with_bug

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, Law, dispatch, sample, verify

# Backends that take trees, and how many run with the tests, by what a kernel costs.
COUNTS = {"native": 400}
MANY = int(os.environ.get("VERIFY_TREE_CASES", "0"))
PORTION = 50
SIZES = (SMALL, SMALL, SMALL, TILES)
# `synthetic` rejects by the coin alone: of dozens of siblings it leaves nothing but rounding, which
# backends do not share. Few siblings are compared in test_packed_calls.py.
TREE_RULES = sorted(set(ACCEPTANCE_RULES) - CHAINS_ONLY - {"synthetic"})


def random_tree(seed: int, rules: Sequence[str] = TREE_RULES) -> Call:
    return tree_call(seed, SIZES[seed % len(SIZES)], rules)


def portions() -> Iterator[Any]:
    for backend, count in COUNTS.items():
        for first in range(0, count, PORTION):
            yield pytest.param(backend, range(first, first + PORTION), id=f"{backend} {first}")


@pytest.mark.parametrize(("backend", "seeds"), list(portions()), indirect=["backend"])
def test_random_trees(backend: str, seeds: range) -> None:
    near = sum(not check_but_near(backend, random_tree(seed)) for seed in seeds)
    assert near <= 1


@pytest.mark.skipif(MANY == 0, reason="VERIFY_TREE_CASES says how many")
@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_many_random_trees(backend: str) -> None:
    near, seeds = 0, range(1_000_000, 1_000_000 + MANY)
    for seed in seeds:
        near += not check_but_near(backend, random_tree(seed))
    text = f"{MANY - near:,} of {MANY:,} equal"
    beside = f" ({near} so near a threshold that no backend can agree)" if near else ""
    sys.stdout.write(f"\nverify on trees, {backend}: {text}{beside}\n")
    assert near <= MANY // 1000 + 1


# Lines of the specification, and what stands there instead. The kernel follows neither.
MISTAKES = {
    "a rejection is forgotten": ("mass, chance, bits = self.left(", "_, chance, bits = self.left("),
    "earlier siblings stay in the law": ("mass[earlier] = 0.0", "pass"),
    "the law of a later sibling is not normalised": (
        "mass = mass / mass.sum() if mass.sum() > 0 else mass",
        "pass",
    ),
    "with is taken for without": ('self.draws == "with"', 'self.draws == "neither"'),
    "without is taken for with": ('self.draws == "with"', "self.draws == self.draws"),
    "what has no mass may be kept": (
        "coin * at.draft[token] < judgement.kept[token]",
        "coin * at.draft[token] <= judgement.kept[token]",
    ),
    "siblings share a coin": (
        "at.token, self.coins[child]",
        "at.token, self.coins[self.parents[child] + 1]",
    ),
    "the residual is not normalised": (
        "return residual / left, chance * left, 0",
        "return residual, chance * left, 0",
    ),
    "siblings are independent": (
        "if self.rule.independent and child != candidates[-1]:",
        "if child != candidates[-1]:",
    ),
    "the walk takes the last child first": (
        "return [node for node in below if self.tokens[node - 1] != PADDING]",
        "return [node for node in below[::-1] if self.tokens[node - 1] != PADDING]",
    ),
}


def differs(one: Call, backend: str, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> bool:
    found = one.run(backend)
    call = dispatch.call_verify
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "call_verify", torch.no_grad()(lambda given: wrong.verify(given)))
        expected = one.run("reference")
    assert dispatch.call_verify is call
    return any(not torch.equal(expected[i], found[i]) for i in (0, 2, 3, 4))


@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_the_random_trees_reject_every_mistake(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected = []
    for place, (name, (line, instead)) in enumerate(MISTAKES.items()):
        (folder := tmp_path / str(place)).mkdir()
        with with_bug(line, instead, folder) as wrong:
            trees = (random_tree(seed, ["k_seq", "lenient", "rejection"]) for seed in range(400))
            if any(differs(one, backend, monkeypatch, wrong) for one in trees):
                rejected.append(name)
    sys.stdout.write(f"\n{backend}: {len(rejected)} of {len(MISTAKES)} mutants rejected\n")
    assert rejected == list(MISTAKES)


@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_trees_that_were_once_got_wrong(backend: str) -> None:
    """Siblings without replacement under a target without mass."""
    check(backend, random_tree(1_007_833))


@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_a_tree_of_width_1_is_the_chain(backend: str) -> None:
    """Of all random trees the nodes as a chain, said as a tree and left unsaid: the same bits."""
    for seed in range(300):
        one = random_tree(seed)
        nodes = one.arguments[1].shape[1]
        # A hole ends a chain, and loses what hangs off it in neither.
        options = {key: value for key, value in one.options.items() if key != "parents"}
        parents = torch.arange(-1, nodes)
        chain = one._replace(options=options).run(backend)
        tree = one._replace(options={**options, "parents": parents}).run(backend)
        for left, right in zip(chain, tree, strict=True):
            assert torch.equal(left, right), one.name


@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_the_order_of_nodes_of_different_parents_does_not_matter(backend: str) -> None:
    """Node i of a tree whose levels are told one after the other is node places[i] of another."""
    batch, vocab_size = 8, 30
    parents = torch.tensor([-1, 0, 0, 1, 2, 1, 2])
    places = torch.tensor([0, 1, 2, 4, 3, 6, 5])
    moved = torch.empty_like(parents)
    moved[places] = torch.where(parents < 0, parents, places[parents.clamp(min=0)])
    for draws in ("with", "without"):
        logits = [2 * torch.randn(batch, 7, vocab_size) for _ in range(2)]
        tokens = torch.randint(0, vocab_size, (batch, 6))
        numbers, proposers = torch.rand(batch, 7, 4), torch.tensor([0, 1, 0, 1, 1, 1])
        numbers[..., 0] *= 0.3
        order = places.argsort()
        options: dict[str, Any] = {"draws": draws}
        law = Law((0.5, 0.5))
        one = verify(logits, tokens, numbers, law, parents=parents, proposers=proposers, **options)
        other = verify(
            [member[:, order] for member in logits],
            tokens[:, order[1:] - 1],
            numbers[:, order],
            law,
            parents=moved,
            proposers=proposers[order[1:] - 1],
            **options,
        )
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.status, other.status)
        path = torch.where(one.path < 0, one.path, places[one.path.clamp(min=0).long()].int())
        assert torch.equal(path, other.path)


@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_rows_that_are_not_reached_are_not_read(backend: str) -> None:
    """Nor the laws of siblings after the one that is kept: their NaNs are not reported."""
    parents = torch.tensor([-1, 0, 0, 2, 2, 1])
    logits = [torch.randn(1, 6, 40) for _ in range(3)]
    numbers = torch.full((1, 6, 4), 0.5)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    logits[0][0, 0, 1] = -torch.inf
    for member in logits:
        member[0, [1, 4, 5]] = torch.nan  # row 3 is where the path ends
    logits[2][0, 0] = torch.nan  # the last member has no weight, and would propose node 3
    numbers[0, 1:, 0] = 0.0
    law, proposers = Law((0.5, 0.5, 0.0)), torch.tensor([0, 1, 2, -1, -1])
    verdict = verify(logits, tokens, numbers, law, parents=parents, proposers=proposers)
    assert verdict.path[0].tolist()[:2] == [2, 3]
    # Row 2 has the law of node 3: of the member without weight.
    assert verdict.status.item() == 0


@pytest.mark.parametrize("draws", ["with", "without"])
@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_hundreds_of_siblings(backend: str, draws: str) -> None:
    """All of a law's tokens, and more: under every rule, in ragged rows."""
    vocab_size, nodes, batch = 60, 200, 3
    logits = [3 * torch.randn(batch, nodes + 1, vocab_size) for _ in range(2)]
    tokens = torch.stack([torch.randperm(nodes) % vocab_size for _ in range(batch)])
    tokens[1, 150:] = -1
    parents = torch.tensor([-1] + [0] * nodes)
    numbers = torch.rand(batch, nodes + 1, 4)
    numbers[..., 0] = 1 - 2.0**-24
    proposers = torch.randint(-1, 2, (1, nodes))
    for rule in TREE_RULES:
        # A coin alone takes a hundred laws away, and what is left of the target is rounding.
        if ACCEPTANCE_RULES[rule].independent or ACCEPTANCE_RULES[rule].by_coin:
            continue
        options = {"parents": parents, "proposers": proposers, "acceptance": rule, "draws": draws}
        check(backend, Call("verify", (logits, tokens, numbers, Law((0.5, 0.5))), options, rule))


@pytest.mark.parametrize("backend", COUNTS, indirect=["backend"])
def test_a_proposer_without_anything_left_is_rejected(backend: str) -> None:
    """Both of its tokens were drawn: a third draw has no law, and the target stays."""
    logits = torch.full((1, 4, 6), -torch.inf)
    logits[0, :, [1, 4]] = 0.0
    target = torch.zeros(1, 4, 6)
    numbers = torch.full((1, 4, 4), 0.9)
    options = {
        "parents": torch.tensor([-1, 0, 0, 0]),
        "proposers": torch.tensor([1, 1, 1]),
        "draws": "without",
    }
    arguments = ([target, logits], torch.tensor([[1, 4, 1]]), numbers, Law((1.0, 0.0)))
    verdict = verify(*arguments, **options)
    assert verdict.num_accepted.item() == 0
    assert verdict.tokens[0, 0] in (0, 2, 3, 5)
    assert verdict.status.item() == 0
    check(backend, Call("verify", arguments, options, "nothing left"))


REFUSED = {
    "parents: expected None, got a tree": lambda logits, numbers: verify(
        logits, torch.zeros(1, 1).long(), numbers, Law(), parents=torch.tensor([-1, 0])
    ),
    "proposers: expected None beside draft_logits, got a tensor": lambda logits, numbers: verify(
        logits,
        torch.zeros(1, 1).long(),
        numbers,
        Law(),
        proposers=torch.ones(1).long(),
        draft_logits=logits[0],
    ),
    "count: expected None, got 2": lambda logits, numbers: sample(
        logits, numbers[:, :, None].expand(1, 2, 2, 4), Law(), count=2
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_who_does_not_take_trees_says_so(why: str) -> None:
    """By name, before anything is computed."""
    for backend in set(dispatch.MODULES) - set(COUNTS):
        if not dispatch.MODULES[backend].AVAILABLE:
            continue
        refused = pytest.raises(specens_kernels.Unsupported)
        with specens_kernels.backend(backend), refused as reason:
            REFUSED[why]([torch.zeros(1, 2, 5)], torch.zeros(1, 2, 4))
        assert str(reason.value) == f"{backend}: {why}"
