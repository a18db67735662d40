# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on the emulator: what a call costs in launches and bytes, and what it refuses.

That its tokens are the reference's is the subject of test_conformance.py; the memory that kernels
touch is the subject of tests/native/test_cuda.cpp. Nothing here needs a GPU or a CUDA toolkit.
"""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import simt
import torch
from calls import Call

import specens_kernels
from specens_kernels import Law, cuda, dispatch, flat, mix, sample, verify

pytestmark = [
    pytest.mark.skipif(flat.MODULE is None, reason=f"native: {flat.REASON}"),
    pytest.mark.skipif(simt.what_is_missing() != "", reason=f"simt: {simt.what_is_missing()}"),
]


@pytest.fixture(autouse=True)
def emulator() -> Iterator[Any]:
    with simt.emulated() as module:
        yield module
    for workspace in cuda._workspaces.values():
        tickets = workspace[: 4 * 65_535]
        assert not tickets.any(), "a kernel left a ticket behind"


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


def rejected(one: Call, kept: int) -> Call:
    """The call in bfloat16, with the draft after `kept` rejected, if but member 0 would have it."""
    logits, tokens, numbers, law = one.arguments
    numbers[..., 0] = 0.0
    numbers[:, kept + 1 :, 0] = 0.999
    tokens[:, kept:] = 5
    for k, member in enumerate(logits):
        member[..., 5] = -9.0 if k > 0 else 0.0
    return one._replace(arguments=([x.bfloat16() for x in logits], tokens, numbers, law))


def read(one: Call, emulator: Any) -> dict[str, int]:
    """Bytes that each of the call's launches loads."""
    emulator.reset_traffic()
    one.run("cuda")
    assert {name: seen[0] for name, seen in emulator.traffic().items()} == {
        "row_stats": 1,
        "verify_resample": 1,
    }
    return {name: seen[1] for name, seen in emulator.traffic().items()}


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True], ids=["one-hot", "dense"])
def test_two_launches_read_each_row_once(members: int, dense: bool, emulator: Any) -> None:
    nodes, vocab_size = 4, 20_000
    one = rejected(verify_call(members, nodes, vocab_size, proposer=0 if dense else None), 0)
    seen = read(one, emulator)
    rows = members * nodes * vocab_size * 2  # not the bonus token's
    assert seen["row_stats"] < 1.05 * rows + 16_384
    swept = members * vocab_size * 2 if dense else 0  # of one member all is kept: the bonus row
    assert seen["verify_resample"] < 1.1 * swept + 3 * 4096 + members * 16_384


@pytest.mark.parametrize("dense", [False, True], ids=["one-hot", "dense"])
def test_the_row_of_the_bonus_token_is_read_when_the_chain_is_kept(
    dense: bool, emulator: Any
) -> None:
    members, nodes, vocab_size = 2, 4, 20_000
    one = rejected(verify_call(members, nodes, vocab_size, proposer=0 if dense else None), nodes)
    seen = read(one, emulator)
    assert seen["row_stats"] < 1.05 * members * nodes * vocab_size * 2 + 16_384
    row = members * vocab_size * 2
    assert row < seen["verify_resample"] < 1.1 * row + 3 * 4096 + members * 16_384


@pytest.mark.parametrize("kept", [0, 3, 4])
@pytest.mark.parametrize("draft", ["one-hot", "member", "apart"])
def test_rows_that_are_known_are_read_once_where_a_token_is_drawn(
    kept: int, draft: str, emulator: Any
) -> None:
    members, nodes, vocab_size = 3, 4, 20_000
    one = verify_call(members, nodes, vocab_size, proposer=0 if draft == "member" else None)
    if draft == "apart":
        one.options["draft_logits"] = one.arguments[0][0][:, :nodes].bfloat16()
        one.options["draft_logits"][..., 5] = 0.0
    one = rejected(one, kept)
    wide = [logits.double() / 0.9 for logits in one.arguments[0]]
    one.options["lse"] = torch.stack([x.logsumexp(-1) for x in wide], -1).float()
    if draft == "apart":
        own = one.options["draft_logits"].double() / 0.9
        one.options["draft_lse"] = own.logsumexp(-1).float()
    seen = read(one, emulator)
    assert seen["row_stats"] < 16_384
    row = vocab_size * 2 * (members + (draft == "apart" and kept < nodes))
    assert row < seen["verify_resample"] < 1.1 * row + 3 * 4096 + members * 16_384


