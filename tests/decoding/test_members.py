# SPDX-License-Identifier: Apache-2.0
"""A member's logits are those of a fresh forward over the row, whatever happened before.

The oracle is the model itself, run without a cache over one row's tokens (`tools/rows.py`); with
kernels, in test_kernel_mode.py. A new architecture in `zoo.CONFIGS` is tested by every test here
that is parametrised over it.
"""

from __future__ import annotations

import copy
import functools
import logging
import random
from typing import Any

import pytest
import torch
from families import tiny
from rows import TOLERANCE, Rows, error, fresh
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from zoo import CONFIGS, MODES, WINDOW, build

from specens.members.by_row import CropMember, ReplayMember
from specens.members.cache import Masks
from specens.members.probe import Probe, member, probe
from specens.members.slot import SlotMember

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {"slot": SlotMember, "crop": CropMember, "replay": ReplayMember}

# Grouped matrix products of transformers' experts have no float64 kernel.
FLOAT32 = {
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "qwen3_next",
    "granitemoehybrid",
}

EXACT = TOLERANCE[torch.float64]
VISIBLE = 20 * TOLERANCE[torch.float32]  # the least error of a fault that must be seen

# Softmax, scans or routing run in float32 in these whatever the dtype: they have its tolerance.
FLOAT32_INSIDE = {"gemma2", "bloom", "mpt", "llama4_text", "mamba", "mamba2", "falcon_h1"}


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name in FLOAT32 else torch.float64


def tolerance_of(name: str) -> float:
    return TOLERANCE[torch.float32 if name in FLOAT32_INSIDE else dtype_of(name)]


SLOW = {"qwen3_next", "granitemoehybrid", "falcon_h1"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CONFIGS]
)
def test_cache_after_random_rejections_equals_fresh_prefill(name):
    model = build(name, dtype=dtype_of(name))
    rows = Rows(member(model), batch_size=4, capacity=160)
    # Fewer turns for scans, which are slow in plain torch.
    rows.play(turns=6 if MODES[name] == "replay" else 12)
    assert rows.compared > 50
    assert rows.worst < tolerance_of(name)


@pytest.mark.parametrize("mode", KINDS)
def test_every_mode_is_exact_where_it_is_allowed(mode):
    model = build("mistral_sliding", dtype=torch.float64)
    forced = member(model, mode=mode)
    assert type(forced) is KINDS[mode]
    rows = Rows(forced, batch_size=3, capacity=160, seed=1)
    rows.play(turns=15)
    assert rows.worst < EXACT


@pytest.mark.parametrize("continuation", ["chunk", "token", "none"])
def test_every_way_to_replay_is_exact(continuation):
    model = build("gemma3_text", dtype=torch.float64)
    rows = Rows(ReplayMember(model, continuation=continuation), batch_size=2, capacity=160, seed=2)
    rows.play(turns=10)
    assert rows.worst < EXACT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attention_implementations_are_exact(attention):
    model = build("qwen2_sliding", dtype=torch.float64, attention=attention)
    rows = Rows(SlotMember(model, per_type=True), batch_size=3, capacity=160, seed=3)
    rows.play(turns=10)
    assert rows.worst < EXACT


@functools.cache
def best_form() -> str:
    """Of `logits_to_keep`: transformers 5.17, unlike 5.23, takes no places of each row."""
    places = torch.tensor([[0], [1]])
    with torch.no_grad():
        kept = build("llama")(torch.ones(2, 3, dtype=torch.int64), logits_to_keep=places).logits
    return "rows" if kept.shape[:2] == places.shape else "last"


@pytest.mark.parametrize("logits_to_keep", ["rows", "last", "all"])
@pytest.mark.parametrize("mode", ["slot", "crop"])
def test_kept_logits_are_the_last_valid_ones(mode, logits_to_keep):
    if logits_to_keep == "rows" != best_form():
        pytest.skip("this transformers takes no places of each row")
    model = build("llama", dtype=torch.float64)
    rows = Rows(KINDS[mode](model, logits_to_keep=logits_to_keep), batch_size=3, capacity=64)
    rows.forward([7, 2, 5], keep=1)
    rows.forward([3, 3, 3], keep=2)
    rows.forward([4, 0, 1], keep=6)
    rows.forward([3, 0, 1], keep=3)
    rows.forward([2, 2], [2, 0], keep=2)
    rows.forward([5, 3], [1, 2], keep=3)
    assert rows.worst < EXACT


