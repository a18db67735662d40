# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, compilation, messages, backends, a lean import."""

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import specens_kernels
from specens_kernels import (
    ACCEPTANCE_RULES,
    ENSEMBLES,
    Law,
    dispatch,
    mix,
    native,
    sample,
    uniforms,
    verify,
)
from specens_kernels.call import AttentionCall, Layout, VerifyCall
from specens_kernels.law import LawTensors

LAW = Law((0.5, 0.5), temperature=0.7, top_k=5, top_p=0.9, min_p=0.01)
SEEDS = torch.tensor([1, 2])
POSITIONS = torch.arange(3)[None]


def members(batch: int = 2, rows: int = 3, vocab_size: int = 11) -> list[Tensor]:
    return [torch.randn(batch, rows, vocab_size) for _ in range(2)]


def run_uniforms(logits: list[Tensor], numbers: Tensor, draft: Tensor) -> Any:
    positions = torch.arange(numbers.shape[1])[None]
    return (uniforms(draft[:, 0], positions, 1, index=2),)


def run_mix(logits: list[Tensor], numbers: Tensor, draft: Tensor) -> Any:
    return mix(logits, LAW)


def run_sample(logits: list[Tensor], numbers: Tensor, draft: Tensor) -> Any:
    return sample(logits, numbers, LAW)


def run_sample_many(logits: list[Tensor], numbers: Tensor, draft: Tensor) -> Any:
    return sample(logits, numbers[:, :, None].expand(-1, -1, 2, 4) / 2, LAW, count=2)


def run_chain(logits: list[Tensor], numbers: Tensor, draft: Tensor) -> Any:
    return verify(logits, draft, numbers, LAW, proposers=torch.zeros(2, dtype=torch.int32))


def run_tree(logits: list[Tensor], numbers: Tensor, draft: Tensor) -> Any:
    parents = torch.tensor([-1, 0, 0])
    options = {"parents": parents, "draft_logits": logits[1], "draws": "without"}
    return verify(logits, draft, numbers, LAW, **options)


RUNS = pytest.mark.parametrize(
    "run",
    [run_uniforms, run_mix, run_sample, run_sample_many, run_chain, run_tree],
    ids=lambda run: run.__name__,
)


def inputs(batch: int = 2, vocab_size: int = 11) -> tuple[list[Tensor], Tensor, Tensor]:
    draft = torch.randint(0, vocab_size, (batch, 2))
    return members(batch, 3, vocab_size), torch.rand(batch, 3, 4), draft


