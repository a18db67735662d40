# SPDX-License-Identifier: Apache-2.0
"""Processors see each position's own prefix; warpers that run inside kernels keep their law.

Transformers' own `generate` and its processors are the oracle. To test an option of `generate`, add
it to OPTIONS.
"""

import itertools
import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from toys import first_difference, logits_after, noisy, prompts, toy
from transformers import (
    EpsilonLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
)
from transformers.generation import logits_process

from specens import SpeculativeDecoder
from specens.loop.processors import STATEFUL, Warp, per_row, split
from specens.schedules import Alternating

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 24
RAGGED = (5, 9, 3, 1, 7)
SCHEDULES = ("speculative", "draft", "alternating")


@pytest.fixture(scope="module")
def models() -> list[Any]:
    first = toy(0, VOCAB_SIZE, spread=3, amplify=30, num_hidden_layers=2)
    return [first, noisy(first, 1.0), noisy(first, 1.0, seed=1)]


def decoder(models: list[Any], size: int, schedule: Any, **options: Any) -> SpeculativeDecoder:
    draft = {}
    if schedule == "draft":
        draft, schedule = {"draft": models[-1]}, "speculative"
    return SpeculativeDecoder(models[:size], schedule=schedule, **draft, **options)


def alternate(row: int, text: Tensor) -> list[int]:
    """Rows may write other tokens, and other ones at odd lengths than at even ones."""
    return list(range(2 + row, VOCAB_SIZE - len(text) % 2))


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[9], [3, 8], [16, 12]]},
    "sequence_bias": {"sequence_bias": [[[4], -5.0], [[7, 9], 6.0]]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [2, 9, 16, 12]},
    "min_length": {"min_length": 13, "eos_token_id": [2, 9, 16, 12]},
    "suppress_tokens": {"suppress_tokens": [1, 9, 16]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(1, 20))},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.2), "eos_token_id": [2]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": alternate},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "several": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "eos_token_id": [2, 9],
        "renormalize_logits": True,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_one_model_writes_what_generate_writes(option, models):
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 16, "do_sample": False}
    settings |= {"pad_token_id": 0}
    expected = models[0].generate(**settings, **OPTIONS[option])
    bare = {name: value for name, value in OPTIONS[option].items() if name == "eos_token_id"}
    assert not torch.equal(expected, models[0].generate(**settings, **bare)), "it changes nothing"
    for schedule in ("plain", *SCHEDULES):
        text = decoder(models, 1, schedule).generate(**settings, **OPTIONS[option])
        assert torch.equal(text, expected), (schedule, first_difference(text, expected))


