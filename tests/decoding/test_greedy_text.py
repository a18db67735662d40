# SPDX-License-Identifier: Apache-2.0
"""Greedy text is what plain decoding writes, however it is drafted.

The oracle for one model is transformers' own `generate`; for several it is schedule "plain", whose
law test_schedules.py proves. To test an architecture, add it to KINDS.
"""

from typing import Any

import pytest
import torch
from decoders import RAGGED, SCHEDULES, VOCAB_SIZE, decoder, same
from toys import noisy, prompts, toy

pytestmark = pytest.mark.usefixtures("one_thread")

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
