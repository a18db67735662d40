# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every kind of attention and state, for tests that need an architecture.

`build(name)` makes one. To add an architecture, add its configuration to `CONFIGS` and, if
`probe` should not choose "slot" for it, its mode to `MODES`.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
WINDOW = 8  # of every sliding or chunked layer, in tokens: short, so that tests get past it
CHUNK = 16  # of scans, in tokens: the default of 256 would spend the tests on padding

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_TOKENS,
}
_NO_GROUPS = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
_ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_OLD = {"vocab_size": VOCAB_SIZE, **_TOKENS}  # models that name their sizes in their own way
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "qwen2": _BASE,
    "qwen2_sliding": {
        **_BASE,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": {**_BASE, "head_dim": 16},
    "mistral": {**_BASE, "sliding_window": None},
    "mistral_sliding": {**_BASE, "sliding_window": WINDOW},
    "phi3": _BASE,
    "gemma2": {**_BASE, "head_dim": 16, "sliding_window": WINDOW},
    "gemma3_text": {**_BASE, "head_dim": 16, **_ALTERNATING},
    "gpt2": {**_OLD, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "opt": {
        **_OLD,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "ffn_dim": 96,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 64,
    },
    "gpt_neox": _NO_GROUPS,
    "olmo2": _BASE,
    "cohere2": {**_BASE, **_ALTERNATING},
    "smollm3": _BASE,
    "gpt_oss": {
        **_BASE,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **_ALTERNATING,
    },
    "mixtral": {**_BASE, "num_local_experts": 4},
    "qwen3_moe": {**_BASE, "head_dim": 16, **_MOE},
    "deepseek_v3": {
        **_BASE,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
    },
    "falcon": {
        **_OLD,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "alibi": False,
        "new_decoder_architecture": False,
    },
    "bloom": {**_OLD, "hidden_size": 64, "n_layer": 4, "n_head": 4},
    "mpt": {
        "vocab_size": VOCAB_SIZE,
        "d_model": 64,
        "n_layers": 4,
        "n_heads": 4,
        "max_seq_len": 256,
    },
    "llama4_text": {
        **_BASE,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "attention_chunk_size": WINDOW,
    },
    "lfm2": {**_BASE, "layer_types": ["conv", "full_attention"] * 2},
    "mamba": {**_OLD, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        **_OLD,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": CHUNK,
    },
    "qwen3_next": {
        **_BASE,
        "head_dim": 16,
        **_MOE,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "granitemoehybrid": {
        **_BASE,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": CHUNK,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {
        **_BASE,
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": CHUNK,
    },
}

# What `probe` finds for each; "slot" where nothing is said.
MODES = dict.fromkeys(CONFIGS, "slot")
MODES |= dict.fromkeys(["bloom", "mpt"], "crop")
MODES |= dict.fromkeys(
    ["lfm2", "mamba", "mamba2", "qwen3_next", "granitemoehybrid", "falcon_h1"], "replay"
)


def build(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    amplify: float = 6.0,
    **changes: Any,
) -> PreTrainedModel:
    """A random model in evaluation mode; the global random state is left as it was.

    Args:
        name: an entry of `CONFIGS`.
        seed: of the weights.
        dtype: of the weights.
        attention: "sdpa" or "eager"; None is what transformers prefers.
        amplify: factor on the matrices. Untouched random weights give nearly the same logits
            whatever a token attends to, and a test of masks could not fail.
        changes: configuration entries to replace.
    """
    model_type = name.removesuffix("_sliding")
    config = AutoConfig.for_model(model_type, **{**CONFIGS[name], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    kept = ("embed", "wte", "wpe", "lm_head")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not any(part in parameter_name for part in kept):
                parameter.mul_(amplify)
    model.requires_grad_(False)
    return model.to(dtype).eval()
