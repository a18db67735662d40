# SPDX-License-Identifier: Apache-2.0
"""Where text ends: end-of-sequence tokens, lengths, criteria, time and stop strings.

The oracle is transformers' own `generate`.
"""

import copy
from typing import Any

import pytest
import torch
from decoders import RAGGED, SCHEDULES, VOCAB_SIZE, decoder, num_written, same
from torch import Tensor
from toys import noisy, prompts, toy
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("at", [[(0, 6)], [(4, 1), (2, 9)], [(1, 13)]])
def test_text_ends_where_generate_ends(schedule, at, models):
    """At an end-of-sequence token inside a block, row by row, the rest padded."""
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 30, "do_sample": False}
    free = models[0].generate(**settings)
    ends = [int(free[row, max(RAGGED) + column]) for row, column in at]
    settings |= {"eos_token_id": ends, "pad_token_id": 0}
    expected = models[0].generate(**settings)
    lengths = num_written(expected, max(RAGGED), ends)
    assert lengths.min() < lengths.max()
    for gamma in (1, 4, 8):
        fast = decoder(models, 1, schedule, gamma)
        same(fast.generate(**settings), expected)
        assert fast.statistics.num_tokens == lengths.sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ensembles_end_where_the_plain_ensemble_ends(schedule, models):
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    for ends in ([1, 2, 3], [11, 12]):
        settings |= {"eos_token_id": ends, "pad_token_id": 0}
        plain = decoder(models, 3, "plain").generate(**settings)
        same(decoder(models, 3, schedule, 4).generate(**settings), plain)


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_max_new_tokens_is_exact(schedule, new, models):
    inputs = prompts((4, 1, 2), VOCAB_SIZE)
    plain = decoder(models, 2, "plain").generate(**inputs, max_new_tokens=new, do_sample=False)
    fast = decoder(models, 2, schedule, 5)
    text = fast.generate(**inputs, max_new_tokens=new, do_sample=False)
    assert text.shape == (3, 4 + new)
    same(text, plain)
    assert fast.statistics.num_tokens == 3 * new
    if schedule != "alternating" and new == 1:  # the last token is never drafted
        assert sum(fast.statistics.drafted) == 0
    same(fast.generate(**inputs, max_length=4 + new, do_sample=False), plain)
    config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    same(fast.generate(**inputs, generation_config=config), plain)


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
@pytest.mark.parametrize("lengths", [(6,), (6, 2, 4)])
def test_text_may_fill_every_position(schedule, lengths):
    """The position after the last token is not asked for, not even by what is rejected."""
    model = toy(0, VOCAB_SIZE, kind="gpt2", n_positions=6 + 14)
    models = [model, noisy(model, 1.0), noisy(model, 1.0, seed=1)]
    settings = {**prompts(lengths, VOCAB_SIZE), "max_new_tokens": 14, "do_sample": False}
    expected = decoder(models, 2, "plain").generate(**settings)
    same(decoder(models, 2, schedule, 5).generate(**settings), expected)
    alone = decoder(models[::2], 1, schedule, 5).generate(**settings)
    same(alone, model.generate(**settings))


