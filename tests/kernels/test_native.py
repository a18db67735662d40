# SPDX-License-Identifier: Apache-2.0
"""The native kernels against themselves; test_conformance.py compares them with the reference.

The same bits for every number of threads, every instruction set and every batch. Memory is
tests/native/test_kernels.cpp's subject, under sanitizers.
"""

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simt
import torch
from calls import DTYPES, REAL, SMALL, TILES, Call, call
from engine_calls import engine_call
from torch import Tensor
from trees import check, paged, problem, random_problem

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, Law, attention, native, sample, verify
from specens_kernels.call import AttentionCall, VerifyCall

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason=f"native: {native.REASON}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(one: Call) -> str:
    return digest(one.run("native"))


def digest(results: tuple[Tensor, ...]) -> str:
    return hashlib.sha1(
        b"".join(result.view(torch.uint8).numpy().tobytes() for result in results)
    ).hexdigest()


@pytest.mark.parametrize("first", range(30_000, 30_040, 5))
def test_the_number_of_threads_never_shows(first: int) -> None:
    for seed in range(first, first + 5):
        one = call(seed, (70_000, 151_936))
        found = set()
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.add(bits(one))
        assert len(found) == 1, one.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_never_shows_in_attention(dtype: torch.dtype) -> None:
    one = problem(batch=2, lengths=(2000, 700), nodes=9, window=1500, dtype=dtype)
    found = set()
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        with specens_kernels.backend("native"):
            found.add(digest(one.run()))
    assert len(found) == 1


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
    for seed in range(42_000, 42_060):
        yield bits(engine_call(seed, SMALL + TILES, sorted(ACCEPTANCE_RULES)))
    for dtype in (torch.bfloat16, torch.float16):
        yield bits(every_bit_pattern(dtype))
    for seed in range(40):
        one = random_problem(seed)
        with specens_kernels.backend("native"):
            # Products of pairs of bfloat16 are added up in another order than products.
            if one.query.dtype != torch.bfloat16:
                yield digest(one.run())


def run_with(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"SPECENS_CPU_ISA": isa, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def instruction_sets() -> list[str]:
    """Those of this machine."""
    message = run_with("none such", "import specens_kernels.ops").stderr
    return message.split("expected one of ")[1].split(" on this machine")[0].split(", ")


@pytest.mark.slow
def test_attention_to_bfloat16_is_right_on_every_instruction_set() -> None:
    """The one result in which the instruction set may show: its rounding."""
    code = "import test_native as t; t.attend_to_bfloat16()"
    for name in instruction_sets():
        done = run_with(name, code)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def attend_to_bfloat16() -> None:
    """What the test before runs."""
    shapes: list[dict[str, Any]] = [
        {"nodes": 1, "lengths": (300,)},
        {"nodes": 5, "sizes": (80, 48), "window": 50, "softcap": 2.0},
        {"nodes": 33, "sizes": (128, 128), "heads": (7, 1), "sinks": torch.ones(7)},
        {"nodes": 70, "sizes": (37, 19), "batch": 2, "lengths": (63, 600)},
    ]
    with specens_kernels.backend("native"):
        for shape in shapes:
            one = problem(dtype=torch.bfloat16, room=9, **shape)
            for each in (one, paged(one, 16)):
                check(one, each)
        # Of nine nodes side by side, one is NaN.
        one = problem(nodes=9, lengths=(61,), dtype=torch.bfloat16)
        one = one._replace(parents=torch.full((1, 9), -1))
        one.values[:, :, 65] = one.keys[:, :, 65] = torch.nan
        out, lse = one.run()
        spoiled = (torch.arange(9) == 4)[None]
        assert torch.equal(out.isnan().any(-1).any(-1), spoiled)
        assert torch.equal(lse.isnan().any(1), spoiled)


@pytest.mark.slow
def test_the_instruction_set_never_shows() -> None:
    names = instruction_sets()
    code = "import test_native as t; print(t.native.cpu_isa(), *t.all_bits())"
    found = [run_with(name, code) for name in names]
    assert all(process.returncode == 0 for process in found), found[0].stderr
    lines = [process.stdout.split() for process in found]
    assert [line[0] for line in lines] == list(names)
    assert all(line[1:] == lines[0][1:] for line in lines)


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused() -> None:
    process = run_with("sse9", "import specens_kernels.ops")
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


def test_the_floor_reads_every_row() -> None:
    logits = [torch.randn(2, 3, 5000).to(dtype) for dtype in DTYPES]
    expected = sum(tensor.double().logsumexp(-1).sum().item() for tensor in logits)
    assert native.floor_sweep(logits, 5000) == pytest.approx(expected, rel=1e-6)


ROWS, NUMBERS = torch.zeros(1, 2, 5), torch.zeros(1, 2, 4)
REFUSED = {
    "float64": (sample, ([ROWS.double()], NUMBERS, Law()), {}),
    "query: expected bfloat16, float16 or float32, got torch.float64": (
        attention,
        (*[ROWS[None].double()] * 3, torch.zeros(1).long(), torch.ones(1, 2, 1).long()),
        {},
    ),
    "at most 16 members, got 17": (sample, ([ROWS] * 17, NUMBERS, Law([1 / 17] * 17)), {}),
}


def test_tensors_elsewhere_are_refused_before_their_addresses_are_taken() -> None:
    there = torch.device("meta")
    rows, numbers = ROWS.to(there), NUMBERS.to(there)
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=there)
    law = Law().tensors("mix", there, 5)
    calls = {
        "uniforms": (tokens[0], tokens, 0, 0),
        "mix": ([rows], law),
        "sample": ([rows], numbers, law, -1),
        "verify": (VerifyCall([rows], tokens, numbers, law),),
        "attention": (
            AttentionCall(*[rows[None]] * 3, tokens[0], tokens, *[None] * 3, 1.0, 0.0, 0),
        ),
        "compact": ([rows], tokens[0], tokens, None),
    }
    for name, arguments in calls.items():
        with pytest.raises(
            NotImplementedError, match=r"^native: tensors: expected .*, got one on meta$"
        ):
            getattr(native, name)(*arguments)