def test_inference_mode_may_change_between_calls():
    for name in ("llama", "lfm2"):
        rows = Rows(member(build(name, dtype=torch.float64)), batch_size=2, capacity=64)
        with torch.inference_mode():
            rows.forward([9, 4])
        rows.forward([1, 3])
        with torch.inference_mode():
            rows.rollback([6, 6])
            rows.forward([2, 2])
        rows.select([1])
        rows.forward([2])
        assert rows.worst < EXACT


def test_tokens_are_moved_to_the_members_device_and_copied_only_then():
    seen: list[Tensor] = []

    class Watched(SlotMember):
        def _forward(self, tokens: Tensor, *arguments: Any) -> Tensor:
            seen.append(tokens)
            return torch.empty(tokens.shape)

    watched = Watched(build("llama"))
    watched.start(2, 8)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    watched.forward(tokens, [3, 3])
    assert seen.pop() is tokens
    watched.device = torch.device("meta")
    watched.forward(tokens, [3, 3])
    assert seen.pop().device == watched.device


def test_no_gradient_is_recorded():
    model = build("llama").requires_grad_(True)
    one = member(model)
    one.start(1, 8)
    assert not one.forward(torch.tensor([[3, 4]]), [2]).requires_grad


# The oracle can tell right from wrong: each fault of a real cache below is seen by it.


def test_oracle_sees_a_window_that_is_one_too_long(monkeypatch):
    model = build("mistral_sliding", dtype=torch.float64)
    one = member(model)
    monkeypatch.setattr(model.config, "sliding_window", WINDOW + 1)
    rows = Rows(one, batch_size=2, capacity=64)
    monkeypatch.setattr(model.config, "sliding_window", WINDOW)
    rows.forward([5, 3])
    assert rows.worst < EXACT
    rows.forward([6, 6])
    assert rows.worst > VISIBLE


def test_oracle_sees_visible_padding(monkeypatch):
    rows = Rows(member(build("llama", dtype=torch.float64)), batch_size=2, capacity=64)
    rows.forward([5, 2])
    build_masks = Masks.build
    monkeypatch.setattr(
        Masks, "build", lambda self, p, k, end: build_masks(self, p.max().expand_as(p), k, end)
    )
    rows.forward([1, 1])
    assert rows.worst > VISIBLE


def test_oracle_sees_rejected_tokens_that_stay():
    rows = Rows(CropMember(build("llama", dtype=torch.float64)), batch_size=1, capacity=64)
    rows.forward([8])
    assert rows.worst < EXACT
    rows.member._rollback = lambda lengths: None
    rows.rollback([6])
    rows.forward([1])
    assert rows.worst > VISIBLE


@pytest.mark.parametrize("name", CONFIGS)
def test_probe_finds_the_mode(name, caplog):
    model = build(name)
    with caplog.at_level(logging.WARNING, logger="specens"):
        found = probe(model)
    assert found.mode == MODES[name]
    assert found.tree == (found.mode == "slot")
    layer_types = getattr(model.config, "layer_types", None)
    assert found.per_type == (found.mode == "slot" and layer_types is not None)
    assert found.logits_to_keep == best_form()
    assert found.continuation == ("token" if name == "mamba" else "chunk")
    lines = [record.getMessage() for record in caplog.records if record.name == "specens"]
    if found.mode == "slot":
        assert not lines
    else:
        assert len(lines) == 1
        assert f"{found.mode} mode" in lines[0]
    assert probe(model) is found


@pytest.mark.parametrize(
    ("argument", "mode"), [("position_ids", "crop"), ("attention_mask", "crop")]
)
def test_probe_does_not_believe_signatures(argument, mode):
    # The model takes the argument and ignores it; no kernel serves its type instead of a mask.
    model = build("llama", dtype=torch.float64)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {argument: None}), with_kwargs=True
    )
    found = probe(model)
    assert found.mode == mode
    assert "slot: logits are off by" in found.reason


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probe_allows_for_low_precision(name, dtype):
    assert probe(build(name, dtype=dtype)).mode == MODES[name]


def test_probe_switches_dropout_off_and_on_again():
    model = build("gpt2").train()
    state = torch.get_rng_state()
    assert probe(model).mode == "slot"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama4_text", "mistral_sliding"])
