# SPDX-License-Identifier: Apache-2.0
"""Every backend against the reference: the same tokens for the same uniforms.

The same tokens, counts, paths and status for random calls at sizes from 2 to 262,144, and for a
list of hard ones. A situation is a seed, and a failure prints it. No GPU is needed: "triton" is
Triton's interpreter under our guard, "cuda" the emulator. With `--card` both are the real ones, on
a CUDA device. To add a hard call, add a test; its calls are made by `Call`, which knows the device.
"""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import rules
import torch
from calls import COUNTED, DTYPES, ON_CARD, REAL, SMALL, TILES, Call, call, check, check_but_near
from torch import Tensor
from trees import random_problem

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES, Acceptance, Law, cuda, dispatch, flat

KERNELS = sorted(dispatch.MODULES)
EVERY = pytest.mark.parametrize("backend", KERNELS, indirect=True)
# Rules that a backend has no kernel of; each new one is named here.
WITHOUT_A_KERNEL: dict[str, set[str]] = {
    "native": set(),
    "triton": {"synthetic"},
    "cuda": {"synthetic"},
}


# How many, by what a kernel costs, an emulator's thread and an interpreter's operation.
COUNTS = {
    "small": (SMALL, 2000, {"cuda": 1000, "triton": 300}, 50),
    "tiles": (TILES, 300, {"cuda": 200, "triton": 45}, 15),
    "real": (REAL, 40, {"cuda": 5, "triton": 2}, 5),
}


def compiles(backend: str) -> bool:
    """Whether a call takes many seconds, for kernels are compiled for it."""
    return backend == "triton" and backend in ON_CARD


def random_calls() -> Iterator[Any]:
    """(backend, sizes, seeds) in portions."""
    for place, (name, (sizes, most, fewer, portion)) in enumerate(COUNTS.items()):
        for backend in KERNELS:
            count = fewer.get(backend, most)
            size = 1 if compiles(backend) else portion
            for first in range(0, count, size):
                seeds = range(first, min(first + size, count))
                marks = [pytest.mark.slow] if name == "real" or backend == "triton" else []
                values = (backend, sizes, [10_000 * place + seed for seed in seeds])
                yield pytest.param(*values, id=f"{backend} {name} {first}", marks=marks)


@pytest.mark.parametrize(("backend", "sizes", "seeds"), list(random_calls()), indirect=["backend"])
def test_random_calls(backend: str, sizes: tuple[int, ...], seeds: list[int]) -> None:
    for seed in seeds:
        check(backend, call(seed, sizes))


TREE_COUNTS = {"native": 300, "triton": 12, "cuda": 48}


def random_trees() -> Iterator[Any]:
    for backend, count in TREE_COUNTS.items():
        for first in range(0, count, 12):
            marks = [pytest.mark.slow] if backend != "native" else []
            seeds = range(first, min(first + 12, count))
            yield pytest.param(backend, seeds, id=f"{backend} {first}", marks=marks)


