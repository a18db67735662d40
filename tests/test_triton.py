# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the reference, in the strict interpreter; no GPU is needed.

The random calls are those of test_native.py: the same tokens, counts, paths and status. Here the
sizes are small, for the interpreter takes some 100 us for each operation of each program.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton_guard
from test_native import DTYPES, EXACT, SMALL, TILES, Call, call
from triton_guard import counted

import specens_kernels
from specens_kernels import Law, Stream, uniforms
from specens_kernels import triton as kernels
from specens_kernels.law import LawTensors

triton_guard.install()


def run(one: Call) -> tuple[Tensor, ...]:
    """The call on the Triton kernels, by way of the op's own checks."""
    name = f"_call_{one.op}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specens_kernels.ops, name, getattr(kernels, one.op))
        return one.run("auto")


def check(one: Call) -> None:
    expected, found = one.run("reference"), run(one)
    for i, (right, ours) in enumerate(zip(expected, found, strict=True)):
        close = {"atol": 0, "rtol": 0} if i in EXACT[one.op] else {"atol": 1e-5, "rtol": 3e-6}
        torch.testing.assert_close(ours, right, **close, msg=lambda m: f"{one.name}\n{m}")


def verify_call(logits: list[Tensor], tokens: Tensor, law: Law, **options: Any) -> Call:
    numbers = torch.rand(tokens.shape[0], tokens.shape[1] + 1, 4)
    return Call("verify", (logits, tokens, numbers, law), options, f"{law}, {options}")


# --- random calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(50_000, 50_120, 10))
def test_small_vocabularies(first: int) -> None:
    for seed in range(first, first + 10):
        check(call(seed, SMALL))


@pytest.mark.parametrize("first", range(51_000, 51_015, 5))
def test_vocabularies_around_a_tile(first: int) -> None:
    for seed in range(first, first + 5):
        check(call(seed, TILES))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(52_000, 52_800, 50))
def test_more_of_them(first: int) -> None:
    for seed in range(first, first + 50):
        check(call(seed, SMALL + TILES))


@pytest.mark.parametrize(
    ("vocab_size", "ensemble"), [(49_152, "mixture"), (49_152, "product"), (151_936, "mixture")]
)
def test_real_vocabularies(vocab_size: int, ensemble: str) -> None:
    logits = [(torch.randn(1, 3, vocab_size) * 3).bfloat16() for _ in range(2)]
    tokens = logits[1][:, :2].float().argmax(-1)
    law = Law((0.4, 0.6), ensemble, temperature=0.8)
    check(verify_call(logits, tokens, law, proposers=torch.tensor([1, 1])))


def test_filters_of_a_real_vocabulary() -> None:
    logits = [(torch.randn(1, 1, 49_152) * 3).bfloat16() for _ in range(2)]
    law = Law((0.4, 0.6), temperature=0.8, top_k=50, top_p=0.9)
    check(Call("sample", (logits, torch.rand(1, 1, 4), law), {"member": None}, "filters"))


# --- the hard list --------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_the_lowest_of_tied_tokens_in_any_tile(ensemble: str) -> None:
    logits = torch.randn(1, 3, 20_000)
    for row, places in enumerate([(0, 19_999), (8191, 8192), (1024, 1023, 12_000)]):
        logits[0, row, list(places)] = 9.0
    law = Law((0.5, 0.5), ensemble, temperature=0.0)
    one = Call("sample", ([logits, logits.clone()], torch.rand(1, 3, 4), law), {}, "")
    assert run(one)[0].tolist() == [[0, 8191, 1023]]


def test_a_row_of_equal_logits_is_uniform() -> None:
    logits = torch.zeros(1, 2, 9000, dtype=torch.float16)
    check(verify_call([logits], torch.tensor([[8999]]), Law()))


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_a_residual_of_nothing_is_the_target(ensemble: str) -> None:
    """A draft without mass in two equal laws is rejected, and nothing is left."""
    logits = torch.randn(2, 2, 3000)
    logits[:, 0, 7] = -torch.inf
    law = Law((1.0,), ensemble)
    tokens = torch.full((2, 1), 7)
    one = verify_call([logits], tokens, law, proposers=torch.tensor([0]))
    check(one)
    assert (run(one)[4] & specens_kernels.Status.EMPTY_RESIDUAL).all()


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_nearly_equal_laws(ensemble: str, scope: str, gap: float) -> None:
    """What is left of them is too small for single precision."""
    expert = torch.randn(2, 2, 3000)
    amateur = expert + gap * torch.randn(2, 2, 3000)
    amateur[:, 0, 7] = expert[:, 0, 7] = -torch.inf
    law = Law((0.5, 0.5), ensemble, scope=scope, temperature=0.9)
    tokens = torch.full((2, 1), 7)
    check(verify_call([expert, amateur], tokens, law, proposers=torch.tensor([1])))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf], ids=str)
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_rows_of_one_broken_value(value: float, ensemble: str) -> None:
    logits = [torch.randn(2, 2, 50), torch.randn(2, 2, 50)]
    logits[0][0, 0] = value
    logits[1][1] = value
    check(verify_call(logits, torch.randint(50, (2, 1)), Law((0.5, 0.5), ensemble)))