def test_tree_scores_equal_those_of_its_paths(name):
    model = build(name, dtype=torch.float64)
    one = member(model)
    rows = Rows(one, batch_size=2, capacity=64)
    rows.forward([11, 6])
    parents = [-1, 0, 0, 1, 1, 3]
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    tree_mask = torch.zeros(6, 6, dtype=torch.bool)
    for i, path in enumerate(paths):
        tree_mask[i, path] = True
    tokens = torch.arange(20, 32).view(2, 6)
    logits = one.forward_tree(tokens, [len(path) - 1 for path in paths], tree_mask)
    for b in range(2):
        for i, path in enumerate(paths):
            expected = fresh(model, rows.rows[b] + tokens[b, path].tolist())[-1]
            assert error(logits[b, i], expected) < tolerance_of(name)
    # The nodes are not committed: the next forward overwrites them.
    rows.forward([2, 1])
    assert rows.worst < tolerance_of(name)


def snapshot(model: Any) -> dict[str, Any]:
    """Everything of a model that a member could change."""
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "buffers": {key: value.clone() for key, value in model.named_buffers()},
        "grad": [parameter.requires_grad for parameter in model.parameters()],
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


@pytest.mark.parametrize("name", ["qwen2_sliding", "bloom", "mamba", "granitemoehybrid"])
def test_model_and_random_state_are_untouched(name):
    model = build(name)
    # Flags that differ between modules must come back module by module.
    model.train()
    next(iter(model.children())).eval()
    before = snapshot(model)
    torch.manual_seed(7)
    state, python_state = torch.get_rng_state(), random.getstate()
    one = member(model)
    one.start(2, 32)
    one.forward(torch.randint(0, 9, (2, 4), generator=torch.Generator()), [4, 2])
    one.rollback([3, 2])
    one.select([1])
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert_same(before, snapshot(model))


def test_change_of_the_model_is_noticed():
    model = build("llama")
    before = snapshot(model)
    model.config.use_cache = not model.config.use_cache
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))


def test_counters_count_valid_tokens():
    one = member(build("llama"))
    one.start(2, 32)
    one.forward(torch.zeros(2, 5, dtype=torch.int64), [5, 3])
    one.forward(torch.zeros(1, 2, dtype=torch.int64), [2], [1])
    assert (one.calls, one.tokens, one.lengths) == (2, 10, [5, 5])
    one.forward(torch.zeros(2, 2, dtype=torch.int64), [0, 0])
    assert (one.calls, one.tokens) == (2, 10)  # nothing to compute
    one.start(1, 8)
    assert (one.calls, one.tokens, one.lengths) == (0, 0, [0])


def test_replay_feeds_few_tokens_again():
    model = build("mamba2")
    one = member(model)
    one.start(1, 256)
    one.forward(torch.zeros(1, 100, dtype=torch.int64), [100])
    one.rollback([100])
    for length in range(102, 142, 2):
        one.forward(torch.zeros(1, 4, dtype=torch.int64), [4])
        one.rollback([length])
    # 100 of the prompt, 20 turns of 4; each rejection replays a snapshot's worth at most.
    replayed = one.tokens - 180
    assert 0 < replayed < 20 * 18


def test_replay_remembers_more_than_the_newest_length():
    one = member(build("mamba2"))
    one.start(1, 256)
    one.forward(torch.zeros(1, 100, dtype=torch.int64), [100])
    for _ in range(40):
        one.forward(torch.zeros(1, 1, dtype=torch.int64), [1])
    one.rollback([120])
    fed = one.tokens
    one.forward(torch.zeros(1, 1, dtype=torch.int64), [1])
    assert one.tokens - fed <= 18


def test_storage_is_one_tensor_per_shape():
    model = build("deepseek_v3")
    one = member(model)
    one.start(2, 16)
    one.forward(torch.zeros(2, 3, dtype=torch.int64), [3, 3])
    shapes = {(layer.keys.shape, layer.values.shape) for layer in one.cache.layers}
    assert len(shapes) == 1
    assert len(one.cache.slabs) == len(set(next(iter(shapes))))
    assert sum(slab.shape[0] for slab in one.cache.slabs) == 2 * len(one.cache.layers)


def test_name_is_the_last_part_of_the_path():
    model = build("llama")
    assert member(model).name == "LlamaForCausalLM"
    model.config._name_or_path = "some/where/tiny-llama/"
    assert SlotMember(model).name == "tiny-llama"


