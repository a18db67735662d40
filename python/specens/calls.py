# SPDX-License-Identifier: Apache-2.0
"""What one call of `generate` brings and gets back: prompts, seeds, what is refused, the output.

Transformers hands over whatever its own `generate` prepares. What the loop would lose is refused;
what is empty or says what holds anyway is accepted, whatever its name: see `_check_arguments`. What
the generation config may say is in `loop/generation_config.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specens.loop import generation_config as fields
from specens.loop.run import Run
from specens.loop.statistics import Statistics
from specens.members.cache import is_filled
from specens.members.facts import model_name, rope_switches, unwrapped
from specens.members.probe import ignores
from specens_kernels.refusal import Refusal, shown
from specens_kernels.storage import holds_numbers

# Of a forward: what the prompts are is checked apart, the rest is for the members to say.
_OWN = frozenset(
    {"attention_mask", "position_ids", "cache_position", "logits_to_keep", "use_cache"}
)
# Tokens of the prompt on which a label or a flag is tried.
_TRIED = 8


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    sequences: (B, S) int64. Prompts and generated tokens, padded after a row's end.
    log_probs: (B, S - S_prompt) float32. Log-probability of each generated token under the
        ensemble; NaN past a row's end, and for schedules "component" and "lookahead", which do not
        score with all members.
    statistics: counts and times of the call.
    """

    log_probs: Tensor | None = None
    statistics: Statistics | None = None


def prompt_lengths(
    members: Sequence[Any],
    model: Any,
    input_ids: Tensor,
    generation_config: Any,
    streamer: Any,
    model_kwargs: Mapping[str, Any],
) -> list[int]:
    """The prompts' lengths; refuses what the loop cannot honour."""
    # A wrapper's `generate` is that of the model inside, which is then what calls the loop.
    if not any(unwrapped(model) is unwrapped(member) for member in members):
        raise Refusal(
            "generate", "model", "one of the decoder's members", f"another {type(model).__name__}"
        )
    fields.check(lambda name, default: getattr(generation_config, name, default))
    _check_ids_type("input_ids", input_ids)
    _check_arguments(members, input_ids, model_kwargs)
    if streamer is not None and len(input_ids) != 1:
        raise Refusal("generate", "streamer", "batch size 1", len(input_ids))
    lengths = _row_lengths(input_ids, model_kwargs.get("attention_mask"))
    position_ids, width = model_kwargs.get("position_ids"), input_ids.shape[1]
    if position_ids is not None and not _are_implied(position_ids, lengths, width):
        raise Refusal("generate", "position_ids", "those that attention_mask implies", "others")
    return lengths


def _row_lengths(input_ids: Tensor, mask: Any) -> list[int]:
    """Tokens of each row; the padding stands before them."""
    batch, width = input_ids.shape
    lengths = [width] * batch
    if mask is not None:
        _check_mask(mask, input_ids)
        ones = mask == 1  # of any dtype
        if not bool((ones | (mask == 0)).all()):
            raise Refusal("generate", "attention_mask", "zeros and ones", "other numbers")
        if bool((ones != ones.cummax(1).values).any()):
            raise Refusal("generate", "attention_mask", "left padding only", "zeros after ones")
        lengths = ones.sum(1).tolist()
    if min(lengths, default=0) < 1:
        raise Refusal("generate", "input_ids", "at least one token a row", "none")
    return lengths


def _check_mask(mask: Any, input_ids: Tensor) -> None:
    """Refuse what is not of the prompts' shape; transformers drops a mask of ones, whatever its."""
    if not _is_dense(mask) or mask.shape != input_ids.shape:
        expected = f"a tensor (B={len(input_ids)}, S={input_ids.shape[1]})"
        raise Refusal("generate", "attention_mask", expected, _described(mask))


def check_ids(input_ids: Tensor, lengths: Sequence[int], size: int) -> None:
    """Refuse ids that a member's embedding lacks; padding may be anything."""
    places = torch.arange(-input_ids.shape[1], 0, device=input_ids.device)
    ids = input_ids[places >= -torch.tensor(lengths, device=input_ids.device)[:, None]]
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= size:
        got = least if least < 0 else most
        raise Refusal("generate", "input_ids", f"ids in [0, {size})", got)


def check_types(inputs: Any, streamer: Any, options: Mapping[str, Any]) -> None:
    """Refuse, before transformers takes them apart, values that are not of their types.

    Args:
        inputs, streamer: as `generate` was given them. options: its other arguments.
    """
    ids = inputs if inputs is not None else options.get("input_ids")
    for name, given in (("inputs", inputs), ("input_ids", options.get("input_ids"))):
        if given is not None:
            _check_ids_type(name, given)
    if inputs is not None and options.get("input_ids") is not None:
        raise Refusal("generate", "inputs", "None with input_ids", _described(inputs))
    mask = options.get("attention_mask")
    if mask is not None and ids is not None:
        _check_mask(mask, ids)
    methods = (getattr(streamer, name, None) for name in ("put", "end"))
    if streamer is not None and (isinstance(streamer, type) or not all(map(callable, methods))):
        raise Refusal("generate", "streamer", "an object with put and end", _described(streamer))
    for name in ("logits_processor", "stopping_criteria"):
        given = options.get(name)
        if given is not None and not (isinstance(given, list) and all(map(callable, given))):
            raise Refusal("generate", name, "a list of functions", _described(given))
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise Refusal("generate", "generation_config", "a GenerationConfig", _described(config))


