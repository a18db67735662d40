# SPDX-License-Identifier: Apache-2.0
"""What a call may bring beside tokens: what is empty or implied is taken, content is refused.

Names do not count. A new kind of argument is one more entry of a table.
"""

from typing import Any

import pytest
import torch
from families import FIRST_SPECIAL, Oracle, tiny
from toys import prompts, toy
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from specens import SpeculativeDecoder

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = prompts((6, 3), 100)
SETTINGS = {**PROMPTS, "max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def sees() -> Any:
    """A model that takes images, too."""
    return tiny("gemma3")


@pytest.fixture(scope="module")
def decoder(sees) -> SpeculativeDecoder:
    return SpeculativeDecoder([sees], schedule="lookup")


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"mm_encoder_outputs": {}},
        {"mm_encoder_outputs": {"image": None, "video": ()}},
        {"mm_encoder_outputs": BaseModelOutputWithPooling()},
        {"token_type_ids": torch.zeros(2, 6, dtype=torch.int64)},
        {"token_type_ids": torch.zeros(2, 6, dtype=torch.bool)},
    ],
)
def test_what_is_empty_or_implied_is_taken(nothing, sees, decoder):
    expected = sees.generate(**SETTINGS)
    assert torch.equal(decoder.generate(**SETTINGS, **nothing), expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pixel_values|mm_encoder_outputs", torch.zeros(1, 3, 16, 16)),  # a black image is one
        ("mm_encoder_outputs", {"image": torch.ones(1, 4, 64)}),
        ("token_type_ids", torch.ones(2, 6, dtype=torch.int64)),
        ("token_type_ids", torch.zeros(2, 6)),  # no labels
        ("token_type_ids", torch.zeros(2, 5, dtype=torch.int64)),
        ("labels", PROMPTS["input_ids"]),
    ],
)
def test_content_is_refused_by_name(name, content, decoder):
    with pytest.raises(ValueError, match=rf"^generate: {name}: expected nothing beyond the tokens"):
        decoder.generate(**SETTINGS, **{name.partition("|")[0]: content})


def test_zeros_that_change_the_logits_are_content():
    """GPT-2 adds the embedding of its token 0 where it is told that tokens are of type 0."""
    model = toy(0, 24, kind="gpt2")
    settings = {**prompts((6, 3), 24), "max_new_tokens": 4, "do_sample": False}
    fast = SpeculativeDecoder([model, toy(1, 24)], schedule="plain")
    zeros = torch.zeros_like(settings["input_ids"])
    with pytest.raises(ValueError, match=r"^generate: token_type_ids: expected nothing beyond"):
        fast.generate(**settings, token_type_ids=zeros)


def test_a_flag_that_changes_no_logits_is_nothing():
    model = tiny("mixtral")
    fast = SpeculativeDecoder([model], schedule="lookup")
    expected = model.generate(**SETTINGS)
    assert torch.equal(fast.generate(**SETTINGS, output_router_logits=True), expected)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba", "lfm2", "llama"])
def test_caches_are_nothing_while_they_are_empty(kind):
    model = tiny(kind)
    name = "cache_params" if "mamba" in kind else "past_key_values"
    fast = SpeculativeDecoder([model], schedule="lookup")
    expected = model.generate(**SETTINGS)
    cache = DynamicCache(config=model.config)
    settings = SETTINGS | {name: cache}
    assert torch.equal(fast.generate(**settings), expected)
    model(PROMPTS["input_ids"], **{name: cache}, use_cache=True)
    with pytest.raises(ValueError, match=rf"^generate: {name}: expected an empty cache, got a fi"):
        fast.generate(**settings)
    cache.reset()
    assert torch.equal(fast.generate(**settings), expected)


def test_a_static_cache_is_empty_though_it_has_memory():
    model = tiny("llama")
    fast = SpeculativeDecoder([model], schedule="lookup")
    cache = StaticCache(config=model.config, max_cache_len=32)
    expected = fast.generate(**SETTINGS)
    assert torch.equal(fast.generate(**SETTINGS, past_key_values=cache), expected)
    model(PROMPTS["input_ids"], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values: expected an empty cache, got a filled"):
        fast.generate(**SETTINGS, past_key_values=cache)


_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
_ROPES = {
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 80, **_FACTORS},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("schedule", ["plain", "lookup"])
@pytest.mark.parametrize("kind", _ROPES)
def test_texts_do_not_grow_past_where_a_rotary_embedding_changes(kind, schedule):
    """Of 81 tokens the last is not read; below and, with two embeddings, above, texts are right."""
    rope = {"rope_theta": 10000.0, **_ROPES[kind]}
    changes = {"max_position_embeddings": 80} if kind == "dynamic" else {}
    model = tiny("llama", rope_parameters=rope, **changes)
    fast = SpeculativeDecoder([model], schedule=schedule)
    oracle = Oracle([model], (1.0,))
    settings = {"do_sample": False, "return_dict_in_generate": True}
    for lengths, new, right in (
        ((70, 40), 11, True),
        ((70, 40), 12, False),
        ((82,), 12, kind == "longrope"),
        ((90, 82), 12, kind == "longrope"),
        ((90, 81), 12, False),
    ):
        inputs = prompts(lengths, FIRST_SPECIAL)
        if not right:
            with pytest.raises(ValueError, match=r"^generate: max_length: expected texts of 81 to"):
                fast.generate(**inputs, **settings, max_new_tokens=new)
            continue
        output = fast.generate(**inputs, **settings, max_new_tokens=new)
        width = max(lengths)
        for row, length in enumerate(lengths):
            prompt = output.sequences[row, width - length : width].tolist()
            written = output.sequences[row, width:].tolist()
            assert oracle.fault(prompt, written, output.log_probs[row].tolist()) == ""
