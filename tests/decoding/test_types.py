# SPDX-License-Identifier: Apache-2.0
"""Values of wrong types are refused in one line, and those of other libraries are taken.

A value that was not refused so is one more entry of a table. What is out of its range is refused in
test_refusals.py.
"""

from collections import UserList
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCAB_SIZE, decoder, same
from toys import prompts, toy
from transformers import AutoModelForCausalLM, BatchEncoding, GenerationConfig, TextStreamer
from transformers.generation.stopping_criteria import MaxLengthCriteria

from specens import SpeculativeDecoder
from specens.loop.generation_config import FIELDS, check
from specens.schedules import Speculative
from specens_kernels import Acceptance, Refusal

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "weights: expected 2 numbers, one per member, or a WeightHead, got "
SEED = "seed: expected an integer or a list of them, one a row, got "


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "0.5,0.5"}, f"{WEIGHTS}'0.5,0.5'"),
        ({"weights": 0.5}, f"{WEIGHTS}0.5"),
        ({"weights": []}, rf"{WEIGHTS}\[\]"),
        ({"weights": [None, 1.0]}, rf"{WEIGHTS}\[None, 1.0\]"),
        ({"weights": ["1", "0"]}, rf"{WEIGHTS}\['1', '0'\]"),
        ({"weights": [True, False]}, rf"{WEIGHTS}\[True, False\]"),
        ({"weights": {0: 0.5, 1: 0.5}}, f"{WEIGHTS}{{0: 0.5"),
        ({"weights": [[0.5, 0.5]]}, rf"{WEIGHTS}\[\["),
        ({"weights": torch.tensor(0.5)}, WEIGHTS),
        ({"weights": torch.ones(2, device="meta")}, WEIGHTS),
        ({"weights": torch.ones(2).to_sparse()}, WEIGHTS),
        ({"weights": torch._efficientzerotensor(2)}, WEIGHTS),
        ({"weights": bytearray(b"\0\1")}, WEIGHTS),
        ({"weights": np.array([[0.5, 0.5]])}, WEIGHTS),
        ({"weights": [0.5, 1j]}, WEIGHTS),
        ({"weights": [1, 10**400]}, "weights: expected .*numbers"),
        ({"schedule": None}, "schedule: expected a Schedule or its text, got None"),
        ({"schedule": Speculative}, "schedule: expected a Schedule or its text, got <class"),
        ({"schedule": ["plain"]}, "schedule: expected a Schedule or its text, got"),
        ({"acceptance": None}, "acceptance: expected a rule or a list of them, got None"),
        ({"acceptance": [None]}, "name: expected one of block, .* got None"),
        ({"acceptance": [nested(2)]}, "name: expected one of block, .* got"),
        ({"acceptance": 1}, "acceptance: expected a rule or a list of them, got 1"),
        ({"acceptance": "js:threshold=much"}, "threshold: expected a number in .* got 'much'"),
        ({"acceptance": "js:threshold"}, "js: expected name=number, each name once"),
        ({"bonus": None}, "bonus: expected 'ensemble' or 'last', got None"),
        ({"bonus": ["last"]}, r"bonus: expected 'ensemble' or 'last', got \['last'\]"),
        ({"bonus": np.array(["last", "last"])}, "bonus: expected 'ensemble' or 'last', got array"),
        ({"bonus": True}, "bonus: expected 'ensemble' or 'last', got True"),
        ({"draft_vocabulary": np.array(["a", "b"])}, "draft_vocabulary: expected 'same' or 'share"),
        ({"draft_vocabulary": None}, "draft_vocabulary: expected 'same' or 'shared', got None"),
        ({"plausibility": None}, "plausibility: expected a number, got None"),
        ({"plausibility": "0.1"}, "plausibility: expected a number, got '0.1'"),
        ({"plausibility": [0.1]}, r"plausibility: expected a number, got \[0.1\]"),
        ({"plausibility": torch._efficientzerotensor(())}, "plausibility: expected a number"),
        ({"plausibility": True}, "plausibility: expected a number, got True"),
        ({"plausibility": 10**400}, r"plausibility: expected a number in \[0, 1\], got "),
        ({"tokenizers": "gpt2"}, "tokenizers: expected a list, one per model, got 'gpt2'"),
        ({"tokenizers": ["gpt2"] * 2}, r"tokenizers\[0\]: expected a tokenizer .* got 'gpt2'"),
        ({"tokenizers": [None] * 2}, r"tokenizers\[0\]: expected a tokenizer .* got NoneType"),
        ({"tokenizers": 2}, "tokenizers: expected a list, one per model, got int"),
        ({"seed": "5"}, f"{SEED}'5'"),
        ({"seed": 5.0}, f"{SEED}5.0"),
        ({"seed": True}, f"{SEED}True"),
        ({"seed": {1: 2}}, f"{SEED}{{1: 2}}"),
        ({"seed": {1, 2}}, f"{SEED}{{1, 2}}"),
        ({"seed": b"ab"}, f"{SEED}b'ab'"),
        ({"seed": torch.tensor(1, device="meta")}, f"{SEED}tensor"),
        ({"seed": torch.tensor([1, 2]).to_sparse()}, SEED),
        ({"seed": [[1, 2]]}, rf"{SEED}\[\[1, 2\]\]"),
        ({"seed": 2**63}, "seed: expected integers in .*, 64 bits, got 9223372036854775808"),
        ({"seed": [0, -(2**63) - 1]}, "seed: expected integers in .*, 64 bits, got -92233720"),
        ({"draft": "gpt2", "schedule": "speculative"}, "draft: expected a causal LM, got the name"),
        ({"draft": ["gpt2"]}, r"draft\[0\]: expected a causal LM, got the name 'gpt2'; Auto"),
        ({"draft": 3}, "draft: expected a causal LM, got int, which is no transformers model"),
    ],
)
def test_wrong_types_of_a_decoder_are_refused(
    options: dict[str, Any], message: str, models: Any
) -> None:
    with pytest.raises(Refusal, match=rf"^\w+: {message}"):
        SpeculativeDecoder(models[:2], **options)


