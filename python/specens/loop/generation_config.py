# SPDX-License-Identifier: Apache-2.0
"""What becomes of each field of transformers' `GenerationConfig`: obeyed, idle or refused.

Calls are checked against the one table, `FIELDS`; `tuning/compare.py` takes from it the values with
which a field has no part in the law. A field that a newer transformers adds is refused, where it is
said, until it has an entry here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import GenerationConfig

from specens.loop.named import integers, is_integer, is_number
from specens_kernels.refusal import Refusal, Unsupported, shown

OBEYED, IDLE, REFUSED = "obeyed", "idle", "refused"

# The call says it, or nothing does: no value of it is neutral.
OPEN = object()


@dataclass(frozen=True)
class Kind:
    """The values of a field, where it is not None; transformers' own check has the other ranges.

    expected: in words.
    holds: whether it is one of them, of any library.
    """

    expected: str
    holds: Callable[[Any], bool]


def _plain(value: Any) -> Any:
    """A tensor or an array as numbers and lists, where it has any."""
    has_numbers = hasattr(value, "tolist") and not getattr(value, "is_meta", False)
    return value.tolist() if has_numbers else value


def _scalar(value: Any) -> Any:
    """The number in a tensor or an array that has one; all else as it is."""
    plain = _plain(value)
    while plain is not value and isinstance(plain, list) and len(plain) == 1:
        plain = plain[0]
    return plain


def _is_real(value: Any) -> bool:
    number = _scalar(value)
    return is_number(number) and not math.isnan(number)


def _is_count(value: Any) -> bool:
    return is_integer(_scalar(value))


def _is_penalty(value: Any) -> bool:
    return _is_real(value) and (value == 1 or (isinstance(value, float) and value > 0))


def _is_id(value: Any) -> bool:
    number = _scalar(value)
    return is_integer(number) and -(2**63) <= number < 2**63


def _are_ids(value: Any) -> bool:
    value = _plain(value)
    return isinstance(value, list | tuple | set | frozenset | range) and all(map(_is_id, value))


def _is_word(value: Any) -> bool:
    """A text of one token or more: what transformers takes for bad words and biased ones."""
    return isinstance(value, list | tuple) and bool(value) and min(integers(value) or [-1]) >= 0


def _are_words(value: Any) -> bool:
    lists = isinstance(value, list) and bool(value)
    return lists and all(isinstance(each, list) and _is_word(each) for each in value)


def _are_biases(value: Any) -> bool:
    """Texts and a float for each: pairs, or a dict with tuples for keys."""
    if isinstance(value, dict):
        pairs: list[Any] = list(value.items())
        kind: type = tuple
    else:
        pairs, kind = (value if isinstance(value, list) else []), list
    return bool(pairs) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and isinstance(pair[0], kind)
        and _is_word(pair[0])
        and isinstance(pair[1], float)
        and _is_real(pair[1])
        for pair in pairs
    )


def _is_decay(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_real, value))


# Of a field that another function checks, or that transformers does not look at.
ANY = Kind("anything", lambda value: True)
COUNT = Kind("an integer", _is_count)
COUNT_FROM_1 = Kind("an integer >= 1", lambda value: _is_count(value) and value >= 1)
NUMBER = Kind("a number", _is_real)
PENALTY = Kind("a float > 0", _is_penalty)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
ID = Kind("an integer", _is_id)
IDS = Kind("a list of integers", _are_ids)
ID_OR_IDS = Kind("an integer or a list of them", lambda value: _is_id(value) or _are_ids(value))
WORDS = Kind("a list of lists of integers >= 0, none of them empty", _are_words)
BIASES = Kind("a list of pairs, a list of integers >= 0 and a float each", _are_biases)
DECAY = Kind("two numbers, where it begins and its factor", _is_decay)
EARLY = Kind("True, False or 'never'", lambda value: isinstance(value, bool) or value == "never")
WATERMARK = Kind(
    "a WatermarkingConfig", lambda value: callable(getattr(value, "construct_processor", None))
)


@dataclass(frozen=True)
class Field:
    """One field of `GenerationConfig`.

    verdict: "obeyed": the text is what transformers' own loop makes of it, of the ensemble. "idle":
        it speaks of beams, assistants or caches that this loop does not have, and whatever it says,
        the text is the same. "refused": the text would be another, or what is asked for not there.
    neutral: with this value it has no part in the law, nor in what is returned; `OPEN` is none.
    allowed: of a refused one, the values that ask for nothing.
    expected: of a refused one, those values in words, and the way out where there is one.
    kind: of another one, which values it has.
    """

    verdict: str
    neutral: Any = OPEN
    allowed: tuple[Any, ...] = ()
    expected: str = ""
    kind: Kind = ANY


def _obeyed(kind: Kind, neutral: Any = OPEN) -> Field:
    return Field(OBEYED, neutral, kind=kind)


def _refused(neutral: Any, expected: str = "None", *others: Any) -> Field:
    return Field(REFUSED, neutral, (None, neutral, *others), expected)


_OUTPUT = "False, since log_probs are what is returned of them"

FIELDS: dict[str, Field] = {
    # Length and end.
    "max_length": _obeyed(COUNT),
    "max_new_tokens": _obeyed(COUNT_FROM_1),
    "min_length": _obeyed(COUNT, 0),
    "min_new_tokens": _obeyed(COUNT, None),
    "max_time": _obeyed(NUMBER, None),
    # `arguments.strings_of` checks them.
    "stop_strings": _obeyed(ANY, ()),
    "eos_token_id": _obeyed(ID_OR_IDS),
    "pad_token_id": _obeyed(ID),
    "bos_token_id": _obeyed(ID_OR_IDS),
    "decoder_start_token_id": Field(IDLE, kind=ID_OR_IDS),
    # Which way of decoding it is.
    "do_sample": _obeyed(FLAG),
    "num_beams": _refused(1, "1"),
    "num_beam_groups": Field(IDLE),
    "early_stopping": Field(IDLE, kind=EARLY),
    "length_penalty": Field(IDLE),
    "diversity_penalty": Field(IDLE),
    "low_memory": Field(IDLE),
    "constraints": _refused(None),
    "force_words_ids": _refused(None),
    "penalty_alpha": _refused(None, "None", 0),
    "dola_layers": _refused(None),
    "token_healing": _refused(
        False, "False, since model.heal_tokens(input_ids, tokenizer) makes the healed prompt"
    ),
    # What drafts: the decoder's schedule and draft say it, once for all calls.
    "is_assistant": _refused(False, "False"),
    "prompt_lookup_num_tokens": _refused(None, "None, since schedule='lookup' drafts so"),
    "assistant_early_exit": _refused(None, "None, since layer_skip makes such a draft"),
    "use_mtp": _refused(None, "None", False),
    "speculation_type": _refused(None, "None, since the decoder's schedule is what drafts"),
    "assistant_ensemble_weight": _refused(None, "None, since the decoder has weights"),
    "num_assistant_tokens": Field(IDLE),
    "num_assistant_tokens_schedule": Field(IDLE),
    "assistant_confidence_threshold": Field(IDLE),
    "max_matching_ngram_size": Field(IDLE),
    "assistant_lookbehind": Field(IDLE),
    "target_lookbehind": Field(IDLE),
    # Warpers that are part of the law.
    "temperature": _obeyed(NUMBER),
    "top_k": _obeyed(COUNT),
    "top_p": _obeyed(NUMBER),
    "min_p": _obeyed(NUMBER),
    # Processors, which run on each member's logits at each position.
    "top_h": _obeyed(NUMBER, None),
    "typical_p": _obeyed(NUMBER, 1.0),
    "epsilon_cutoff": _obeyed(NUMBER, 0.0),
    "eta_cutoff": _obeyed(NUMBER, 0.0),
    "repetition_penalty": _obeyed(PENALTY, 1.0),
    "encoder_repetition_penalty": _obeyed(PENALTY, 1.0),
    "no_repeat_ngram_size": _obeyed(COUNT, 0),
    "encoder_no_repeat_ngram_size": _obeyed(COUNT, 0),
    "bad_words_ids": _obeyed(WORDS, None),
    "sequence_bias": _obeyed(BIASES, None),
    "forced_bos_token_id": _obeyed(ID_OR_IDS, None),
    "forced_eos_token_id": _obeyed(ID_OR_IDS, None),
    "suppress_tokens": _obeyed(IDS, None),
    "begin_suppress_tokens": _obeyed(IDS, None),
    "exponential_decay_length_penalty": _obeyed(DECAY, None),
    "remove_invalid_values": _obeyed(FLAG, False),
    "watermarking_config": _obeyed(WATERMARK, None),
    "guidance_scale": _refused(None, "None", 1),
    # Every law is normalised anyway.
    "renormalize_logits": Field(IDLE),
    # What comes out.
    "num_return_sequences": _obeyed(COUNT, 1),
    "return_dict_in_generate": _obeyed(FLAG, False),
    "output_scores": _refused(False, _OUTPUT),
    "output_logits": _refused(False, _OUTPUT),
    "output_attentions": _refused(False, _OUTPUT),
    "output_hidden_states": _refused(False, _OUTPUT),
    # Caches and compilation: each member keeps its own state. "paged" never reaches the loop, and
    # other text comes of keys and values that are quantised.
    "use_cache": Field(IDLE),
    "cache_implementation": _refused(
        None,
        "None, 'dynamic', 'static' or 'offloaded'",
        "dynamic",
        "static",
        "offloaded",
        "offloaded_static",
        "sliding_window",
        "hybrid",
        "hybrid_chunked",
    ),
    "cache_config": Field(IDLE),
    "max_cache_len": Field(IDLE, kind=COUNT),
    "prefill_chunk_size": Field(IDLE),
    "compile_config": Field(IDLE),
    "disable_compile": Field(IDLE),
    "continuous_batching_config": Field(IDLE),
    "transformers_version": Field(IDLE),
}


@cache
def unknown_fields() -> dict[str, Any]:
    """Fields of the installed transformers that have no entry, and what they are by default."""
    known = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    return {name: value for name, value in known.items() if name[0] != "_" and name not in FIELDS}


def check(value_of: Callable[[str, Any], Any]) -> None:
    """Refuse what the loop cannot honour.

    Args:
        value_of: of a field's name and what it is if nothing was said, the field's value.
    Raises:
        Refusal: a field has a value of a wrong type. Unsupported, which is one: it asks for what
            this loop does not do.
    """
    for name, field in FIELDS.items():
        value = value_of(name, None)
        if field.verdict == REFUSED:
            plain = _plain(value)
            if not any(value is each or plain == each for each in field.allowed):
                raise Unsupported("generate", name, field.expected, shown(value))
        elif value is not None and not field.kind.holds(value):
            raise Refusal("generate", name, field.kind.expected, shown(value))
    for name, default in unknown_fields().items():
        value = value_of(name, default)
        if value is not None and value != default:
            expected = f"{default!r}, for a field that this version does not know"
            raise Unsupported("generate", name, expected, shown(value))