@pytest.mark.parametrize("option", ["several", "bad_words", "prefix_allowed_tokens_fn"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_ensembles_write_what_the_plain_ensemble_writes(option, do_sample, models):
    """Greedy text is equal; sampled text obeys, and a draft that is the target is accepted."""
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 16, "do_sample": do_sample}
    settings |= {"pad_token_id": 0, **OPTIONS[option]}
    if not do_sample:
        plain = decoder(models, 2, "plain").generate(**settings)
        for schedule in SCHEDULES:
            text = decoder(models, 2, schedule).generate(**settings)
            assert torch.equal(text, plain), (schedule, first_difference(text, plain))
        return
    for schedule in SCHEDULES:
        same = [models[0]] * 2
        fast = decoder(same, 1 if schedule == "draft" else 2, schedule, seed=0)
        text = fast.generate(**settings, top_k=0, temperature=1.4)
        assert fast.statistics.acceptance_rate == 1.0
        if option == "prefix_allowed_tokens_fn":
            for row, written in enumerate(text.tolist()):
                for at in range(max(RAGGED), len(written)):
                    assert written[at] in alternate(row, torch.tensor(written[:at]))


class Recorder(LogitsProcessor):
    """Remembers every prefix it is asked about, and forbids what may not follow it."""

    def __init__(self) -> None:
        self.prefixes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == scores.shape[0] == 1
        assert scores.dtype == torch.float32
        self.prefixes.append(tuple(input_ids[0].tolist()))
        scores[:, int(input_ids.sum()) % VOCAB_SIZE] = -torch.inf  # in place, as some do
        return scores


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_a_processor_sees_the_prefix_of_each_position(schedule, models):
    recorder = Recorder()
    fast = decoder(models, 2, schedule, seed=0)
    inputs = prompts((5, 3), VOCAB_SIZE)
    text = fast.generate(
        **inputs,
        max_new_tokens=16,
        do_sample=True,
        top_k=0,
        logits_processor=LogitsProcessorList([recorder]),
    )
    asked: dict[tuple[int, ...], int] = defaultdict(int)
    for prefix in recorder.prefixes:
        asked[prefix] += 1
    for row in text.tolist():
        for at in range(5, 21):
            prefix = tuple(row[:at])
            # Both members and a draft, each once where nothing was taken back.
            assert asked[prefix] >= 2, "a member's law was not processed"
            assert row[at] != sum(prefix) % VOCAB_SIZE
    # What is asked about otherwise are proposals that were taken back: the beginning is the text.
    texts = {tuple(row[:5]) for row in text.tolist()}
    assert {prefix[:5] for prefix in recorder.prefixes} <= texts
    if schedule == "plain":
        assert all(count == 2 for count in asked.values())
        assert len(recorder.prefixes) == 2 * 2 * 16
    else:
        committed = {tuple(row[:at]) for row in text.tolist() for at in range(5, 22)}
        assert set(asked) - committed, "no proposal was taken back"


def test_component_runs_processors_for_the_member_it_draws(models):
    """Not for the positions that a member catches up on."""
    recorder = Recorder()
    text = decoder(models, 3, "component", seed=0).generate(
        **prompts((5,), VOCAB_SIZE),
        max_new_tokens=20,
        do_sample=True,
        top_k=0,
        logits_processor=LogitsProcessorList([recorder]),
    )
    assert recorder.prefixes == [tuple(text[0, :at].tolist()) for at in range(5, 25)]


def test_processors_run_once_for_each_law(models):
    """A member that is never rolled back is asked about each position once."""
    recorder = Recorder()
    schedule = Alternating((3, 2))
    fast = decoder([models[0]] * 2, 2, schedule, seed=0)
    fast.generate(
        **prompts((5,), VOCAB_SIZE),
        max_new_tokens=20,
        do_sample=True,
        top_k=0,
        logits_processor=LogitsProcessorList([recorder]),
    )
    assert fast.statistics.acceptance_rate == 1.0
    asked = [recorder.prefixes.count(prefix) for prefix in set(recorder.prefixes)]
    assert max(asked) == 2  # members
    assert sum(asked) <= 2 * (20 + 5)  # proposals past the end may have been scored


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_processors_and_padded_vocabularies(schedule):
    """Some processors remember the width of the logits that they saw first."""
    words = {f"w{i}": i for i in range(20)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0"))
    )
    models = [toy(0, 32), toy(1, 24), toy(2, 28)]
    draft = {"draft": models[2], "schedule": "speculative"} if schedule == "draft" else {}
    fast = SpeculativeDecoder(
        models[:2],
        **{"schedule": schedule, **draft},
        tokenizers=[tokenizer] * (3 if draft else 2),
        seed=0,
    )
    text = fast.generate(
        **prompts((4, 2), 20),
        max_new_tokens=30,
        do_sample=True,
        top_k=0,
        bad_words_ids=[[3], [5, 6], [7, 7]],
        repetition_penalty=1.1,
    )
    written = text[:, 4:]
    assert written.max() < 20
    assert not (written == 3).any()
    pairs = {pair for row in text.tolist() for pair in itertools.pairwise(row)}
    assert not pairs & {(5, 6), (7, 7)}


def test_each_row_has_its_own_share():
    penalty = RepetitionPenaltyLogitsProcessor(2.0)
    penalty.prompt_ignore_length = torch.tensor([2, 0])  # as transformers after 5.17 is given it
    shared = TemperatureLogitsWarper(0.5)
    first, second = per_row([penalty, shared], 2)
    assert isinstance(first, LogitsProcessorList)
    assert first[0].prompt_ignore_length.tolist() == [2]
    assert second[0].prompt_ignore_length.tolist() == [0]
    assert first[1] is second[1] is shared
    assert penalty.prompt_ignore_length.tolist() == [2, 0]
    assert per_row([penalty], 1)[0][0] is penalty


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale: expected None, got 1.5"),
        (
            {
                "watermarking_config": SynthIDTextWatermarkingConfig(
                    keys=[1, 2, 3], ngram_len=2, sampling_table_size=64
                )
            },
            "logits_processor: expected processors without a history, got "
            "SynthIDTextWatermarkLogitsProcessor",
        ),
    ],
)
def test_stateful_processors_are_refused(options, refusal, models):
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 4, "do_sample": True}
    with pytest.raises(ValueError, match=rf"^generate: {refusal}$"):
        decoder(models, 1, "alternating").generate(**settings, **options)


