# SPDX-License-Identifier: Apache-2.0
"""What `SpeculativeDecoder` writes is what plain `generate` writes, however it is drafted.

The oracle for one model is transformers' own `generate`; for several it is schedule "plain", whose
law test_schedules.py proves; for what members say, a fresh forward without a cache. To test an
architecture, add it to KINDS.
"""

import contextlib
import copy
import dataclasses
import gc
import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from toys import first_difference, logits_after, noisy, prompts, toy
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specens import SpeculativeDecoder, SpeculativeOutput, Statistics
from specens import schedules as schedules_module
from specens.loop import run as run_module
from specens.loop.run import Run
from specens.schedules import Alternating, LookAhead, Speculative
from specens_kernels import Acceptance, Law, mix

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 24
RAGGED = (5, 9, 3, 1, 7)
SCHEDULES = ("speculative", "draft", "alternating")


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Four members that agree now and then, and a draft that does so more often."""
    first = toy(0, VOCAB_SIZE, spread=3, amplify=30, num_hidden_layers=2)
    return [first, *(noisy(first, noise, seed=seed) for seed, noise in enumerate((1, 1, 1, 0.5)))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token; token 0 pads, and one is the word that transformers asks about."""
    words = {"<pad>": 0, "abcdef": 1} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def decoder(models: list[Any], size: int, schedule: str, gamma: Any = 3, **options: Any):
    """A decoder of the first members; schedule "draft" is "speculative" with the last model."""
    if schedule == "draft":
        options = {"draft": models[-1], **options}
        schedule = "speculative"
    kind = schedules_module.SCHEDULES[schedule]
    arguments = {field.name for field in dataclasses.fields(kind)}
    mine = {name: options.pop(name) for name in list(options) if name in arguments}
    if "tokens" in arguments:
        mine = {"tokens": gamma, **mine}
    return SpeculativeDecoder(models[:size], schedule=kind(**mine), **options)


def num_written(texts: Tensor, width: int, ends: list[int]) -> Tensor:
    """(B,) tokens of each row after the prompt, the one that ended it included."""
    ended = torch.isin(texts[:, width:], torch.tensor(ends))
    return (ended.cumsum(1) - ended.long() == 0).sum(1)


def same(text: Tensor, other: Tensor) -> bool:
    assert torch.equal(text, other), first_difference(text, other)
    return True


# --- who drafts, unless it is said ----------------------------------------------------------------


def test_the_cheapest_member_drafts():
    large, small, middle = (
        toy(seed, VOCAB_SIZE, hidden_size=size) for seed, size in enumerate((48, 16, 32))
    )
    members = [large, small, middle]
    assert SpeculativeDecoder(members).schedule == Alternating((1, 1, 1), (1, 2, 0))
    fast = SpeculativeDecoder(members, schedule=Alternating(tokens=4))
    assert fast.schedule == Alternating((4, 1, 1), (1, 2, 0))
    fast = SpeculativeDecoder(members, schedule=Alternating(tokens=(3, 2, 1), order=(2, 0, 1)))
    assert fast.schedule == Alternating((3, 2, 1), (2, 0, 1))
    fast = SpeculativeDecoder(members, schedule="speculative")
    assert fast.schedule == Speculative(4, 1)
    fast = SpeculativeDecoder(members, schedule=Speculative(proposer=2))
    assert fast.schedule == Speculative(4, 2)
    fast = SpeculativeDecoder([small], schedule="speculative", draft=large)
    assert fast.schedule == Speculative(4, 1)
    assert SpeculativeDecoder(members).weights == (1 / 3, 1 / 3, 1 / 3)


def test_looking_ahead_goes_by_every_members_size():
    """Who asks another member runs it: four that are asked cost more than one."""
    cheap = toy(0, VOCAB_SIZE, hidden_size=8)
    dear = [toy(seed, VOCAB_SIZE, hidden_size=64, num_hidden_layers=2) for seed in range(1, 5)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (cheap, dear[0])]
    assert sizes[1] > 20 * sizes[0]
    two = SpeculativeDecoder([cheap, dear[0]], weights=[0.2, 0.8], schedule="lookahead")
    five = SpeculativeDecoder([cheap, *dear], schedule="lookahead")
    assert two.schedule.proposer == five.schedule.proposer == 0
    assert sum(five.schedule.ahead) < sum(two.schedule.ahead)
    fixed = SpeculativeDecoder([cheap, *dear], schedule=LookAhead(ahead=3))
    assert fixed.schedule == LookAhead(16, 0, 3)
    with pytest.raises(ValueError, match=r"^lookahead: token_cost: expected None beside ahead"):
        SpeculativeDecoder([cheap, *dear], schedule=LookAhead(ahead=3, token_cost=0.2))


