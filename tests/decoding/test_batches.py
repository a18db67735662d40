# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch: each is written as it would be alone, from its own seed."""

import copy

import pytest
import torch
from decoders import RAGGED, SCHEDULES, VOCAB_SIZE, decoder, num_written, same
from toys import prompts
from transformers import GenerationConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pad", [None, 7])
def test_rows_that_have_ended_are_padded_as_by_generate(pad, models):
    """With the padding token, or, where none is set, with the end-of-sequence token."""
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    free = models[0].generate(**settings)
    ends = [int(free[0, max(RAGGED) + 4]), 1]
    config = GenerationConfig(max_new_tokens=20, eos_token_id=ends, pad_token_id=pad)
    model = copy.deepcopy(models[0])
    model.generation_config.pad_token_id = pad
    inputs = prompts(RAGGED, VOCAB_SIZE)
    expected = model.generate(**inputs, generation_config=config)
    filler = ends[0] if pad is None else pad
    assert (expected[0, max(RAGGED) + 5 :] == filler).all()
    fast = decoder([model, *models[1:]], 1, "draft")
    same(fast.generate(**inputs, generation_config=config), expected)


@pytest.mark.parametrize("schedule", ["plain", "component", *SCHEDULES])
def test_rows_end_one_by_one(schedule, models):
    """The last row of the batch and the first, in any order, and no row changes another's text."""
    inputs = prompts(RAGGED, VOCAB_SIZE)
    settings = {"max_new_tokens": 20, "do_sample": True, "top_k": 0}
    ends = [2, 3, 4, 5]
    settings |= {"eos_token_id": ends, "pad_token_id": 0}
    first_to_end = set()
    for seed in range(0, 60, 10):
        fast = decoder(models, 3, schedule, 2)
        together = fast.generate(**inputs, **settings, seed=seed)
        lengths = num_written(together, max(RAGGED), ends)
        assert fast.statistics.num_tokens == lengths.sum()
        first_to_end.add(int(lengths.argmin()))
        if seed:
            continue
        for row, length in enumerate(RAGGED):
            prompt = inputs["input_ids"][row : row + 1, -length:]
            alone = fast.generate(
                prompt, attention_mask=torch.ones_like(prompt), **settings, seed=seed + row
            )
            written = alone.shape[1] - length
            same(together[row : row + 1, max(RAGGED) : max(RAGGED) + written], alone[:, length:])
            assert not together[row, max(RAGGED) + written :].any()
    assert len(first_to_end) >= 3


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_prompts_of_one_token(schedule, models):
    expected = decoder(models, 2, "plain").generate(
        torch.tensor([[5]]), max_new_tokens=10, do_sample=False
    )
    fast = decoder(models, 2, schedule)
    same(fast.generate(torch.tensor([[5]]), max_new_tokens=10, do_sample=False), expected)
    text = fast.generate(torch.tensor([[5], [6]]), max_new_tokens=10, do_sample=False)
    same(text[:1], expected)


def test_num_return_sequences(models):
    fast = decoder(models, 2, "alternating")
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    inputs = prompts((5, 2), VOCAB_SIZE)
    texts = fast.generate(**inputs, **settings, seed=0)
    assert texts.shape == (6, 17)
    same(texts[:, :5], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(text) for text in texts.tolist()}) == 6
    repeated = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    same(fast.generate(**repeated, **{**settings, "num_return_sequences": 1}, seed=0), texts)


def test_one_seed_is_one_text(models):
    """In any slot of any batch, padded or not, whatever the others are."""
    settings = {"max_new_tokens": 16, "do_sample": True, "top_k": 0}
    inputs = prompts(RAGGED, VOCAB_SIZE)
    for schedule in ("plain", "component", *SCHEDULES):
        fast = decoder(models, 2, schedule)
        seeds = [11, 5, 2**62, -3, 8]
        texts = fast.generate(**inputs, **settings, seed=seeds)[:, max(RAGGED) :]
        order = [3, 1, 4]
        some = {name: value[order] for name, value in inputs.items()}
        again = fast.generate(**some, **settings, seed=[seeds[row] for row in order])
        same(again[:, max(RAGGED) :], texts[order])
        row = inputs["input_ids"][3:4, -1:]
        alone = fast.generate(row, **settings, seed=[seeds[3]])
        same(alone[:, 1:], texts[3:4])


def test_seeds_are_given_or_drawn(models):
    settings = {
        **prompts((4, 4, 4), VOCAB_SIZE),
        "max_new_tokens": 16,
        "do_sample": True,
        "top_k": 0,
    }
    settings["input_ids"] = settings["input_ids"][:1].repeat(3, 1)
    fast = decoder(models, 2, "alternating")
    five = fast.generate(**settings, seed=5)
    assert len({tuple(text) for text in five.tolist()}) == 3
    same(fast.generate(**settings, seed=[5, 6, 7]), five)
    same(decoder(models, 2, "alternating", seed=5).generate(**settings), five)
    same(decoder(models, 2, "alternating", seed=9).generate(**settings, seed=5), five)
    assert not torch.equal(fast.generate(**settings, seed=6), five)
    texts = []
    for _ in range(2):
        torch.manual_seed(1)
        texts += [fast.generate(**settings), fast.generate(**settings)]
    same(texts[0], texts[2])
    same(texts[1], texts[3])
    assert not torch.equal(texts[0], texts[1])
    torch.manual_seed(2)
    assert not torch.equal(fast.generate(**settings), texts[0])