def test_a_single_tokenizer_is_no_list(models: Any, tokenizer: Any) -> None:
    with pytest.raises(Refusal, match=r"^decoder: tokenizers: expected a list, one per model, got"):
        SpeculativeDecoder(models[:1], tokenizers=tokenizer)


def test_what_is_no_model_is_refused(models: Any) -> None:
    with torch.device("meta"):
        nowhere = AutoModelForCausalLM.from_config(models[0].config)
    loads = "; AutoModelForCausalLM.from_pretrained loads it"
    faults: list[tuple[Any, str]] = [
        ("gpt2", r"members: expected a list of models, got 'gpt2'"),
        (None, r"members: expected a list of models, got NoneType"),
        (7, r"members: expected a list of models, got int"),
        ({0: models[0]}, r"members: expected a list of models, got dict"),
        (iter(models), r"members: expected a list of models, got list_iterator"),
        (torch.nn.ModuleList(models), r"members: expected a list of models, got ModuleList"),
        (["gpt2"], rf"members\[0\]: expected a causal LM, got the name 'gpt2'{loads}"),
        ([models[0], None], r"members\[1\]: expected a causal LM, got None"),
        ([torch.nn.Linear(2, 2)], r"members\[0\]: expected a causal LM, got Linear, which is no"),
        ([type(models[0])], r"members\[0\]: expected a causal LM, got type, which is no transf"),
        ([models[0].config], r"members\[0\]: expected a causal LM, got LlamaConfig, which is no"),
        ([nowhere], r"members\[0\]: expected a causal LM, got LlamaForCausalLM on device 'meta'"),
        ([[models[0]]], r"members\[0\]: expected a causal LM, got list, which is no transformers"),
    ]
    for given, message in faults:
        with pytest.raises(Refusal, match=f"^decoder: {message}"):
            SpeculativeDecoder(given)
    with pytest.raises(Refusal, match=r"^decoder: draft: expected a causal LM, got .* 'meta'"):
        SpeculativeDecoder(models[:1], schedule="speculative", draft=nowhere)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_a_model_with_few_positions_has_one_line_or_works(kind: str) -> None:
    """Learned positions end; rotary ones go on."""
    names = {"gpt2": "n_positions"}
    for positions in (16, 4):
        few = {names.get(kind, "max_position_embeddings"): positions}
        model = toy(0, VOCAB_SIZE, kind=kind, **few)
        if kind == "llama":
            fast = SpeculativeDecoder([model], schedule="lookup")
            assert fast.generate(torch.ones(1, 2).long(), max_new_tokens=2).shape == (1, 4)
            continue
        with pytest.raises(
            Refusal, match=r"^member: model: expected a causal LM that reads 20 tok"
        ):
            SpeculativeDecoder([model])