# --- greedy text ----------------------------------------------------------------------------------

ENSEMBLES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "mixture of 2": (2, {"weights": [0.4, 0.6]}),
    "contrastive": (
        2,
        {"ensemble": "product", "weights": [1.5, -0.5], "plausibility": 0.1},
    ),
    "product of 3": (3, {"ensemble": "product", "scope": "ensemble"}),
    "mixture of 4": (4, {"weights": [0.4, 0.3, 0.2, 0.1], "scope": "ensemble"}),
}


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("ragged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_text_does_not_depend_on_the_schedule(ensemble, ragged, models):
    size, options = ENSEMBLES[ensemble]
    inputs = prompts(RAGGED if ragged else (5,), VOCAB_SIZE)
    settings = {**inputs, "max_new_tokens": 18, "do_sample": False}
    plain = decoder(models, size, "plain", **options).generate(**settings)
    accepted, tested = 0, 0
    for schedule in SCHEDULES:
        for gamma in (1, 2, 3, 5, 8):
            fast = decoder(models, size, schedule, gamma, **options)
            same(fast.generate(**settings), plain)
            accepted += sum(fast.statistics.accepted)
            tested += sum(fast.statistics.tested)
    assert 0 < accepted < tested or size == 1  # a member alone accepts all that it drafts


@pytest.mark.parametrize("gammas", [(1, 3, 2, 2), (4, 1, 1, 1), (2, 2, 2, 2)])
def test_greedy_text_does_not_depend_on_who_proposes_how_much(gammas, models):
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 18, "do_sample": False}
    plain = decoder(models, 4, "plain").generate(**settings)
    fast = decoder(models, 4, "alternating", gammas, order=(2, 0, 3, 1))
    same(fast.generate(**settings), plain)
    assert 0 < fast.statistics.acceptance_rate < 1


KINDS = ("llama", "qwen2", "qwen3", "mistral_sliding", "gemma3_text", "gpt2", "opt")


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_writes_what_generate_writes(kind):
    model = toy(0, 64, kind=kind, spread=3, amplify=20, dtype=torch.float32)
    models = [model, noisy(model, 0.2)]
    inputs = prompts((5, 17, 9, 1, 12), 64)
    for rows in (slice(0, 1), slice(None)):
        settings = {name: value[rows] for name, value in inputs.items()}
        settings |= {"max_new_tokens": 20, "do_sample": False}
        expected = model.generate(**settings)
        for schedule in ("alternating", "draft"):
            fast = decoder(models, 1, schedule)
            assert fast.members[0].__class__.__name__ == "SlotMember"
            same(fast.generate(**settings), expected)
        if rows == slice(None):
            assert 0 < fast.statistics.acceptance_rate < 1


@pytest.mark.parametrize(("kind", "mode"), [("bloom", "CropMember"), ("lfm2", "ReplayMember")])
def test_models_that_run_row_by_row_write_it_too(kind, mode):
    model = toy(0, 64, kind=kind, spread=3, amplify=20)
    models = [model, noisy(model, 0.5)]
    inputs = prompts((5, 12), 64)
    settings = {"max_new_tokens": 16, "do_sample": False}
    fast = decoder(models, 1, "draft")
    assert fast.members[0].__class__.__name__ == mode
    text = fast.generate(**inputs, **settings)
    assert 0 < fast.statistics.acceptance_rate < 1
    for row, length in enumerate((5, 12)):  # without padding, which is no such model's strength
        prompt = inputs["input_ids"][row : row + 1, -length:]
        mask = torch.ones_like(prompt)
        same(
            text[row, -length - 16 :][None], model.generate(prompt, attention_mask=mask, **settings)
        )


# --- acceptance -----------------------------------------------------------------------------------

