# SPDX-License-Identifier: Apache-2.0
"""What `verify` is told: laws of a fresh forward, and drafts from the laws they are said to have.

The oracle is a forward of the whole text without a cache.
"""

from typing import Any

import pytest
import torch
from decoders import SCHEDULES, VOCAB_SIZE, decoder
from torch import Tensor
from toys import logits_after, noisy, prompts, toy

from specens.loop import run as run_module
from specens.loop.run import Run
from specens_kernels import Law, mix

pytestmark = pytest.mark.usefixtures("one_thread")

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
        scores = list(zip(which, logits, strict=True))
        if "draft_logits" in options:
            scores.append((len(run.members) - 1, options["draft_logits"]))
        for k, (row, count) in enumerate(
            zip(verification.rows, verification.num_drafts, strict=True)
        ):
            text = run.text.tokens[row.index, row.pad : row.pad + row.length + count][None]
            for member, tensor in scores:
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