def test_what_is_derived_from_a_stateful_processor_is_refused(models):
    class Mine(UnbatchedClassifierFreeGuidanceLogitsProcessor): ...

    processors = LogitsProcessorList([Mine(1.5, models[0])])
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match=r"expected processors without a history, got Mine$"):
        decoder(models, 1, "alternating").generate(**settings, logits_processor=processors)


def test_every_stateful_name_exists():
    """A name that transformers has changed would let its processor through."""
    assert all(hasattr(logits_process, name) for name in STATEFUL)


def test_scope_ensemble_takes_warpers_only(models):
    fast = decoder(models, 2, "alternating", scope="ensemble")
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 4, "do_sample": True}
    fast.generate(**settings, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
    message = (
        "generate: logits_processor: expected none but temperature, top-k, top-p and min-p for "
        "scope 'ensemble', got "
    )
    for options, names in (
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        (
            {"typical_p": 0.9, "temperature": 0.7, "top_k": 0},
            "TemperatureLogitsWarper, TypicalLogitsWarper",
        ),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(message + names)}$"):
            fast.generate(**settings, **options)


PENALTY = RepetitionPenaltyLogitsProcessor(1.2)
COLD, FEW, NUCLEUS, LIKELY = (
    TemperatureLogitsWarper(0.7),
    TopKLogitsWarper(5),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.1),
)
KEEP_TWO = TopPLogitsWarper(0.3, min_tokens_to_keep=2)
DAMPED = TopKLogitsWarper(5, filter_value=-2.0)
TYPICAL = TypicalLogitsWarper(0.8)


@pytest.mark.parametrize(
    ("processors", "warp", "rest"),
    [
        ([], Warp(), 0),
        ([COLD], Warp(temperature=0.7), 0),
        ([COLD, FEW, NUCLEUS, LIKELY], Warp(0.7, 5, 0.9, 0.1), 0),
        ([PENALTY, COLD, NUCLEUS], Warp(temperature=0.7, top_p=0.9), 1),
        ([FEW, LIKELY, LogitNormalization()], Warp(top_k=5, min_p=0.1), 0),
        ([COLD, PENALTY], Warp(), 2),  # the user's order is kept
        ([NUCLEUS, FEW], Warp(), 2),
        ([FEW, COLD], Warp(), 2),
        ([COLD, COLD], Warp(), 2),
        ([COLD, FEW, TYPICAL], Warp(), 3),
        ([COLD, KEEP_TWO], Warp(), 2),
        ([COLD, DAMPED], Warp(), 2),
        ([LogitNormalization(), PENALTY], Warp(), 2),  # a penalty depends on the logits' signs
    ],
)
def test_what_runs_inside_the_kernels(processors, warp, rest):
    found, others = split(processors, do_sample=True)
    assert found == warp
    assert others == processors[:rest]
    greedy, greedy_others = split(processors, do_sample=False)
    assert greedy.temperature == 0
    assert greedy_others == others


WARPERS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "fused": (
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        [
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(9),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ],
    ),
    "default": ({}, [TopKLogitsWarper(50)]),
    "typical": (
        {"temperature": 0.7, "top_k": 0, "typical_p": 0.8},
        [TemperatureLogitsWarper(0.7), TypicalLogitsWarper(0.8)],
    ),
    "epsilon": (
        {"temperature": 1.4, "top_k": 9, "epsilon_cutoff": 0.02},
        [TemperatureLogitsWarper(1.4), TopKLogitsWarper(9), EpsilonLogitsWarper(0.02)],
    ),
    "min_tokens_to_keep": (
        {"top_k": 0, "logits_processor": LogitsProcessorList([KEEP_TWO])},
        [KEEP_TWO],
    ),
    "penalised": (
        {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.5},
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(0.7),
            TopPLogitsWarper(0.9),
        ],
    ),
}