def test_a_model_that_was_changed_after_its_decoder_was_made_is_refused() -> None:
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 4, "do_sample": False}
    for size in (VOCAB_SIZE - 4, VOCAB_SIZE + 8):
        model = toy(0, VOCAB_SIZE)
        draft = toy(1, VOCAB_SIZE)
        fast = SpeculativeDecoder([model], schedule="speculative", draft=draft)
        fast.generate(**settings)
        draft.resize_token_embeddings(size)
        expected = "expected 24 columns of logits, as when the decoder was made; make another"
        with pytest.raises(Refusal, match=rf"^generate: models\[1\]: {expected}, got {size}$"):
            fast.generate(**settings)
    model = toy(0, VOCAB_SIZE)
    fast = SpeculativeDecoder([toy(1, VOCAB_SIZE), model])
    model.to("meta")
    with pytest.raises(Refusal, match=r"^generate: models\[1\]: expected a causal LM, .* 'meta'"):
        fast.generate(**settings)
    model = toy(0, VOCAB_SIZE)
    fast = SpeculativeDecoder([model])
    model.lm_head = None
    with pytest.raises(Refusal, match=r"^generate: models\[0\]: .*, which has no causal LM head$"):
        fast.generate(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": [[1, 2]]}, "input_ids: expected a tensor .* of int64 or int32, got list"),
        ({"input_ids": np.ones((1, 2), int)}, "input_ids: expected a tensor .*, got ndarray"),
        ({"input_ids": "text"}, "input_ids: expected a tensor .* of int64 or int32, got 'text'"),
        ({"input_ids": torch.ones(3).long()}, r"input_ids: expected a tensor .* got \(3,\) int64"),
        ({"input_ids": torch.ones(1, 3)}, r"input_ids: expected .* got \(1, 3\) float32"),
        ({"input_ids": torch.ones(1, 3).bool()}, r"input_ids: expected .* got \(1, 3\) bool"),
        ({"input_ids": torch.tensor([[1, 24]])}, r"input_ids: expected ids in \[0, 24\), got 24"),
        ({"input_ids": torch.tensor([[-1, 2]])}, r"input_ids: expected ids in \[0, 24\), got -1"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.uint8)},
            r"input_ids: expected a tensor \(B, S\) of int64 or int32, got \(1, 3\) uint8",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.int64, device="meta")},
            r"input_ids: expected .* got \(1, 3\) int64 on device 'meta'",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.int64).to_sparse()},
            r"input_ids: expected .* got \(1, 3\) int64 sparse_coo",
        ),
        (
            {"attention_mask": torch.ones(1, 3, device="meta")},
            r"attention_mask: expected .* got \(1, 3\) float32 on device 'meta'",
        ),
        (
            {"inputs": torch.ones(1, 3).long()},
            r"inputs: expected None with input_ids, got \(1, 3\) int64",
        ),
        ({"custom_generate": print}, "custom_generate: expected None, since the decoder is the"),
        ({"inputs": [[1, 2]], "input_ids": None}, "inputs: expected a tensor .*, got list"),
        (
            {"inputs": BatchEncoding({"input_ids": torch.ones(1, 2)}), "input_ids": None},
            r"inputs: expected .* \(what a tokenizer returns goes in as \*\*inputs\), got BatchEnc",
        ),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask: expected a tensor .*, got list"),
        ({"attention_mask": "ones"}, "attention_mask: expected a tensor .*, got 'ones'"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask: expected a .*, got \(1, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask: expected a .*, got \(2, 3\)"),
        ({"attention_mask": torch.ones(3)}, r"attention_mask: expected a .*, got \(3,\)"),
        ({"attention_mask": torch.full((1, 3), 0.5)}, "attention_mask: expected zeros and ones"),
        ({"attention_mask": torch.tensor([[0, 1, 2]])}, "attention_mask: expected zeros and ones"),
        (
            {"attention_mask": torch.tensor([[float("nan"), 1, 1]])},
            "attention_mask: expected zeros and ones",
        ),
        ({"position_ids": [[0, 1, 2]]}, "position_ids: expected those that attention_mask implies"),
        ({"position_ids": torch.arange(3)}, "position_ids: expected those that attention_mask im"),
        (
            {"input_ids": torch.nested.nested_tensor([torch.ones(2).long()], layout=torch.jagged)},
            "input_ids: expected a tensor .*, got NestedTensor",
        ),
        ({"streamer": TextStreamer}, "streamer: expected an object with put and end, got type"),
        ({"streamer": "yes"}, "streamer: expected an object with put and end, got 'yes'"),
        ({"streamer": print}, "streamer: expected an object with put and end, got builtin"),
        ({"stop_strings": ""}, "stop_strings: expected a string or a list of them, none of them e"),
        ({"stop_strings": [""]}, r"stop_strings: expected .* got \[''\]"),
        ({"stop_strings": ["w1", ""]}, r"stop_strings: expected .* got \['w1', ''\]"),
        ({"stop_strings": [None]}, r"stop_strings: expected .* got \[None\]"),
        ({"stop_strings": 3}, "stop_strings: expected .* got 3"),
        ({"stop_strings": b"w1"}, "stop_strings: expected .* got b'w1'"),
        ({"stop_strings": "w1", "tokenizer": "gpt2"}, "tokenizer: expected a tokenizer .* 'gpt2'"),
        (
            {"logits_processor": print},
            "logits_processor: expected a list of functions, got builtin",
        ),
        ({"logits_processor": [3]}, "logits_processor: expected a list of functions, got list"),
        *(
            (
                {"stopping_criteria": [MaxLengthCriteria(wrong)]},
                "stopping_criteria: expected lengths that are counts, got MaxLengthCriteria",
            )
            for wrong in (float("inf"), float("nan"), 5.0, -1, "5")
        ),
        (
            {"input_ids": torch._efficientzerotensor((1, 3), dtype=torch.int64)},
            "input_ids: expected a tensor ",
        ),
        *(
            ({name: torch.tensor([2]).to_sparse()}, f"{name}: expected")
            for name in ("eos_token_id", "pad_token_id", "suppress_tokens", "num_beams")
        ),
        ({"stopping_criteria": {}}, "stopping_criteria: expected a list of functions, got dict"),
        ({"generation_config": {"top_k": 3}}, "generation_config: expected a Gen.*, got dict"),
        ({"seed": "5"}, f"{SEED}'5'"),
        ({"seed": 2**64}, "seed: expected integers in .*, 64 bits, got 18446744073709551616"),
        ({"seed": [2**63]}, "seed: expected integers in .*, 64 bits, got 9223372036854775808"),
        ({"seed": -(2**63) - 1}, "seed: expected integers in .*, 64 bits, got -92233720368547758"),
    ],
)
def test_wrong_types_of_a_call_are_refused(
    options: dict[str, Any], message: str, models: Any
) -> None:
    settings = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4, **options}
    with pytest.raises(Refusal, match=f"^generate: {message}"):
        decoder(models, 2, "alternating").generate(**settings)


