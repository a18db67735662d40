# SPDX-License-Identifier: Apache-2.0
"""What a model says of itself: its name, its vocabulary, its configuration, what it takes.

Read through the wrappers of torch.compile and PEFT. To ask a model something else, add a function.
"""

import inspect
from os import PathLike
from typing import Any

import torch

from specens_kernels import Refusal


def check_causal_lm(model: Any, op: str = "member", argument: str = "model") -> None:
    """Refuse what is not a decoder-only language model with a head and weights, in one line."""
    config, is_module = getattr(model, "config", None), isinstance(model, torch.nn.Module)
    if isinstance(model, str | PathLike):
        fault = f"the name {str(model)!r}; AutoModelForCausalLM.from_pretrained loads it"
    elif model is None:
        fault = "None"
    elif (
        not is_module
        or config is None
        or not callable(getattr(model, "get_output_embeddings", None))
    ):
        fault = f"{type(model).__name__}, which is no transformers model"
    elif getattr(config, "is_encoder_decoder", False):
        fault = f"{type(model).__name__}, an encoder-decoder"
    elif model.get_output_embeddings() is None or not model.can_generate():
        fault = f"{type(model).__name__}, which has no causal LM head"
    elif _is_on_meta(model):
        fault = f"{type(model).__name__} on device 'meta', without weights"
    else:
        return
    raise Refusal(op, argument, "a causal LM", fault)


def _is_on_meta(model: Any) -> bool:
    """Whether its weights are nowhere; those that accelerate brings when they are needed are."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return False
    return any(parameter.is_meta for parameter in model.parameters())


def model_name(model: Any) -> str:
    """The last part of the model's path or repository, else its class name."""
    path = str(getattr(model.config, "_name_or_path", "") or "").rstrip("/")
    return path.rsplit("/", 1)[-1] or type(model).__name__


def vocab_size(model: Any) -> int:
    """Columns of the model's logits, padding included."""
    head: Any = model.get_output_embeddings()
    size = getattr(head, "out_features", None)  # quantised weights have packed shapes
    return int(size if size is not None else head.weight.shape[0])


def text_config(model: Any) -> Any:
    """The configuration of the language model inside, which is the model's own as a rule."""
    return model.config.get_text_config(decoder=True)


def rope_switches(model: Any) -> list[tuple[str, int]]:
    """(kind, tokens) of each rotary embedding that longer texts are read with another one of.

    Longer than that, "longrope" reads the whole text with other frequencies, and "dynamic" with
    others at every length.
    """
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    switches = []
    for each in layers:
        kind = str(each.get("rope_type"))
        if kind == "longrope":
            tokens = each.get("original_max_position_embeddings")
            tokens = tokens or getattr(config, "original_max_position_embeddings", None)
        else:
            tokens = getattr(config, "max_position_embeddings", None) if "dynamic" in kind else None
        if tokens:
            switches.append((kind, int(tokens)))
    return switches


def unwrapped(model: Any) -> Any:
    """The transformers model inside the wrappers of torch.compile and PEFT, or the model itself.

    For names and identity only: what runs is the wrapper.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def forward_arguments(model: Any) -> set[str]:
    """Names the model's forward takes; a wrapper's are those of the model inside."""
    return set(inspect.signature(unwrapped(model).forward).parameters)


def num_parameters(model: Any) -> int:
    """How many numbers a forward goes through, as the schedules compare models."""
    return sum(parameter.numel() for parameter in model.parameters())