class Recorder:
    """A stopping criterion: the row ends with `tokens`. It remembers what it was asked about."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.clone())
        width = len(self.tokens)
        return (input_ids[:, -width:] == torch.tensor(self.tokens)).all(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_custom_criteria_stop_where_generate_stops(schedule, models):
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 30, "do_sample": False}
    free = models[0].generate(**settings)
    # Without an end-of-sequence token, transformers goes on writing to rows that have stopped.
    settings |= {"eos_token_id": [VOCAB_SIZE], "pad_token_id": 0}
    width = max(RAGGED)
    tokens = free[0, width + 6 : width + 8].tolist()  # in the middle of the first row's text
    settings["stopping_criteria"] = StoppingCriteriaList([Recorder(tokens)])
    expected = models[0].generate(**settings)
    assert not expected[0, width + 8 :].any()
    for gamma in (3, 8):
        recorder = Recorder(tokens)
        settings["stopping_criteria"] = StoppingCriteriaList([recorder])
        fast = decoder(models, 1, schedule, gamma)
        same(fast.generate(**settings), expected)
        assert settings["stopping_criteria"][0] is recorder
        # Each row is asked about once per token, and never about a token past its end.
        assert all(seen.shape[0] == 1 for seen in recorder.seen)
        asked = sorted(seen[0].tolist() for seen in recorder.seen if seen.shape[1] < width + 30)
        texts = [row.tolist() for row in expected]
        lengths = [
            next((n for n in range(1, 30) if text[width + n - 2 : width + n] == tokens), 29)
            for text in texts
        ]
        assert asked == sorted(
            text[: width + n]
            for text, length in zip(texts, lengths, strict=True)
            for n in range(1, length + 1)
        )


def test_criteria_may_answer_for_the_batch_with_one_bool(models):
    class Short:
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
            return input_ids.shape[1] >= 12

    criteria = StoppingCriteriaList([Short()])
    settings = {"stopping_criteria": criteria, "do_sample": False, "max_new_tokens": 20}
    text = decoder(models, 2, "alternating").generate(**prompts((5, 3), VOCAB_SIZE), **settings)
    assert text.shape == (2, 12)


def test_criteria_with_an_answer_for_each_row_are_refused(models):
    """They are asked about one row at a time and cannot know which."""

    class Every:
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([True, False])

    settings = {"do_sample": False, "max_new_tokens": 20}
    settings["stopping_criteria"] = StoppingCriteriaList([Every()])
    with pytest.raises(
        ValueError,
        match=r"^generate: stopping_criteria: expected one answer for the one row asked about, "
        r"got 2 from Every$",
    ):
        decoder(models, 2, "alternating").generate(**prompts((5, 3), VOCAB_SIZE), **settings)


def test_the_users_own_lengths_and_ends_take_precedence(models):
    """As in transformers, criteria of the types that it makes itself replace its own."""
    settings = {
        **prompts(RAGGED, VOCAB_SIZE),
        "max_new_tokens": 30,
        "do_sample": False,
        "pad_token_id": 0,
    }
    free = models[0].generate(**settings)
    for own in ([MaxLengthCriteria(15)], [EosTokenCriteria(free[:, 15])]):
        criteria = {"stopping_criteria": StoppingCriteriaList(own), "eos_token_id": [1]}
        expected = models[0].generate(**settings, **criteria)
        assert not torch.equal(expected, models[0].generate(**settings, eos_token_id=[1]))
        same(decoder(models, 1, "draft").generate(**settings, **criteria), expected)


@pytest.mark.parametrize("schedule", ["plain", "component", *SCHEDULES])
def test_a_prompt_beyond_the_maximum_length_gets_one_token(schedule, models):
    """As in transformers, whose criteria are asked after each token."""
    inputs = prompts((9,), VOCAB_SIZE)
    own = {"max_new_tokens": 30, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(5)])}
    assert models[0].generate(**inputs, **own, do_sample=False).shape == (1, 10)
    sampled = schedule == "component"
    text = decoder(models, 2, schedule).generate(**inputs, **own, do_sample=sampled)
    assert text.shape == (1, 10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_max_time_ends_with_the_next_token(schedule, models):
    settings = {"do_sample": False, "max_new_tokens": 30}
    fast = decoder(models, 2, schedule, 8)
    assert fast.generate(**prompts((5, 2), VOCAB_SIZE), max_time=1e-9, **settings).shape == (2, 6)
    criteria = StoppingCriteriaList([MaxTimeCriteria(max_time=3600)])
    text = fast.generate(**prompts((5, 2), VOCAB_SIZE), stopping_criteria=criteria, **settings)
    assert text.shape == (2, 35)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stop_strings_end_where_generate_ends(schedule, models, tokenizer):
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 30, "do_sample": False}
    free = models[0].generate(**settings)[0, 5:].tolist()
    stop = [tokenizer.decode(free[9:11]), "w99"]
    expected = models[0].generate(**settings, stop_strings=stop, tokenizer=tokenizer)
    assert expected.shape[1] < 35
    for gamma in (2, 8):
        fast = decoder(models, 1, schedule, gamma)
        same(fast.generate(**settings, stop_strings=stop, tokenizer=tokenizer), expected)
        # One string, and beside the user's own criteria.
        own = StoppingCriteriaList([MaxLengthCriteria(40)])
        text = fast.generate(
            **settings, stop_strings=stop[0], tokenizer=tokenizer, stopping_criteria=own
        )
        same(text, expected)
        assert len(own) == 1


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_stop_strings_end_it_wherever_they_are_said(where, models, tokenizer):
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 30, "do_sample": False}
    free = models[0].generate(**settings)[0, 5:].tolist()
    stop = tokenizer.decode(free[9:11])
    expected = models[0].generate(**settings, stop_strings=stop, tokenizer=tokenizer)
    assert expected.shape[1] < 35
    model = copy.copy(models[0])
    model.generation_config = GenerationConfig(stop_strings=stop if where == "model" else None)
    if where == "argument":
        settings["stop_strings"] = stop
    elif where == "config":
        config = GenerationConfig(max_new_tokens=30, do_sample=False, stop_strings=stop)
        settings = {**prompts((5,), VOCAB_SIZE), "generation_config": config}
    ours = [model, *models[1:]]
    same(decoder(ours, 1, "draft").generate(**settings, tokenizer=tokenizer), expected)
    fast = decoder(ours, 1, "draft", tokenizers=[tokenizer] * 2)
    same(fast.generate(**settings), expected)
    assert model.generation_config.stop_strings == (stop if where == "model" else None)
    # The argument goes before what the configs say.
    text = fast.generate(**settings | {"stop_strings": "abcdef"})
    assert text.shape == (1, 35)


def test_stop_strings_end_it_in_a_call_of_the_models_generate(models, tokenizer):
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 30, "do_sample": False}
    free = models[0].generate(**settings)[0, 5:].tolist()
    settings |= {"stop_strings": [tokenizer.decode(free[9:11]), "w99"], "tokenizer": tokenizer}
    expected = models[0].generate(**settings)
    fast = decoder(models, 1, "draft", tokenizers=[tokenizer] * 2)
    same(models[0].generate(**settings, custom_generate=fast), expected)
    with pytest.raises(ValueError, match=r"^generate: tokenizer: expected one for stop_strings, "):
        models[0].generate(**settings, custom_generate=decoder(models, 1, "draft"))
