# SPDX-License-Identifier: Apache-2.0
"""Backends against the reference in random situations: every argument, broken inputs included.

A situation is a seed; a failure prints it. Equal tokens are asked for, not close ones: the seeds
are fixed, and a decision that rounding could turn has a chance of about 1e-6.
"""

import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES, Law, mix, sample, verify

INF, NAN = float("inf"), float("nan")

BACKENDS = pytest.mark.parametrize("backend", ["native"], indirect=True)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


class Situation:
    """Random arguments; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        torch.manual_seed(seed)
        self.batch = dice.choice([1, 2, 5])
        self.nodes = dice.choice([0, 1, 3, 6])
        self.members = dice.choice([1, 1, 2, 3])
        self.vocab_size = dice.choice([1, 2, 5, 33, 1023, 1025, 4099, 8193])
        self.broken = dice.random() < 0.3
        self.shared = dice.choice([1.0, 3.0, 8.0]) * torch.randn(
            self.batch, self.nodes + 1, self.vocab_size
        )

    def logits(self, rows: int) -> Tensor:
        """A member's logits in a wider tensor, whose other columns and rows are NaN."""
        dice = self.dice
        values = self.shared + torch.randn_like(self.shared)
        if self.broken:
            for _ in range(3):
                value = dice.choice([NAN, INF, -INF, -INF])
                b, row = dice.randrange(self.batch), dice.randrange(self.nodes + 1)
                columns = dice.choice([1, self.vocab_size // 2, self.vocab_size])
                values[b, row, :columns] = value
        dtype = dice.choice([torch.float32, torch.float16, torch.bfloat16])
        step, extra = dice.choice([1, 2]), dice.choice([0, 0, 1, 7])
        shape = (self.batch, (self.nodes + 1) * step, self.vocab_size + extra)
        wide = torch.full(shape, NAN, dtype=dtype)
        wide[:, ::step, : self.vocab_size] = values
        return wide[:, ::step][:, :rows]

    def law(self, rows: int) -> Law:
        dice = self.dice
        ensemble = dice.choice(list(ENSEMBLES))
        scope = dice.choice(["member", "ensemble"])
        shape = dice.choice([(), (self.batch,), (self.batch, rows)])
        weights = torch.rand(*shape, self.members)
        if ensemble == "mixture":
            weights = weights / weights.sum(-1, keepdim=True)
        elif dice.random() < 0.5:
            weights[..., -1:] = -weights[..., -1:] / 2
        if self.members > 1 and dice.random() < 0.2:
            weights[..., dice.randrange(self.members)] = 0.0
        one = scope == "ensemble" or dice.random() < 0.5
        temperature = 0.3 + 1.2 * torch.rand(
            dice.choice([1, self.batch]), 1 if one else self.members
        )
        if dice.random() < 0.3:
            temperature[dice.randrange(len(temperature))] = 0.0

        def maybe(off: Any, on: Any) -> Any:
            """A filter that is off, the same for all rows, or a row's own and off in some."""
            values = [dice.choice([on(), on(), off]) for _ in range(self.batch)]
            return dice.choice([off, on(), torch.tensor(values)])

        return Law(
            weights,
            ensemble,
            temperature,
            top_k=maybe(0, lambda: dice.randint(1, self.vocab_size + 3)),
            top_p=maybe(1.0, lambda: dice.uniform(0.05, 0.99)),
            min_p=maybe(0.0, lambda: dice.uniform(0.001, 0.3)),
            scope=scope,
            plausibility=dice.choice([0.0, 0.05]) if ensemble == "product" else 0.0,
            vocab_size=self.vocab_size,
        )

    def numbers(self, rows: int) -> Tensor:
        numbers = (torch.rand(self.batch, rows, 8) / 2**-24).floor() * 2**-24
        ends = torch.tensor([0.0, 1 - 2**-24])
        numbers = torch.where(
            torch.rand_like(numbers) < 0.02, ends[torch.randint(0, 2, numbers.shape)], numbers
        )
        return numbers[..., ::2] if self.dice.random() < 0.5 else numbers[..., :4]


def assert_same(name: str, one: tuple[Tensor, ...], other: tuple[Tensor, ...], seed: int) -> None:
    for position, (value, expected) in enumerate(zip(one, other, strict=True)):
        message = f"{name}, output {position}, seed {seed}"
        if value.dtype == torch.float32:
            torch.testing.assert_close(
                value, expected, equal_nan=True, **CLOSE, msg=lambda m, n=message: f"{n}: {m}"
            )
        else:
            assert torch.equal(value, expected), message


@BACKENDS
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_mix_and_sample(backend: str, first: int) -> None:
    for seed in range(first, first + 20):
        situation = Situation(seed)
        rows = situation.nodes + 1
        logits = [situation.logits(rows) for _ in range(situation.members)]
        law, numbers = situation.law(rows), situation.numbers(rows)
        member = situation.dice.choice([None, situation.dice.randrange(situation.members)])
        mixed = mix(logits, law)
        drawn = sample(logits, numbers, law, member=member)
        with specens_kernels.backend("reference"):
            assert_same("mix", mixed, mix(logits, law), seed)
            assert_same("sample", drawn, sample(logits, numbers, law, member=member), seed)


@BACKENDS
@pytest.mark.parametrize("first", range(1000, 1300, 15))
@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_verify(backend: str, first: int, shape: str) -> None:
    for seed in range(first, first + 15):
        situation = Situation(seed)
        dice, batch, nodes = situation.dice, situation.batch, situation.nodes
        bonus = dice.random() < 0.8
        rows = nodes + bonus
        logits = [situation.logits(rows) for _ in range(situation.members)]
        law, numbers = situation.law(rows), situation.numbers(nodes + 1)
        apart = situation.logits(dice.choice([nodes, nodes + 1]))
        if nodes == 0:
            draft = torch.zeros(batch, 0, dtype=torch.int64)
        else:
            likely = logits[0][:, :nodes, : situation.vocab_size].nan_to_num()
            draft = sample([likely], torch.rand(batch, nodes, 4), Law()).tokens
        if situation.broken:
            wild = torch.tensor([-1, -2, situation.vocab_size, 2**31 - 1])
            choice = wild[torch.randint(0, 4, draft.shape)]
            draft = torch.where(torch.rand(draft.shape) < 0.2, choice, draft)
        options: dict[str, Any] = {
            "acceptance": dice.choice(list(ACCEPTANCE_RULES)),
            "lenience": dice.choice([1.0, 0.6]),
            "bonus": bonus,
        }
        if dice.random() < 0.3:
            options["draft_logits"] = apart
            options["draft_temperature"] = dice.choice(
                [None, torch.tensor(0.9), torch.full((batch,), 0.7)]
            )
        elif ((law.weights != 0).sum(-1) > 1).all():
            # Of a target that equals its draft rounding is the whole residual, and no two backends
            # round alike; so nobody here says to have drawn what it did not from such a law.
            some = torch.randint(-1, situation.members, (dice.choice([1, batch]), nodes))
            options["proposers"] = dice.choice([None, some, some.int()])
        if shape == "tree":
            parents = [[-1] + [dice.randrange(i + 1) for i in range(nodes)] for _ in range(batch)]
            options["parents"] = torch.tensor(parents[: dice.choice([1, batch])])
        draft = dice.choice([draft, draft.int()])
        verdict = verify(logits, draft, numbers, law, **options)
        with specens_kernels.backend("reference"):
            expected = verify(logits, draft, numbers, law, **options)
        assert_same("verify", verdict, expected, seed)


@pytest.mark.slow
@BACKENDS
def test_instruction_sets_do_not_matter(backend: str) -> None:
    """The kernels of this machine's best one and those of any machine agree to the last bit."""
    program = (
        "import torch, specens_kernels as sk\n"
        "torch.manual_seed(0)\n"
        "logits = [3 * torch.randn(5, 4, 9001) for _ in range(2)]\n"
        "law = sk.Law((0.4, 0.6), top_p=0.9)\n"
        "drawn = sk.sample(logits, torch.rand(5, 4, 4), law)\n"
        "verdict = sk.verify(logits, drawn.tokens[:, :3], torch.rand(5, 4, 4), law)\n"
        "print([value.tolist() for value in (*drawn, *verdict, sk.mix(logits, law)[0])])\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **choice},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for choice in ({}, {"SPECENS_CPU_ISA": "baseline"})
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 100_000


@BACKENDS
def test_threads_do_not_matter(backend: str) -> None:
    logits = [3 * torch.randn(7, 4, 9000) for _ in range(3)]
    law = Law((0.5, 0.3, 0.2), temperature=0.8, top_p=0.9)
    numbers = torch.rand(7, 4, 4)

    def everything() -> list[Tensor]:
        drawn = sample(logits, numbers, law)
        return [*mix(logits, law), *drawn, *verify(logits, drawn.tokens[:, :3], numbers, law)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(5)
        together = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize("vocab_size", [4_096, 49_152, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_vocabularies(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for ensemble, weights in (("mixture", (0.3, 0.7)), ("product", (1.5, -0.5))):
        law = Law(weights, ensemble, temperature=0.8, vocab_size=vocab_size)
        logits = [
            (3 * torch.randn(2, 5, vocab_size + 64 * m, generator=generator)).to(dtype)
            for m in range(2)
        ]
        numbers = torch.randint(2**24, (2, 5, 4), generator=generator) * 2.0**-24
        drawn = sample(logits, numbers.flip(0), law, member=0).tokens
        with specens_kernels.backend("reference"):
            assert torch.equal(drawn, sample(logits, numbers.flip(0), law, member=0).tokens)
        drafts, proposers = drawn[:, :4], torch.zeros(1, 4, dtype=torch.int32)
        verdict = verify(logits, drafts, numbers, law, proposers=proposers)
        with specens_kernels.backend("reference"):
            expected = verify(logits, drafts, numbers, law, proposers=proposers)
        for mine, true in zip(verdict, expected, strict=True):
            if mine.is_floating_point():
                torch.testing.assert_close(mine, true, **CLOSE)
            else:
                assert torch.equal(mine, true)