@pytest.mark.parametrize(("backend", "seeds"), list(random_trees()), indirect=["backend"])
def test_random_trees_are_attended_to_alike(backend: str, seeds: range) -> None:
    """Up to the rounding of the result, and of scores; test_attention.py is stricter."""
    for seed in seeds:
        one = random_problem(seed)
        with specens_kernels.backend("reference"):
            right, right_lse = one.run()
        out, lse = one.run()
        half = out.dtype != torch.float32
        close = {"atol": 8e-3, "rtol": 2e-2} if half else {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(out, right, **close, msg=f"seed {seed}: {{}}".format)
        torch.testing.assert_close(lse, right_lse, atol=2e-5, rtol=1e-5)


@EVERY
def test_calls_that_some_backend_once_got_wrong(backend: str) -> None:
    """Values that single precision cannot tell apart, next to a threshold or a residual."""
    for seed in (25, 2087, 2826, 3095, 3221, 3662, 5277):
        check(backend, call(seed, SMALL))


# Few of the calls may be too near a threshold to tell: of 10,000, 4 are.
RULE_COUNTS = {"cuda": 100, "triton": 30}  # else 2400
PORTIONS = {"cuda": 50, "triton": 10}  # else 200


def random_rule_calls() -> Iterator[Any]:
    for backend in KERNELS:
        count = RULE_COUNTS.get(backend, 2400)
        portion = 1 if compiles(backend) else PORTIONS.get(backend, 200)
        for first in range(0, count, portion):
            marks = [pytest.mark.slow] if backend == "triton" else []
            seeds = range(first, first + portion)
            yield pytest.param(backend, seeds, id=f"{backend} {first}", marks=marks)


@pytest.mark.parametrize(("backend", "seeds"), list(random_rule_calls()), indirect=["backend"])
def test_random_calls_under_every_rule(backend: str, seeds: range) -> None:
    names, near = sorted(rules_of(backend)), 0
    for seed in seeds:
        sizes = TILES if seed % 4 == 0 else SMALL
        near += not check_but_near(backend, call(40_000 + seed, sizes, names))
    assert near <= 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("rule", sorted(ACCEPTANCE_RULES))
def test_every_rule_at_real_vocabularies(backend: str, rule: str) -> None:
    for seed in range(3):
        check_but_near(backend, call(50_000 + seed, REAL, [rule]))


@pytest.mark.slow
def test_the_random_calls_get_both_answers_from_every_rule() -> None:
    for rule in ACCEPTANCE_RULES:
        kept, refused = 0, 0
        for seed in range(40_000, 40_020):
            one = call(seed, SMALL, [rule])
            accepted = one.run("reference")[2]
            kept += int(accepted.sum())
            refused += int((accepted < one.arguments[1].shape[1]).sum())
        assert min(kept, refused) > 0, rule


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_random_calls_see_a_wrong_parameter(backend: str) -> None:
    def shows(seed: int, rule: str, place: int) -> bool:
        one = call(seed, SMALL, [rule])
        given = ACCEPTANCE_RULES[rule].parameters
        values = {
            p.name: v for p, v in zip(given, one.options["acceptance"].parameters, strict=True)
        }
        wrong, value = given[place], values[given[place].name]
        if wrong.name in COUNTED:
            moved = 1 if value > 1 else 4
        elif wrong.high == math.inf:
            moved = value + 0.5
        else:
            moved = wrong.high if value < 0.5 else 0.05
        options = {"acceptance": Acceptance(rule, **{**values, wrong.name: moved})}
        moved_call = one._replace(options={**one.options, **options})
        return not torch.equal(one.run(backend)[2], moved_call.run(backend)[2])

    for rule in ACCEPTANCE_RULES:
        for place in range(len(ACCEPTANCE_RULES[rule].parameters)):
            assert any(shows(seed, rule, place) for seed in range(40_000, 40_400)), (rule, place)


def rules_of(backend: str) -> dict[str, Any]:
    """The rules that have a kernel: those of the C++ code, where a backend has no other table."""
    if backend == "cuda":
        return cuda.RULES
    if backend != "triton":
        return flat.RULES
    rules: dict[str, Any] = import_module("specens_kernels.triton.rules").RULES
    return rules


@EVERY
def test_every_rule_has_a_kernel(backend: str) -> None:
    assert set(ACCEPTANCE_RULES) - set(rules_of(backend)) == WITHOUT_A_KERNEL[backend]


@EVERY
def test_a_rule_without_a_kernel_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(rules_of(backend), "tv")
    one = verify_call([torch.randn(1, 2, 8)], torch.tensor([[1]]), Law(), acceptance="tv")
    with pytest.raises(specens_kernels.Unsupported, match=r"acceptance: expected .*, got 'tv'"):
        one.run(backend)


# So strict that a draft that the target likes less than its proposer is rejected.
STRICT: dict[str, dict[str, float]] = {
    **{rule: {"threshold": 0.01} for rule in rules.DIVERGENCES},
    **{f"cascade_{name}": {"alpha": 0.05} for name in ("chow", "opt", "v1", "v2", "v3")},
    "cascade_diff": {"alpha": 0.0},
    "mentored": {"divergence": 0.05},
    "cactus": {"divergence": 0.1},
    "lenient": {"lenience": 0.9},
    "typical": {"epsilon": 0.9, "delta": 0.9},
    "top_k": {"k": 1},
    "likelihood": {"threshold": 0.5},
    "entropy_veto": {"target_entropy": 1, "draft_entropy": 1, "overlap": 0.25, "top_n": 4},
    "synthetic": {"rate": 0.1},
}


@pytest.mark.parametrize(
    ("backend", "rule"),
    [
        (backend, rule)
        for backend in KERNELS
        for rule in sorted(set(ACCEPTANCE_RULES) - WITHOUT_A_KERNEL[backend])
    ],
    indirect=["backend"],
)
def test_what_is_left_of_a_rejected_draft_under_every_rule(backend: str, rule: str) -> None:
    dice = torch.Generator().manual_seed(11)
    target, noise = torch.randn(2, 10, 1, 1500, generator=dice).mul(2.5).unbind()
    draft = target / 2 + noise / 4  # flatter than the target, so that it is deferred to
    target[..., 1203], draft[..., 1203] = 10.4, 8.0
    tokens = (draft.softmax(-1) - 4 * target.softmax(-1)).argmax(-1)
    # A token with much of both laws, so that what is left of the others is scaled.
    target[..., 7], draft[..., 7], tokens[2:] = 9.0, 8.0, 7
    chosen = Acceptance(rule, **STRICT.get(rule, {}))
    options = {"proposers": torch.tensor([1]), "acceptance": chosen, "bonus": False}
    one = verify_call([target, draft], tokens, Law((1.0, 0.0)), **options)
    one.arguments[2][:, 1, 0] = 1 - 2.0**-24
    assert one.run("reference")[2].sum() <= (8 if rule == "typical" else 2)
    check(backend, one)


def hard_rows(name: str) -> tuple[Tensor, Tensor]:
    """(3, 2, 40) logits of two members; the draft is token 7, the second member's."""
    dice = torch.Generator().manual_seed(3)
    target, draft = torch.randn(2, 3, 2, 40, generator=dice).mul(2).unbind()
    draft[..., 7] += 4
    if name == "q(x) is 0":
        draft[..., 7] = -torch.inf
    elif name == "p(x) is 0":
        target[..., 7] = -torch.inf
    elif name == "p is one token":
        target[:, :, 8:], target[..., :7] = -torch.inf, -torch.inf
    elif name == "q is one token":
        draft[:, :, 8:], draft[..., :7] = -torch.inf, -torch.inf
    elif name == "p is empty":
        target[1:] = -torch.inf
    elif name == "q is empty":
        draft[1:] = -torch.inf
    elif name == "NaN":
        target[0, 0, 3] = draft[1, 0, 5] = torch.nan
    elif name == "infinite":
        target[0, 0, 3] = draft[1, 0, 5] = torch.inf
    elif name == "p is q":
        target = draft.clone()
    elif name == "uniform":
        target, draft = torch.zeros_like(target), torch.zeros_like(draft)
    return target, draft


HARD_ROWS = ["q(x) is 0", "p(x) is 0", "p is one token", "q is one token", "p is empty"]
HARD_ROWS += ["q is empty", "NaN", "infinite", "p is q", "uniform"]
BOUNDLESS = list(product(("cactus", "mentored"), (0.0, 1e308)))
DRAFTED, TEMPERATURES = ("by a member", "as a point"), (1.0, 0.0)
HARD_CALLS = list(product(HARD_ROWS, DRAFTED, TEMPERATURES))


def hard_rules(backend: str, place: int) -> list[Acceptance]:
    """All of them with all their parameters; where a call takes a second, each at one place."""
    names = sorted(rules_of(backend))
    every = [Acceptance(name, **one) for name in names for one in rules.parameters(name)]
    every += [Acceptance(name, divergence=at) for name, at in BOUNDLESS]
    return every[place :: len(HARD_CALLS)] if backend == "triton" else every


@EVERY
@pytest.mark.parametrize(
    "place", range(len(HARD_CALLS)), ids=lambda i: ", ".join(map(str, HARD_CALLS[i]))
)
def test_hard_rows_under_every_rule(backend: str, place: int) -> None:
    rows, drafted, temperature = HARD_CALLS[place]
    target, draft = hard_rows(rows)
    proposers = torch.tensor([1]) if drafted == "by a member" else None
    law, tokens = Law((1.0, 0.0), temperature=temperature), torch.full((3, 1), 7)
    # At the thresholds themselves, where equal laws are, no two backends need agree.
    apart = 0
    for acceptance in hard_rules(backend, place):
        options = {"proposers": proposers, "acceptance": acceptance}
        apart += not check_but_near(backend, verify_call([target, draft], tokens, law, **options))
    assert apart == 0


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_memory_of_any_type_is_read(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3, 30)
    tokens = logits[:, :2].topk(2, -1).indices[..., 1]
    chosen = Acceptance("likelihood", threshold=2, smoothing=0.6)
    answers = []
    for memory in (torch.tensor([0.0, 2.0, 4.0, 8.0], dtype=dtype), None):
        one = verify_call([logits], tokens, Law(), acceptance=chosen, memory=memory)
        one.arguments[2].zero_()
        assert check_but_near(backend, one)
        answers.append(one.run(backend)[2].tolist())
    assert answers[0] != answers[1]


@EVERY
@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize(
    "options", [{"top_k": 700}, {"top_k": 5000}, {"top_p": 0.3}, {"top_p": 0.95}], ids=str
)
@pytest.mark.parametrize("levels", [1, 2, 40, 0], ids="levels {}".format)
def test_thresholds_among_thousands_of_ties(
    backend: str, scope: str, options: dict[str, Any], levels: int
) -> None:
    """A threshold that cannot be listed, for too many tokens tie or lie between."""
    logits = torch.randn(1, 2, 20_000) * 2
    if levels > 0:
        logits = (logits.clamp(-1.9, 1.9) / 4 * levels).round() * 4 / levels
    members = [logits.bfloat16(), torch.randn(1, 2, 20_000)]
    law = Law((0.5, 0.5), scope=scope, **options)
    one = Call("mix", (members, law), {}, "")
    expected, found = one.run("reference")[0], one.run(backend)[0]
    assert torch.equal(expected.isinf(), found.isinf())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@EVERY
@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_greedy_takes_the_lowest_of_tied_tokens_in_any_tile(backend: str, ensemble: str) -> None:
    vocab_size = 30_000
    logits = torch.randn(1, 3, vocab_size)
    for row, places in enumerate([(0, 29_999), (8191, 8192), (1024, 1023, 20_000)]):
        logits[0, row, list(places)] = 9.0
    law = Law((0.5, 0.5), ensemble, temperature=0.0)
    arguments = ([logits, logits.clone()], torch.rand(1, 3, 4), law)
    tokens = Call("sample", arguments, {}, "").run(backend)[0]
    assert tokens.tolist() == [[0, 8191, 1023]]


@EVERY
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_greedy_between_confident_members_that_disagree(backend: str, first: int) -> None:
    """The best two tokens differ by what single-precision normalisers cannot tell.

    A CPU looks again in double precision; a GPU's token may be another one, if it is as good.
    """
    for seed in range(first, first + 100):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 1, 1, 17, generator=generator)
        best = torch.randint(17, (2, 1, 1, 1), generator=generator)
        members = list(logits.scatter_add(-1, best, torch.full(best.shape, 20.0)).unbind())
        law = Law((0.5, 0.5), temperature=0.0)
        one = Call("sample", (members, torch.zeros(1, 1, 4), law), {}, f"seed {seed}")
        if backend == "native":
            check(backend, one)
            continue
        exact = Call("mix", ([member.double() for member in members], law), {}, "")
        log_probs = exact.run("reference")[0][0, 0]
        assert log_probs.max() - log_probs[one.run(backend)[0].item()] < 1e-6, one.name


