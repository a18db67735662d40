# SPDX-License-Identifier: Apache-2.0
"""Memory is for what is written: whatever has a place for each token grows by doubling."""

import gc
import warnings
from typing import Any

import pytest
import torch
from decoders import RAGGED, VOCAB_SIZE, decoder, same
from torch import Tensor
from toys import noisy, prompts, toy
from transformers import StoppingCriteriaList

from specens.members.capacity import capacity_for, widened
from specens.schedules import SCHEDULES
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def storages() -> int:
    """Bytes of all tensors that anything refers to."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects do not like to be asked for their type
        # Of the plain types: fake tensors, for one, have no memory and warn if they are asked.
        plain = (Tensor, torch.nn.Parameter)
        tensors = [thing for thing in gc.get_objects() if type(thing) in plain]
    held = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        except RuntimeError:  # sparse, or a tracer's: it has no storage
            continue
    return sum(held.values())


class Weigher:
    """A stopping criterion that ends the text after some tokens, and notes what is held then."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.bytes = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        done = input_ids.shape[1] >= self.width
        if done:
            self.bytes = storages()
        return done


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("limit", [131072, 10**12])
def test_a_limit_that_is_not_reached_costs_nothing(schedule: str, limit: int, models: Any) -> None:
    drafts = {"companion": models[2:4], "hierarchy": models[2:3]}.get(schedule)
    fast = decoder(models, 2, schedule, draft=drafts)
    held = []
    for most in (40, limit):
        weigher = Weigher(5 + 20)
        settings = {"do_sample": True, "top_k": 0, "seed": 0, "max_new_tokens": most}
        settings["stopping_criteria"] = StoppingCriteriaList([weigher])
        fast.generate(**prompts((5,), VOCAB_SIZE), **settings)
        held.append(weigher.bytes)
    # Which tensors of the last turn are still referred to may differ by a block's laws.
    assert held[1] - held[0] < 64 * 1024


@pytest.mark.parametrize("kind", ["llama", "bloom", "lfm2", "qwen2_sliding"])
@pytest.mark.parametrize("lengths", [(40,), (100, 9, 70)])
def test_texts_that_outgrow_every_capacity_are_right(kind: str, lengths: tuple[int, ...]) -> None:
    """Token by token and in blocks: caches and texts double on the way."""
    model = toy(0, VOCAB_SIZE, kind=kind, max_position_embeddings=512)
    models = [model, noisy(model, 0.5)]
    settings = {**prompts(lengths, VOCAB_SIZE), "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**settings)
    for schedule in ("plain", "draft", "lookup"):
        same(decoder(models, 1, schedule, 5).generate(**settings), expected)


@pytest.mark.parametrize("schedule", ["component", "speculative", "alternating"])
def test_numbers_do_not_depend_on_when_they_were_drawn(schedule: str, models: Any) -> None:
    """A short text is the beginning of a long one, but for its last block, which is cut."""
    fast = decoder(models, 2, schedule)
    settings = {**prompts(RAGGED, VOCAB_SIZE), "do_sample": True, "top_k": 0, "seed": 5}
    long = fast.generate(**settings, max_new_tokens=140)
    short = fast.generate(**settings, max_new_tokens=30)[:, :-6]
    same(short, long[:, : short.shape[1]])


def test_capacities_are_powers_of_two_and_rows_that_ended_are_let_go(models: Any) -> None:
    fast = decoder(models, 1, "plain")
    capacities: list[tuple[int, int]] = []

    def watch(input_ids: Tensor, scores: Any, **_: Any) -> bool:
        slab = fast.members[0].cache.slabs[0]
        capacities.append((slab.shape[1], slab.shape[3]))
        # All rows but one are short.
        return input_ids.shape[1] > 40 and int(input_ids[0, 4]) != int(texts["input_ids"][0, 4])

    texts = prompts((5, 5, 5), VOCAB_SIZE)
    texts["input_ids"][:, 4] = torch.tensor([1, 2, 3])
    settings = {"max_new_tokens": 300, "do_sample": False}
    fast.generate(**texts, **settings, stopping_criteria=StoppingCriteriaList([watch]))
    assert sorted(set(capacities)) == [(1, 128), (1, 256), (1, 512), (3, 64)]


def test_a_capacity_holds_what_is_asked() -> None:
    assert [capacity_for(size) for size in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    tensor = torch.ones(2, 3, 4)
    with torch.inference_mode():
        wide = widened(tensor, 1, 5, -1.0)
    assert not wide.is_inference()
    assert torch.equal(wide[:, :3], tensor)
    assert torch.equal(wide[:, 3:], torch.full((2, 2, 4), -1.0))


@pytest.mark.parametrize("schedule", ["speculative", "draft", "lookup", "alternating", "hierarchy"])
def test_gamma_is_bounded_by_the_room_that_is_left(schedule: str, models: Any) -> None:
    settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 12, "do_sample": False}
    drafts = {"draft": models[2:3]} if schedule == "hierarchy" else {}
    expected = decoder(models, 2, "plain").generate(**settings)
    fast = decoder(models, 2, schedule, 4096, **drafts)
    same(fast.generate(**settings), expected)
    assert all(len(row.by_position) <= 12 for row in fast.statistics.rows)
    with pytest.raises(Refusal, match=r"tokens: expected .* from 1 to 4096, got 4097$"):
        decoder(models, 2, schedule, 4097, **drafts)


def test_looking_ahead_without_an_end_is_bound_at_once(models: Any) -> None:
    assert decoder(models, 2, "lookahead", 4096).schedule.ahead is not None
