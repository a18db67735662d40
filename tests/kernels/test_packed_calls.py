# SPDX-License-Identifier: Apache-2.0
"""An engine's calls on every backend that takes them: alike, without a copy, and refused by name.

The laws are those of test_packed.py. A random call is a seed, and a failure prints it. To cover one
more argument, draw it in `engine_calls.py` and add what is wrong of it to `WRONG`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import SMALL, TILES, Dice, call, check_but_near
from engine_calls import as_packed, engine_call

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, Acceptance, Law, Refusal, Unsupported, sample, verify

BOTH = pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)
NATIVE = pytest.mark.parametrize("backend", ["native"], indirect=True)
RULES = sorted(ACCEPTANCE_RULES)
PORTION = 100


@NATIVE
@pytest.mark.parametrize("first", range(0, 600, PORTION))
def test_random_calls_of_an_engine(backend: str, first: int) -> None:
    near = 0
    for seed in range(first, first + PORTION):
        sizes = TILES if seed % 8 == 0 else SMALL
        near += not check_but_near(backend, engine_call(seed, sizes, RULES))
    assert near <= 1


@BOTH
def test_packed_rows_give_the_very_numbers_of_padded_ones(backend: str) -> None:
    for seed in range(60):
        one = call(80_000 + seed, SMALL, RULES)
        lying = as_packed(Dice(seed), one)
        for right, found in zip(one.run(backend), lying.run(backend), strict=True):
            assert torch.equal(right, found), one.name


B, N, V, L = 3, 2, 11, 20


def inputs(seed: int = 0) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(seed)
    return {
        "logits": [torch.randn(L, V, generator=dice) * 2, torch.randn(L, V + 3, generator=dice)],
        "draft_tokens": torch.randint(V, (B, N), generator=dice),
        "uniforms": torch.rand(B, N + 1, 4, generator=dice),
        "law": Law((0.4, 0.6)),
        "rows": torch.randint(L, (B, N + 1), generator=dice),
        "draft_logits": torch.randn(5, 4, V, generator=dice),
        "draft_rows": torch.randint(20, (B, N), generator=dice),
    }


def run(**changes: Any) -> Any:
    return verify(**{**inputs(), **changes})


@BOTH
@pytest.mark.parametrize("member", [None, 0, 1])
@pytest.mark.parametrize("count", [None, 3])
def test_a_sample_of_packed_rows_is_that_of_padded_ones(
    backend: str, member: int | None, count: int | None
) -> None:
    given = inputs()
    logits, rows, law = given["logits"], given["rows"].int(), Law((0.4, 0.6), top_k=4)
    numbers = torch.rand(B, N + 1, *([] if count is None else [count]), 4)
    drawn = sample(logits, numbers, law, rows=rows, member=member, count=count)
    padded = [tensor[rows.long()] for tensor in logits]
    right = sample(padded, numbers, law, member=member, count=count)
    assert all(torch.equal(a, b) for a, b in zip(drawn, right, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [B, 1])
def test_tokens_are_written_where_the_caller_says(
    backend: str, dtype: torch.dtype, size: int
) -> None:
    given = inputs()
    for name in ("draft_tokens", "uniforms", "rows", "draft_rows"):
        given[name] = given[name][:size]
    right = verify(**given)
    buffer = torch.full((size, 9), 7, dtype=dtype)
    out = buffer[:, 2 : 3 + N]
    before = out._version
    verdict = verify(**given, out=out)
    assert verdict.tokens is out
    assert torch.equal(out.long(), right.tokens)
    assert all(torch.equal(a, b) for a, b in zip(verdict[1:], right[1:], strict=True))
    assert (buffer[:, :2] == 7).all()
    assert (buffer[:, 3 + N :] == 7).all()
    assert out._version > before


@NATIVE
def test_nothing_of_an_engines_buffers_is_copied(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gets the addresses of the caller's memory, and torch allocates results only."""
    given = inputs()
    out = torch.empty(B, N + 1, dtype=torch.int32)
    seen: list[list[Any]] = []
    module = specens_kernels.native._C

    class Watching:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def verify(self, arguments: list[Any]) -> None:
            seen.append(arguments)
            module.verify(arguments)

    monkeypatch.setattr(specens_kernels.native, "_C", Watching())
    own = [*given["logits"], given["draft_logits"], given["rows"], given["draft_rows"], out]
    verify(**given, out=out)
    assert {tensor.data_ptr() for tensor in own} <= set(seen[0])
    # As many bytes as the results have, less than ten of the 40 rows that the buffers have.
    assert allocated(lambda: verify(**given)) < 10 * V * 4


