# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, emulated on the CPU, against the reference.

The random calls of test_native.py and a list of hard ones give the same tokens, counts, paths and
status; nothing here needs a GPU or a CUDA toolkit. The memory that kernels touch is the subject of
tests/native/test_cuda.cpp.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import simt
import torch
from test_native import EXACT, OPS, SMALL, TILES, Call, call
from torch import Tensor

from specens_kernels import Law, cuda, mix, native, sample, uniforms, verify

pytestmark = [
    pytest.mark.skipif(not native.AVAILABLE, reason=f"native: {native.REASON}"),
    pytest.mark.skipif(simt.what_is_missing() != "", reason=f"simt: {simt.what_is_missing()}"),
]


@pytest.fixture(scope="session")
def emulator() -> Any:
    return simt.build()


@pytest.fixture(autouse=True)
def fresh_workspaces() -> Iterator[None]:
    yield
    for workspace in cuda._workspaces.values():
        tickets = workspace[: 4 * 65_535]
        assert not tickets.any(), "a kernel left a ticket behind"


def run(one: Call, module: Any) -> tuple[Tensor, ...]:
    with simt.emulated(module):
        return tuple(OPS[one.op](*one.arguments, **one.options))


def check(one: Call, module: Any) -> None:
    expected, found = one.run("reference"), run(one, module)
    for i, (right, ours) in enumerate(zip(expected, found, strict=True)):
        close = {} if i in EXACT[one.op] else {"atol": 1e-5, "rtol": 3e-6}
        torch.testing.assert_close(
            ours, right, **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{one.name}\n{m}"
        )


@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_small_vocabularies(first: int, emulator: Any) -> None:
    for seed in range(first, first + 50):
        check(call(seed, SMALL), emulator)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 10_200, 50))
def test_vocabularies_around_a_tile(first: int, emulator: Any) -> None:
    for seed in range(first, first + 50):
        check(call(seed, TILES), emulator)


@pytest.mark.slow
def test_real_vocabularies(emulator: Any) -> None:
    for seed in range(20_000, 20_006):
        check(call(seed, (49_152, 128_256)), emulator)


def test_uniforms(emulator: Any) -> None:
    seeds = torch.tensor([0, 1, -(2**63), 2**63 - 1])
    positions = torch.tensor([[0, 5, 2**32 + 7, -1]])
    expected = uniforms(seeds, positions, stream=3, index=9)
    with simt.emulated(emulator):
        found = uniforms(seeds, positions, stream=3, index=9)
    assert torch.equal(found, expected)


# --- hard calls ---


def verify_call(
    members: int,
    nodes: int,
    vocab_size: int,
    batch: int = 1,
    proposer: int | None = 0,
    law: Law | None = None,
    name: str = "",
) -> Call:
    logits = [torch.randn(batch, nodes + 1, vocab_size) * 3 for _ in range(members)]
    tokens = logits[proposer or 0][:, :nodes].argmax(-1)
    law = law or Law([1 / members] * members, temperature=0.9)
    options: dict[str, Any] = {}
    if proposer is not None:
        options["proposers"] = torch.full((1, nodes), proposer)
    return Call("verify", (logits, tokens, torch.rand(batch, nodes + 1, 4), law), options, name)


@pytest.mark.parametrize("vocab_size", [8192, 8193, 16_383, 24_577])
def test_vocabularies_that_tiles_do_not_divide(vocab_size: int, emulator: Any) -> None:
    for proposer in (0, None):
        check(verify_call(2, 3, vocab_size, proposer=proposer), emulator)


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_ties_across_tiles(ensemble: str, emulator: Any) -> None:
    logits = torch.randn(1, 3, 30_000)
    for row, places in enumerate([(0, 29_999), (8191, 8192), (1024, 1023, 20_000)]):
        logits[0, row, list(places)] = 9.0
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.01}):
        law = Law((0.5, 0.5), ensemble, **options)
        arguments = ([logits, logits.clone()], torch.rand(1, 3, 4), law)
        check(Call("sample", arguments, {}, f"{options}"), emulator)


def test_a_residual_of_nothing(emulator: Any) -> None:
    one = verify_call(1, 3, 9000)
    logits, tokens, numbers, law = one.arguments
    draft = logits[0] + 1e-7 * torch.randn_like(logits[0])
    numbers[..., 0] = 1 - 2.0**-24
    for draft_logits in (logits[0], draft, logits[0].float() * (1 + 1e-5)):
        options = {"draft_logits": draft_logits, "draft_temperature": torch.tensor(0.9)}
        check(Call("verify", (logits, tokens, numbers, law), options, ""), emulator)
    tight = {"acceptance": "lenient", "lenience": 1e-3, "proposers": torch.zeros(1, 3).long()}
    check(Call("verify", (logits, tokens, numbers, law), tight, "lenient"), emulator)


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_rows_of_nan(ensemble: str, emulator: Any) -> None:
    one = verify_call(2, 2, 3000, batch=3, law=Law((0.5, 0.5), ensemble))
    one.arguments[0][0][1] = math.nan
    one.arguments[0][1][2, 1] = math.nan
    one.arguments[0][0][2, 0, 77] = math.inf
    check(one, emulator)


