# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functions: kept sets by its rules in plain Python, laws by frequencies, refusals.

Seeds are fixed, so that what is drawn never changes; a frequency is compared with five standard
deviations.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specens.engines import flashinfer
from specens_kernels import Refusal

MANY = 20_000
PROBS = torch.tensor([0.3, 0.05, 0.2, 0.2, 0.15, 0.1, 0.0])
ROWS = torch.zeros(MANY, dtype=torch.int64)
NUMBERS = {"seed": 7, "offset": 0}


def filtered(
    top_k: int = 99, top_p: float = 1.0, min_p: float = 0.0, order: str = "top_k_first"
) -> Tensor:
    """The law by FlashInfer's rules, read literally: counts and masses of likelier tokens."""
    law = PROBS.double()
    above = torch.tensor([int((law > p).sum()) for p in law])
    kept_k = above < top_k
    base = torch.where(kept_k, law, 0) / law[kept_k].sum() if order == "top_k_first" else law
    mass = torch.tensor([float(base[base > p].sum()) for p in base])
    kept = kept_k & ((mass < top_p) | (top_p >= 1)) & (law >= min_p * law.max()) & (law > 0)
    return torch.where(kept, law, 0) / law[kept].sum()


def check_frequencies(tokens: Tensor, law: Tensor) -> None:
    counts = torch.bincount(tokens.long(), minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    deviation = (len(tokens) * law * (1 - law)).sqrt()
    assert ((counts - len(tokens) * law).abs() <= 5 * deviation).all()


CASES: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {
    "probs": (lambda: flashinfer.sampling_from_probs(PROBS[None], ROWS, **NUMBERS), {}),
    "unnormalised": (lambda: flashinfer.sampling_from_probs(3 * PROBS[None], ROWS, **NUMBERS), {}),
    "logits": (lambda: flashinfer.sampling_from_logits(PROBS.log()[None], ROWS, **NUMBERS), {}),
    "top_k": (
        lambda: flashinfer.top_k_sampling_from_probs(PROBS[None], 2, ROWS, **NUMBERS),
        {"top_k": 2},
    ),
    "top_p": (
        lambda: flashinfer.top_p_sampling_from_probs(PROBS[None], 0.6, ROWS, **NUMBERS),
        {"top_p": 0.6},
    ),
    "min_p": (
        lambda: flashinfer.min_p_sampling_from_probs(PROBS[None], 0.4, ROWS, **NUMBERS),
        {"min_p": 0.4},
    ),
    "top_k first": (
        lambda: flashinfer.top_k_top_p_sampling_from_probs(PROBS[None], 4, 0.75, ROWS, **NUMBERS),
        {"top_k": 4, "top_p": 0.75},
    ),
    "joint": (
        lambda: flashinfer.top_k_top_p_sampling_from_probs(
            PROBS[None], 4, 0.75, ROWS, "joint", **NUMBERS
        ),
        {"top_k": 4, "top_p": 0.75, "order": "joint"},
    ),
    "logits, top_k first": (
        lambda: flashinfer.top_k_top_p_sampling_from_logits(
            PROBS.log()[None] + 2, 4, 0.75, ROWS, **NUMBERS
        ),
        {"top_k": 4, "top_p": 0.75},
    ),
    "logits, joint": (
        lambda: flashinfer.top_k_top_p_sampling_from_logits(
            PROBS.log()[None], 4, 0.75, ROWS, "joint", **NUMBERS
        ),
        {"top_k": 4, "top_p": 0.75, "order": "joint"},
    ),
}


def test_the_two_orders_are_told_apart() -> None:
    first, joint = (filtered(4, 0.75, order=order) for order in ("top_k_first", "joint"))
    assert (first > 0).sum() != (joint > 0).sum()


@pytest.mark.parametrize("case", CASES)
def test_tokens_have_the_law(case: str) -> None:
    draw, parameters = CASES[case]
    tokens = draw()
    assert tokens.dtype == ROWS.dtype
    check_frequencies(tokens, filtered(**parameters))


def test_parameters_may_differ_by_row() -> None:
    probs = PROBS.repeat(MANY, 1)
    top_k = torch.arange(MANY) % 2 * 2 + 1
    top_p = torch.where(top_k == 1, 1.0, 0.75)
    tokens = flashinfer.top_k_top_p_sampling_from_probs(probs, top_k, top_p, **NUMBERS)
    assert tokens.dtype == torch.int32
    check_frequencies(tokens[::2], filtered(1))
    check_frequencies(tokens[1::2], filtered(3, 0.75))


@pytest.mark.parametrize("top_k", [0, -1, 2**30])
def test_counts_that_are_none(top_k: int) -> None:
    """0 keeps the likeliest token, below 0 keeps all, as a count beyond the vocabulary does."""
    law = filtered(1) if top_k == 0 else filtered()
    tokens = flashinfer.top_k_sampling_from_probs(PROBS[None], top_k, ROWS, **NUMBERS)
    check_frequencies(tokens, law)
    counts = torch.tensor([top_k], dtype=torch.int32)
    assert torch.equal(
        tokens, flashinfer.top_k_sampling_from_probs(PROBS[None], counts, ROWS, **NUMBERS)
    )


def test_parameters_are_those_of_the_row_that_an_index_names() -> None:
    probs, indices = PROBS.repeat(2, 1), torch.tensor([1, 0] * 500, dtype=torch.int32)
    top_k = torch.tensor([1, 2])
    tokens = flashinfer.top_k_sampling_from_probs(probs, top_k, indices, **NUMBERS)
    assert tokens.dtype == torch.int32
    assert set(tokens[1::2].tolist()) == {0}
    assert set(tokens[::2].tolist()) == {0, 2, 3}  # 2 and 3 are tied


def test_renormalised_probabilities() -> None:
    for given in (2, torch.tensor([2, 2])):
        law = flashinfer.top_k_renorm_probs(PROBS.repeat(2, 1), given)
        torch.testing.assert_close(law, filtered(2).float().repeat(2, 1))
    law = flashinfer.top_p_renorm_probs(PROBS[None].bfloat16(), 0.6)
    assert law.dtype == torch.float32
    assert (law[0] > 0).tolist() == (filtered(top_p=0.6) > 0).tolist()
    assert flashinfer.top_k_renorm_probs(PROBS[None].bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [None, 0.7, torch.tensor([0.5, 1.0, 2.0])], ids=str)
def test_softmax(temperature: float | Tensor | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 33)
    by = temperature[:, None] if isinstance(temperature, Tensor) else temperature or 1.0
    probs = flashinfer.softmax(logits, temperature)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, (logits / by).softmax(-1))