def allocated(function: Callable[[], object]) -> int:
    """Bytes that torch allocates in a call, all together."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return sum(
        event.self_cpu_memory_usage
        for event in profile.events()
        if event.name != "[memory]" and event.self_cpu_memory_usage > 0
    )


@NATIVE
def test_a_compiled_call_writes_the_same_tokens(backend: str) -> None:
    """In a graph, which has the op without `out`, they are copied there."""
    given, law = inputs(), Law((0.4, 0.6))
    given.pop("law")

    def turn(out: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return verify(**given, law=law, draft_space="logits", out=out).tokens + 1

    right = verify(**given, law=law).tokens
    out = torch.zeros(B, N + 1, dtype=torch.int32)
    found = torch.compile(turn, fullgraph=True, backend="eager")(out, given)
    assert torch.equal(out.long(), right)
    assert torch.equal(found.long(), right + 1)


@BOTH
def test_a_strided_view_of_slots_is_read_as_it_lies(backend: str) -> None:
    """Slots of more steps and wider rows than are asked for."""
    given = inputs()
    slots = given["draft_logits"]
    wide = torch.full((5, 4, 2 * V), torch.nan)
    wide[..., :V] = slots
    assert torch.equal(run().tokens, run(draft_logits=wide[..., :V]).tokens)
    assert torch.equal(run().tokens, run(draft_logits=slots.flatten(0, 1)).tokens)


@BOTH
@pytest.mark.parametrize("rule", [n for n in RULES if ACCEPTANCE_RULES[n].parameters])
def test_each_request_has_its_own_parameters(backend: str, rule: str) -> None:
    """A batch's row is the call of that request alone, with numbers."""
    dice, batch = Dice(3), 6
    chosen = [dice.acceptance([rule], V) for _ in range(batch)]
    names = [parameter.name for parameter in ACCEPTANCE_RULES[rule].parameters]
    columns = zip(*(each.numbers for each in chosen), strict=True)
    several = {name: torch.tensor(each) for name, each in zip(names, columns, strict=True)}
    logits = [torch.randn(batch, N + 1, V, generator=dice.generator) * 2 for _ in range(2)]
    tokens = logits[1][:, :N].topk(2, -1).indices[..., 0]
    numbers = torch.rand(batch, N + 1, 4, generator=dice.generator)
    numbers[..., 0] = 0.5
    options = {"proposers": torch.tensor([1, 1])}
    law = Law((0.6, 0.4))
    together = verify(
        logits, tokens, numbers, law, acceptance=Acceptance(rule, **several), **options
    )
    for b, alone in enumerate(chosen):
        here = slice(b, b + 1)
        # Numbers that a tensor holds in single precision.
        single = {n: torch.tensor(v).item() for n, v in zip(names, alone.numbers, strict=True)}
        verdict = verify(
            [tensor[here] for tensor in logits],
            tokens[here],
            numbers[here],
            law,
            acceptance=Acceptance(rule, **single),
            **options,
        )
        assert all(torch.equal(a[b], c[0]) for a, c in zip(together, verdict, strict=True))


@BOTH
def test_parameters_beyond_their_range_count_as_the_end_of_it(backend: str) -> None:
    """Tensors are not looked at on the host."""
    given = torch.tensor([-1.0, 7.0, torch.nan])
    ends = torch.tensor([0.0, 1.0, 0.0])
    for rule, name in (("tv", "threshold"), ("synthetic", "rate"), ("cascade_v1", "alpha")):
        found = run(acceptance=Acceptance(rule, **{name: given}))
        right = run(acceptance=Acceptance(rule, **{name: ends}))
        assert torch.equal(found.tokens, right.tokens)
    found = run(acceptance=Acceptance("lenient", lenience=torch.tensor([0.0, -1.0, torch.nan])))
    # All that the target can emit is kept.
    assert found.num_accepted.tolist() == [N] * B