def test_what_is_not_a_causal_lm_is_refused():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, num_heads=2))
    config = build("llama").config
    refused = {
        "T5ForConditionalGeneration, an encoder-decoder": t5,
        "LlamaModel, which has no causal LM head": AutoModel.from_config(config),
        "LlamaForSequenceClassification, which has no causal LM head": (
            AutoModelForSequenceClassification.from_config(config)
        ),
        "Linear, which is no transformers model": torch.nn.Linear(2, 2),
    }
    for fault, model in refused.items():
        with pytest.raises(ValueError, match="member: model: expected a causal LM") as caught:
            member(model)
        assert str(caught.value) == f"member: model: expected a causal LM, got {fault}"


def test_model_that_looks_ahead_is_refused():
    model = build("llama")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, whose logits depend on later tokens"):
        member(model)


@pytest.mark.parametrize("kind", ["xlnet", "cpmant"])
def test_architecture_that_looks_ahead_is_refused(kind):
    with pytest.raises(ValueError, match=r"a causal LM, got .*, whose logits depend on later tok"):
        member(tiny(kind))


@pytest.mark.parametrize("kind", ["axk2", "deepseek_v32", "glm_moe_dsa"])
def test_index_over_keys_is_exact_or_refused(kind):
    """With few heads many keys have the score 0: which are chosen depends on how many there are."""
    with pytest.raises(ValueError, match=r"whose logits depend on later tokens or their number"):
        member(tiny(kind, index_n_heads=2))
    rows = Rows(member(tiny(kind)), batch_size=3, capacity=160)
    rows.play(turns=6)
    assert rows.compared > 50
    assert rows.worst < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("kind", "most"), [("llama", 21), ("bloom", 24), ("mamba2", 24)])
def test_probe_takes_few_forwards(kind, most):
    model = build(kind)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(1))
    probe(model)
    assert len(seen) <= most


def test_mode_that_is_not_exact_is_refused():
    with pytest.raises(ValueError, match=r"expected one that is exact for .*, got 'crop' \(crop"):
        member(build("mamba2"), mode="crop")
    with pytest.raises(ValueError, match=r"got 'slot' \(slot: its forward takes no position_ids\)"):
        member(build("bloom"), mode="slot")
    with pytest.raises(
        ValueError, match="member: mode: expected one of auto, slot, crop, replay, got 'slots'"
    ):
        member(build("llama"), mode="slots")


def test_bad_arguments_are_refused():
    one = member(build("llama"))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="start: batch_size, capacity: expected at least 1"):
        one.start(0, 4)
    one.start(2, 8)
    cases = [
        (lambda: one.forward(tokens, [3]), "forward: tokens: expected one row for each of 2 rows"),
        (lambda: one.forward(tokens, [3, 4]), r"forward: counts: expected 0..3, got \[3, 4\]"),
        (lambda: one.forward(tokens, [3, -1]), "forward: counts"),
        (lambda: one.forward(tokens, [1, 1], [0, 0]), "forward: rows: expected distinct rows"),
        (lambda: one.forward(tokens, [1, 1], [0, -1]), "forward: rows: expected distinct rows"),
        (lambda: one.forward(tokens, [1, 1], keep_last=0), "forward: keep_last"),
        (lambda: one.forward(tokens[:0], [], []), "forward: tokens: expected at least one row"),
        (lambda: one.rollback([0]), "rollback: lengths: expected 2 ints, got 1"),
        (lambda: one.rollback([0, 1]), "rollback: lengths"),
        (lambda: one.select([0, 0]), "select: rows: expected distinct rows below 2"),
        (lambda: one.select([2]), "select: rows"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert one.lengths == [0, 0]
    one.forward(tokens.repeat(1, 2), [6, 6])
    with pytest.raises(
        ValueError, match=r"expected at most 2 more for a row \(capacity 8\), got 3"
    ):
        one.forward(tokens, [1, 1])
    assert one.lengths == [6, 6]


def test_attention_without_4d_masks_falls_back_to_crop(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(SlotMember, "_new_masks", refuse_masks)
    found = probe(model)
    assert found == Probe(
        "LlamaForCausalLM",
        "crop",
        logits_to_keep=best_form(),
        reason="slot: attention 'flash_attention_2' takes no 4-D mask",
    )


def refuse_masks(self: SlotMember) -> Masks:
    raise NotImplementedError("slot: attention 'flash_attention_2' takes no 4-D mask")


def test_switched_attention_takes_its_own_masks():
    model = build("qwen2_sliding", dtype=torch.float64, attention="sdpa")
    one = member(model)
    model.set_attn_implementation("eager")
    rows = Rows(one, batch_size=2, capacity=64)
    rows.forward([9, 5])
    rows.forward([3, 2])
    assert rows.worst < EXACT
