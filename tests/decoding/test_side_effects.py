# SPDX-License-Identifier: Apache-2.0
"""A call changes nothing of the user's and leaves no memory behind."""

import contextlib
import copy
import gc
import itertools
import warnings
from typing import Any

import pytest
import torch
from decoders import VOCAB_SIZE, decoder, same
from torch import Tensor
from toys import noisy, prompts, toy
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList

from specens import SpeculativeDecoder

pytestmark = pytest.mark.usefixtures("one_thread")


def snapshot(*things: Any) -> list[Any]:
    """All that a user could find changed."""
    state: list[Any] = []
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            state.append({name: value.clone() for name, value in thing.state_dict().items()})
            state.append([(name, p.requires_grad, p.grad) for name, p in thing.named_parameters()])
            for name, module in thing.named_modules():
                kept = {key: value for key, value in vars(module).items() if key[0] != "_"}
                hooks = [len(value) for key, value in vars(module).items() if "hooks" in key]
                state.append((name, module.training, sorted(kept), hooks))
                state.append(module.forward.__qualname__)
            state.append(thing.config.to_dict())
            state.append(thing.config._attn_implementation)
            state.append(thing.generation_config.to_dict())
        elif isinstance(thing, PreTrainedTokenizerFast):
            state += [thing.get_vocab(), thing.backend_tokenizer.to_str(), thing.padding_side]
        else:
            state.append(copy.deepcopy(thing.to_dict()))
    return state


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
    belongings = (*models, tokenizer, config)
    before = snapshot(*belongings)
    dice = torch.get_rng_state()
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
    assert unchanged(before, snapshot(*belongings))
    assert unchanged(given, inputs)
    assert torch.equal(dice, torch.get_rng_state())  # a seed was given
    models[0].config.vocab_size += 1
    assert not unchanged(before, snapshot(*belongings))


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


class Stop(BaseException):
    """As a KeyboardInterrupt, which would end the test run."""


@pytest.mark.parametrize("schedule", ["plain", "alternating", "draft"])
@pytest.mark.parametrize("fails", [None, OSError, Stop])
def test_models_that_are_being_trained_write_as_they_would_in_evaluation(schedule, fails):
    """Dropout and gradient checkpointing are on again after the call, however it ends."""
    models = [toy(seed, VOCAB_SIZE, kind="gpt2", n_layer=2) for seed in range(3)]
    settings = {**prompts((5, 2), VOCAB_SIZE), "max_new_tokens": 10, "do_sample": False}
    expected = decoder(models, 2, schedule).generate(**settings)
    for model in models:
        model.requires_grad_(True).train()
        # The newer name; transformers 5.17 has the older one alone.
        name = "activation_checkpointing_enable"
        getattr(model, name, model.gradient_checkpointing_enable)()
    models[0].transformer.h[0].eval()  # flags that differ come back one by one
    modules = [module for model in models for module in model.modules()]
    before = [module.training for module in modules]
    fast = decoder(models, 2, schedule)
    same(fast.generate(**settings), expected)
    same(models[0].generate(**settings, custom_generate=fast), expected)
    if fails is not None:
        during: list[bool] = []

        def end(*_: Any, **__: Any) -> bool:
            during.extend(module.training for module in modules)
            if len(during) > 3 * len(modules):
                raise fails
            return False

        with pytest.raises(fails):
            fast.generate(**settings, stopping_criteria=StoppingCriteriaList([end]))
        used = {module for model in fast.models for module in model.modules()}
        seen = zip(during, itertools.cycle(modules), strict=False)
        assert not any(was for was, module in seen if module in used)
    assert [module.training for module in modules] == before
    assert all(layer.gradient_checkpointing for layer in models[0].transformer.h)


def live_tensors() -> dict[str, int]:
    """Tensors that anything still refers to, and their bytes."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects do not like to be asked for their type
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return {"tensors": len(tensors), "bytes": sum(t.numel() * t.element_size() for t in tensors)}


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
