# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of any architecture of transformers that writes text, and what becomes of it.

`tiny` shrinks a default configuration by the names of its entries, so that an architecture that
transformers adds is tested without a word here. Where names are not enough, add to `CHANGES`.
`examine` has decoders write with it, and compares each token with whole forwards of the mixture.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from toys import noisy, prompts
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from specens import SpeculativeDecoder
from specens.members.facts import forward_arguments
from specens.members.probe import REFUSALS
from specens_kernels import Refusal

VOCAB_SIZE = 128
FIRST_SPECIAL = 112  # ids from here on stand for images and the like; no text has them
WINDOW = 8

# Which class makes a model of each type. What writes text by itself comes first.
AUTO = {
    **dict.fromkeys(auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, auto.AutoModelForMultimodalLM),
    **dict.fromkeys(
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.AutoModelForImageTextToText
    ),
    **dict.fromkeys(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.AutoModelForCausalLM),
}

# What an entry becomes, by its name: the first pattern that fits. Smaller values stay.
SIZES = {
    r"vocab_size|vocab$": VOCAB_SIZE,
    r"position_embeddings|max_.*position|n_positions|n_ctx|max_seq|seq_len|context_len": 256,
    r"(key_value|kv)_heads?|multi_query_group_num": 2,
    r"(shared|zero).*expert.*(num)?$|num_shared_expert": 1,
    r"index_topk|indexer_budget": WINDOW,
    r"experts?_per_tok|top_?k(_experts)?$|moe_k$|topk$": 2,
    r"n_group|topk_group|expert_groups?": 1,
    r"num(_local|_routed|_total)?_experts|n_routed_experts": 4,
    r"sliding_window$|window_size|attention_chunk|window$|block_size": WINDOW,
    r"lora_rank|_rank$|rope_head_dim|nope_head_dim|rotary_dim|dim_head|d_kv|d_head|v_head_dim": 16,
    r"head_dim|head_size|kv_channels": 16,
    r"num_hidden_layers|n_layers?$|num_layers|layers$|^depth$": 2,
    r"num_.*heads|n_heads?$|attention_heads": 4,
    r"image_size|img_size": 16,
    r"patch_size|patch$": 4,
    r"d_state|state_size": 8,
    r"chunk_size|chunk": 16,
    r"moe_.*intermediate|expert.*(intermediate|ffn|hidden)": 32,
    r"intermediate|_mlp$|ffn|ff_dim|d_ff|n_inner|feed_?forward": 96,
    r"hidden_size|hidden_dim|d_model|n_embd|embed(ding)?_size|width|^dim$|_dim$": 64,
}
# Of log-probabilities. Rounding moves logits by 5e-4 of their spread, 2.5, at most (see
# test_members.py), and a log-probability by twice that; a wrong mask or position by more.
TOLERANCE = 2.5e-3
IDS = re.compile(r"_(id|index|ids)$|_token_id")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"text_config.rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
# With few heads an index gives many keys the score 0, and which of them it chooses depends on the
# length of the text: then nothing is exact.
_SURE = {"index_n_heads": 64}
_FULL_AND = {"layer_types": ["sliding_attention", "full_attention"]}