def test_one_member_dominates() -> None:
    logits = [torch.randn(2, 3, 2000), torch.randn(2, 3, 2000) * 200]
    tokens = logits[1][:, :2].argmax(-1)
    check(verify_call(logits, tokens, Law((1e-6, 1 - 1e-6)), proposers=torch.tensor([1, 0])))


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_eight_members_of_three_types(ensemble: str) -> None:
    logits = [torch.randn(1, 2, 100 + k).to(DTYPES[k % 3]) for k in range(8)]
    law = Law([1 / 8] * 8, ensemble, temperature=[0.5 + k / 8 for k in range(8)], vocab_size=99)
    check(verify_call(logits, torch.tensor([[5]]), law, proposers=torch.tensor([7])))


@pytest.mark.parametrize("bonus", [True, False])
def test_without_nodes(bonus: bool) -> None:
    logits = torch.randn(2, int(bonus), 30)
    check(verify_call([logits], torch.empty(2, 0, dtype=torch.int64), Law(), bonus=bonus))


def test_without_sequences() -> None:
    check(verify_call([torch.randn(0, 3, 30)], torch.empty(0, 2, dtype=torch.int32), Law()))


def test_drafts_of_32_lengths() -> None:
    logits = [torch.randn(32, 4, 200) for _ in range(2)]
    tokens = logits[1][:, :3].argmax(-1)
    tokens = tokens.masked_fill(torch.arange(3) >= torch.randint(0, 4, (32, 1)), -1)
    check(verify_call(logits, tokens, Law((0.5, 0.5)), proposers=torch.tensor([1, 1, 1])))


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_rows_that_are_more_than_two_to_the_31_elements_apart(ensemble: str) -> None:
    """Memory that nobody touches is not there: 4.3 GB of addresses, a few pages."""
    if sys.maxsize < 2**32:
        pytest.skip("needs 64-bit addresses")
    stride = 2**31 + 64
    torch.use_deterministic_algorithms(False)  # it would fill the storage
    storage = torch.empty(stride + 1024, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)
    logits = storage.as_strided((1, 2, 600), (2 * stride, stride, 1))
    logits.copy_(torch.randn(1, 2, 600))
    tokens = logits[:, :1].float().argmax(-1)
    check(verify_call([logits, torch.randn(1, 2, 600)], tokens, Law((0.9, 0.1), ensemble)))


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_uniforms_are_the_reference_s(batch: int) -> None:
    seeds = torch.randint(-(2**62), 2**62, (batch,))
    for positions in (torch.arange(70)[None] + 2**33, torch.randint(2**40, (batch, 5))):
        with specens_kernels.backend("reference"):
            expected = uniforms(seeds, positions, Stream.DRAFT, index=2**32 - 1)
        found = kernels.uniforms(seeds, positions, int(Stream.DRAFT), 2**32 - 1)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_a_verification_reads_every_row_once(ensemble: str, members: int) -> None:
    """And has four launches; a second look is for the stop row, and for the token's sub-tile."""
    vocab_size, nodes = 20_000, 2
    logits = [torch.randn(1, nodes + 1, vocab_size).bfloat16() for _ in range(members)]
    tokens = logits[-1][:, :nodes].float().argmax(-1)
    law = Law([1 / members] * members, ensemble)
    proposers = torch.full((1, nodes), members - 1)
    with counted() as traffic:
        run(verify_call(logits, tokens, law, proposers=proposers))
    assert sum(kernel.launches for kernel in traffic.values()) == 4
    row = 2 * vocab_size
    rows = members * (nodes + 1) * row
    sweep = traffic[f"{ensemble}_stats"].loaded
    assert rows <= sweep < rows * 1.01
    assert traffic["residual"].loaded < members * row * 1.03


def test_the_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import specens_kernels.triton as backend; "
        "assert not backend.AVAILABLE and backend.REASON"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def law_tensors(members: int) -> LawTensors:
    return Law([1 / members] * members).tensors("mix", 1, 1, members, torch.device("cpu"), 5)


def test_what_has_no_kernel_is_refused() -> None:
    rows, numbers = torch.zeros(1, 1, 5), torch.zeros(1, 1, 4)
    with pytest.raises(kernels.Unsupported, match="9 members; Triton kernels take 8"):
        kernels.mix([rows] * 9, law_tensors(9))
    with pytest.raises(kernels.Unsupported, match=r"logits of torch\.float64"):
        kernels.sample([rows.double()], numbers, law_tensors(1), -1)
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    rest = (None, None, None, law_tensors(1))
    with pytest.raises(kernels.Unsupported, match="trees have no Triton kernel"):
        kernels.verify([rows], tokens, numbers, torch.tensor([[-1]]), *rest, "greedy", 1.0, True)
    with pytest.raises(kernels.Unsupported, match="rule 'typical' has no Triton kernel"):
        kernels.verify([rows], tokens, numbers, None, *rest, "typical", 1.0, True)
    with pytest.raises(kernels.Unsupported, match="ensemble 'median' has no Triton kernel"):
        kernels.mix([rows], law_tensors(1)._replace(ensemble="median"))