@EVERY
def test_greedy_ties_do_not_depend_on_the_order_of_a_sum(backend: str) -> None:
    members = [torch.tensor([[[-1.0, 2.0, 19.0]]]), torch.tensor([[[-1.0, 19.0, 2.0]]])]
    for logits in (members, members[::-1]):
        law = Law((0.5, 0.5), temperature=0.0)
        one = Call("sample", (logits, torch.zeros(1, 1, 4), law), {}, "")
        assert one.run(backend)[0].item() == 1


@EVERY
@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -0.5)], ids=str)
def test_a_nan_that_a_filter_would_pass_over_is_seen(
    backend: str, weights: tuple[float, ...]
) -> None:
    for vocab_size in (2048, 8192):
        members = [3 * torch.randn(1, 4, vocab_size) for _ in weights]
        members[0][0, :, 777] = torch.nan
        law = Law(weights, "product", top_k=3, plausibility=0.1)
        check(backend, Call("mix", (members, law), {}, f"{weights}, {vocab_size}"))


def verify_call(logits: list[Tensor], tokens: Tensor, law: Law, **options: Any) -> Call:
    numbers = torch.rand(tokens.shape[0], tokens.shape[1] + 1, 4)
    return Call("verify", (logits, tokens, numbers, law), options, f"{law}, {options}")