NAN = float("nan")
# Two are what the test says itself, and transformers compares the last with a number.
NOT_NONE = ("max_new_tokens", "pad_token_id", "num_return_sequences")


@pytest.mark.parametrize("where", ["argument", "config", "loop"])
@pytest.mark.parametrize(
    ("field", "expected", "wrong"),
    [
        ("max_new_tokens", "an integer >= 1", [3.5, 4.0, "3", [3], NAN, True, 0, -1]),
        ("max_length", "an integer", ["9", 9.5, [9], True]),
        ("min_length", "an integer", ["3", 1.5, True]),
        ("min_new_tokens", "an integer", ["3", 1.5, True]),
        ("max_time", "a number", ["1", NAN, [1], True]),
        ("eos_token_id", "an integer or a list of them", ["a", 1.5, [None], [1, "a"], True, 2**64]),
        ("pad_token_id", "an integer", ["x", 1.5, [1], True]),
        ("do_sample", "True or False", ["yes", 1, [True]]),
        ("temperature", "a number", [NAN, "1", [1.0], True]),
        ("top_k", "an integer", [1.5, True, "3", NAN]),
        ("top_p", "a number", ["x", NAN, [0.5], True]),
        ("min_p", "a number", ["x", NAN]),
        ("top_h", "a number", ["x", NAN]),
        ("typical_p", "a number", ["x", NAN]),
        ("epsilon_cutoff", "a number", ["x", NAN]),
        ("eta_cutoff", "a number", ["x", NAN]),
        ("repetition_penalty", "a float > 0", [0, 0.0, "a", NAN, 2, True, -1.0]),
        ("encoder_repetition_penalty", "a float > 0", [0, "a", NAN]),
        ("no_repeat_ngram_size", "an integer", ["2", 1.5]),
        ("bad_words_ids", "a list of lists of integers >= 0", [[5], [[]], [], "a", [["a"]]]),
        ("sequence_bias", "a list of pairs", [3, [], [[[3], 1]], {3: 1.0}, [[[3]]]]),
        ("forced_bos_token_id", "an integer or a list of them", ["a", 1.5]),
        ("forced_eos_token_id", "an integer or a list of them", ["a", 1.5]),
        ("suppress_tokens", "a list of integers", [5, "a", [1.5], [None]]),
        ("begin_suppress_tokens", "a list of integers", [5, "a", [1.5], [None]]),
        ("exponential_decay_length_penalty", "two numbers", [3, (1,), ("a", 1.0), (1, NAN)]),
        ("remove_invalid_values", "True or False", ["yes", 1]),
        ("num_return_sequences", "an integer", ["2", 1.5, True]),
        ("return_dict_in_generate", "True or False", ["yes", 1]),
        ("early_stopping", "True, False or 'never'", [[1], "x"]),
    ],
)
def test_wrong_types_of_a_generation_config_are_refused(
    where: str, field: str, expected: str, wrong: list[Any], models: Any
) -> None:
    fast = decoder(models, 2, "alternating")
    text = torch.tensor([[1, 2, 3]])
    for value in wrong:
        settings = {"max_new_tokens": 4, "pad_token_id": 0, field: value}
        config = GenerationConfig()
        vars(config).update(settings)  # past the checks of transformers
        call = {
            "argument": partial(fast.generate, text, **settings),
            "config": partial(fast.generate, text, generation_config=config),
            "loop": partial(check, settings.get),
        }[where]
        with pytest.raises(Refusal, match=rf"^generate: {field}: expected {expected}.*, got "):
            call()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": np.int64(4)},
        {"max_new_tokens": None, "max_length": np.int32(6)},
        {"temperature": 0.0, "do_sample": False},
        {"top_k": -1, "do_sample": False},
        {"top_p": 1.5, "do_sample": True, "top_k": 1},
        {"top_p": torch.tensor(0.5), "do_sample": True, "top_k": 1},
        {"repetition_penalty": 1},
        {"eos_token_id": []},
        {"eos_token_id": -1},
        {"eos_token_id": torch.tensor([3, 5])},
        {"eos_token_id": np.int64(5)},
        {"pad_token_id": torch.tensor([0])},
        {"suppress_tokens": range(3)},
        {"suppress_tokens": torch.tensor([5])},
        {"sequence_bias": {(3,): 10.0}},
        {"max_time": float("inf")},
        {"max_time": -1},
        dict.fromkeys(
            name
            for name, field in FIELDS.items()
            if field.verdict != "refused" and name not in NOT_NONE
        ),
    ],
)
def test_what_transformers_takes_is_taken(settings: dict[str, Any], models: Any) -> None:
    text = torch.tensor([[1, 2, 3]])
    settings = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False} | settings
    expected = models[0].generate(text, **settings)
    same(decoder(models, 1, "draft").generate(text, **settings), expected)


