# SPDX-License-Identifier: Apache-2.0
"""What only a card can show: the kernels on it, CUDA graphs, streams, no wait for the device.

Everything here needs a CUDA device. What can be shown without one is in test_conformance.py, where
the same kernels run in Triton's interpreter and in the emulator.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import REAL, SMALL, TILES, Call, call, is_near_a_threshold, on_card
from torch import Tensor

import specens_kernels
from specens_kernels import Law, Stream, cuda, dispatch, sample, uniforms, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True),
]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of the card; the emulator's stand-in plays no part here."""
    if not dispatch.MODULES[request.param].AVAILABLE:
        pytest.skip(f"{request.param}: {dispatch.MODULES[request.param].REASON}")
    if request.param == "triton" and os.environ["TRITON_INTERPRET"] == "1":
        pytest.skip("triton: it interprets in this process; `pytest -m gpu` compiles")
    with specens_kernels.backend(request.param):
        yield request.param


def compare(one: Call, backend: str) -> None:
    there = Call(one.op, on_card(one.arguments), on_card(one.options), one.name)
    expected, found = one.run("reference"), there.run(backend)
    for right, ours in zip(expected, found, strict=True):
        if not right.is_floating_point():
            assert torch.equal(ours.cpu(), right), one.name
        else:
            close = {"atol": 1e-5, "rtol": 3e-6, "equal_nan": True}  # as in `calls.check`
            torch.testing.assert_close(ours.cpu(), right, **close, msg=one.name)


# Calls of one test: for each, Triton compiles several kernels, which takes seconds.
PORTION = 2 if torch.cuda.is_available() else 100


@pytest.mark.parametrize("sizes", [SMALL, TILES, REAL], ids=str)
@pytest.mark.parametrize("first", range(0, 300, PORTION))
def test_the_reference_s_tokens(backend: str, sizes: tuple[int, ...], first: int) -> None:
    for seed in range(first, first + PORTION):
        compare(call(seed, sizes), backend)


@pytest.mark.parametrize("sizes", [SMALL, TILES, REAL], ids=str)
@pytest.mark.parametrize("first", range(0, 300, PORTION))
def test_every_rule_s_tokens(backend: str, sizes: tuple[int, ...], first: int) -> None:
    rules = sorted(cuda.RULES)
    for seed in range(first, first + PORTION):
        one = call(seed, sizes, rules)
        if not is_near_a_threshold(one):
            compare(one, backend)


WEIGHTS = pytest.mark.parametrize(
    "weights", [(0.5, 0.5), torch.tensor([0.5, 0.5])], ids=["numbers", "tensor"]
)


class Turn:
    """One draft and one verification over fixed memory, as a decoder would capture them.

    weights: of the law; a tensor goes to the card.
    """

    def __init__(
        self,
        batch: int = 3,
        nodes: int = 4,
        vocab_size: int = 50_000,
        rule: str = "rejection",
        weights: Any = (0.5, 0.5),
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, nodes + 1, vocab_size)
        self.logits = [
            (3 * torch.randn(shape, generator=generator)).bfloat16().cuda() for _ in range(2)
        ]
        self.seeds = torch.arange(batch).cuda()
        self.positions = torch.arange(nodes + 1)[None].cuda()
        self.proposers = torch.zeros(1, nodes, dtype=torch.int32).cuda()
        self.law = Law(on_card(weights), temperature=0.8)
        self.rule = rule

    def run(self) -> tuple[Tensor, ...]:
        numbers = uniforms(self.seeds, self.positions, Stream.DRAFT)
        drafts = sample(self.logits, numbers, self.law, member=0).tokens[:, :-1]
        coins = uniforms(self.seeds, self.positions, Stream.VERIFY)
        options = {"proposers": self.proposers, "acceptance": self.rule}
        return verify(self.logits, drafts, coins, self.law, **options)


@WEIGHTS
@pytest.mark.parametrize("rule", ["rejection", "js", "block"])
def test_a_graph_replays_with_new_numbers(backend: str, rule: str, weights: Any) -> None:
    turn = Turn(rule=rule, weights=weights)
    turn.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = turn.run()
    for position in (0, 100, 200):
        turn.positions.copy_(torch.arange(position, position + 5)[None])
        graph.replay()
        replayed = [value.clone() for value in captured]
        for one, other in zip(replayed, turn.run(), strict=True):
            assert torch.equal(one, other)


def test_the_first_graph_to_run_need_not_be_the_first_captured(backend: str) -> None:
    turn = Turn()
    expected = [value.clone() for value in turn.run()]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    found = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            found.append(turn.run())
    for graph, verdict in reversed(list(zip(graphs, found, strict=True))):
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(verdict, expected, strict=True))


def test_the_current_stream_is_used(backend: str) -> None:
    """What the stream writes late, after a delay, is what the ops on it read."""
    turn = Turn()
    turn.positions += 7
    expected = turn.run()
    for _ in range(3):
        turn.positions -= 7
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)  # cycles
            turn.positions += 7
            found = turn.run()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_tensors_device_need_not_be_the_current_one(backend: str) -> None:
    one = call(7, SMALL)
    expected = one.run("reference")
    with torch.cuda.device(1):
        arguments, options = on_card(one.arguments), on_card(one.options)
    assert torch.cuda.current_device() == 0
    found = Call(one.op, arguments, options, one.name).run(backend)
    assert found[0].device.index == 1
    assert torch.equal(found[0].cpu(), expected[0])


@WEIGHTS
@pytest.mark.parametrize("rule", ["rejection", "js", "block"])
def test_no_op_waits_for_the_device(backend: str, rule: str, weights: Any) -> None:
    turn = Turn(rule=rule, weights=weights)
    turn.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        turn.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(backend: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = (
        "import specens_kernels, test_gpu\n"
        f"with specens_kernels.backend({backend!r}):\n"
        "    test_gpu.Turn(vocab_size=9001).run()\n"
        f"    if {backend!r} == 'cuda':\n"
        "        test_gpu.Turn(vocab_size=9001, rule='block').run()\n"
        "        test_gpu.Turn(vocab_size=9001, rule='entropy_veto').run()\n"
        "test_gpu.torch.cuda.synchronize()\n"
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-4000:]
