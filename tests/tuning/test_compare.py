# SPDX-License-Identifier: Apache-2.0
"""Comparisons are fair: interleaved, within a round, and of text that no config shapes.

What transformers adds to a generation config is one more entry of `SHAPING`.
"""

import math
from typing import Any

import pytest
import torch
from toys import toy
from transformers import GenerationConfig, WatermarkingConfig

from specens import SpeculativeDecoder, Statistics
from specens.loop.statistics import RowStatistics
from specens.tuning.compare import compare, sampling, total

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(speed: float, log: list[str], name: str) -> Statistics:
    log.append(name)
    row = RowStatistics([0], [0], [0], [0], num_tokens=10)
    return Statistics(["a"], rows=[row], decode_seconds=10 / speed)


def test_compare_interleaves_and_takes_ratios_within_a_round() -> None:
    log: list[str] = []
    # The machine halves its speed from round to round; the first round warms up.
    slow = iter([1.0, 100.0, 50.0, 25.0])
    fast = iter([1.0, 200.0, 100.0, 50.0])
    first, second = compare(
        {
            "slow": lambda: counted(next(slow), log, "slow"),
            "fast": lambda: counted(next(fast), log, "fast"),
        },
        3,
    )
    assert log == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert (first.ratio, second.ratio, second.ratio_low, second.ratio_high) == (1, 2, 2, 2)
    assert (second.tokens_per_second, second.best, second.rounds) == (100, 200, 3)
    assert second.low == pytest.approx(60)
    assert math.isnan(second.acceptance_rate)
    assert second.as_dict()["acceptance_rate"] is None


def test_compare_stops_at_its_limit_after_one_measured_round() -> None:
    log: list[str] = []
    (row,) = compare({"one": lambda: counted(1.0, log, "one")}, 5, limit_s=0.0)
    assert (row.rounds, len(log)) == (1, 2)


# What a generation config may say, and a value that changes the text, or is refused. More than one
# where they act together alone.
SHAPING: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 4},
    "constraints": {"constraints": [1]},
    "force_words_ids": {"force_words_ids": [[1]]},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "use_mtp": {"use_mtp": True},
    "is_assistant": {"is_assistant": True},
    "guidance_scale": {"guidance_scale": 2.0},
    "sequence_bias": {"sequence_bias": [[[3], 10.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[1], [3], [5]]},
    "min_length": {"min_length": 20},
    "min_new_tokens": {"min_new_tokens": 20},
    "forced_bos_token_id": {"forced_bos_token_id": 1},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0)},
    "suppress_tokens": {"suppress_tokens": [1, 3, 5]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 3, 4, 5]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "top_h": {"top_h": 0.1},
    "typical_p": {"typical_p": 0.1},
    "epsilon_cutoff": {"epsilon_cutoff": 0.4},
    "eta_cutoff": {"eta_cutoff": 0.4},
    "token_healing": {"token_healing": True},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": ["w2"]},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "output_scores": {"output_scores": True},
    "output_logits": {"output_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "temperature": {"temperature": 0.2},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.2},
    "min_p": {"min_p": 0.9},
}
# It acts on logits that are no numbers alone.
RARE = {"remove_invalid_values"}
# They shape nothing, or come with the call, or are the first model's to say.
IDLE = {
    *("max_new_tokens", "max_length", "do_sample", "eos_token_id"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits"),
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "low_memory"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"),
    *("continuous_batching_config", "transformers_version"),
}


def test_everything_that_a_generation_config_may_say_is_judged() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known <= {*SHAPING, *RARE, *IDLE}
    assert {*SHAPING, *RARE} <= {*sampling(1)}


@pytest.mark.parametrize("name", SHAPING)
def test_sampling_leaves_nothing_to_a_generation_config(name: str) -> None:
    """Of what changes the text, or is refused, where the call does not say `sampling`."""
    model = toy(1, 7, spread=1.0)
    model.generation_config.eos_token_id = 2
    decoder = SpeculativeDecoder([model, toy(2, 7, spread=1.0)], schedule="plain")

    def write(**arguments: Any) -> Any:
        prompt = torch.tensor([[4]])
        try:
            found = decoder.generate(prompt, attention_mask=torch.ones(1, 1).long(), **arguments)
        except (ValueError, NotImplementedError, AttributeError, TypeError) as refusal:
            return type(refusal)
        return found.tolist() if isinstance(found, torch.Tensor) else type(found)

    def texts() -> tuple[list[Any], list[Any]]:
        """As `sampling` says, and with no more said than that it is sampled, or greedy."""
        heats = [(0, 1.0), (1, 1.0), (0, 0.0)]
        said = [write(seed=seed, **sampling(24, temperature=heat)) for seed, heat in heats]
        bare = [write(seed=s, max_new_tokens=24, do_sample=heat > 0) for s, heat in heats]
        return said, bare

    (said, bare), own = texts(), model.generation_config
    assert all(isinstance(one, list) for one in said + bare)
    model.generation_config = GenerationConfig(eos_token_id=2, **SHAPING[name])
    now_said, now_bare = texts()
    assert now_bare != bare
    assert now_said == said
    assert own.eos_token_id == 2


def test_compare_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="decoders: expected at least one"):
        compare({}, 1)
    with pytest.raises(ValueError, match="repeats: expected a count >= 1, got 0"):
        compare({"one": lambda: Statistics(["a"])}, 0)


def test_total_adds_counts_and_refuses_other_members() -> None:
    first = RowStatistics([3, 0], [3, 0], [2, 0], [2, 0], [[3, 2]], num_tokens=4, status=1)
    second = RowStatistics([2, 1], [2, 0], [1, 0], [0, 0], [[1, 1], [1, 0]], status=2)
    one = Statistics(["a", "b"], [first], calls=[1, 2])
    two = Statistics(["a", "b"], [second], calls=[3, 4], turns=5)
    whole = total([one, two])
    assert (whole.calls, whole.by_position) == ([4, 6], [[4, 3], [1, 0]])
    assert (whole.num_tokens, whole.turns, whole.status) == (4, 5, 3)
    assert (whole.drafted, whole.accepted, whole.emitted) == ([5, 1], [3, 0], [2, 0])
    assert whole.rows == [first, second]
    with pytest.raises(ValueError, match="calls with the same members"):
        total([one, Statistics(["c"])])