WARPERS = ({}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.1})


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_draft_that_is_the_target_is_always_accepted(temperature, schedule, models):
    model = models[0]
    for place, warpers in enumerate(WARPERS):
        scope = ("member", "ensemble")[place % 2]
        fast = decoder([model, model], 1 if schedule == "draft" else 2, schedule, scope=scope)
        fast.generate(
            **prompts((5, 1, 3), VOCAB_SIZE),
            max_new_tokens=20,
            do_sample=True,
            temperature=temperature,
            **{"top_k": 0, **warpers},
            seed=place,
        )
        assert fast.statistics.acceptance_rate == 1.0
        assert sum(fast.statistics.tested) > 30


def test_a_draft_that_is_warped_twice_is_not(monkeypatch):
    """Transformers does so: still the right law, but drafts are refused."""
    sample, verify = run_module.sample, run_module.verify
    temperature = 0.5

    def sample_twice(logits: list[Tensor], *arguments: Any) -> Any:
        return sample([logits[0] / temperature], *arguments)

    def verify_twice(*arguments: Any, draft_logits: Tensor, **options: Any) -> Any:
        return verify(*arguments, draft_logits=draft_logits / temperature, **options)

    monkeypatch.setattr(run_module, "sample", sample_twice)
    monkeypatch.setattr(run_module, "verify", verify_twice)
    model = toy(0, VOCAB_SIZE)
    fast = decoder([model, model], 1, "draft")
    settings = {"do_sample": True, "top_k": 0, "temperature": temperature, "seed": 0}
    fast.generate(**prompts((5, 5, 5), VOCAB_SIZE), max_new_tokens=20, **settings)
    assert 0.5 < fast.statistics.acceptance_rate < 0.95


# --- what members say -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["plain", "component", *SCHEDULES])
@pytest.mark.parametrize("kind", ["llama", "mistral_sliding"])
def test_laws_are_those_of_a_fresh_forward(schedule, kind, monkeypatch):
    """After any number of rejections, in rows of any length."""
    model = toy(0, 16, kind=kind, dtype=torch.float64)
    models = [model, noisy(model, 1.0), noisy(model, 1.0, seed=1)]
    compared = 0
    now: list[Any] = []
    verify, verify_op = Run._verify, run_module.verify

    def watched(self: Run, verification: Any) -> Any:
        now[:] = [self, verification]
        return verify(self, verification)

    def compare(logits: list[Tensor], *arguments: Any, **options: Any) -> Any:
        nonlocal compared
        run, verification = now
        which = verification.members or tuple(run.ensemble)
        said = list(zip(which, logits, strict=True))
        if "draft_logits" in options:
            said.append((len(run.members) - 1, options["draft_logits"]))
        for k, (row, count) in enumerate(
            zip(verification.rows, verification.num_drafts, strict=True)
        ):
            text = run.text.tokens[row.index, row.pad : row.pad + row.length + count][None]
            for member, tensor in said:
                with torch.no_grad():
                    fresh = models[member](text, use_cache=False).logits[0, row.length - 1 :]
                own = options.get("draft_logits") is tensor
                laws = count + (options["bonus"] and not own)
                # Both round the same sums in another order, at 2^-53 each time.
                assert torch.allclose(tensor[k, :laws], fresh[:laws], rtol=1e-10, atol=1e-10)
                compared += laws
        return verify_op(logits, *arguments, **options)

    monkeypatch.setattr(Run, "_verify", watched)
    monkeypatch.setattr(run_module, "verify", compare)
    fast = decoder(models, 2, schedule, seed=0)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 24}
    fast.generate(**prompts((5, 12, 1), 16), **settings)
    counts = fast.statistics
    assert compared >= counts.num_tokens * (1 if schedule == "component" else 2)
    if schedule in SCHEDULES:
        assert sum(counts.tested) - sum(counts.accepted) > 4, "too few rejections"


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_log_probs_are_the_ensembles(schedule, scope, do_sample, models):
    weights = (0.3, 0.7)
    warpers = {"temperature": 0.7, "top_p": 0.9, "top_k": 5} if do_sample else {}
    fast = decoder(models, 2, schedule, scope=scope, weights=weights, seed=0)
    inputs = prompts((5, 2), VOCAB_SIZE)
    output = fast.generate(
        **inputs, max_new_tokens=12, do_sample=do_sample, return_dict_in_generate=True, **warpers
    )
    law = Law(weights, scope=scope, **warpers)  # greedy text is that of the bare ensemble
    for row, length in enumerate((5, 2)):
        for at in range(12):
            text = output.sequences[row : row + 1, 5 - length : 5 + at]
            logits = [logits_after(model, text)[:, None] for model in models[:2]]
            expected = mix(logits, law)[0][0, 0, output.sequences[row, 5 + at]]
            # The op returns float32.
            assert abs(output.log_probs[row, at] - expected) < 1e-5 * (1 + abs(expected))


