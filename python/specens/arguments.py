# SPDX-License-Identifier: Apache-2.0
"""What the user says to the decoder, as values of one type each, or a refusal in one line.

A function here takes what was given and returns what the decoder works with; none knows a model's
inside. To take another argument, add its function.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from specens.loop.named import integers, is_number, untensored
from specens.members.facts import check_causal_lm
from specens.members.weight_head import WeightHead
from specens_kernels import Acceptance, Refusal
from specens_kernels.refusal import shown

# Row b has seed + b in 64 bits.
_SEEDS = range(-(2**63), 2**63)


def models_of(argument: str, given: Any) -> list[Any]:
    """Causal LMs, of a list of them."""
    if isinstance(given, torch.nn.Module | str) or not isinstance(given, Sequence):
        got = shown(given) if isinstance(given, str) else type(given).__name__
        raise Refusal("decoder", argument, "a list of models", got)
    if not given:
        raise Refusal("decoder", argument, "at least one model", "none")
    for i, model in enumerate(given):
        check_causal_lm(model, "decoder", f"{argument}[{i}]")
    return list(given)


def drafts_of(given: Any) -> list[Any]:
    """Causal LMs, of None, one of them or a list."""
    if given is None:
        return []
    if isinstance(given, Sequence) and not isinstance(given, str):
        return models_of("draft", given) if given else []
    check_causal_lm(given, "decoder", "draft")
    return [given]


def weights_of(given: Any, size: int) -> tuple[float, ...]:
    """Of each of `size` members; those that a head says are not numbers yet."""
    if given is None or isinstance(given, WeightHead):
        return tuple([1 / size] * size)
    listed = untensored(given)
    is_list = isinstance(listed, Sequence) and not isinstance(listed, bytes | bytearray)
    numbers = [_float(each) for each in listed] if is_list else []
    if not numbers or None in numbers:
        expected = f"{size} numbers, one per member, or a WeightHead"
        raise Refusal("decoder", "weights", expected, shown(given))
    if len(numbers) != size:
        raise Refusal("decoder", "weights", f"{size} numbers, one per member", len(numbers))
    return tuple(number for number in numbers if number is not None)


def number_of(argument: str, given: Any) -> float:
    """A number, whose range is another's to check."""
    number = _float(given)
    if number is None:
        raise Refusal("decoder", argument, "a number", shown(given))
    return number


def _float(given: Any) -> float | None:
    """A number of any library, or None."""
    value = untensored(given)
    if not is_number(value):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def word_of(argument: str, given: Any, *known: str) -> str:
    """One of some words."""
    if not isinstance(given, str) or given not in known:
        raise Refusal("decoder", argument, " or ".join(map(repr, known)), shown(given))
    return given


def tokenizers_of(given: Any) -> list[Any] | None:
    """Of None or a list of tokenizers; how many there must be is another's to check."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence):
        got = shown(given) if isinstance(given, str) else type(given).__name__
        raise Refusal("decoder", "tokenizers", "a list, one per model", got)
    for i, each in enumerate(given):
        check_tokenizer("decoder", f"tokenizers[{i}]", each)
    return list(given)


def check_tokenizer(op: str, argument: str, given: Any) -> None:
    """Refuse what is no tokenizer."""
    if isinstance(given, type) or not callable(getattr(given, "get_vocab", None)):
        got = shown(given) if isinstance(given, str) else type(given).__name__
        raise Refusal(op, argument, "a tokenizer of transformers", got)


def acceptances_of(given: Any, levels: int) -> list[Acceptance]:
    """One for each level; a single one is the last level's, the others' is "rejection"."""
    if isinstance(given, str | Acceptance):
        return [Acceptance()] * (levels - 1) + [Acceptance.of(given)]
    if not isinstance(given, list | tuple):
        raise Refusal("decoder", "acceptance", "a rule or a list of them", shown(given))
    if len(given) != levels:
        raise Refusal("decoder", "acceptance", f"one rule or a list of {levels}", len(given))
    acceptances = [Acceptance.of(each) for each in given]
    if any(each.rule.remembers for each in acceptances[:-1]):
        expected = "a rule without a memory below the last level"
        raise Refusal("decoder", "acceptance", expected, acceptances)
    return acceptances


def seed_of(op: str, given: Any) -> int | list[int] | None:
    """None, one integer or a list of them; each in 64 bits."""
    if given is None:
        return None
    value = untensored(given)
    seeds = integers(value)
    if seeds is None:
        raise Refusal(op, "seed", "an integer or a list of them, one a row", shown(given))
    for seed in seeds:
        if seed not in _SEEDS:
            raise Refusal(op, "seed", "integers in [-2^63, 2^63), 64 bits", seed)
    return seeds if isinstance(value, Iterable) else seeds[0]


def strings_of(given: Any) -> list[str]:
    """Stop strings, of None, one or several."""
    if given is None:
        return []
    strings = [given] if isinstance(given, str) else given
    listed: list[Any] = list(strings) if isinstance(strings, Iterable) else [None]
    if not all(isinstance(each, str) and each for each in listed):
        expected = "a string or a list of them, none of them empty"
        raise Refusal("generate", "stop_strings", expected, shown(given))
    return listed
