# SPDX-License-Identifier: Apache-2.0
"""The native kernels against the reference, and against themselves.

The same tokens, counts, paths and status for thousands of random calls, at sizes from 2 to 262,144;
the same bits for every number of threads, every instruction set and every batch. A situation is a
seed, and a failure prints it. Memory is tests/native/test_kernels.cpp's subject, under sanitizers.
"""

import hashlib
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES, Law, mix, native, sample, verify

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"native: {native.REASON}")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = {"mix": mix, "sample": sample, "verify": verify}
EXACT = {"mix": (1,), "sample": (0, 3), "verify": (0, 2, 3, 4)}  # the rest is rounded to float32
SMALL, TILES, REAL = (2, 3, 17, 100), (1023, 1024, 1025, 4096, 8193), (49152, 151936, 262144)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- random calls ---------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of an op, and how a failure names it."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    name: str

    def run(self, backend: str) -> tuple[Tensor, ...]:
        with specens_kernels.backend(backend):
            return tuple(OPS[self.op](*self.arguments, **self.options))


class Dice(random.Random):
    """Random arguments; `seed` makes torch's generator, too."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def happens(self, probability: float) -> bool:
        return self.random() < probability

    def uniform_tensor(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def logits(self, batch: int, rows: int, vocab_size: int) -> Tensor:
        """Of any kind that a model or a mistake may produce, in rows with any gap between them."""
        width = vocab_size + self.choice([0, 0, 1, 7, 64])
        shape, dtype = (batch, rows, width), self.choice(DTYPES)
        scale = self.choice([0.05, 2.0, 3.0, 12.0])
        values = torch.randn(shape, generator=self.generator) * scale
        if self.happens(0.2):
            values = (values * 2).round() / 2
        if self.happens(0.2):
            values[..., self.randrange(vocab_size)] += 12
        broken = self.choice([None] * 12 + [-math.inf, -math.inf, math.nan, math.inf, "min", "row"])
        if broken == "row":
            values[self.randrange(batch)] = -math.inf
        elif broken is not None:
            value = torch.finfo(dtype).min if broken == "min" else broken
            common = value in (-math.inf, torch.finfo(dtype).min)
            values[self.uniform_tensor(*shape) < (0.5 if common else 2 / width)] = value
        values = values.to(dtype)
        if self.happens(0.3):
            wide = torch.full((batch + 1, rows + 2, width + 3), math.nan, dtype=dtype)
            wide[1:, 1:-1, 1:-2] = values
            values = wide[1:, 1:-1, 1:-2]
        return values

    def law(self, batch: int, rows: int, members: int, vocab_size: int) -> Law:
        ensemble, scope = self.choice(sorted(ENSEMBLES)), self.choice(["member", "ensemble"])
        shape = (*self.choice([(), (batch,), (batch, rows)]), members)
        weights = self.uniform_tensor(*shape) + 0.05
        if self.happens(0.2):
            weights[self.uniform_tensor(*shape) < 0.4] = 0.0
        if ensemble == "mixture":
            weights[..., self.randrange(members)] += 0.1
            weights /= weights.sum(-1, keepdim=True)
        elif self.happens(0.5):
            weights[..., -1] = -weights[..., -1]
        columns = self.choice([1, members if scope == "member" else 1])
        temperature = 0.2 + 1.5 * self.uniform_tensor(self.choice([1, batch]), columns)
        if self.happens(0.4):
            temperature[self.uniform_tensor(*temperature.shape) < 0.4] = 0.0
        options: dict[str, Any] = {"temperature": self.choice([1.0, 0.0, temperature, temperature])}
        if self.happens(0.3):
            counts = torch.randint(-1, 60, (batch,), generator=self.generator)
            options["top_k"] = self.choice([1, 5, 50, vocab_size // 2 + 1, vocab_size + 9, counts])
        if self.happens(0.3):
            options["top_p"] = self.choice([0.1, 0.9, 0.999, 1.1 * self.uniform_tensor(batch)])
        if self.happens(0.2):
            options["min_p"] = self.choice([0.01, 0.1, 0.6, 0.5 * self.uniform_tensor(batch)])
        if ensemble == "product" and self.happens(0.3):
            options["plausibility"] = self.choice([0.01, 0.1, 1.0])
        return Law(weights, ensemble, scope=scope, vocab_size=vocab_size, **options)

    def numbers(self, *shape: int) -> Tensor:
        numbers = torch.randint(2**24, shape, generator=self.generator) * 2.0**-24
        if self.happens(0.2):
            numbers[self.uniform_tensor(*shape) < 0.3] = self.choice([0.0, 1 - 2.0**-24])
        return numbers

    def drafts(self, sources: Tensor, vocab_size: int) -> Tensor:
        """Likely tokens of (B, N, V) logits; some are anything, some missing."""
        batch, nodes = sources.shape[:2]
        values = sources[..., :vocab_size].float().nan_to_num(-1e9, 1e9, -1e9)
        likely = values.topk(min(3, vocab_size), -1).indices
        tokens = likely[..., self.randrange(likely.shape[-1])] if nodes else likely[..., 0]
        any_token = torch.randint(-2, vocab_size + 2, tokens.shape, generator=self.generator)
        tokens = torch.where(self.uniform_tensor(batch, nodes) < 0.1, any_token, tokens)
        if self.happens(0.3):
            lengths = torch.randint(0, nodes + 1, (batch, 1), generator=self.generator)
            tokens = tokens.masked_fill(torch.arange(nodes) >= lengths, -1)
        return tokens.to(self.choice([torch.int32, torch.int64]))


def call(seed: int, sizes: tuple[int, ...]) -> Call:
    dice = Dice(seed)
    vocab_size, batch = dice.choice(sizes), dice.choice([1, 1, 2, 3])
    nodes, members = dice.choice([0, 1, 2, 5]), dice.choice([1, 2, 2, 3, 4])
    op = dice.choice(["mix", "sample", "verify", "verify", "verify"])
    bonus = nodes == 0 or dice.happens(0.8)
    rows = nodes + 1 if bonus or op != "verify" else nodes
    logits = [dice.logits(batch, rows, vocab_size) for _ in range(members)]
    law = dice.law(batch, rows, members, vocab_size)
    name = f"{op}, seed {seed}: {law}"
    if op == "mix":
        return Call(op, (logits, law), {}, name)
    if op == "sample":
        member = dice.choice([None, None, dice.randrange(members)])
        return Call(op, (logits, dice.numbers(batch, rows, 4), law), {"member": member}, name)
    options: dict[str, Any] = {
        "acceptance": dice.choice(sorted(ACCEPTANCE_RULES)),
        "lenience": dice.choice([1.0, 0.7]),
        "bonus": bonus,
    }
    sources = logits[0][:, :nodes]
    proposal = dice.choice(["members", "logits", "points"])
    if proposal == "members":
        member = dice.randrange(members)
        proposers = torch.full((dice.choice([1, batch]), nodes), member)
        if dice.happens(0.3):
            proposers = torch.randint(-2, members + 1, (batch, nodes), generator=dice.generator)
        options["proposers"] = proposers.to(dice.choice([torch.int32, torch.int64]))
        sources = logits[member][:, :nodes]
    elif proposal == "logits":
        options["draft_logits"] = dice.logits(batch, nodes + 1, vocab_size)
        sources = options["draft_logits"][:, :nodes]
        temperatures = [None, torch.tensor(0.8), dice.uniform_tensor(batch)]
        options["draft_temperature"] = dice.choice(temperatures)
    tokens = dice.drafts(sources, vocab_size)
    arguments = (logits, tokens, dice.numbers(batch, nodes + 1, 4), law)
    return Call(op, arguments, options, name)


def check(seed: int, sizes: tuple[int, ...]) -> None:
    one = call(seed, sizes)
    expected, found = one.run("reference"), one.run("native")
    for i, (right, ours) in enumerate(zip(expected, found, strict=True)):
        close = {} if i in EXACT[one.op] else {"atol": 1e-5, "rtol": 3e-6}
        torch.testing.assert_close(
            ours, right, **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{one.name}\n{m}"
        )


@pytest.mark.parametrize("first", range(0, 2000, 50))
def test_small_vocabularies(first: int) -> None:
    for seed in range(first, first + 50):
        check(seed, SMALL)


@pytest.mark.parametrize("first", range(10_000, 10_300, 15))
def test_vocabularies_around_a_tile(first: int) -> None:
    for seed in range(first, first + 15):
        check(seed, TILES)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20_000, 20_040, 5))
def test_real_vocabularies(first: int) -> None:
    for seed in range(first, first + 5):
        check(seed, REAL)


# --- searches ---


@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize(
    "options", [{"top_k": 700}, {"top_k": 5000}, {"top_p": 0.3}, {"top_p": 0.95}], ids=str
)
@pytest.mark.parametrize("levels", [1, 2, 40, 0], ids="levels {}".format)
def test_thresholds_among_thousands_of_ties(
    scope: str, options: dict[str, Any], levels: int
) -> None:
    """A threshold that cannot be listed, for too many tokens tie or lie between."""
    logits = torch.randn(1, 2, 20_000) * 2
    if levels > 0:
        logits = (logits.clamp(-1.9, 1.9) / 4 * levels).round() * 4 / levels
    members = [logits.bfloat16(), torch.randn(1, 2, 20_000)]
    law = Law((0.5, 0.5), scope=scope, **options)
    one = Call("mix", (members, law), {}, "")
    expected, found = one.run("reference")[0], one.run("native")[0]
    assert torch.equal(expected.isinf(), found.isinf())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_greedy_takes_the_lowest_of_tied_tokens_in_any_tile(ensemble: str) -> None:
    vocab_size = 30_000
    logits = torch.randn(1, 3, vocab_size)
    for row, places in enumerate([(0, 29_999), (8191, 8192), (1024, 1023, 20_000)]):
        logits[0, row, list(places)] = 9.0
    law = Law((0.5, 0.5), ensemble, temperature=0.0)
    with specens_kernels.backend("native"):
        drawn = sample([logits, logits.clone()], torch.rand(1, 3, 4), law)
    assert drawn.tokens.tolist() == [[0, 8191, 1023]]


# --- the same bits ---


def bits(one: Call) -> str:
    results = one.run("native")
    return hashlib.sha1(b"".join(result.numpy().tobytes() for result in results)).hexdigest()


@pytest.mark.parametrize("first", range(30_000, 30_040, 5))
def test_the_number_of_threads_never_shows(first: int) -> None:
    for seed in range(first, first + 5):
        one = call(seed, (70_000, 151_936))
        found = set()
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.add(bits(one))
        assert len(found) == 1, one.name


def every_bit_pattern(dtype: torch.dtype) -> Call:
    """All that 16 bits can hold, NaN and infinities left out, as one row."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()][None, None]
    return Call("mix", ([values], Law((1.0,), "product", temperature=1e5)), {}, str(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_read_as_it_is(dtype: torch.dtype) -> None:
    one = every_bit_pattern(dtype)
    torch.testing.assert_close(one.run("native"), one.run("reference"), atol=1e-5, rtol=1e-6)


def all_bits() -> Iterator[str]:
    """What the next test compares."""
    for seed in range(40_000, 40_150):
        yield bits(call(seed, SMALL + TILES))
    for seed in range(41_000, 41_010):
        yield bits(call(seed, REAL))
    for dtype in (torch.bfloat16, torch.float16):
        yield bits(every_bit_pattern(dtype))


def run_with(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"SPECENS_CPU_ISA": isa, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_instruction_set_never_shows() -> None:
    known = ("avx512", "avx2", "baseline")
    names = known[known.index(native.cpu_isa()) :]
    code = "import test_native as t; print(t.native.cpu_isa(), *t.all_bits())"
    found = [run_with(name, code) for name in names]
    assert all(process.returncode == 0 for process in found), found[0].stderr
    lines = [process.stdout.split() for process in found]
    assert [line[0] for line in lines] == list(names)
    assert all(line[1:] == lines[0][1:] for line in lines)


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused() -> None:
    process = run_with("sse9", "import specens_kernels")
    assert process.returncode != 0
    assert "SPECENS_CPU_ISA: expected one of" in process.stderr
    assert "got 'sse9'" in process.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_does_not_depend_on_its_batch(count: int) -> None:
    """Neither on its slot nor on whether threads share a row or the batch."""
    torch.set_num_threads(count)
    batch, nodes, vocab_size = 5, 3, 40_000
    logits = [torch.randn(batch, nodes + 1, vocab_size) * 3 for _ in range(2)]
    tokens = logits[1][:, :nodes].argmax(-1)
    numbers = torch.rand(batch, nodes + 1, 4)
    proposers = torch.ones(1, nodes, dtype=torch.int64)
    law = Law((0.3, 0.7), temperature=0.9)
    with specens_kernels.backend("native"):
        whole = verify(logits, tokens, numbers, law, proposers=proposers)
        for b in range(batch):
            rows = [tensor[b : b + 1] for tensor in logits]
            one = verify(rows, tokens[b : b + 1], numbers[b : b + 1], law, proposers=proposers)
            for full, part in zip(whole, one, strict=True):
                assert torch.equal(full[b : b + 1], part)


# --- what there is no kernel for ---


def test_the_floor_reads_every_row() -> None:
    logits = [torch.randn(2, 3, 5000).to(dtype) for dtype in DTYPES]
    expected = sum(tensor.double().logsumexp(-1).sum().item() for tensor in logits)
    assert native.floor_sweep(logits, 5000) == pytest.approx(expected, rel=1e-6)


ROWS, NUMBERS = torch.zeros(1, 2, 5), torch.zeros(1, 2, 4)
REFUSED = {
    "trees": (
        verify,
        ([ROWS], torch.zeros(1, 1, dtype=torch.int64), NUMBERS, Law()),
        {"parents": torch.tensor([-1, 0])},
    ),
    "float64": (sample, ([ROWS.double()], NUMBERS, Law()), {}),
    "17 members": (sample, ([ROWS] * 17, NUMBERS, Law([1 / 17] * 17)), {}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_kernel_runs_on_the_reference(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    op, arguments, options = REFUSED[why]
    with specens_kernels.backend("native"), pytest.raises(NotImplementedError, match=why):
        op(*arguments, **options)
    with caplog.at_level(logging.INFO, "specens_kernels"), specens_kernels.backend("auto"):
        found = op(*arguments, **options)
    with specens_kernels.backend("reference"):
        expected = op(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