@EVERY
@pytest.mark.parametrize(
    ("vocab_size", "ensemble"), [(49_152, "mixture"), (49_152, "product"), (151_936, "mixture")]
)
def test_real_vocabularies(backend: str, vocab_size: int, ensemble: str) -> None:
    logits = [(torch.randn(1, 3, vocab_size) * 3).bfloat16() for _ in range(2)]
    tokens = logits[1][:, :2].float().argmax(-1)
    law = Law((0.4, 0.6), ensemble, temperature=0.8)
    check(backend, verify_call(logits, tokens, law, proposers=torch.tensor([1, 1])))


@EVERY
def test_filters_of_a_real_vocabulary(backend: str) -> None:
    logits = [(torch.randn(1, 1, 49_152) * 3).bfloat16() for _ in range(2)]
    law = Law((0.4, 0.6), temperature=0.8, top_k=50, top_p=0.9)
    check(backend, Call("sample", (logits, torch.rand(1, 1, 4), law), {"member": None}, "filters"))


@EVERY
@pytest.mark.parametrize("vocab_size", [8192, 8193, 16_383, 24_577])
def test_vocabularies_that_tiles_do_not_divide(backend: str, vocab_size: int) -> None:
    logits = [3 * torch.randn(1, 3, vocab_size) for _ in range(2)]
    tokens = logits[0][:, :2].argmax(-1)
    for proposers in (torch.tensor([0, 0]), None):
        check(
            backend,
            verify_call(logits, tokens, Law((0.5, 0.5), temperature=0.9), proposers=proposers),
        )