def op_calls() -> list[Any]:
    """Every op with every optional argument given and left out."""
    logits, numbers, draft = inputs()
    law = LAW.tensors("test", draft.device, 11)
    numbers_of_law = (torch.ones(2) / 2, torch.ones(1, 1), None, None, None)
    bare = LawTensors(*numbers_of_law, "logits", "", "ensemble", 0.1, 9)
    plain = LawTensors(*numbers_of_law, "probabilities", "", "member", 0.0, 9)
    lenient = {"acceptance": "lenient", "parameters": [0.9]}
    apart = {"draft_logits": logits[0], "draft_temperature": torch.ones(2)}
    known = {
        "lse": torch.stack([member.logsumexp(-1) for member in logits], -1),
        "draft_lse": logits[0].logsumexp(-1),
    }
    packed, rows = [member.flatten(0, 1) for member in logits], torch.tensor([[4, 1, 1], [0, 5, 2]])
    half = [member[:, :2] for member in logits]
    verifications = {
        "points": VerifyCall(logits, draft, numbers, bare),
        "chain": VerifyCall(
            half,
            draft,
            numbers,
            law,
            proposers=torch.tensor([[0, -1]], dtype=torch.int32),
            acceptance="greedy",
            bonus=False,
        ),
        "tree": VerifyCall(
            logits,
            draft,
            numbers,
            law,
            parents=torch.tensor([[-1, 0, 0]], dtype=torch.int32),
            **apart,
            **lenient,
            draws="without",
        ),
        "known": VerifyCall(logits, draft, numbers, plain, **apart, **known, **lenient),
        "memory": VerifyCall(logits, draft, numbers, law, **apart)._replace(
            acceptance="likelihood",
            parameters=[2.0, 0.2],
            memory=torch.zeros(2, dtype=torch.float64),
        ),
        "packed": VerifyCall(
            packed,
            draft,
            numbers,
            law,
            draft_logits=packed[0].softmax(-1),
            acceptance="synthetic",
            parameters=[0.5],
            layout=Layout(
                rows,
                rows.int(),
                torch.tensor([1, 2]),
                False,
                "probabilities",
                torch.rand(2, 2, dtype=torch.float64),
            ),
        ),
    }
    heads, words = torch.randn(2, 2, 3, 8), torch.ones(1, 3, 1, dtype=torch.int64)
    pages, depths = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32)
    whole = AttentionCall(
        heads, *heads.repeat(2, 1, 1, 4, 1), SEEDS, words, *[None] * 3, 0.3, 0.0, 0
    )
    parts = whole._replace(block_table=pages, depths=depths, sinks=torch.ones(2), window=3)
    slabs = [torch.randn(3, 2, 1, 9, 4), torch.randn(2, 2, 2, 9, 4)]
    path = torch.tensor([[2, 4], [1, -1]], dtype=torch.int32)
    specens = torch.ops.specens
    calls = {
        "attention": (specens.attention, (whole,)),
        "attention in pages": (specens.attention, (parts,)),
        "compact": (specens.compact, (slabs, SEEDS, path, None)),
        "compact in pages": (
            specens.compact,
            (slabs, SEEDS, path, pages + SEEDS[:, None].int() - 1),
        ),
        "uniforms": (specens.uniforms, (SEEDS, POSITIONS, 1, 0)),
        "mix": (specens.mix, (logits, law)),
        "mix bare": (specens.mix, (logits, bare)),
        "sample": (specens.sample, (logits, numbers, law, -1, None)),
        "sample member": (specens.sample, (logits, numbers, bare, 1, None)),
        "sample many": (specens.sample, (logits, torch.rand(2, 3, 2, 4), law, -1, None)),
        "sample packed": (specens.sample, (packed, numbers, law, -1, rows)),
    }
    calls |= {f"verify {name}": (specens.verify, (call,)) for name, call in verifications.items()}
    return [
        pytest.param(op.default, tuple(dispatch.flattened(arguments)), id=name)
        for name, (op, arguments) in calls.items()
    ]


@pytest.mark.parametrize(("op", "arguments"), op_calls())
def test_opcheck(backend: str, op: Any, arguments: tuple[Any, ...]) -> None:
    op(*arguments)  # skips what the native kernels refuse
    torch.library.opcheck(op, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_uniforms, run_mix, run_sample, run_sample_many, run_tree])