@pytest.mark.parametrize("unknown", [-1, 2, 99])
def test_an_id_that_no_table_has_is_refused(unknown: int) -> None:
    law = [1, *[0] * 24]  # one member's logits, weights, temperature and filters
    rest = [True, 0.0, 5]
    with pytest.raises(RuntimeError, match=rf"^_C: no space or rule has the id {unknown}$"):
        native._C.mix([*law, unknown, *rest])
    with pytest.raises(RuntimeError, match=rf"^_C: no space or rule has the id {unknown + 90}$"):
        native._C.verify([*law, 0, *rest, unknown + 90])


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


# A compiler that tells its version and compiles nothing.
NVCC = """#!/bin/sh
test "$1" = --version && echo "Cuda compilation tools, release {0}, V{0}.48"
"""


@pytest.mark.slow
@pytest.mark.skipif(simt.what_is_missing() != "", reason=f"simt: {simt.what_is_missing()}")
@pytest.mark.parametrize("asked", ["AUTO", "ON"])
@pytest.mark.parametrize(
    ("release", "reason"),
    [("12.9", "expected nvcc 13 or newer, got {}"), ("13.0", "{} does not compile here")],
)
def test_an_nvcc_that_cannot_leaves_the_build_without_cuda(
    asked: str, release: str, reason: str, tmp_path: Path
) -> None:
    import cmake
    import ninja
    import pybind11

    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC.format(release))
    nvcc.chmod(0o755)
    command = [Path(cmake.CMAKE_BIN_DIR, "cmake"), "-S", simt.ROOT, "-B", tmp_path, "-G", "Ninja"]
    command.append(f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}")
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    command.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    command += [f"-DSPECENS_CUDA={asked}", f"-DSPECENS_NVCC={nvcc}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join(done.stderr.split())  # without CMake's line breaks
    assert reason.format(nvcc) in said
    if asked == "ON":
        assert done.returncode != 0
        assert "SPECENS_CUDA=ON: " in said
    else:
        assert done.returncode == 0, said
        assert "The module is built without CUDA kernels: " in said