@EVERY
def test_chains_longer_than_a_block_has_warps(backend: str) -> None:
    logits = [3 * torch.randn(1, 21, 300) for _ in range(2)]
    one = verify_call(logits, logits[0][:, :20].argmax(-1), Law((0.5, 0.5)))
    one.arguments[2][:, :18, 0] = 0.0
    check(backend, one)


@EVERY
def test_a_residual_next_to_nothing(backend: str) -> None:
    logits, numbers = 3 * torch.randn(1, 4, 9000), torch.rand(1, 4, 4)
    numbers[..., 0] = 1 - 2.0**-24
    tokens, law = logits[:, :3].argmax(-1), Law(temperature=0.9)
    near = logits + 1e-7 * torch.randn_like(logits)
    for draft in (logits, near, logits * (1 + 1e-5)):
        options: dict[str, Any] = {"draft_logits": draft, "draft_temperature": torch.tensor(0.9)}
        check(backend, Call("verify", ([logits], tokens, numbers, law), options, ""))
    tight = {
        "acceptance": Acceptance("lenient", lenience=1e-3),
        "proposers": torch.zeros(1, 3).long(),
    }
    check(backend, Call("verify", ([logits], tokens, numbers, law), tight, "lenient"))


@EVERY
def test_a_row_of_equal_logits_is_uniform(backend: str) -> None:
    logits = torch.zeros(1, 2, 9000, dtype=torch.float16)
    check(backend, verify_call([logits], torch.tensor([[8999]]), Law()))


