# SPDX-License-Identifier: Apache-2.0
"""Each field of transformers' `GenerationConfig` is obeyed, idle or refused, as the table says.

The oracle is transformers' own `generate` with one model.
"""

import copy
import re
import warnings
from typing import Any

import generation_options as options
import pytest
import torch
from decoders import VOCAB_SIZE, decoder, same
from toys import prompts
from transformers import EtaLogitsWarper, GenerationConfig

from specens import SpeculativeOutput
from specens.loop import generation_config
from specens.loop.generation_config import FIELDS, IDLE, OBEYED, REFUSED, check
from specens_kernels import Unsupported

pytestmark = pytest.mark.usefixtures("one_thread")

INPUTS = {**prompts((5, 3), VOCAB_SIZE), "pad_token_id": 0}
BARE = {**INPUTS, "max_new_tokens": 24, "do_sample": False}
# They act on the token that ends a text.
ENDING = {"min_length", "min_new_tokens", "pad_token_id", "exponential_decay_length_penalty"}
# There is nothing to see of them: logits are finite here, a call without prompts says which token
# is first, and of the others the next test is about what they return.
UNSEEN = {"remove_invalid_values", "bos_token_id", "do_sample", "return_dict_in_generate"}


def test_every_field_is_judged_and_has_its_example():
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known <= set(FIELDS)
    for verdict, examples in (
        (OBEYED, options.OBEYED),
        (IDLE, options.IDLE),
        (REFUSED, options.REFUSED),
    ):
        assert set(examples) == {name for name in FIELDS if FIELDS[name].verdict == verdict}


def test_a_field_that_is_not_known_is_refused_where_it_is_said(monkeypatch):
    monkeypatch.delitem(FIELDS, "early_stopping")
    config = GenerationConfig(early_stopping=True)
    generation_config.unknown_fields.cache_clear()
    try:
        check(lambda name, default: default)
        with pytest.raises(Unsupported, match="generate: early_stopping: expected None, for a fie"):
            check(lambda name, default: getattr(config, name, default))
    finally:
        generation_config.unknown_fields.cache_clear()


def settings_of(name: str, said: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    settings = {**BARE}
    if name in ENDING:
        settings["eos_token_id"] = list(range(2, VOCAB_SIZE, 2))
    if name == "bos_token_id":
        del settings["input_ids"], settings["attention_mask"]
    if name == "forced_bos_token_id":  # the token after the first
        settings |= prompts((1, 1), VOCAB_SIZE)
    if name == "stop_strings":  # transformers pads no row that one has ended
        settings |= prompts((5,), VOCAB_SIZE)
    settings |= said
    if name == "stop_strings":
        settings |= {"stop_strings": ["w2", "w5", "w7"], "tokenizer": tokenizer}
    return settings


@pytest.mark.parametrize("schedule", ["plain", "draft"])
@pytest.mark.parametrize("name", options.OBEYED)
def test_what_is_obeyed_is_what_transformers_makes_of_it(name, schedule, models, tokenizer):
    settings = settings_of(name, options.OBEYED[name], tokenizer)
    fast = decoder(models, 1, schedule, seed=0)
    text = fast.generate(**settings)
    if name == "eta_cutoff":  # leaves more than one token, and two generators draw two texts
        settings["logits_processor"] = [EtaLogitsWarper(settings.pop(name))]
        same(text, fast.generate(**settings))
        return
    expected = models[0].generate(**settings)
    if name == "return_dict_in_generate":
        text, expected = text.sequences, expected.sequences
    same(text, expected)


@pytest.mark.parametrize("name", sorted(set(options.OBEYED) - UNSEEN))
def test_what_is_obeyed_is_seen_in_the_text(name, models, tokenizer):
    said = options.OBEYED[name]
    settings = settings_of(name, said, tokenizer)
    fast = decoder(models, 1, "plain", seed=0)
    text = fast.generate(**settings)
    for key in {*said, "stop_strings", "tokenizer"} - {"do_sample"}:
        settings.pop(key, None)
    bare = fast.generate(**settings | {"max_new_tokens": 24})
    assert text.shape != bare.shape or not torch.equal(text, bare)


@pytest.mark.parametrize("name", options.IDLE)
def test_what_is_idle_changes_nothing(name, models):
    fast = decoder(models, 2, "alternating")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = fast.generate(**BARE | options.IDLE[name])
    same(text, fast.generate(**BARE))


@pytest.mark.parametrize("where", ["argument", "config", "model"])
@pytest.mark.parametrize("name", options.REFUSED)
def test_what_is_refused_is_so_by_name_wherever_it_is_said(name, where, models, monkeypatch):
    fast = decoder(models, 2, "alternating")
    said = options.REFUSED[name]
    settings = dict(BARE)
    if where == "argument":
        settings |= said
    else:
        config = GenerationConfig(**said, max_new_tokens=12, pad_token_id=0)
        if where == "config":
            settings = {**prompts((5, 3), VOCAB_SIZE), "generation_config": config}
        else:
            monkeypatch.setattr(models[0], "generation_config", config)
    got = re.escape(f"got {said[name]!r}")
    with pytest.raises(Unsupported, match=f"^generate: {name}: expected .*, {got}$"):
        fast.generate(**settings)


# Transformers asks for a tokenizer to heal tokens, and what is paged comes to no loop at all.
ELSEWHERE = {"token_healing", "cache_implementation"}


@pytest.mark.parametrize("name", sorted(set(options.REFUSED) - ELSEWHERE))
def test_what_is_refused_is_so_in_a_call_of_the_models_generate(name, models):
    fast = decoder(models, 2, "alternating")
    with pytest.raises(Unsupported, match=f"^generate: {name}: expected "):
        models[0].generate(**BARE | options.REFUSED[name], custom_generate=fast)


def test_logits_that_are_no_numbers_are_removed_where_that_is_asked_for(models):
    model = copy.deepcopy(models[0])
    fast = decoder([model], 1, "plain")
    model.get_output_embeddings().weight[7] = torch.nan
    settings = BARE | options.OBEYED["remove_invalid_values"]
    same(fast.generate(**settings), model.generate(**settings))


def test_what_comes_out_is_of_the_kind_that_was_asked_for(models):
    fast = decoder(models, 2, "alternating")
    output = fast.generate(**BARE | options.OBEYED["return_dict_in_generate"])
    assert isinstance(output, SpeculativeOutput)
    same(output.sequences, fast.generate(**BARE))


def test_a_call_that_does_not_come_to_the_loop_is_an_error(models, monkeypatch):
    """Whatever takes transformers another way: the text would be one model's own."""
    fast = decoder(models, 2, "alternating")
    generate = models[0].generate
    monkeypatch.setattr(
        models[0], "generate", lambda *args, custom_generate, **kwargs: generate(*args, **kwargs)
    )
    with pytest.raises(ValueError, match=r"^generate: members: expected a LlamaForCausalLM that h"):
        fast.generate(**BARE)