def test_it_compiles_without_a_graph_break_and_for_any_shape(run: Callable[..., Any]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, vocab_size in ((2, 11), (5, 11), (3, 17)):
        arguments = inputs(batch, vocab_size)
        for one, other in zip(compiled(*arguments), run(*arguments), strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
def test_inductor_takes_a_whole_turn(backend: str) -> None:
    def turn(logits: list[Tensor], seeds: Tensor, positions: Tensor) -> Tensor:
        numbers = uniforms(seeds, positions, 0)
        draft = sample([member[:, :2] for member in logits], numbers[:, :2], LAW, member=0)
        proposers = torch.zeros(2, dtype=torch.int32)
        return verify(logits, draft.tokens, numbers, LAW, proposers=proposers).tokens + 0

    torch.compiler.reset()
    logits, compiled = members(), torch.compile(turn, fullgraph=True)
    assert torch.equal(compiled(logits, SEEDS, POSITIONS), turn(logits, SEEDS, POSITIONS))


@RUNS
def test_a_fake_has_the_shapes_types_and_strides_of_the_result(
    backend: str, run: Callable[..., Any]
) -> None:
    logits, numbers, draft = inputs()
    real = run(logits, numbers, draft)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the tensors of LAW are real
    with mode:
        fake = run(
            [mode.from_tensor(member) for member in logits],
            mode.from_tensor(numbers),
            mode.from_tensor(draft),
        )
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        assert one.stride() == other.stride()


def test_a_wide_member_widens_the_fake_mix() -> None:
    logits = [member.double() for member in members()]
    mode = FakeTensorMode()
    with mode:
        fake, _ = mix([mode.from_tensor(member) for member in logits], Law((0.5, 0.5)))
    assert fake.dtype == mix(logits, Law((0.5, 0.5)))[0].dtype == torch.float64


@pytest.mark.parametrize("name", ["uniforms", "mix", "sample", "verify", "attention", "compact"])
def test_inductor_captures_no_op_in_its_own_graphs(name: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.specens, name).default.tags


def test_nothing_has_a_gradient(backend: str) -> None:
    logits, numbers, draft = inputs()
    trainable = [member.requires_grad_() for member in logits]
    for run in (run_mix, run_sample, run_chain):
        assert not any(value.requires_grad for value in run(trainable, numbers, draft))


def test_memory_that_nobody_wrote_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int64).min() == torch.iinfo(torch.int64).max


def test_results_are_new_memory(backend: str) -> None:
    logits, numbers, draft = inputs()
    for run in (run_uniforms, run_mix, run_sample, run_chain):
        before = run(logits, numbers, draft)
        copies = [value.clone() for value in before]
        again = run([-member for member in logits], numbers / 2, draft)
        for kept, value, other in zip(copies, before, again, strict=True):
            torch.testing.assert_close(value, kept, atol=0, rtol=0)
            assert value.data_ptr() != other.data_ptr()


def two(rows: int = 3) -> list[Tensor]:
    return [torch.zeros(2, rows, 8) for _ in range(2)]


NUMBERS, DRAFT, HALVES = torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.int64), Law((0.5, 0.5))