# --- where text ends ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ensembles_end_where_the_plain_ensemble_ends(schedule, models):
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    for ends in ([1, 2, 3], [11, 12]):
        settings |= {"eos_token_id": ends, "pad_token_id": 0}
        plain = decoder(models, 3, "plain").generate(**settings)
        same(decoder(models, 3, schedule, 4).generate(**settings), plain)


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
def test_prompts_of_one_token(schedule, models):
    expected = decoder(models, 2, "plain").generate(
        torch.tensor([[5]]), max_new_tokens=10, do_sample=False
    )
    fast = decoder(models, 2, schedule)
    same(fast.generate(torch.tensor([[5]]), max_new_tokens=10, do_sample=False), expected)
    text = fast.generate(torch.tensor([[5], [6]]), max_new_tokens=10, do_sample=False)
    same(text[:1], expected)


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
@pytest.mark.parametrize("lengths", [(6,), (6, 2, 4)])
def test_text_may_fill_every_position(schedule, lengths):
    """The position after the last token is not asked for, not even by what is rejected."""
    model = toy(0, VOCAB_SIZE, kind="gpt2", n_positions=6 + 14)
    models = [model, noisy(model, 1.0), noisy(model, 1.0, seed=1)]
    settings = {**prompts(lengths, VOCAB_SIZE), "max_new_tokens": 14, "do_sample": False}
    expected = decoder(models, 2, "plain").generate(**settings)
    same(decoder(models, 2, schedule, 5).generate(**settings), expected)
    one = decoder(models[::2], 1, schedule, 5).generate(**settings)
    same(one, model.generate(**settings))


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


# --- entry points ---------------------------------------------------------------------------------


def test_generate_takes_the_decoder(models):
    fast = decoder(models, 2, "alternating", seed=3)
    settings = {**prompts(RAGGED, VOCAB_SIZE), "max_new_tokens": 12, "do_sample": True, "top_k": 0}
    expected = fast.generate(**settings)
    for model in models[:2]:
        same(model.generate(**settings, custom_generate=fast), expected)
        same(
            model.generate(**settings, custom_generate=fast, seed=4),
            fast.generate(**settings, seed=4),
        )
    inputs = settings.pop("input_ids")
    same(fast.generate(inputs, **settings), expected)