@BOTH
def test_without_a_count_a_draft_of_minus_one_is_none(backend: str) -> None:
    """And with one it is refused: a token is drawn though there is no bonus."""
    given = inputs()
    given["draft_tokens"][:, 0] = -1
    given["rows"] = given["rows"][:, :N]
    ended = verify(**given, bonus=False)
    assert (ended.tokens == -1).all()
    refused = verify(**given, bonus=False, num_drafts=torch.full((B,), N))
    assert (refused.tokens[:, 0] >= 0).all()
    assert (refused.tokens[:, 1:] == -1).all()
    assert refused.status.tolist() == [0] * B
    none = verify(**given, bonus=False, num_drafts=torch.zeros(B, dtype=torch.int32))
    assert (none.tokens == -1).all()


INDICES = torch.zeros(B, N + 1, dtype=torch.int64)
# What is wrong, and how the refusal begins.
WRONG = [
    (
        {"rows": INDICES.float()},
        r"rows: expected \(B=3, 3\) int32 or int64 on cpu, got .* float32",
    ),
    (
        {"rows": INDICES[:, :2]},
        r"rows: expected \(B=3, 3\) int32 or int64 on cpu, got \(3, 2\)",
    ),
    ({"rows": INDICES[:1]}, r"rows: expected \(B=3, 3\) .*, got \(1, 3\) int64 on cpu"),
    ({"rows": INDICES[0]}, r"rows: expected \(B=3, 3\) .*, got \(3,\) int64 on cpu"),
    ({"rows": INDICES.to("meta")}, r"rows: expected .* on cpu, got \(3, 3\) int64 on meta"),
    ({"rows": [[0] * 3] * 3}, r"rows: expected a tensor or None, got \[\[0, 0, 0\]"),
    ({"rows": INDICES + L}, r"rows: expected indices in \[0, 20\), got 20 at \(0, 0\)"),
    ({"rows": INDICES - 1}, r"rows: expected indices in \[0, 20\), got -1 at \(0, 0\)"),
    ({"rows": None}, r"logits\[0\]: expected \(B, T, V >= 11\) float"),
    (
        {"logits": [torch.randn(3, L, V)] * 2},
        r"logits\[0\]: expected \(L, V\) on cpu, for rows are given, got \(3, 20, 11\) float32",
    ),
    (
        {"logits": [torch.randn(L, V), torch.randn(L + 1, V)]},
        r"logits\[1\]: expected \(L=20, V\) on cpu, for rows are given, got \(21, 11\) float32",
    ),
    (
        {"draft_rows": INDICES.short()},
        r"draft_rows: expected \(B=3, 2 or 3\) int32 or int64 on cpu",
    ),
    (
        {"draft_rows": INDICES + 20},
        r"draft_rows: expected indices in \[0, 20\), got 20 at \(0, 0\)",
    ),
    ({"draft_logits": None}, r"draft_rows: expected None without draft_logits, got a tensor"),
    ({"draft_rows": None}, r"draft_logits: expected \(B=3, N=2 or N\+1, V >= 11\) float on cpu"),
    (
        {"draft_logits": torch.randn(4, 5, V).transpose(0, 1)},
        r"draft_logits: expected slots whose steps lie at equal distances, .*, got strides",
    ),
    (
        {"draft_logits": torch.randn(20, V - 1)},
        r"draft_logits: expected \(L, V >= 11\) or \(slots, steps, V\) float on cpu, got",
    ),
    ({"draft_logits": torch.randn(V, 20).mT}, r"draft_logits: expected contiguous rows, got"),
    ({"draft_lse": torch.zeros(19)}, r"draft_lse: expected \(20,\) float32 on cpu, got \(19,\)"),
    ({"lse": torch.zeros(B, N + 1, 2)}, r"lse: expected \(20, 2\) float32 on cpu, got \(3, 3, 2\)"),
    ({"num_drafts": torch.ones(B)}, r"num_drafts: expected \(B=3,\) int32 or int64 on cpu, got"),
    (
        {"num_drafts": torch.ones(2, dtype=torch.int32)},
        r"num_drafts: expected \(B=3,\) .*, got \(2,\)",
    ),
    ({"num_drafts": 2}, r"num_drafts: expected a tensor or None, got 2"),
    ({"draft_filtered": 0}, r"draft_filtered: expected True or False, got 0"),
    ({"draft_space": "odds"}, r"draft_space: expected one of .*, got 'odds'"),
    ({"draft_space": None}, r"draft_space: expected one of .*, got None"),
    (
        {"draft_space": "probabilities", "draft_temperature": torch.tensor(1.0)},
        r"draft_temperature: expected None for probabilities, got a tensor",
    ),
    (
        {"draft_space": "probabilities", "draft_lse": torch.zeros(20)},
        r"draft_lse: expected None for probabilities, got a tensor",
    ),
    (
        {"draft_space": "probabilities", "draft_logits": None, "draft_rows": None},
        r"draft_logits: expected the probabilities of draft_space, got None",
    ),
    ({"out": torch.empty(B, N + 1)}, r"out: expected \(B=3, 3\) int32 or int64 on cpu, got"),
    ({"out": INDICES[:, :2].clone()}, r"out: expected \(B=3, 3\) .*, got \(3, 2\) int64 on cpu"),
    ({"out": INDICES[:1].expand(3, 3)}, r"out: expected contiguous rows that do not overlap, got"),
    ({"out": INDICES.clone().mT}, r"out: expected contiguous rows that do not overlap, got"),
    (
        {"acceptance": Acceptance("tv", threshold=torch.ones(2))},
        r"acceptance 'tv': expected numbers or \(B=3,\) tensors on cpu, got",
    ),
]