def _check_ids_type(name: str, given: Any) -> None:
    """Refuse what no embedding takes."""
    if not _is_dense(given) or given.dim() != 2 or given.dtype not in (torch.int64, torch.int32):
        expected = "a tensor (B, S) of int64 or int32"
        if isinstance(given, Mapping):
            expected += " (what a tokenizer returns goes in as **inputs)"
        raise Refusal("generate", name, expected, _described(given))


def _is_dense(given: Any) -> bool:
    """Whether it is a tensor with a value at each place."""
    if not isinstance(given, Tensor) or given.is_nested:
        return False
    return holds_numbers(given)


def _described(given: Any) -> str:
    """A value of a wrong type, in a word or two."""
    if isinstance(given, Tensor) and not given.is_nested:
        words = [str(tuple(given.shape)), str(given.dtype).removeprefix("torch.")]
        if given.layout != torch.strided:
            words.append(str(given.layout).removeprefix("torch."))
        if given.is_meta:
            words.append("on device 'meta'")
        return " ".join(words)
    return shown(given) if isinstance(given, str | int | float) else type(given).__name__


def check_rope(members: Sequence[Any], lengths: Sequence[int], width: int, max_length: int) -> None:
    """Refuse texts that grow past where a rotary embedding changes: caches have the old one.

    Args:
        members: of the ensemble.
        lengths: of the prompts. width: their columns.
        max_length: columns that a row has at most.
    """
    for member in members:
        for kind, tokens in rope_switches(member):
            # The last token of a text is not read, nor is that of a prompt at first.
            longest = max_length - width + max(lengths) - 1
            beyond = kind == "longrope" and min(lengths) - 1 > tokens
            if longest > tokens and not beyond:
                expected = (
                    f"texts of {tokens + 1} tokens at most, where the rotary embedding ({kind}) of "
                    f"{model_name(member)} changes"
                )
                if kind == "longrope":
                    expected += ", or longer prompts in all rows"
                raise Refusal("generate", "max_length", expected, longest + 1)


def _check_arguments(
    members: Sequence[Any], input_ids: Tensor, model_kwargs: Mapping[str, Any]
) -> None:
    """Refuse arguments with content: the members are given tokens and nothing else."""
    for name, value in model_kwargs.items():
        if name in _OWN or _is_empty(value):
            continue
        if isinstance(value, Cache):
            raise Refusal("generate", name, "an empty cache", "a filled one")
        zeros = _are_zeros(value, input_ids)
        if zeros or value is True:
            tokens, tried = input_ids[:1, -_TRIED:], value[:1, -_TRIED:] if zeros else value
            if all(ignores(member, name, tokens, tried) for member in members):
                continue
        expected = "nothing beyond the tokens, which are all that members are given"
        raise Refusal("generate", name, expected, type(value).__name__)


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in it, however deep: no image, no state, no flag."""
    if isinstance(value, Tensor):
        return value.numel() == 0
    if isinstance(value, Cache):
        return not is_filled(value)
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    return value is None or value is False


def _are_zeros(value: Any, input_ids: Tensor) -> bool:
    """Whether it is the label 0 for each token: text, as a rule."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return value.shape == input_ids.shape and not bool(value.any())


def _are_implied(position_ids: Any, lengths: Sequence[int], width: int) -> bool:
    """Whether every row counts from 0 at its first token; padding may have any position.

    position_ids: (B or 1, S), or (..., B or 1, S) where a model has several for a token.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() < 2:
        return False
    if position_ids.shape[-1] != width or position_ids.shape[-2] not in (1, len(lengths)):
        return False
    pads = width - torch.tensor(lengths, device=position_ids.device)[:, None]
    implied = torch.arange(width, device=position_ids.device) - pads
    return bool(((position_ids == implied) | (implied < 0)).all())


def seeds_of(seed: int | list[int] | None, input_ids: Tensor) -> Tensor:
    """(B,) int64: one seed a row, on the device of the prompts."""
    batch = len(input_ids)
    if seed is None:
        seeds = torch.randint(2**63 - 1, (batch,))
    elif isinstance(seed, int):
        seeds = torch.tensor(seed, dtype=torch.int64) + torch.arange(batch)
    elif len(seed) == batch:
        seeds = torch.tensor(seed, dtype=torch.int64)
    else:
        raise Refusal("generate", "seed", f"{batch} seeds, one a row", len(seed))
    return seeds.to(input_ids.device)


def output_of(run: Run, width: int, generation_config: Any) -> Any:
    """(B, S) sequences, or a `SpeculativeOutput`, as the generation config asks."""
    rows = sorted(run.finished, key=lambda row: row.index)
    columns = max(row.pad + row.length for row in rows)
    pad = getattr(generation_config, "_pad_token_tensor", None)
    sequences = run.text.tokens[:, :columns].clone()
    for row in rows:
        if row.pad + row.length < columns:
            # Transformers fills in the end-of-sequence token where no padding token is set.
            sequences[row.index, row.pad + row.length :] = 0 if pad is None else int(pad)
    if not generation_config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(
        sequences=cast(Any, sequences),
        log_probs=run.text.log_probs[:, width:columns].to("cpu", copy=True),
        statistics=run.statistics,
    )