def test_a_long_value_is_cut_in_its_refusal(models: Any) -> None:
    wrong: list[dict[str, Any]] = [
        {"schedule": "a" * 10**6},
        {"schedule": f"speculative:tokens={'9' * 5000}"},
        {"schedule": f"speculative:tokens={'9' * 4000}"},
        {"acceptance": f"js:threshold={'x' * 10**5}"},
        {"bonus": "a" * 10**6},
        {"weights": "a" * 10**6},
        {"weights": [1.0] * 10**5},
        {"seed": 10**5000},
        {"seed": 10**4000},
        {"scope": "a" * 10**6},
    ]
    for options in wrong:
        with pytest.raises(Refusal) as refusal:
            SpeculativeDecoder(models[:2], **options)
        assert len(refusal.value.got) <= 500
        assert len(str(refusal.value)) < 1500, options


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_a_mask_may_be_of_any_type(dtype: torch.dtype, models: Any) -> None:
    inputs = prompts((5, 2), VOCAB_SIZE)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = models[0].generate(**inputs, **settings)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    same(decoder(models, 1, "draft").generate(**inputs, **settings), expected)


@pytest.mark.parametrize("schedule", ["plain", "draft", "alternating", "component"])
def test_ids_may_be_of_32_bits(schedule: str, models: Any) -> None:
    inputs = prompts((5, 2, 3), VOCAB_SIZE)
    sampled = schedule == "component"
    settings = {"max_new_tokens": 6, "do_sample": sampled, "top_k": 0, "seed": 3}
    expected = decoder(models, 2, schedule).generate(**inputs, **settings)
    inputs["input_ids"] = inputs["input_ids"].int()
    same(decoder(models, 2, schedule).generate(**inputs, **settings), expected)