def processed(model: Any, text: Tensor, processors: list[LogitsProcessor]) -> Tensor:
    """(V,) log-probabilities after `text` as transformers computes them."""
    scores = LogitsProcessorList(processors)(text, logits_after(model, text).float())
    return scores.log_softmax(-1)[0]


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
@pytest.mark.parametrize("warpers", WARPERS)
def test_warpers_keep_the_law_of_transformers(warpers, schedule, models):
    """Of one model, and of each member of a mixture."""
    options, processors = WARPERS[warpers]
    settings = {"max_new_tokens": 10, "do_sample": True, "return_dict_in_generate": True}
    weights = [0.4, 0.6]
    for size in (1, 2):
        mixed = {"weights": weights} if size == 2 else {}
        fast = decoder(models, size, schedule, seed=3, **mixed)
        output = fast.generate(**prompts((5,), VOCAB_SIZE), **settings, **options)
        text = output.sequences
        for at in range(10):
            prefix, token = text[:, : 5 + at], int(text[0, 5 + at])
            laws = [processed(model, prefix, processors).exp() for model in models[:size]]
            law = laws[0] if size == 1 else sum(w * p for w, p in zip(weights, laws, strict=True))
            assert law[token] > 0
            # Transformers' softmax is of float32, and so are the log-probabilities returned.
            assert abs(output.log_probs[0, at] - law[token].log()) < 2e-5


@pytest.mark.parametrize("warpers", ["fused", "typical", "min_tokens_to_keep", "penalised"])
def test_what_a_warper_removes_is_never_written(warpers, models):
    options, processors = WARPERS[warpers]
    fast = decoder(models, 1, "draft", seed=0)
    inputs = prompts((5,) * 30, VOCAB_SIZE)
    text = fast.generate(**inputs, max_new_tokens=3, do_sample=True, **options)
    removed = 0
    for row in text:
        for at in range(3):
            law = processed(models[0], row[None, : 5 + at], processors)
            removed += int(torch.isneginf(law).sum())
            assert not torch.isneginf(law[row[5 + at]])
    assert removed > 30 * 3


def test_greedy_text_ignores_warpers(models):
    """As in transformers, which makes none where nothing is drawn."""
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 10, "do_sample": False}
    plain = decoder(models, 2, "plain").generate(**settings)
    own = LogitsProcessorList([TemperatureLogitsWarper(3.0), TopKLogitsWarper(1)])
    fast = decoder(models, 2, "alternating")
    assert torch.equal(fast.generate(**settings, logits_processor=own), plain)


def test_a_processor_may_be_any_callable(models):
    def ban(text: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, text[0, -1:], -torch.inf)

    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 12, "do_sample": True}
    text = decoder(models, 2, "alternating", seed=0).generate(
        **settings, logits_processor=LogitsProcessorList([ban])
    )
    written = text[:, max(RAGGED) - 1 :]
    assert not (written[:, 1:] == written[:, :-1]).any()


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_processors_with_a_state_for_each_row_are_refused(schedule, models):
    """They are asked about one row at a time and cannot know which."""
    bias = torch.arange(2.0 * VOCAB_SIZE).reshape(2, VOCAB_SIZE)
    processors = LogitsProcessorList([lambda text, scores: scores + bias])
    settings = {"max_new_tokens": 4, "do_sample": False, "logits_processor": processors}
    fast = decoder(models, 2, schedule)
    message = (
        r"^generate: logits_processor: expected scores \(1, 24\) for the one row asked about, "
        r"got \(2, 24\) from <lambda>$"
    )
    with pytest.raises(ValueError, match=message):
        fast.generate(**prompts((5, 3), VOCAB_SIZE), **settings)
    # One number for a row would be taken for all of the row's logits.
    settings["logits_processor"] = LogitsProcessorList([lambda text, scores: scores[0]])
    with pytest.raises(ValueError, match=r"row asked about, got \(24,\) from <lambda>$"):
        fast.generate(**prompts((5, 3), VOCAB_SIZE), **settings)