@pytest.mark.parametrize("zero", [0, torch.zeros(1)], ids=str)
def test_softmax_of_temperature_zero_makes_all_tokens_equal(zero: float | Tensor) -> None:
    probs = flashinfer.softmax(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), zero)
    assert probs.tolist() == [[0.25] * 4]


def test_rows_without_a_law_are_not_valid() -> None:
    probs = torch.stack((PROBS, torch.zeros(7), torch.full((7,), torch.nan)))
    tokens, valid = flashinfer.top_p_sampling_from_probs(probs, 0.9, return_valid=True)
    assert valid.tolist() == [True, False, False]
    assert tokens.shape == (3,)
    with pytest.raises(
        Refusal, match="top_p_sampling_from_probs: probs: expected numbers, got NaN"
    ):
        flashinfer.top_p_sampling_from_probs(probs, 0.9, check_nan=True)


def test_a_seed_and_an_offset_name_the_tokens() -> None:
    def draw(**numbers: Any) -> list[int]:
        return flashinfer.sampling_from_probs(PROBS[None], ROWS[:40], **numbers).tolist()

    ones = torch.ones(1, dtype=torch.int64)
    assert draw(seed=1, offset=4) == draw(seed=1, offset=4)
    assert draw(seed=1, offset=4) == draw(seed=ones.view(torch.uint64), offset=4 * ones)
    assert draw(seed=1, offset=4) == draw(seed=ones.repeat(40), offset=4 * ones.repeat(40))
    assert len({tuple(draw(seed=s, offset=o)) for s in (1, 2**64 - 1) for o in (4, 5)}) == 4
    first, again = (torch.Generator().manual_seed(3) for _ in range(2))
    once = draw(generator=first)
    assert once == draw(generator=again)
    assert once != draw(generator=first)  # it advances
    torch.manual_seed(3)
    assert once == draw()


def test_chains_have_the_targets_law() -> None:
    torch.manual_seed(0)
    draft, target = torch.randn(2, 5).softmax(-1), torch.randn(3, 5).softmax(-1)
    drafts = torch.stack([row.multinomial(MANY, replacement=True) for row in draft], 1)
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(
        draft.expand(MANY, 2, 5), drafts, target.expand(MANY, 3, 5), **NUMBERS
    )
    assert tokens.dtype == accepted.dtype == emitted.dtype == torch.int32
    check_frequencies(tokens[:, 0], target[0].double())
    for i in (1, 2):
        check_frequencies(tokens[emitted >= i][:, i], target[i].double())
    # Padding, and what the two counts count.
    places = torch.arange(3)
    assert ((tokens == -1) == (places > emitted[:, None])).all()
    assert (accepted >= emitted).all()
    assert (tokens[:, :2] == drafts)[places[:2] < emitted[:, None]].all()
    kept = torch.minimum(draft, target[:2]).sum(-1).double()
    passed = torch.stack((kept[0] + kept[1], torch.tensor(2.0)))
    deviation = (kept * (1 - kept)).sum().sqrt() * MANY**0.5
    assert abs(float(accepted.sum()) - MANY * float(passed[0])) <= 5 * float(deviation)