@EVERY
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_a_residual_of_nothing_is_the_target(backend: str, ensemble: str) -> None:
    """A draft without mass in two equal laws is rejected, and nothing is left."""
    logits = torch.randn(2, 2, 3000)
    logits[:, 0, 7] = -torch.inf
    law = Law((1.0,), ensemble)
    tokens = torch.full((2, 1), 7)
    one = verify_call([logits], tokens, law, proposers=torch.tensor([0]))
    check(backend, one)
    assert (one.run(backend)[4] & specens_kernels.Status.EMPTY_RESIDUAL).all()


@EVERY
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_nearly_equal_laws(backend: str, ensemble: str, scope: str, gap: float) -> None:
    """What is left of them is too small for single precision."""
    expert = torch.randn(2, 2, 3000)
    amateur = expert + gap * torch.randn(2, 2, 3000)
    amateur[:, 0, 7] = expert[:, 0, 7] = -torch.inf
    law = Law((0.5, 0.5), ensemble, scope=scope, temperature=0.9)
    tokens = torch.full((2, 1), 7)
    check(backend, verify_call([expert, amateur], tokens, law, proposers=torch.tensor([1])))


@EVERY
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf], ids=str)
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_rows_of_one_broken_value(backend: str, value: float, ensemble: str) -> None:
    logits = [torch.randn(2, 2, 50), torch.randn(2, 2, 50)]
    logits[0][0, 0] = value
    logits[1][1] = value
    check(backend, verify_call(logits, torch.randint(50, (2, 1)), Law((0.5, 0.5), ensemble)))


@EVERY
def test_one_member_dominates(backend: str) -> None:
    logits = [torch.randn(2, 3, 2000), torch.randn(2, 3, 2000) * 200]
    tokens = logits[1][:, :2].argmax(-1)
    check(
        backend, verify_call(logits, tokens, Law((1e-6, 1 - 1e-6)), proposers=torch.tensor([1, 0]))
    )


@EVERY
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_eight_members_of_three_types(backend: str, ensemble: str) -> None:
    logits = [torch.randn(1, 2, 100 + k).to(DTYPES[k % 3]) for k in range(8)]
    law = Law([1 / 8] * 8, ensemble, temperature=[0.5 + k / 8 for k in range(8)], vocab_size=99)
    check(backend, verify_call(logits, torch.tensor([[5]]), law, proposers=torch.tensor([7])))


@EVERY
@pytest.mark.parametrize("bonus", [True, False])
def test_without_nodes(backend: str, bonus: bool) -> None:
    logits = torch.randn(2, int(bonus), 30)
    check(backend, verify_call([logits], torch.empty(2, 0, dtype=torch.int64), Law(), bonus=bonus))


@EVERY
def test_without_sequences(backend: str) -> None:
    check(
        backend, verify_call([torch.randn(0, 3, 30)], torch.empty(0, 2, dtype=torch.int32), Law())
    )


@EVERY
def test_drafts_of_32_lengths(backend: str) -> None:
    logits = [torch.randn(32, 4, 200) for _ in range(2)]
    tokens = logits[1][:, :3].argmax(-1)
    tokens = tokens.masked_fill(torch.arange(3) >= torch.randint(0, 4, (32, 1)), -1)
    check(backend, verify_call(logits, tokens, Law((0.5, 0.5)), proposers=torch.tensor([1, 1, 1])))


@EVERY
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
def test_rows_that_are_more_than_two_to_the_31_elements_apart(backend: str, ensemble: str) -> None:
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
    check(backend, verify_call([logits, torch.randn(1, 2, 600)], tokens, Law((0.9, 0.1), ensemble)))
