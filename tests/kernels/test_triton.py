# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: what a call costs in launches and bytes, and what it refuses.

That its tokens are the reference's is the subject of test_conformance.py.
"""

import ast
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton_guard
from trees import problem
from triton_guard import counted

import specens_kernels
from specens_kernels import Law, compact, verify
from specens_kernels import triton as kernels
from specens_kernels.call import VerifyCall
from specens_kernels.law import LawTensors

triton_guard.install()


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_a_verification_reads_every_row_once(ensemble: str, members: int) -> None:
    """And has four launches; a second look is for the stop row, and for the token's sub-tile.

    A mixture's bonus row is read where every draft was kept.
    """
    vocab_size, nodes = 20_000, 2
    logits = [torch.randn(1, nodes + 1, vocab_size).bfloat16() for _ in range(members)]
    tokens = logits[-1][:, :nodes].float().argmax(-1)
    law = Law([1 / members] * members, ensemble)
    proposers = torch.full((1, nodes), members - 1)
    numbers = torch.rand(1, nodes + 1, 4)
    with specens_kernels.backend("triton"), counted() as traffic:
        verify(logits, tokens, numbers, law, proposers=proposers)
    assert sum(kernel.launches for kernel in traffic.values()) == 4
    row = 2 * vocab_size
    rows = members * (nodes + (ensemble == "product")) * row
    sweep = traffic[f"{ensemble}_stats"].loaded
    assert rows <= sweep < rows * 1.01
    assert traffic["residual"].loaded < members * row * 1.03


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_reads_the_cache_once_and_has_two_launches(
    dtype: torch.dtype, window: int
) -> None:
    one = problem(nodes=3, lengths=(900,), sizes=(32, 64), room=600, dtype=dtype, window=window)
    with specens_kernels.backend("triton"), counted() as traffic:
        one.run()
    assert {name: kernel.launches for name, kernel in traffic.items()} == {"attend": 1, "join": 1}
    # Slots of the window and what lies beside it in its first tile.
    slots = window + 3 if window else 903
    beside = 64 if window else 0
    floor = 2 * slots * (32 + 64) * dtype.itemsize
    parts = traffic["attend"].stored
    assert floor <= traffic["attend"].loaded + (window > 0) * 2000
    most = floor + 2 * beside * (32 + 64) * dtype.itemsize
    assert traffic["attend"].loaded <= 1.10 * most
    # Each split's part is written once and read once, but for the tops, which are read twice.
    splits = -(-903 // 256) - (903 - slots) // 256
    assert parts == splits * 2 * 6 * (64 + 2) * 4
    assert traffic["join"].loaded < 1.05 * parts + 12 * 64


def test_compaction_moves_what_it_has_to_in_one_launch() -> None:
    slab = torch.randn(4, 2, 3, 40, 16)
    path = torch.tensor([[1, 3, 4], [2, -1, -1]], dtype=torch.int32)
    with specens_kernels.backend("triton"), counted() as traffic:
        compact([slab], torch.tensor([5, 9]), path)
    (moved,) = traffic.values()
    assert moved.launches == 1
    # A node that lies where it belongs is copied onto itself.
    assert moved.stored == 4 * 4 * 3 * 16 * 4


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("told", ["lse", "draft_lse", "both"])
def test_a_known_row_is_read_where_the_chain_ends_alone(told: str, kept: int) -> None:
    vocab_size, nodes, members = 20_000, 2, 2
    logits = [torch.randn(1, nodes + 1, vocab_size).bfloat16() for _ in range(members)]
    apart = torch.randn(1, nodes, vocab_size).bfloat16()
    lse = torch.stack([one.float().logsumexp(-1) for one in logits], -1)
    known = {"lse": lse, "draft_lse": apart.float().logsumexp(-1)}
    if told != "both":
        known = {told: known[told]}
    tokens = apart.float().argmax(-1)
    numbers = torch.zeros(1, nodes + 1, 4)
    numbers[0, kept + 1 :, 0] = 1 - 2.0**-24
    with specens_kernels.backend("triton"), counted() as traffic:
        found = verify(logits, tokens, numbers, Law((0.5, 0.5)), draft_logits=apart, **known)
    assert found.num_accepted == kept
    assert sum(kernel.launches for kernel in traffic.values()) == 4
    row = 2 * vocab_size
    swept = {"lse": nodes, "draft_lse": members * nodes, "both": 0}[told]
    assert swept <= traffic["mixture_stats"].loaded / row < swept + 0.05
    last = members + (kept < nodes)
    assert last <= traffic["residual"].loaded / row < last + 0.1
    assert traffic["decide"].loaded + traffic["emit"].loaded < row / 2


@pytest.mark.parametrize(
    ("rule", "sums", "launches"),
    [
        ("cactus", 0, 4),
        ("cascade_chow", 0, 4),
        ("js", 1, 3),
        ("cascade_v1", 1, 4),
        ("block", 0.5, 4),
    ],
)
def test_a_judgement_reads_a_row_once_more_for_each_sum(
    rule: str, sums: float, launches: int
) -> None:
    """In one launch; what replaces a draft under a gate is the target, which needs no sweep."""
    vocab_size, nodes = 10_000, 2
    logits = [(5 * torch.randn(1, nodes + 1, vocab_size)).bfloat16() for _ in range(2)]
    tokens = logits[1][:, :nodes].float().argmax(-1)
    options = {"proposers": torch.ones(1, nodes, dtype=torch.int64), "acceptance": rule}
    with specens_kernels.backend("triton"), counted() as traffic:
        verify(logits, tokens, torch.rand(1, nodes + 1, 4), Law((0.5, 0.5)), **options)
    assert traffic["judge"].launches == 1
    assert sum(kernel.launches for kernel in traffic.values()) == launches
    rows = sums * nodes * len(logits) * 2 * vocab_size
    assert rows <= traffic["judge"].loaded < rows + 30_000
    assert traffic["judge"].stored < 1000


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("rule", ["rejection", "js", "block"])
@pytest.mark.parametrize("draft", ["member", "apart"])
def test_rows_whose_offset_has_33_bits_are_found(draft: str, rule: str, kept: int) -> None:
    """Though strides have fewer. Of the memory between the rows no page is ever touched."""
    nodes, far = 3, 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (nodes * far + 8)), dtype=torch.bfloat16)
    logits = memory.as_strided((1, nodes + 1, 8), (8, far, 1))
    for t in range(nodes + 1):
        logits[0, t, t + 1] = 20.0
    tokens = torch.tensor([[1, 2, 3]])
    tokens[0, kept:] = 7
    numbers = torch.full((1, nodes + 1, 4), 0.5)
    drafts = {"proposers": torch.zeros(1, nodes, dtype=torch.int64)}
    if draft == "apart":
        drafts = {"draft_logits": logits[:, :nodes]}
    found = []
    for name in ("reference", "triton"):
        with specens_kernels.backend(name):
            found.append(verify([logits], tokens, numbers, Law(), acceptance=rule, **drafts).tokens)
    assert torch.equal(*found)


def test_the_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import specens_kernels.triton as backend; "
        "assert not backend.AVAILABLE and backend.REASON"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def law_tensors(members: int) -> LawTensors:
    return Law([1 / members] * members).tensors("mix", torch.device("cpu"), 5)


def test_what_has_no_kernel_is_refused() -> None:
    rows, numbers = torch.zeros(1, 1, 5), torch.zeros(1, 1, 4)
    with pytest.raises(NotImplementedError, match="logits: expected at most 8 members, got 9"):
        kernels.mix([rows] * 9, law_tensors(9))
    with pytest.raises(NotImplementedError, match=r"logits: expected .*, got torch\.float64"):
        kernels.sample([rows.double()], numbers, law_tensors(1), -1)
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="parents: expected None, got a tree"):
        kernels.verify(VerifyCall([rows], tokens, numbers, law_tensors(1), torch.tensor([[-1]])))
    with pytest.raises(NotImplementedError, match=r"ensemble: expected fold=None, got .* 'median'"):
        kernels.mix([rows], law_tensors(1)._replace(fold="median@1"))


@pytest.mark.parametrize(
    "file", sorted(Path(kernels.__file__).parent.glob("*.py")), ids=lambda file: file.stem
)
def test_whether_a_tuple_is_given_is_asked_as_every_triton_can(file: Path) -> None:
    """Triton 3.6, which torch 2.10 and 2.11 ask for, compiles no `tuple is None`: ask `given`."""
    asked = [
        f"{function.name}: {ast.unparse(comparison)}"
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        for comparison in ast.walk(function)
        if isinstance(comparison, ast.Compare)
        and isinstance(comparison.left, ast.Name)
        and isinstance(comparison.ops[0], (ast.Is, ast.IsNot))
    ]
    assert not asked
