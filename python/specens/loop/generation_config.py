# SPDX-License-Identifier: Apache-2.0
"""What becomes of each field of transformers' `GenerationConfig`: obeyed, idle or refused.

Calls are checked against the one table, `FIELDS`; `tuning/compare.py` takes from it the values with
which a field has no part in the law. A field that a newer transformers adds is refused, where it is
said, until it has an entry here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import GenerationConfig

from specens_kernels.refusal import Unsupported

OBEYED, IDLE, REFUSED = "obeyed", "idle", "refused"

# The call says it, or nothing does: no value of it is neutral.
OPEN = object()


@dataclass(frozen=True)
class Field:
    """One field of `GenerationConfig`.

    verdict: "obeyed": the text is what transformers' own loop makes of it, of the ensemble. "idle":
        it speaks of beams, assistants or caches that this loop does not have, and whatever it says,
        the text is the same. "refused": the text would be another, or what is asked for not there.
    neutral: with this value it has no part in the law, nor in what is returned; `OPEN` is none.
    allowed: of a refused one, the values that ask for nothing.
    expected: of a refused one, those values in words, and the way out where there is one.
    """

    verdict: str
    neutral: Any = OPEN
    allowed: tuple[Any, ...] = ()
    expected: str = ""


def _refused(neutral: Any, expected: str = "None", *others: Any) -> Field:
    return Field(REFUSED, neutral, (None, neutral, *others), expected)


_OUTPUT = "False, since log_probs are what is returned of them"

FIELDS: dict[str, Field] = {
    # Length and end.
    "max_length": Field(OBEYED),
    "max_new_tokens": Field(OBEYED),
    "min_length": Field(OBEYED, 0),
    "min_new_tokens": Field(OBEYED, None),
    "max_time": Field(OBEYED, None),
    "stop_strings": Field(OBEYED, ()),
    "eos_token_id": Field(OBEYED),
    "pad_token_id": Field(OBEYED),
    "bos_token_id": Field(OBEYED),
    "decoder_start_token_id": Field(IDLE),
    # Which way of decoding it is.
    "do_sample": Field(OBEYED),
    "num_beams": _refused(1, "1"),
    "num_beam_groups": Field(IDLE),
    "early_stopping": Field(IDLE),
    "length_penalty": Field(IDLE),
    "diversity_penalty": Field(IDLE),
    "low_memory": Field(IDLE),
    "constraints": _refused(None),
    "force_words_ids": _refused(None),
    "penalty_alpha": _refused(None, "None", 0),
    "dola_layers": _refused(None),
    "token_healing": _refused(False, "False"),
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
    "temperature": Field(OBEYED),
    "top_k": Field(OBEYED),
    "top_p": Field(OBEYED),
    "min_p": Field(OBEYED),
    # Processors, which run on each member's logits at each position.
    "top_h": Field(OBEYED, None),
    "typical_p": Field(OBEYED, 1.0),
    "epsilon_cutoff": Field(OBEYED, 0.0),
    "eta_cutoff": Field(OBEYED, 0.0),
    "repetition_penalty": Field(OBEYED, 1.0),
    "encoder_repetition_penalty": Field(OBEYED, 1.0),
    "no_repeat_ngram_size": Field(OBEYED, 0),
    "encoder_no_repeat_ngram_size": Field(OBEYED, 0),
    "bad_words_ids": Field(OBEYED, None),
    "sequence_bias": Field(OBEYED, None),
    "forced_bos_token_id": Field(OBEYED, None),
    "forced_eos_token_id": Field(OBEYED, None),
    "suppress_tokens": Field(OBEYED, None),
    "begin_suppress_tokens": Field(OBEYED, None),
    "exponential_decay_length_penalty": Field(OBEYED, None),
    "remove_invalid_values": Field(OBEYED, False),
    "watermarking_config": Field(OBEYED, None),
    "guidance_scale": _refused(None, "None", 1),
    # Every law is normalised anyway.
    "renormalize_logits": Field(IDLE),
    # What comes out.
    "num_return_sequences": Field(OBEYED, 1),
    "return_dict_in_generate": Field(OBEYED, False),
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
    "max_cache_len": Field(IDLE),
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
        Unsupported: a field asks for what this loop does not do.
    """
    for name, field in FIELDS.items():
        if field.verdict == REFUSED:
            value = value_of(name, None)
            if not any(value is each or value == each for each in field.allowed):
                raise Unsupported("generate", name, field.expected, repr(value))
    for name, default in unknown_fields().items():
        value = value_of(name, default)
        if value is not None and value != default:
            expected = f"{default!r}, for a field that this version does not know"
            raise Unsupported("generate", name, expected, repr(value))