class Adapted(torch.nn.Module):
    """A wrapper as PEFT makes them: its forward names nothing, and it changes the logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def get_base_model(self) -> Any:
        return self.base_model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output = self.base_model(*args, **kwargs)
        output.logits = output.logits.roll(1, -1)
        return output


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_members_may_be_wrapped(schedule, models):
    """What runs is the wrapper; what `generate` is called on may be it or the model inside."""
    settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": False}
    bare = decoder(models, 2, schedule)
    expected = bare.generate(**settings)
    # The default backend needs a C++ compiler.
    compiled = torch.compile(models[0], backend="eager")
    with torch.compiler.set_stance("force_eager"):
        fast = decoder([compiled, *models[1:]], 2, schedule)
        assert fast.members[0].model is compiled
        assert {type(member).__name__ for member in fast.members} == {"SlotMember"}
        same(fast.generate(**settings), expected)
        for model in (compiled, models[0], models[1]):
            same(model.generate(**settings, custom_generate=fast), expected)
        same(bare.models[0].generate(**settings, custom_generate=bare), expected)

    adapted = Adapted(models[0])
    fast = decoder([adapted, *models[1:]], 2, schedule)
    before = adapted.calls
    text = fast.generate(**settings)
    assert adapted.calls - before == fast.members[0].calls > 0
    assert not torch.equal(text, expected)
    for model in (adapted, models[0]):
        same(model.generate(**settings, custom_generate=fast), text)


def test_pipeline_takes_the_decoder(models, tokenizer):
    fast = decoder(models, 2, "alternating")
    write = pipeline("text-generation", models[0], tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "do_sample": False}
    texts = ["w3 w2 w5", "w4"]
    found = write(texts, custom_generate=fast, batch_size=2, **settings)
    for text, [answer] in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        expected = fast.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        assert answer["generated_text"] == text + tokenizer.decode(
            expected, skip_special_tokens=True
        )


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_streamers_get_every_token(skip_prompt, schedule, models, tokenizer):
    fast = decoder(models, 2, schedule)
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=60)
    texts: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: texts.append(fast.generate(**settings, streamer=streamer))
    )
    thread.start()
    pieces = list(streamer)  # ends only if `end` is called
    thread.join()
    written = texts[0][0, 5 if skip_prompt else 0 :]
    assert "".join(pieces) == tokenizer.decode(written)
    assert len(pieces) > 3


def test_a_streamer_gets_what_transformers_would_give_it(models, tokenizer, capsys):
    class Log(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer)
            self.puts: list[Tensor] = []
            self.ends = 0

        def put(self, value: Tensor) -> None:
            self.puts.append(value.clone())
            super().put(value)

        def end(self) -> None:
            self.ends += 1
            super().end()

    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    theirs, ours = Log(), Log()
    expected = models[0].generate(**settings, streamer=theirs)
    printed = capsys.readouterr().out
    decoder(models, 1, "draft").generate(**settings, streamer=ours)
    assert capsys.readouterr().out == printed == tokenizer.decode(expected[0]) + "\n"
    assert ours.ends == theirs.ends == 1
    same(ours.puts[0], settings["input_ids"])
    assert all(put.dim() == 1 and put.device.type == "cpu" for put in ours.puts[1:])
    same(torch.cat(ours.puts[1:]), expected[0, 5:])


def test_a_streamer_does_not_arrive_through_the_models_generate(models):
    """Why README sends streamers to `decoder.generate`; where this fails, it need not any more."""
    sink = Meddler(lambda: None)
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": False}
    models[0].generate(**settings, streamer=sink, custom_generate=decoder(models, 1, "draft"))
    assert sink.puts == 1


def test_a_streamer_takes_one_row(models):
    class Sink:
        def put(self, value: Tensor) -> None: ...
        def end(self) -> None: ...

    fast = decoder(models, 2, "alternating")
    with pytest.raises(ValueError, match=r"^generate: streamer: expected batch size 1, got 2$"):
        fast.generate(**prompts((5, 2), VOCAB_SIZE), max_new_tokens=4, streamer=Sink())


class Meddler:
    """A streamer that calls `act` once, at the first tokens written, and keeps what it raised."""

    def __init__(self, act: Any) -> None:
        self.act = act
        self.raised: list[Exception] = []
        self.puts = 0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the prompt came first
            try:
                self.act()
            except RuntimeError as error:
                self.raised.append(error)

    def end(self) -> None: ...


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_call_at_a_time(elsewhere, models):
    """A nested or concurrent call is refused at once and changes nothing of the first."""
    fast = decoder(models, 2, "alternating")
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 12, "do_sample": False}
    expected = fast.generate(**settings)

    def again() -> None:
        fast.generate(**prompts((3, 2), VOCAB_SIZE), max_new_tokens=4, do_sample=False)

    def from_a_thread() -> None:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(again).result(timeout=60)

    meddler = Meddler(from_a_thread if elsewhere else again)
    same(fast.generate(**settings, streamer=meddler), expected)
    (error,) = meddler.raised
    assert str(error).startswith("generate: decoder: expected one call at a time, got another")
    again()  # now it may


def test_a_call_that_fails_leaves_the_decoder_usable(models):
    class Broken(Meddler):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if self.puts > 2:
                raise OSError("full")

    fast = decoder(models, 2, "alternating")
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 12, "do_sample": False}
    expected = fast.generate(**settings)
    with pytest.raises(OSError, match="full"):
        fast.generate(**settings, streamer=Broken(lambda: copy.deepcopy(fast).generate(**settings)))
    same(fast.generate(**settings), expected)


# --- what is returned -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["plain", "component", *SCHEDULES])
@pytest.mark.parametrize("ends", [None, [2, 3, 4, 5]])
def test_statistics_add_up(schedule, ends, models):
    fast = decoder(models, 2, schedule, seed=0)
    assert fast.statistics is None
    settings = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    if ends is not None:
        settings["eos_token_id"] = ends
    output = fast.generate(**prompts(RAGGED, VOCAB_SIZE), **settings, return_dict_in_generate=True)
    counts = fast.statistics
    assert output.statistics is counts
    assert len(counts.members) == len(fast.members) == (3 if schedule == "draft" else 2)
    per_member = zip(counts.accepted, counts.tested, counts.drafted, strict=True)
    assert all(0 <= accepted <= tested <= drafted for accepted, tested, drafted in per_member)
    positions = list(zip(*counts.by_position, strict=True)) or [(0,), (0,)]
    assert sum(positions[0]) == sum(counts.tested)
    assert sum(positions[1]) == sum(counts.accepted)
    assert all(accepted <= tested for tested, accepted in counts.by_position)
    # The second draft is tested iff the first is kept and there is a second.
    pairs = itertools.pairwise(counts.by_position)
    assert all(after[0] <= before[1] for before, after in pairs)
    # All that was emitted was drafted and accepted, or drawn by `verify`; an end may cut it short.
    emitted = sum(counts.accepted) + counts.num_replaced
    assert emitted == counts.num_tokens if ends is None else emitted >= counts.num_tokens
    assert counts.num_tokens == (~output.log_probs.isnan()).sum() or schedule == "component"
    assert counts.num_tokens == num_written(output.sequences, max(RAGGED), ends or []).sum()
    assert counts.num_tokens < 100 if ends else counts.num_tokens == 100
    assert 0 < counts.turns <= counts.num_tokens
    assert counts.status == 0
    assert counts.prefill_seconds > 0 < counts.decode_seconds
    assert counts.tokens_per_second == counts.num_tokens / counts.decode_seconds
    assert counts.calls_per_token == sum(counts.calls) / counts.num_tokens
    ratios = {"acceptance_rate", "calls_per_token", "tokens_per_second"}
    assert set(counts.as_dict()) == {*vars(counts), *ratios}
    first = counts.as_dict()
    fast.generate(**prompts(RAGGED, VOCAB_SIZE), **settings)
    assert fast.statistics is not counts
    assert output.statistics.as_dict() == first or schedule in ("plain", "component")


def test_nothing_drafted_has_no_acceptance_rate():
    counts = Statistics(["a"])
    assert counts.acceptance_rate != counts.acceptance_rate
    assert counts.tokens_per_second != counts.tokens_per_second
    assert counts.calls_per_token == 0


@pytest.mark.parametrize("schedule", ["component", "alternating"])
def test_what_return_dict_holds(schedule, models):
    fast = decoder(models, 2, schedule, seed=1)
    settings = {**prompts((5, 2), VOCAB_SIZE), "max_new_tokens": 20, "do_sample": True, "top_k": 0}
    ends = [2, 3, 4, 5, 6]
    settings |= {"eos_token_id": ends, "pad_token_id": 0}
    output = fast.generate(**settings, return_dict_in_generate=True)
    assert isinstance(output, SpeculativeOutput)
    same(output.sequences, fast.generate(**settings))
    assert output.log_probs.shape == (2, output.sequences.shape[1] - 5)
    assert output.log_probs.dtype == torch.float32
    if schedule == "component":
        assert output.log_probs.isnan().all()  # no token is scored by all members
    else:
        lengths = num_written(output.sequences, 5, ends)
        assert lengths[0] != lengths[1]
        written = torch.arange(output.log_probs.shape[1]) < lengths[:, None]
        same(output.log_probs.isnan(), ~written)
        assert (output.log_probs.nan_to_num(0) <= 0).all()
    assert output.scores is None
    output.sequences[0, 0] = 7  # ordinary tensors, not those of inference mode
    assert not output.log_probs.is_inference()


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


def snapshot(*things: Any) -> list[Any]:
    """All that a user could find changed."""
    found: list[Any] = []
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            found.append({name: value.clone() for name, value in thing.state_dict().items()})
            found.append([(name, p.requires_grad, p.grad) for name, p in thing.named_parameters()])
            for name, module in thing.named_modules():
                kept = {key: value for key, value in vars(module).items() if key[0] != "_"}
                hooks = [len(value) for key, value in vars(module).items() if "hooks" in key]
                found.append((name, module.training, sorted(kept), hooks))
                found.append(module.forward.__qualname__)
            found.append(thing.config.to_dict())
            found.append(thing.config._attn_implementation)
            found.append(thing.generation_config.to_dict())
        elif isinstance(thing, PreTrainedTokenizerFast):
            found += [thing.get_vocab(), thing.backend_tokenizer.to_str(), thing.padding_side]
        else:
            found.append(copy.deepcopy(thing.to_dict()))
    return found


def unchanged(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(
            unchanged(before[key], after[key]) for key in before
        )
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(unchanged, before, after))
    return torch.equal(before, after) if isinstance(before, Tensor) else before == after


def test_nothing_of_the_users_is_modified(tokenizer):
    models = [toy(0, VOCAB_SIZE), toy(1, VOCAB_SIZE, kind="gpt2"), toy(2, VOCAB_SIZE)]
    config = GenerationConfig(max_new_tokens=9, do_sample=True, top_k=3, pad_token_id=0)
    mine = (*models, tokenizer, config)
    before = snapshot(*mine)
    state = torch.get_rng_state()
    fast = SpeculativeDecoder(
        models[:2], schedule="speculative", draft=models[2], tokenizers=[tokenizer] * 3, seed=0
    )
    inputs = prompts((5, 2), VOCAB_SIZE)
    given = {name: value.clone() for name, value in inputs.items()}
    fast.generate(**inputs, generation_config=config)
    fast.generate(**inputs, max_new_tokens=5, do_sample=False, repetition_penalty=1.3)
    fast.generate(
        **prompts((5,), VOCAB_SIZE),
        max_new_tokens=5,
        stop_strings="w2",
        tokenizer=tokenizer,
        do_sample=False,
    )
    assert unchanged(before, snapshot(*mine))
    assert unchanged(given, inputs)
    assert torch.equal(state, torch.get_rng_state())  # a seed was given
    models[0].config.vocab_size += 1
    assert not unchanged(before, snapshot(*mine))


def test_training_mode_and_gradients_are_left_alone(models):
    model = copy.deepcopy(models[0])
    settings = {
        **prompts((5, 2), VOCAB_SIZE),
        "max_new_tokens": 10,
        "do_sample": True,
        "top_k": 0,
        "seed": 0,
    }
    expected = decoder([model, models[1]], 2, "alternating").generate(**settings)
    model.train().requires_grad_(True)
    with torch.enable_grad():
        fast = decoder([model, models[1]], 2, "alternating")
        output = fast.generate(**settings, return_dict_in_generate=True)
        assert torch.is_grad_enabled()
        same(output.sequences, expected)  # no dropout in this one
        assert not output.log_probs.requires_grad
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        loss = model(output.sequences, labels=output.sequences).loss  # as in a training loop
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def live_tensors() -> dict[str, int]:
    """Tensors that anything still refers to, and their bytes."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects do not like to be asked for their type
        found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return {"tensors": len(found), "bytes": sum(t.numel() * t.element_size() for t in found)}