def test_padding_may_be_any_token(models: Any) -> None:
    inputs = prompts((5, 2), VOCAB_SIZE)
    settings = {"max_new_tokens": 6, "do_sample": False}
    fast = decoder(models, 1, "draft")
    expected = fast.generate(**inputs, **settings)[:, 5:]
    for padding in (-100, -1, VOCAB_SIZE, 2**40):
        ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, padding)
        text = fast.generate(ids, attention_mask=inputs["attention_mask"], **settings)
        same(text[:, 5:], expected)


def test_values_of_other_libraries_are_taken(models: Any) -> None:
    settings = {**prompts((5, 2), VOCAB_SIZE), "max_new_tokens": 6, "do_sample": True, "top_k": 0}
    expected = SpeculativeDecoder(models[:2], weights=[0.25, 0.75], seed=3).generate(**settings)
    for weights in (
        np.array([0.25, 0.75], dtype=np.float32),
        torch.tensor([0.25, 0.75]),
        [np.float64(0.25), torch.tensor(0.75)],
        (1 / 4, 3 / 4),
    ):
        fast = SpeculativeDecoder(UserList(models[:2]), weights=weights, seed=np.int64(3))
        same(fast.generate(**settings), expected)
    fast = SpeculativeDecoder(models[:2], weights=[0.25, 0.75])
    for seed in (3, np.int32(3), torch.tensor(3), [3, 4], np.array([3, 4]), torch.tensor([3, 4])):
        same(fast.generate(**settings, seed=seed), expected)
    for seed in (2**63 - 1, -(2**63), [2**63 - 1, -(2**63)]):
        assert fast.generate(**settings, seed=seed).shape == expected.shape


def test_a_rule_may_be_text_as_a_schedule_may(models: Any) -> None:
    fast = SpeculativeDecoder(
        models[:2], schedule="speculative(tokens=3)", acceptance="js:threshold=0.3"
    )
    assert fast.acceptance.parameters == Acceptance("js", threshold=0.3).parameters
    drafts = {"schedule": "hierarchy", "draft": models[2:4]}
    fast = SpeculativeDecoder(models[:1], **drafts, acceptance=["tv:threshold=0.2", "block"])
    assert [each.rule.name for each in fast.acceptances] == ["tv", "block"]
