# SPDX-License-Identifier: Apache-2.0
"""For each field of transformers' `GenerationConfig`, a value that a test can see the effect of.

More than one entry where fields act together alone. A field of a newer transformers is one more
line here, and one in `specens/loop/generation_config.py`.
"""

from typing import Any

from transformers import CompileConfig, WatermarkingConfig

# They change the text of a toy with 7 tokens, or what is returned.
OBEYED: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 9, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 20},
    "min_new_tokens": {"min_new_tokens": 20},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": ["w2"]},
    "eos_token_id": {"eos_token_id": [1, 3, 5]},
    "pad_token_id": {"pad_token_id": 6},
    "bos_token_id": {"bos_token_id": 3},
    "do_sample": {"do_sample": True, "top_k": 1},
    "temperature": {"do_sample": True, "temperature": 1e-4},
    "top_k": {"do_sample": True, "top_k": 1},
    "top_p": {"do_sample": True, "top_p": 1e-6},
    "min_p": {"do_sample": True, "min_p": 0.999},
    "top_h": {"do_sample": True, "top_h": 1e-4},
    "typical_p": {"do_sample": True, "typical_p": 1e-4},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.999},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.999},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[1], [3], [5]]},
    "sequence_bias": {"sequence_bias": [[[3], 10.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 1},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "suppress_tokens": {"suppress_tokens": [1, 3, 5]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 3, 4, 5, 9, 23]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "return_dict_in_generate": {"return_dict_in_generate": True},
}
IDLE: dict[str, dict[str, Any]] = {
    "decoder_start_token_id": {"decoder_start_token_id": 3},
    "num_beam_groups": {"num_beam_groups": 2},
    "early_stopping": {"early_stopping": True},
    "length_penalty": {"length_penalty": 3.0},
    "diversity_penalty": {"diversity_penalty": 2.0},
    "low_memory": {"low_memory": True},
    "num_assistant_tokens": {"num_assistant_tokens": 2},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "max_matching_ngram_size": {"max_matching_ngram_size": 1},
    "assistant_lookbehind": {"assistant_lookbehind": 1},
    "target_lookbehind": {"target_lookbehind": 1},
    "renormalize_logits": {"renormalize_logits": True},
    "use_cache": {"use_cache": False},
    "cache_config": {"cache_config": {"nbits": 2}},
    "max_cache_len": {"max_cache_len": 64, "cache_implementation": "static"},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": {}},
    "transformers_version": {"transformers_version": "4.0"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 4},
    "constraints": {"constraints": [1]},
    "force_words_ids": {"force_words_ids": [[1]]},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "token_healing": {"token_healing": True},
    "is_assistant": {"is_assistant": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "use_mtp": {"use_mtp": True},
    "speculation_type": {"speculation_type": "dflash"},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "guidance_scale": {"guidance_scale": 2.0},
    "output_scores": {"output_scores": True},
    "output_logits": {"output_logits": True},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "cache_implementation": {"cache_implementation": "paged"},
}