WRONG: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: uniforms(SEEDS[None], POSITIONS, 0),
        "uniforms: seeds: expected (B,) int64, got (1, 2) int64 on cpu",
    ),
    (
        lambda: uniforms(SEEDS.int(), POSITIONS, 0),
        "uniforms: seeds: expected (B,) int64, got (2,) int32 on cpu",
    ),
    (
        lambda: uniforms(SEEDS, POSITIONS[0], 0),
        "uniforms: positions: expected (B, T) int64, got (3,) int64 on cpu",
    ),
    (
        lambda: uniforms(SEEDS, POSITIONS.expand(3, 3), 0),
        "uniforms: positions: expected (B=2, T) or (1, T), got (3, 3) int64 on cpu",
    ),
    (
        lambda: uniforms(SEEDS, POSITIONS.to("meta"), 0),
        "uniforms: positions: expected device cpu, got (1, 3) int64 on meta",
    ),
    (lambda: mix([], HALVES), "mix: logits: expected a list of M >= 1 tensors, got"),
    (lambda: mix(two()[0], HALVES), "mix: logits: expected a list of M >= 1 tensors, got"),
    (
        lambda: mix([two()[0][0]], Law()),
        "mix: logits[0]: expected (B, T, V >= 8) float, like logits[0] (3, 8) on cpu, got (3, 8)",
    ),
    (
        lambda: mix([two()[0], two(2)[0]], HALVES),
        "mix: logits[1]: expected (B, T, V >= 8) float, like logits[0] (2, 3, 8) on cpu, "
        "got (2, 2, 8) float32 on cpu",
    ),
    (
        lambda: mix([two()[0], two()[1].int()], HALVES),
        "mix: logits[1]: expected (B, T, V >= 8) float, like logits[0] (2, 3, 8) on cpu, "
        "got (2, 3, 8) int32 on cpu",
    ),
    (
        lambda: mix([two()[0], two()[1].to("meta")], HALVES),
        "mix: logits[1]: expected (B, T, V >= 8) float, like logits[0] (2, 3, 8) on cpu, "
        "got (2, 3, 8) float32 on meta",
    ),
    (
        lambda: mix(two(), Law((0.5, 0.5), vocab_size=9)),
        "mix: logits[0]: expected (B, T, V >= 9) float, like logits[0] (2, 3, 8) on cpu, "
        "got (2, 3, 8) float32 on cpu",
    ),
    (
        lambda: mix([torch.zeros(2, 8, 3).mT], Law()),
        "mix: logits[0]: expected contiguous rows, got (2, 3, 8) float32 on cpu",
    ),
    (lambda: mix(two(), Law()), "mix: weights: expected (M=2,), (B=2, M) or (B, T=3, M), got (1,)"),
    (
        lambda: sample(two(), NUMBERS[:, :2], HALVES),
        "sample: uniforms: expected (B=2, 3, 4) float32 on cpu, got (2, 2, 4) float32 on cpu",
    ),
    (
        lambda: sample(two(), NUMBERS.double(), HALVES),
        "sample: uniforms: expected (B=2, 3, 4) float32 on cpu, got (2, 3, 4) float64 on cpu",
    ),
    (
        lambda: sample(two(), NUMBERS, HALVES, member=2),
        "sample: member: expected None or 0 to 1, got 2",
    ),
    (
        lambda: sample(two(), NUMBERS, HALVES, member=-1),
        "sample: member: expected None or 0 to 1, got -1",
    ),
    (
        lambda: sample(two(), NUMBERS, HALVES, count=0),
        "sample: count: expected None or an integer >= 1, got 0",
    ),
    (
        lambda: sample(two(), NUMBERS, HALVES, count=2),
        "sample: uniforms: expected (B, T, 2, 4), got (2, 3, 4)",
    ),
    (
        lambda: sample(two(), NUMBERS[:, :, None], HALVES, count=2),
        "sample: uniforms: expected (B, T, 2, 4), got (2, 3, 1, 4)",
    ),
    (
        lambda: sample(two(), NUMBERS[:, :, None], HALVES),
        "sample: uniforms: expected (B, T, 4), got (2, 3, 1, 4)",
    ),
    (
        lambda: sample(two(), NUMBERS[:, :2, None], HALVES, count=1),
        "sample: uniforms: expected (B=2, 3, 1, 4) float32 on cpu, got (2, 2, 1, 4) float32 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, draws="some"),
        "verify: draws: expected one of with, without, got 'some'",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, draws="without", acceptance="k_seq"),
        "verify: draws: expected 'with' for acceptance 'k_seq', got 'without'",
    ),
    (
        lambda: verify(two(), DRAFT[0], NUMBERS, HALVES),
        "verify: draft_tokens: expected (B, N) int32 or int64, got (2,) int64 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT.float(), NUMBERS, HALVES),
        "verify: draft_tokens: expected (B, N) int32 or int64, got (2, 2) float32 on cpu",
    ),
    (
        lambda: verify(two(2), DRAFT, NUMBERS, HALVES),
        "verify: logits[0]: expected (B=2, 3, V) on cpu, got (2, 2, 8) float32 on cpu",
    ),
    (
        lambda: verify(two(3), DRAFT, NUMBERS, HALVES, bonus=False),
        "verify: logits[0]: expected (B=2, 2, V) on cpu, got (2, 3, 8) float32 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS[:, :2], HALVES),
        "verify: uniforms: expected (B=2, 3, 4) float32 on cpu, got (2, 2, 4) float32 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, acceptance="typcal"),
        "acceptance: name: expected one of block, cactus, cascade_chow, ",
    ),
    (
        lambda: verify(
            two(), DRAFT, NUMBERS, HALVES, acceptance="block", parents=torch.tensor([-1, 0, 1])
        ),
        "verify: parents: expected None for acceptance 'block', got a tensor",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, memory=torch.zeros(2, dtype=torch.float64)),
        "verify: memory: expected None for acceptance 'rejection', got a tensor",
    ),
    (
        lambda: verify(
            two(), DRAFT, NUMBERS, HALVES, acceptance="likelihood", memory=torch.zeros(3).double()
        ),
        "verify: memory: expected (B=2,) float on cpu, got (3,) float64 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, parents=torch.zeros(2, dtype=torch.int32)),
        "verify: parents: expected (B=2 or 1, 3) int32 or int64 on cpu, got (1, 2) int32 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, parents=torch.zeros(3)),
        "verify: parents: expected (B=2 or 1, 3) int32 or int64 on cpu, got (1, 3) float32 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, proposers=DRAFT[:, :1]),
        "verify: proposers: expected (B=2 or 1, 2) int32 or int64 on cpu, got (2, 1) int64 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, draft_logits=torch.zeros(2, 3, 7)),
        "verify: draft_logits: expected (B=2, N=2 or N+1, V >= 8) float on cpu, "
        "got (2, 3, 7) float32 on cpu",
    ),
    (
        lambda: verify(two(), DRAFT, NUMBERS, HALVES, draft_logits=torch.zeros(2, 8, 3).mT),
        "verify: draft_logits: expected contiguous rows, got (2, 3, 8) float32 on cpu",
    ),
    (
        lambda: verify(
            two(), DRAFT, NUMBERS, HALVES, draft_logits=two()[0], draft_temperature=torch.ones(3)
        ),
        "verify: draft_temperature: expected () or (B=2,) float on cpu, got (3,) float32 on cpu",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_argument_is_named_with_what_was_expected(
    wrong: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        wrong()


def chosen() -> str:
    return dispatch._backend.get()


def test_a_backend_is_chosen_for_a_block() -> None:
    before = chosen()
    with specens_kernels.backend("reference"):
        assert chosen() == "reference"
        with specens_kernels.backend("auto"):
            assert chosen() == "auto"
        assert chosen() == "reference"
    assert chosen() == before


def test_threads_choose_each_for_itself() -> None:
    """The second enters its block before the first leaves its own, and leaves it after."""
    before, seen = chosen(), []
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        with specens_kernels.backend("auto"):
            entered.set()
            assert left.wait(60)
            seen.append(chosen())

    other = threading.Thread(target=second)
    with specens_kernels.backend("reference"):
        other.start()
        assert entered.wait(60)
        assert chosen() == "reference"
    left.set()
    other.join(60)
    assert seen == ["auto"]
    assert chosen() == before


def test_an_error_in_the_block_gives_the_backend_back() -> None:
    before = chosen()
    with pytest.raises(ZeroDivisionError), specens_kernels.backend("reference"):
        1 / 0  # noqa: B018
    assert chosen() == before


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(dispatch.BACKENDS)
    with (
        pytest.raises(ValueError, match=f"^backend: name: expected one of {known}, got 'metal'$"),
        specens_kernels.backend("metal"),
    ):
        pass
    monkeypatch.setenv("SPECENS_BACKEND", "nativ")
    with pytest.raises(
        ValueError, match=f"^environment: SPECENS_BACKEND: expected one of {known}, got 'nativ'$"
    ):
        dispatch._backend_from_environment()


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECENS_BACKEND", "reference")
    assert dispatch._backend_from_environment() == "reference"
    monkeypatch.delenv("SPECENS_BACKEND")
    assert dispatch._backend_from_environment() == "auto"


def test_each_backend_runs_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference runs under "reference" and, where the native kernels exist, nowhere else."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(import_module("specens_kernels.reference.laws"), "clean", refuse)
    for run in (run_mix, run_sample, run_chain):
        for name in ("auto", "native") if native.AVAILABLE else ():
            with specens_kernels.backend(name):
                run(*inputs())
        with specens_kernels.backend("reference"), pytest.raises(AssertionError, match="reference"):
            run(*inputs())


def test_native_is_refused_where_it_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "REASON", "no compiler")
    with (
        pytest.raises(
            NotImplementedError, match=r"^backend: name: expected .*, got 'native': no compiler$"
        ),
        specens_kernels.backend("native"),
    ):
        pass


@pytest.mark.skipif(not native.AVAILABLE, reason="the native kernels are not built")
def test_what_native_does_not_take_the_reference_does_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wide = [member.double() for member in members()]
    with specens_kernels.backend("native"), pytest.raises(NotImplementedError, match="float64"):
        mix(wide, Law((0.5, 0.5)))
    with specens_kernels.backend("reference"):
        expected = mix(wide, Law((0.5, 0.5)))
    with specens_kernels.backend("auto"), caplog.at_level(logging.INFO, "specens_kernels"):
        for _ in range(2):
            assert torch.equal(mix(wide, Law((0.5, 0.5)))[0], expected[0])
    assert len(caplog.records) <= 1  # none if another test was the first to ask
    assert all("float64" in record.getMessage() for record in caplog.records)


@pytest.mark.skipif(not native.AVAILABLE, reason="the native kernels are not built")
def test_the_native_kernels_take_every_rule_ensemble_and_scope() -> None:
    logits, numbers, draft = inputs()
    with specens_kernels.backend("native"):
        for ensemble in ENSEMBLES:
            for scope in ("member", "ensemble"):
                law = Law((0.5, 0.5), ensemble, 0.7, top_k=5, top_p=0.9, min_p=0.01, scope=scope)
                mix(logits, law)
                sample(logits, numbers, law)
                sample(logits, numbers, law, member=1)
                for acceptance in ACCEPTANCE_RULES:
                    verify(logits, draft, numbers, law, acceptance=acceptance)


ROOT = Path(__file__).parents[2]


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"PYTHONPATH": str(ROOT), "PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# An entry of None in sys.modules is a module that cannot be imported.
LEAN = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import specens_kernels.ops, torch
assert not any(sys.modules.get(name) for name in ("transformers", "triton", "numpy.testing"))
assert not torch.cuda.is_initialized()
logits = torch.zeros(1, 2, 8)
numbers = specens_kernels.uniforms(torch.tensor([1]), torch.arange(2)[None], 0)
draft = torch.tensor([[3]])
print(specens_kernels.verify([logits], draft, numbers, specens_kernels.Law()).tokens.tolist())
"""


@pytest.mark.slow
def test_it_imports_without_transformers_and_triton_and_leaves_cuda_alone() -> None:
    done = run_python(LEAN.format(blocked=("transformers", "triton")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")
    if native.AVAILABLE:
        assert done.stderr == ""


@pytest.mark.slow
def test_it_imports_without_native_kernels_and_says_so_in_one_line() -> None:
    done = run_python(LEAN.format(blocked=("specens_kernels._C",)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")
    (line,) = done.stderr.splitlines()
    assert re.match(r"specens_kernels: .*not built.*; ops run the reference, which is slow$", line)


@pytest.mark.slow
def test_an_unknown_backend_in_the_environment_stops_the_import() -> None:
    done = run_python("import specens_kernels.ops", SPECENS_BACKEND="metal")
    assert done.returncode != 0
    known = ", ".join(dispatch.BACKENDS)
    expected = f"SPECENS_BACKEND: expected one of {known}, got 'metal'"
    assert f"environment: {expected}" in done.stderr


class Listener(TorchDispatchMode):
    """Counts the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard += [str(func)] * (func.namespace == "specens")
        return func(*args, **(kwargs or {}))


@RUNS
def test_whoever_listens_hears_every_op(run: Callable[..., Any]) -> None:
    """The short way to the CPU's kernels is taken only where nobody could tell."""
    arguments = inputs()
    expected = run(*arguments)
    with Listener() as listener:
        found = run(*arguments)
    assert len(listener.heard) == 1
    with torch.profiler.profile() as profile:
        run(*arguments)
    assert [event.key for event in profile.key_averages() if event.key.startswith("specens::")]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_op() -> None:
    logits = torch.randn(1, 1, 8)
    traced = torch.jit.trace(lambda values: mix([values], Law())[0], (logits,))
    assert torch.equal(traced(2 * logits), mix([2 * logits], Law())[0])


def test_tensors_that_are_not_what_they_look_like(backend: str) -> None:
    logits = torch.randn(1, 1, 8)
    negative = mix([torch._neg_view(logits)], Law())[0]
    assert torch.equal(negative, mix([-logits], Law())[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.rand(1, 1, 4)
        assert type(sample([logits], fake, Law()).tokens) is type(fake)


def test_another_default_device_changes_nothing(backend: str) -> None:
    logits, numbers, draft = inputs()
    proposers = torch.zeros(2, dtype=torch.int32)

    def everything() -> list[Tensor]:
        verdict = verify(logits, draft, numbers, LAW, proposers=proposers)
        drawn = sample(logits, numbers, LAW)
        return [*verdict, *drawn, *mix(logits, LAW), uniforms(SEEDS, POSITIONS, 0)]

    expected = everything()
    with torch.device("meta"):
        found = everything()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