def test_one_member_that_dominates(emulator: Any) -> None:
    law = Law((1 - 1e-6, 1e-6))
    for proposer in (0, 1, None):
        one = verify_call(2, 3, 20_000, proposer=proposer, law=law)
        one.arguments[0][0][..., 12_345] = 40.0
        check(one, emulator)


@pytest.mark.parametrize("ensemble", ["mixture", "product"])
@pytest.mark.parametrize("scope", ["member", "ensemble"])
def test_eight_members(ensemble: str, scope: str, emulator: Any) -> None:
    law = Law([1 / 8] * 8, ensemble, temperature=0.7, scope=scope, top_p=0.9)
    check(verify_call(8, 2, 5000, proposer=7, law=law), emulator)
    unfiltered = Law([1 / 8] * 8, ensemble, temperature=0.7, scope=scope)
    check(verify_call(8, 2, 5000, proposer=3, law=unfiltered), emulator)


def test_no_drafts(emulator: Any) -> None:
    check(verify_call(2, 0, 5000, batch=3), emulator)
    check(verify_call(2, 0, 5000, batch=3, proposer=None), emulator)


def test_a_batch_of_32_with_ragged_drafts(emulator: Any) -> None:
    one = verify_call(3, 4, 2500, batch=32, proposer=1)
    lengths = torch.arange(32)[:, None] % 5
    one.arguments[1].masked_fill_(torch.arange(4) >= lengths, -1)
    check(one, emulator)


def test_chains_longer_than_a_block_has_warps(emulator: Any) -> None:
    one = verify_call(2, 20, 300)
    one.arguments[2][:, :18, 0] = 0.0
    check(one, emulator)


def test_offsets_beyond_32_bits(emulator: Any) -> None:
    """Rows so far apart that their distance has more than 31 bits; nothing between is touched."""
    vocab_size, gap = 1500, 2**31 + 11
    storage = torch.empty(0, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # it would fill what nobody touches
    try:
        storage = torch.empty(gap + vocab_size, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of addresses")
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    far = storage.as_strided((1, 2, vocab_size), (0, gap, 1))
    far.copy_(torch.randn(1, 2, vocab_size))
    tokens, numbers = far[:, :1].argmax(-1), torch.rand(1, 2, 4)
    options = {"proposers": torch.zeros(1, 1, dtype=torch.int64)}
    check(Call("verify", ([far], tokens, numbers, Law()), options, ""), emulator)


# --- what a call costs ---


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True], ids=["one-hot", "dense"])
def test_two_launches_read_each_row_once(members: int, dense: bool, emulator: Any) -> None:
    nodes, vocab_size = 4, 20_000
    one = verify_call(members, nodes, vocab_size, proposer=0 if dense else None)
    logits, tokens, numbers, law = one.arguments
    numbers[..., 0] = 0.999
    tokens.fill_(5)  # rejected at once
    one = one._replace(arguments=([x.bfloat16() for x in logits], tokens, numbers, law))
    emulator.reset_traffic()
    run(one, emulator)
    traffic = emulator.traffic()
    assert {name: seen[0] for name, seen in traffic.items()} == {
        "row_stats": 1,
        "verify_resample": 1,
    }
    rows = members * (nodes + 1) * vocab_size * 2
    assert traffic["row_stats"][1] < 1.05 * rows + 16_384
    swept = members * vocab_size * 2 if dense and members > 1 else 0
    blocks = 3 if dense else 1
    assert traffic["verify_resample"][1] < 1.1 * swept + blocks * 4096 + members * 16_384


# --- what there is no kernel for ---

ROWS, NUMBERS = torch.zeros(1, 2, 5), torch.zeros(1, 2, 4)
REFUSED = {
    "trees": (
        verify,
        ([ROWS], torch.zeros(1, 1, dtype=torch.int64), NUMBERS, Law()),
        {"parents": torch.tensor([-1, 0])},
    ),
    "float64": (sample, ([ROWS.double()], NUMBERS, Law()), {}),
    "9 members": (mix, ([ROWS] * 9, Law([1 / 9] * 9)), {}),
    "70000 rows": (mix, ([torch.zeros(2, 35_000, 2)], Law()), {}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_kernel_is_refused(why: str, emulator: Any) -> None:
    op, arguments, options = REFUSED[why]
    with simt.emulated(emulator), pytest.raises(NotImplementedError, match=why):
        op(*arguments, **options)


def test_a_workspace_that_is_too_small_is_refused(emulator: Any) -> None:
    flat, _ = native.flatten_mix([ROWS], Law().tensors("mix", 1, 2, 1, ROWS.device, 5))
    needed = emulator.cuda_mix_workspace(flat)
    workspace = torch.zeros(needed - 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="cuda: the workspace is too small"):
        emulator.cuda_mix([*flat, workspace.data_ptr(), needed - 1, 0])