@pytest.mark.parametrize(
    ("kind", "mode"), [("llama", "SlotMember"), ("bloom", "CropMember"), ("lfm2", "ReplayMember")]
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_call_leaves_no_memory_behind(kind, mode, fails):
    """Keys, values and laws are given back when it ends or fails, though the decoder lives on."""

    def end(*_: Any, **__: Any) -> bool:
        if fails:
            raise OSError("full")
        return False

    model = toy(0, VOCAB_SIZE, kind=kind)
    fast = decoder([model, noisy(model, 0.5)], 2, "alternating")
    assert {type(member).__name__ for member in fast.members} == {mode}
    settings = {**prompts((5, 2), VOCAB_SIZE), "max_new_tokens": 10, "do_sample": False}
    settings["stopping_criteria"] = StoppingCriteriaList([end])
    before = live_tensors()
    for _ in range(2):
        with pytest.raises(OSError, match="full") if fails else contextlib.nullcontext():
            fast.generate(**settings)
    after = live_tensors()
    # A member without rows holds a few empty tensors, which have no bytes.
    assert after["bytes"] <= before["bytes"]
    assert after["tensors"] <= before["tensors"] + 2 * len(fast.members)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "decoder: weights: expected 2 numbers, got 1"),
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
                f"alternating: tokens: expected integers >= 1, got {shown}",
            )
            for tokens, shown in (("0", "0"), ("2,0", r"\[2, 0\]"), ("", "''"), ("2.0", "'2.0'"))
        ),
        (
            {"schedule": "alternating:tokens=2,1,1"},
            r"alternating: tokens: expected 1 or 2 integers, got \(2, 1, 1\)",
        ),
        (
            {"schedule": "speculative:tokens=2,1"},
            "speculative: tokens: expected an integer >= 1, got '2,1'",
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
            "speculative: proposer: expected an integer >= 0, got -1",
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


def test_numbers_may_be_those_of_numpy(models):
    def both(number: Any, real: Any) -> Tensor:
        fast = [
            SpeculativeDecoder(
                models[:2],
                schedule=Alternating(tokens=[number(2), number(1)], order=[number(1), number(0)]),
                weights=[real(0.25), real(0.75)],
                acceptance=Acceptance("lenient", lenience=real(0.5)),
                seed=number(7),
            ),
            SpeculativeDecoder(
                models[:2],
                schedule=Speculative(tokens=number(2), proposer=number(1)),
                ensemble="product",
                plausibility=real(0.25),
            ),
        ]
        settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": True}
        return torch.cat(
            [
                fast[0].generate(**settings),
                fast[0].generate(**settings, seed=[number(4), number(9)]),
                fast[1].generate(**settings, seed=number(3)),
            ]
        )

    expected = both(int, float)
    same(both(np.int64, np.float32), expected)
    same(both(np.uint8, np.float64), expected)
    fast = decoder(models, 2, "alternating", gamma=np.array([2, 1]))
    assert fast.schedule.tokens == (2, 1)
    settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": True}
    text = fast.generate(**settings, seed=[5, 6])
    for seeds in (np.array([5, 6]), torch.tensor([5, 6])):
        same(fast.generate(**settings, seed=seeds), text)
    same(fast.generate(**settings, seed=5), text)


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
        match=r"^decoder: draft: expected None for schedule 'alternating', got LlamaForCausalLM$",
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
                f"generate: seed: expected an integer or 2, one a row, got {shown}",
            )
            for wrong, shown in ((1.5, "1.5"), (True, "True"), ([1, "a"], r"\[1, 'a'\]"))
        ),
        *(
            (
                options,
                NotImplementedError,
                f"generate: generation_config: expected greedy_search or sample, got {mode}",
            )
            for options, mode in (
                ({"num_beams": 2}, "beam_search"),
                ({"num_beams": 2, "do_sample": True}, "beam_sample"),
                ({"num_beams": 2, "num_beam_groups": 2}, "group_beam_search"),
                ({"num_beams": 2, "force_words_ids": [[3]]}, "constrained_beam_search"),
                ({"constraints": [3]}, "constrained_beam_search"),
                ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
                ({"dola_layers": "high"}, "dola_generation"),
                ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
            )
        ),
        (
            {"assistant_model": torch.nn.Linear(1, 1)},
            ValueError,
            "generate: assistant_model: expected None, since .* drafts, got Linear",
        ),
        *(
            (
                {name: True, "return_dict_in_generate": True},
                NotImplementedError,
                f"generate: {name}: expected False, got True; .* returned.*",
            )
            for name in (
                "output_scores",
                "output_logits",
                "output_attentions",
                "output_hidden_states",
            )
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
            "generate: inputs_embeds: expected None, got Tensor",
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


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_degenerate_logits_are_reported(schedule, models, caplog):
    """NaN logits count as no mass, set a status bit, and are named in the log."""
    broken = copy.deepcopy(models[0])
    fast = decoder([broken, models[1], broken], 2, schedule, seed=0)
    broken.lm_head.weight[4] = torch.nan  # a model that is broken from the start is refused
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 0}
    text = fast.generate(**prompts((3, 2), VOCAB_SIZE), **settings)
    assert text.shape == (2, 11)
    assert fast.statistics.status & 1
    assert "generate: degenerate logits: NAN_LOGITS\n" in caplog.text