def test_chains_add_to_the_counts_that_are_given() -> None:
    """FlashInfer's own example: the first draft is kept, the second has no mass in the target."""
    draft = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.1]]])
    target = torch.tensor([[[0.0, 0.1, 0.6, 0.3], [1.0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]]])
    counts = [torch.tensor([10], dtype=torch.int32), torch.tensor([20])]
    results = flashinfer.chain_speculative_sampling(
        draft, torch.tensor([[2, 1]], dtype=torch.int32), target, *counts
    )
    assert results[0].tolist() == [[2, 0, -1]]
    assert [results[1] is counts[0], results[2] is counts[1]] == [True, True]
    assert [count.tolist() for count in counts] == [[11], [21]]


def test_a_draft_that_is_the_target_is_always_kept() -> None:
    probs = PROBS.expand(200, 3, 7)
    drafts = PROBS.multinomial(400, replacement=True).view(200, 2)
    _, accepted, emitted = flashinfer.chain_speculative_sampling(probs[:, :2], drafts, probs)
    assert accepted.tolist() == emitted.tolist() == [2] * 200


def test_a_draft_without_mass_is_kept_iff_the_target_has_some() -> None:
    draft = torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(100, 2, 4)
    target = torch.tensor([0.5, 0.0, 0.25, 0.25]).expand(100, 3, 4)
    ids = torch.tensor([[0, 1]]).expand(100, 2)
    tokens, accepted, emitted = flashinfer.chain_speculative_sampling(draft, ids, target, **NUMBERS)
    assert accepted.tolist() == emitted.tolist() == [1] * 100
    # What the target has over the draft.
    assert tokens.tolist() == [[0, 0, -1]] * 100


def test_a_draft_that_is_none_ends_its_chain() -> None:
    probs = PROBS.expand(4, 3, 7)
    ids = torch.tensor([[0, -1]]).expand(4, 2)
    _, accepted, emitted = flashinfer.chain_speculative_sampling(probs[:, :2], ids, probs)
    assert accepted.tolist() == emitted.tolist() == [1] * 4


ONE = PROBS[None]
CHAIN = (torch.ones(1, 2, 7), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 3, 7))
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: flashinfer.softmax(PROBS), "softmax: logits: expected"),
    (lambda: flashinfer.softmax(ONE, torch.ones(2)), "softmax: temperature: expected"),
    (lambda: flashinfer.softmax(ONE, True), "softmax: temperature: expected a number"),
    (lambda: flashinfer.sampling_from_probs(ONE.double()), "sampling_from_probs: probs: expected"),
    (lambda: flashinfer.top_k_sampling_from_probs(ONE, 1.5), "top_k_sampling_from_probs: top_k: e"),
    (
        lambda: flashinfer.top_k_sampling_from_probs(ONE, torch.ones(1)),
        "top_k_sampling_from_probs: top_k: expected",
    ),
    (
        lambda: flashinfer.min_p_sampling_from_probs(ONE, torch.ones(2)),
        "min_p_sampling_from_probs: min_p: expected",
    ),
    (lambda: flashinfer.sampling_from_probs(ONE, ONE), "sampling_from_probs: indices: expected"),
    (lambda: flashinfer.sampling_from_probs(ONE, seed=1), "sampling_from_probs: offset: expected"),
    (
        lambda: flashinfer.sampling_from_probs(ONE, seed=-1, offset=0),
        "sampling_from_probs: seed: expected",
    ),
    (
        lambda: flashinfer.sampling_from_probs(ONE, seed=1, offset=torch.zeros(2)),
        "sampling_from_probs: offset: expected",
    ),
    (
        lambda: flashinfer.top_k_top_p_sampling_from_probs(ONE, 1, 0.5, None, "other"),
        "filter_apply_order: expected one of top_k_first, joint",
    ),
    (
        lambda: flashinfer.chain_speculative_sampling(CHAIN[0], CHAIN[1].float(), CHAIN[2]),
        "chain_speculative_sampling: draft_token_ids: expected",
    ),
    (
        lambda: flashinfer.chain_speculative_sampling(CHAIN[0][:, :1], *CHAIN[1:]),
        "chain_speculative_sampling: draft_probs: expected",
    ),
    (
        lambda: flashinfer.chain_speculative_sampling(*CHAIN[:2], CHAIN[2][:, :2]),
        "chain_speculative_sampling: target_probs: expected",
    ),
    (
        lambda: flashinfer.chain_speculative_sampling(*CHAIN, None, torch.zeros(2).int()),
        "maybe_output_emitted_draft_token_num: expected",
    ),
]


@pytest.mark.parametrize("at", range(len(REFUSED)), ids=lambda at: REFUSED[at][1])
def test_what_does_not_fit_is_refused_by_name(at: int) -> None:
    call, message = REFUSED[at]
    with pytest.raises(Refusal, match=message):
        call()
