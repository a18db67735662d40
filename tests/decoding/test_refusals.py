# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments, models and calls are refused, in the words of one form.

A new refusal is one more entry of a table.
"""

import pytest
import torch
from decoders import VOCAB_SIZE, decoder, same
from toys import prompts

from specens import SpeculativeDecoder
from specens.schedules import Speculative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "decoder: weights: expected 2 numbers, one per member, got 1"),
        (
            {"weights": [0.5, 0.6]},
            r"law: weights: expected numbers >= 0 that sum to 1 for 'mixture', got \[0.5, 0.6\]",
        ),
        (
            {"schedule": "fast"},
            "schedule: name: expected one of plain, component, lookahead, speculative, companion, "
            "lookup, hierarchy, alternating, got 'fast'",
        ),
        (
            {"acceptance": "typcal"},
            "acceptance: name: expected one of .*rejection.*, got 'typcal'",
        ),
        (
            {"ensemble": "sum"},
            "law: ensemble: .*mixture, product.*",
        ),
        ({"scope": "both"}, "law: scope: expected one of member, ensemble, got 'both'"),
        (
            {"plausibility": 0.1},
            "law: plausibility: expected 0 for 'mixture', got 0.1",
        ),
        (
            {"ensemble": "product", "plausibility": 1.1},
            r"law: plausibility: expected a number in \[0, 1\], got 1.1",
        ),
        (
            {"schedule": "component", "ensemble": "product"},
            "decoder: schedule: expected a mixture of scope 'member' for 'component', "
            "got a product of scope 'member'",
        ),
        (
            {"schedule": "component", "scope": "ensemble"},
            "decoder: schedule: expected a mixture of scope 'member' for 'component', "
            "got a mixture of scope 'ensemble'",
        ),
        *(
            (
                {"schedule": f"alternating:tokens={tokens}"},
                f"alternating: tokens: expected integers from 1 to 4096, got {shown}",
            )
            for tokens, shown in (("0", "0"), ("2,0", r"\[2, 0\]"), ("", "''"), ("2.0", "'2.0'"))
        ),
        (
            {"schedule": "alternating:tokens=2,1,1"},
            r"alternating: tokens: expected 1 or 2 integers, got \(2, 1, 1\)",
        ),
        (
            {"schedule": "speculative:tokens=2,1"},
            "speculative: tokens: expected an integer from 1 to 4096, got '2,1'",
        ),
        *(
            (
                {"schedule": f"alternating:order={order}"},
                f"alternating: order: expected every member 0 to 1 once, got {shown}",
            )
            for order, shown in (("0,2", r"\(0, 2\)"), ("0", "0"))
        ),
        (
            {"schedule": "speculative:proposer=2"},
            "speculative: proposer: expected None with a draft, else 0 to 1, got 2",
        ),
        (
            {"schedule": "speculative:proposer=-1"},
            "speculative: proposer: expected an integer from 0 to 4096, got -1",
        ),
        ({"schedule": "plain:tokens=2"}, "plain: arguments: expected no arguments, got 'tokens'"),
        (
            {"schedule": "speculative:order=0,1"},
            "speculative: arguments: expected tokens, proposer, stop, got 'order'",
        ),
        (
            {"schedule": "speculative:tokens"},
            "speculative: arguments: expected name=value, each name once, got 'tokens'",
        ),
        ({"schedule": 4}, "decoder: schedule: expected a Schedule or its text, got 4"),
    ],
)
def test_wrong_arguments_are_refused(options, message, models):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        SpeculativeDecoder(models[:2], **options)


def test_wrong_models_are_refused(models):
    with pytest.raises(
        ValueError, match=r"^decoder: members: expected a list of models, got LlamaForCausalLM$"
    ):
        SpeculativeDecoder(models[0])
    with pytest.raises(
        ValueError, match=r"^decoder: members: expected at least one model, got none$"
    ):
        SpeculativeDecoder([])
    draft = {"draft": models[-1]}
    with pytest.raises(
        ValueError,
        match=r"^decoder: draft: expected None for schedule 'alternating' "
        r"\('speculative' or 'hierarchy' would take 1\), got LlamaForCausalLM$",
    ):
        SpeculativeDecoder(models[:2], **draft)
    with pytest.raises(
        ValueError, match=r"^speculative: proposer: expected None with a draft, else 0 to 1, got 1$"
    ):
        SpeculativeDecoder(models[:2], schedule=Speculative(proposer=1), **draft)
    fast = SpeculativeDecoder(models[:2], schedule="speculative", **draft)
    for stranger in (models[2], models[-1]):
        with pytest.raises(
            ValueError,
            match=r"^generate: model: expected one of the decoder's members, got another LlamaFor",
        ):
            stranger.generate(**prompts((3,), VOCAB_SIZE), max_new_tokens=3, custom_generate=fast)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": [1, 2, 3]}, ValueError, "generate: seed: expected 2 seeds, one a row, got 3"),
        *(
            (
                {"seed": wrong},
                ValueError,
                f"generate: seed: expected an integer or a list of them, one a row, got {shown}",
            )
            for wrong, shown in ((1.5, "1.5"), (True, "True"), ([1, "a"], r"\[1, 'a'\]"))
        ),
        (
            {"assistant_model": torch.nn.Linear(1, 1)},
            ValueError,
            "generate: assistant_model: expected None, since .* drafts, got Linear",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
            ValueError,
            "generate: attention_mask: expected left padding only, got zeros after ones",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            ValueError,
            "generate: input_ids: expected at least one token a row, got none",
        ),
        (
            {"stop_strings": "w1"},
            ValueError,
            "generate: tokenizer: expected one for stop_strings, .* hand it on.*, got None",
        ),
        (
            {"inputs_embeds": torch.zeros(2, 3, 16)},
            ValueError,
            "generate: inputs_embeds: expected nothing beyond the tokens, .*, got Tensor",
        ),
    ],
)
def test_wrong_calls_are_refused(options, error, message, models):
    fast = decoder(models, 2, "alternating")
    settings = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "max_new_tokens": 4, **options}
    with pytest.raises(error, match=rf"^{message}$"):
        fast.generate(**settings)


def test_position_ids_are_those_of_the_mask_or_refused(models):
    fast = decoder(models, 2, "alternating")
    settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 4, "do_sample": False}
    expected = fast.generate(**settings)
    implied = (settings["attention_mask"].cumsum(1) - 1).clamp_min(0)
    same(fast.generate(**settings, position_ids=implied), expected)
    padding = 1 - settings["attention_mask"]
    same(fast.generate(**settings, position_ids=implied + 7 * padding), expected)
    sampled = settings | {"do_sample": True, "num_return_sequences": 2, "seed": 0}
    same(fast.generate(**sampled, position_ids=implied), fast.generate(**sampled))
    alone = settings | {name: settings[name][:1] for name in ("input_ids", "attention_mask")}
    same(fast.generate(**alone, position_ids=torch.arange(5)[None]), expected[:1])
    for others in (implied + 1, implied * 2, torch.arange(5)[None], implied[:, :3]):
        with pytest.raises(
            ValueError,
            match=r"^generate: position_ids: expected those that attention_mask implies, got oth",
        ):
            fast.generate(**settings, position_ids=others)


def test_a_filled_cache_is_refused_and_an_empty_one_is_not(models):
    from transformers import DynamicCache

    fast = decoder(models, 2, "alternating")
    text = torch.tensor([[1, 2, 3]])
    settings = {"max_new_tokens": 4, "do_sample": False}
    cache = DynamicCache()
    expected = fast.generate(text, **settings)
    same(fast.generate(text, past_key_values=cache, **settings), expected)
    assert cache.get_seq_length() == 0
    models[0](text[:, :2], past_key_values=cache, use_cache=True)
    with pytest.raises(
        ValueError, match=r"^generate: past_key_values: expected an empty cache, got a filled one$"
    ):
        fast.generate(text, past_key_values=cache, **settings)


def test_component_cannot_be_greedy(models):
    fast = decoder(models, 2, "component")
    with pytest.raises(
        ValueError,
        match=r"^generate: do_sample: expected True for schedule 'component', got False$",
    ):
        fast.generate(**prompts((3,), VOCAB_SIZE), max_new_tokens=3, do_sample=False)


SCORES = r"logits_processor: expected scores \(1, 24\) for the one row asked about, got "
ANSWER = "stopping_criteria: expected one answer for the one row asked about, got "
TWO = r"expected functions of \(input_ids, scores\), got "


@pytest.mark.parametrize(
    ("argument", "function", "message"),
    [
        ("logits_processor", lambda ids, scores: None, f"{SCORES}None from <lambda>"),
        ("logits_processor", lambda ids, scores: scores.numpy(), f"{SCORES}.* from <lambda>"),
        ("logits_processor", lambda ids, scores: scores[0], rf"{SCORES}\(24,\) from <lambda>"),
        ("logits_processor", lambda ids, scores: scores[:, 1:], rf"{SCORES}\(1, 23\) from <lamb"),
        ("logits_processor", lambda ids: ids, rf"logits_processor: {TWO}<lambda>\(ids\)"),
        ("logits_processor", lambda: 0, rf"logits_processor: {TWO}<lambda>\(\)"),
        ("stopping_criteria", lambda ids, scores: "x", f"{ANSWER}'x' from <lambda>"),
        ("stopping_criteria", lambda ids, scores: None, f"{ANSWER}None from <lambda>"),
        ("stopping_criteria", lambda ids, scores: 0.5, f"{ANSWER}0.5 from <lambda>"),
        ("stopping_criteria", lambda ids, scores: [True] * 2, f"{ANSWER}2 from <lambda>"),
        ("stopping_criteria", lambda ids: False, rf"stopping_criteria: {TWO}<lambda>\(ids\)"),
    ],
)
@pytest.mark.parametrize("schedule", ["plain", "alternating"])
def test_what_a_function_may_not_return_is_refused(argument, function, message, schedule, models):
    fast = decoder(models, 2, schedule)
    with pytest.raises(ValueError, match=f"^generate: {message}"):
        fast.generate(**prompts((3,), VOCAB_SIZE), max_new_tokens=3, **{argument: [function]})


@pytest.mark.parametrize("argument", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, AttributeError])
def test_what_a_function_raises_is_its_own(argument, error, models):
    def fails(ids, scores):
        raise error("its own")

    with pytest.raises(error, match=r"^its own$"):
        decoder(models, 2, "plain").generate(
            **prompts((3,), VOCAB_SIZE), max_new_tokens=3, **{argument: [fails]}
        )


def test_ids_that_no_embedding_takes_are_refused_in_a_call_of_the_models_generate(models):
    fast = decoder(models, 1, "lookup")
    for dtype in (torch.uint8, torch.int16):
        with pytest.raises(
            ValueError, match=r"^generate: input_ids: expected a tensor \(B, S\) of int64 or int32"
        ):
            models[0].generate(
                torch.ones(1, 3, dtype=dtype), max_new_tokens=3, custom_generate=fast
            )