@pytest.mark.parametrize("rule", ["rejection", "js"])
def test_the_draft_that_is_known_is_read_for_the_residual_only(rule: str, emulator: Any) -> None:
    nodes, vocab_size = 2, 20_000
    one = verify_call(1, nodes, vocab_size, proposer=None)
    apart = one.arguments[0][0][:, :nodes] + torch.randn(1, nodes, vocab_size)
    own = (apart.double() / 0.9).logsumexp(-1).float()
    one.options.update(draft_logits=apart, draft_lse=own, acceptance=rule)
    emulator.reset_traffic()
    one.run("cuda")
    rows = nodes * vocab_size * 4 if rule == "rejection" else (2 * nodes + 1) * vocab_size * 4
    assert rows < emulator.traffic()["row_stats"][1] < 1.05 * rows + 16_384


@pytest.mark.parametrize("rule", ["js", "block", "cactus", "entropy_veto"])
def test_rules_that_judge_whole_laws_take_one_launch_more(rule: str, emulator: Any) -> None:
    one = verify_call(2, 4, 3000)
    emulator.reset_traffic()
    one._replace(options={**one.options, "acceptance": rule}).run("cuda")
    assert {name: seen[0] for name, seen in emulator.traffic().items()} == {
        "row_stats": 1,
        "judge": 1,
        "verify_resample": 1,
    }


def test_threads_may_share_a_stream() -> None:
    """And with it a workspace, in which each launch leaves what the next one reads."""
    ones = [verify_call(2, 3, 3000), verify_call(3, 3, 3000)]
    expected = [one.run("cuda") for one in ones]
    found: list[list[Any]] = [[], []]

    def run(i: int) -> None:
        found[i] += [ones[i].run("cuda") for _ in range(15)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for right, theirs in zip(expected, found, strict=True):
        assert len(theirs) == 15
        for verdict in theirs:
            assert all(torch.equal(a, b) for a, b in zip(verdict, right, strict=True))


ROWS, NUMBERS = torch.zeros(1, 2, 5), torch.zeros(1, 2, 4)
REFUSED = {
    "got a tree": (
        verify,
        ([ROWS], torch.zeros(1, 1, dtype=torch.int64), NUMBERS, Law()),
        {"parents": torch.tensor([-1, 0])},
    ),
    "float64": (sample, ([ROWS.double()], NUMBERS, Law()), {}),
    "at most 8 members, got 9": (mix, ([ROWS] * 9, Law([1 / 9] * 9)), {}),
    "at most 65535 rows, got 70000": (mix, ([torch.zeros(2, 35_000, 2)], Law()), {}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_kernel_is_refused(why: str, emulator: Any) -> None:
    op, arguments, options = REFUSED[why]
    with specens_kernels.backend("cuda"), pytest.raises(NotImplementedError, match=why):
        op(*arguments, **options)


def test_a_workspace_that_is_too_small_is_refused(emulator: Any) -> None:
    arguments, _ = flat.flattened_mix([ROWS], Law().tensors("mix", ROWS.device, 5))
    needed = emulator.cuda_mix_workspace(arguments)
    workspace = torch.zeros(needed - 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="cuda: the workspace is too small"):
        emulator.cuda_mix([*arguments, workspace.data_ptr(), needed - 1, 0])


def test_an_old_device_is_refused_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def capability(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 7, 5

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(cuda, "_refusals", {})
    message = r"^cuda: device: expected .*, got cuda:0 of compute capability 7\.5, older than 8\.0$"
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=message):
            cuda._check_device(torch.device("cuda", 0))
    assert asked == [torch.device("cuda", 0)]


def test_what_a_device_cannot_run_another_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class CudaUnsupported(RuntimeError):
        pass

    calls = []

    def refuse(flat: list[Any]) -> None:
        calls.append(flat)
        raise CudaUnsupported("cuda: the kernels were not built for this device")

    with specens_kernels.backend("native"):
        expected = mix([ROWS], Law())
    stub = SimpleNamespace(
        cuda_mix=refuse, cuda_mix_workspace=lambda flat: 64, CudaUnsupported=CudaUnsupported
    )
    monkeypatch.setattr(cuda, "module", stub)
    monkeypatch.setattr(cuda, "_refusals", {})
    monkeypatch.setitem(dispatch.PREFERRED, "cpu", ("cuda", "native"))
    for _ in range(2):
        with specens_kernels.backend("auto"):
            found = mix([ROWS], Law())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(calls) == 1
    with (
        specens_kernels.backend("cuda"),
        pytest.raises(NotImplementedError, match=r"got cuda: the kernels were not built"),
    ):
        mix([ROWS], Law())
