# SPDX-License-Identifier: Apache-2.0
"""The ways in: `decoder.generate`, a model's own `generate`, a wrapped model and a pipeline."""

from typing import Any

import pytest
import torch
from decoders import RAGGED, SCHEDULES, VOCAB_SIZE, decoder, same
from toys import prompts
from transformers import pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


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
    answers = write(texts, custom_generate=fast, batch_size=2, **settings)
    for text, [answer] in zip(texts, answers, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        expected = fast.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        assert answer["generated_text"] == text + tokenizer.decode(
            expected, skip_special_tokens=True
        )