# Entries of a configuration, or of the one inside it at "a.b", that names do not say.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"], _SECTIONS
    ),
    "qwen2_5_omni_thinker": {**_SECTIONS, "vision_start_token_id": 118},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 118},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "hunyuan_vl": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "2/4"},
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4"), _SURE),
    "mistral_large4": {f"text_config.{name}": value for name, value in _SURE.items()},
    "glm4v_moe": {
        "text_config.rope_parameters": {
            **_ROPE,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        }
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32},
    "dbrx": {
        "rope_parameters": _ROPE,
        "attn_config.rope_theta": 10000.0,
        "attn_config.clip_qkv": 8.0,
        "attn_config.kv_n_heads": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {**_EXPERTS, "first_k_dense_replace": 1},
    "gemma3n_text": {
        **_FULL_AND,
        "num_kv_shared_layers": 0,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95, 0.0],
    },
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "dots3_note": {
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
        "vision_config.adapter_out_dim": 64,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlstm": {"qk_dim_factor": 1.0, "num_blocks": 2},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "dots3_note_text": {
        **_SURE,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "chameleon": {"vocabulary_map": {"<image>": 120}},
    "step3p7": {"text_config.sliding_window": WINDOW},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "cohere_compass_text": {
        **_FULL_AND,
        "rope_parameters": dict.fromkeys(_FULL_AND["layer_types"], _ROPE),
    },
    "glm5_next": {
        "text_config.index_n_heads": 64,
        "text_config.index_kpool": 2,
        "text_config.qk_rope_head_dim": 0,
        "text_config.linear_head_dim": 16,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
}
CHANGES["dots3_note"] |= {
    f"text_config.{name}": value for name, value in CHANGES["dots3_note_text"].items()
}
CHANGES["qwen4_exp"] = {f"text_config.{name}": v for name, v in CHANGES["qwen4_exp_text"].items()}
CHANGES["cohere_compass"] = {
    f"text_config.{name}": value for name, value in CHANGES["cohere_compass_text"].items()
}


def tiny(model_type: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode, of a vocabulary of `VOCAB_SIZE`."""
    config = tiny_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AUTO[model_type].from_config(config)
    model = model.requires_grad_(False).float().eval()
    spread_out(model)
    # Some say which token ends a text; the oracle knows nothing of it.
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The default configuration with every size small."""
    return shrunk(CONFIG_MAPPING[model_type](), {**CHANGES.get(model_type, {}), **changes})


def shrunk(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of the same type; `changes` may name entries of inner ones, as "a.b"."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    known = set(defaults)
    depth, kept = kept_layers(config, known)
    special = iter(range(VOCAB_SIZE - 1, FIRST_SPECIAL - 1, -1))
    entries: dict[str, Any] = {}
    for name in sorted(known):
        value = said(config, name)
        if isinstance(value, PreTrainedConfig):
            prefix = f"{name}."
            inner = {
                key.removeprefix(prefix): entry
                for key, entry in changes.items()
                if key.startswith(prefix)
            }
            entries[name] = shrunk(value, inner)
        elif is_per_layer(value, depth):
            few = [value[i] for i in kept]
            entries[name] = [small_value(name, v, special) if type(v) is int else v for v in few]
        elif name in LAYER_COUNTS and value == depth:
            entries[name] = len(kept)
        elif name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            entries[name] = {"eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}[name]
        elif type(value) is int:
            entries[name] = small_value(name, value, special)
        elif value is None and name == "head_dim":
            entries[name] = 16
        elif value is False and name in ("is_decoder", "causal"):
            entries[name] = True
        elif type(value) in (str, bool, float) and value != defaults[name]:
            entries[name] = value
    heads = [said(config, name) for name in ("num_key_value_heads", "num_attention_heads")]
    if heads[1] is not None and (heads[0] == heads[1] or "kv_lora_rank" in known):
        entries["num_key_value_heads"] = min(heads[1], 4)
    rope = said(config, "rope_parameters")
    if isinstance(rope, dict):
        entries["rope_parameters"] = small_rope(rope, entries.get("head_dim", 16))
    entries |= {key: value for key, value in changes.items() if "." not in key}
    if isinstance(entries.get("layer_types"), list):
        names = [name for name in LAYER_COUNTS if name in known]
        entries |= dict.fromkeys(names, len(entries["layer_types"]))
    return type(config)(**entries)


def said(config: PreTrainedConfig, name: str) -> Any:
    """An entry; None where there is none, or where each layer has its own."""
    return vars(config).get(name)


def small_rope(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Sections of a rotary embedding that add up to the pairs of a small head."""
    small = {
        key: small_rope(value, head_dim) if isinstance(value, dict) else value
        for key, value in rope.items()
    }
    if "mrope_section" in small:
        pairs = int(head_dim * small.get("partial_rotary_factor", 1.0)) // 2
        small["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return small


def small_value(name: str, value: int, special: Iterator[int]) -> int:
    """Of an entry; ids beyond the vocabulary become special ones, each another."""
    if IDS.search(name):
        return value if value < FIRST_SPECIAL else next(special)
    fitting = (size for pattern, size in SIZES.items() if re.search(pattern, name))
    return min(value, next(fitting, value))


def kept_layers(config: PreTrainedConfig, known: set[str]) -> tuple[int, list[int]]:
    """How many layers there are, and the few of them that show every kind, in their order."""
    counts = [said(config, name) for name in LAYER_COUNTS if name in known]
    depth = next((count for count in counts if type(count) is int), 0)
    lists = [said(config, name) for name in sorted(known)]
    per_layer = [value for value in lists if is_per_layer(value, depth)]
    firsts = {list(map(str, value)).index(str(kind)) for value in per_layer for kind in value}
    others = [i for i in range(depth) if i not in firsts]
    return depth, sorted([*firsts, *others[: max(0, 2 - len(firsts))]])


def is_per_layer(value: Any, depth: int) -> bool:
    """Whether it is a list with an entry for each layer, and not the numbers of the layers."""
    if not isinstance(value, (list, tuple)) or len(value) != depth:
        return False
    return list(value) != list(range(depth))


def spread_out(model: Any, amplify: float = 5.0, spread: float = 2.5) -> None:
    """Make logits differ, and depend on every token: untouched random ones are nearly flat."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not re.search("embed|wte|wpe|lm_head", name):
            parameter.mul_(amplify)
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None:
        return
    tokens = prompts((12,), FIRST_SPECIAL)["input_ids"]
    std = float(whole(model, tokens).std(-1).mean())
    weight.mul_(spread / max(std, 1e-6))
    weight[FIRST_SPECIAL:] = weight[0] = 0  # never the largest


def whole(model: Any, tokens: Tensor) -> Tensor:
    """(B, S, V). What a model says of texts it has never seen, without a cache."""
    extra = {"use_cache": False} if "use_cache" in forward_arguments(model) else {}
    with torch.no_grad():
        return model(tokens, return_dict=True, **extra).logits


# What transformers raises where it cannot.
FOREIGN = (*REFUSALS, ImportError, StrictDataclassError)


@dataclass
class Verdict:
    """What became of an architecture: "right", "refused" or "wrong", and why.

    "not tiny": there is no small model of it that takes text alone. "cannot": there is one, and
    transformers itself writes nothing with it.
    """

    outcome: str
    reason: str = ""
    modes: str = ""


class Oracle:
    """What whole forwards say of a text that a mixture is said to have written greedily."""

    def __init__(self, models: list[Any], weights: tuple[float, ...]) -> None:
        self.models, self.weights = models, weights
        self.known: dict[tuple[int, ...], Tensor] = {}

    def after(self, text: list[int]) -> Tensor:
        """(S, V) float64 log-probabilities of the mixture after each token of a text."""
        key = tuple(text)
        if key not in self.known:
            laws = [
                weight * whole(model, torch.tensor([text]))[0].double().softmax(-1)
                for model, weight in zip(self.models, self.weights, strict=True)
            ]
            self.known[key] = torch.stack(laws).sum(0).log()
        return self.known[key]

    def fault(self, prompt: list[int], written: list[int], log_probs: list[float]) -> str:
        """Where a text is not the mixture's, or nothing."""
        text = [*prompt, *written]
        laws = self.after(text[:-1])[len(prompt) - 1 :].clone()
        # That a model says the same of a text and of its prefixes is seen at some of them.
        for i in range(0, len(written), 4):
            laws[i] = self.after(text[: len(prompt) + i])[-1]
        for i, (law, token, log_prob) in enumerate(zip(laws, written, log_probs, strict=True)):
            if float(law.max() - law[token]) > TOLERANCE:
                return f"token {i} is {token}, whole forwards say {int(law.argmax())}"
            if not abs(float(law[token]) - log_prob) < TOLERANCE:
                return f"log-probability of token {i} is {log_prob:.6g}, not {law[token]:.6g}"
        return ""


SCHEDULES = ("plain", "alternating:tokens=3", "speculative:tokens=3")
WEIGHTS = (0.6, 0.4)
# Alone, and left-padded; all get past every window.
BATCHES = ((7,), (9, 2, 5))
NEW_TOKENS = 16


def examine(model_type: str) -> Verdict:
    """Write with a tiny model of this type and two that disagree with it now and then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny(model_type)
            models = [model] * 3
            if model.get_output_embeddings() is not None:
                models[1:] = noisy(model, 0.5), noisy(model, 0.4, seed=1)
        except FOREIGN as error:
            return Verdict("not tiny", in_one_line(error))
        try:
            model.generate(prompts((3,), FIRST_SPECIAL)["input_ids"], max_new_tokens=2)
        except FOREIGN as error:
            return Verdict("cannot", f"transformers' own generate: {in_one_line(error)}")
        oracle = Oracle(models[:2], WEIGHTS)
        modes = ""
        for schedule in SCHEDULES:
            draft = models[2] if schedule.startswith("speculative") else None
            try:
                decoder = SpeculativeDecoder(
                    models[:2], weights=WEIGHTS, schedule=schedule, draft=draft
                )
                modes = type(decoder.members[0]).__name__.removesuffix("Member").lower()
                for lengths in BATCHES:
                    fault = written_wrong(decoder, oracle, lengths)
                    if fault:
                        return Verdict("wrong", f"{schedule}, batch {lengths}: {fault}", modes)
            except Refusal as refusal:
                return Verdict("refused", in_one_line(refusal), modes)
    return Verdict("right", "", modes)


def written_wrong(decoder: SpeculativeDecoder, oracle: Oracle, lengths: tuple[int, ...]) -> str:
    """What is wrong with greedy texts of these prompts, or nothing."""
    inputs = prompts(lengths, FIRST_SPECIAL)
    output = decoder.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    width = inputs["input_ids"].shape[1]
    for row, length in enumerate(lengths):
        prompt = output.sequences[row, width - length : width].tolist()
        written = output.sequences[row, width:].tolist()
        if len(written) != NEW_TOKENS:
            return f"{len(written)} tokens"
        fault = oracle.fault(prompt, written, output.log_probs[row].tolist())
        if fault:
            return f"row {row}: {fault}"
    return ""


def in_one_line(error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, Refusal) else f"{type(error).__name__}: {said}"
