# SPDX-License-Identifier: Apache-2.0
"""Drafts made of the models there are: without some layers, or quantised.

A draft decides how fast a text is written and never which law it has: everything here may be
approximate, but a draft must propose from the law that its logits say. `layer_skip` and `quantised`
return models, for `SpeculativeDecoder(draft=...)`. To add a way to make a draft, add a function
that returns a causal LM and leaves the user's as it was.
"""

import copy
import itertools
from collections.abc import Iterable, Sequence
from importlib import import_module
from numbers import Integral
from typing import Any

import torch

from specens.members.facts import check_causal_lm, model_name, text_config, unwrapped
from specens_kernels import Refusal


def layer_skip(model: Any, keep: Sequence[int] | int) -> Any:
    """The model without some of its layers, as a draft for itself.

    Every parameter and buffer is the model's own; what is new is the modules' objects and the
    configuration, so that keys and values of the layers that stay are numbered from 0.

    Args:
        model: a causal LM; it is not modified.
        keep: indices of the layers that stay, ascending; or how many: that many, spread evenly, the
            first and the last one among them.
    Returns:
        A causal LM of the same class.
    Raises:
        ValueError: not a causal LM, no list of its layers is found, or no such layers.

    Source: self-speculative decoding, arXiv:2309.08168; LayerSkip, arXiv:2404.16710.
    """
    check_causal_lm(model)
    draft = _shared_copy(unwrapped(model))
    owner, name, layers = _layers("layer_skip", draft)
    kept = _kept(keep, len(layers))
    setattr(owner, name, torch.nn.ModuleList(layers[i] for i in kept))
    config = text_config(draft)
    # Before the number of layers: a configuration compares their lengths with it.
    for entry, value in list(vars(config).items()):
        if "layer" in entry and isinstance(value, (list, tuple)) and len(value) == len(layers):
            setattr(config, entry, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)
    for i, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i
    draft.config._name_or_path = f"{model_name(draft)}-{len(kept)}-of-{len(layers)}-layers"
    return draft


def quantised(model: Any) -> Any:
    """The model with the weights of its linear layers in int8, one scale a row, as a draft.

    Parameters of other modules are the model's own, the embedding's too.

    Args:
        model: a causal LM; it is not modified.
    Returns:
        A causal LM of the same class.
    Raises:
        Refusal: torchao is not installed; not a causal LM, or its layers have no `torch.nn.Linear`.

    Source: weight-only quantisation by torchao; ML-SpecQD, arXiv:2503.13565, drafts in this way.
    """
    check_causal_lm(model)
    try:
        quantization = import_module("torchao.quantization")
    except ImportError as error:
        expected = "it installed (pip install torchao)"
        raise Refusal("quantised", "torchao", expected, "none") from error
    draft = _shared_copy(unwrapped(model))
    _, _, layers = _layers("quantised", draft)
    if not any(isinstance(module, torch.nn.Linear) for module in layers.modules()):
        kinds = sorted({type(m).__name__ for m in layers.modules() if hasattr(m, "weight")})
        raise Refusal("quantised", "model", "layers with torch.nn.Linear", ", ".join(kinds))
    # The inductor's settings are the user's.
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(draft, config)
    draft.config._name_or_path = f"{model_name(draft)}-int8"
    return draft


def _shared_copy(model: Any) -> Any:
    """New modules and a new configuration around the same parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _layers(op: str, model: Any) -> tuple[Any, str, torch.nn.ModuleList]:
    """Where the decoder's layers are: the module that holds them, its name for them, and they."""
    count = text_config(model).num_hidden_layers
    # Outer modules come first: a layer's own lists, of experts say, come after the layers.
    for module in model.get_decoder().modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return module, name, child
    raise Refusal(
        op, "model", f"a list of its {count} layers inside", f"{type(model).__name__} without one"
    )


def _kept(keep: Any, count: int) -> list[int]:
    """Indices of the layers that stay."""
    layers: list[Any] = list(keep) if isinstance(keep, Iterable) else []
    if isinstance(keep, int) and not isinstance(keep, bool) and keep <= count:
        layers = [round(i * (count - 1) / max(keep - 1, 1)) for i in range(keep)]
    known = all(isinstance(i, Integral) for i in layers) and set(layers) <= set(range(count))
    if not layers or not known or layers != sorted(set(layers)):
        raise Refusal(
            "layer_skip",
            "keep",
            f"1 to {count}, or some of 0 to {count - 1} in ascending order",
            repr(keep),
        )
    return [int(i) for i in layers]