@BOTH
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused_by_name(
    backend: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refusal, match=f"^verify: {message}"):
        run(**changes)


def test_an_out_that_is_the_drafts_memory_is_refused() -> None:
    buffer = torch.zeros(B, N + 2, dtype=torch.int64)
    with pytest.raises(Refusal, match=r"^verify: out: expected memory of its own"):
        run(draft_tokens=buffer[:, :N], out=buffer[:, 1:])


def test_parameters_of_a_rule_that_are_no_numbers_are_refused() -> None:
    for value, got in ((torch.ones(2, 2), "a Tensor"), ("x", "'x'"), ((0.5, 0.5), r"\(0.5, 0.5\)")):
        with pytest.raises(Refusal, match=rf"^acceptance: threshold: expected .*, got {got}$"):
            Acceptance("tv", threshold=value)
    for value in ((), (0.5, 2.0), (0.5, "x"), torch.ones(1, 1, 1)):
        with pytest.raises(Refusal, match=r"^acceptance: rate: expected .*, got "):
            Acceptance("synthetic", rate=value)
    with pytest.raises(Refusal, match=r"^acceptance: rate: expected one number"):
        _ = Acceptance("synthetic", rate=(0.5, 0.2)).parameters


# What Triton and CUDA do not take yet.
NOT_YET = {
    "rows": {},
    "draft_rows": {"rows": None, "logits": [torch.randn(B, N + 1, V)] * 2},
    "num_drafts": {"num_drafts": torch.ones(B, dtype=torch.int32)},
    "draft_filtered": {"draft_filtered": False},
    "draft_space": {"draft_space": "probabilities"},
    "acceptance": {"acceptance": Acceptance("tv", threshold=torch.ones(B))},
}
PADDED = {"rows": None, "draft_rows": None, "logits": [torch.randn(B, N + 1, V)] * 2}


@pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("argument", NOT_YET)
def test_a_gpu_backend_refuses_each_argument_by_name(backend: str, argument: str) -> None:
    changes = NOT_YET[argument]
    if not argument.endswith("rows"):
        changes = {**PADDED, "draft_logits": torch.rand(B, N, V), **changes}
    with pytest.raises(Unsupported, match=rf"^{backend}: {argument}: expected .*, got "):
        run(**changes)
