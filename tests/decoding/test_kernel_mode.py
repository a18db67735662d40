# SPDX-License-Identifier: Apache-2.0
"""Layers that attend through a kernel say what they say with masks, and nobody else notices.

What a member's forwards say is compared with the model itself, as in test_members.py, in float32:
the kernels take no float64. A new architecture in `zoo.CONFIGS` is tested here, too.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoders import decoder, same
from rows import TOLERANCE, Rows, error, fresh
from torch import Tensor
from toys import noisy, prompts, toy
from zoo import CONFIGS, MODES, WINDOW, build

from specens.members import kernel, slot
from specens.members import probe as probes
from specens.members.kernel import Slots
from specens.members.probe import member, probe
from specens.members.slot import SlotMember
from specens_kernels import Refusal, backend, native, tree
from specens_kernels.layers import Layers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not native.AVAILABLE, reason=native.REASON),
]

EXACT = TOLERANCE[torch.float32]
WITH_MASKS = {
    "falcon": "0 of 4 layers ask for it",
    "llama4_text": "its layers attend to chunks, which it is not told",
}
IN_SLOTS = [name for name, mode in MODES.items() if mode == "slot"]
THROUGH_KERNEL = [name for name in IN_SLOTS if name not in WITH_MASKS]


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_probe_says_what_layers_attend_through(name, caplog):
    model = build(name)
    before = model.config._attn_implementation
    with caplog.at_level(logging.INFO, logger="specens"):
        found = probe(model)
    assert found.attention == ("kernel" if name in THROUGH_KERNEL else "mask")
    assert found.mask_reason == WITH_MASKS.get(name, "")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("slot mode with masks, no kernel" in line for line in lines) == (name in WITH_MASKS)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", THROUGH_KERNEL)
def test_cache_after_random_rejections_equals_fresh_prefill(name):
    model = build(name)
    rows = Rows(member(model), batch_size=4, capacity=160)
    rows.play(turns=6)
    assert rows.compared > 30
    assert rows.worst < EXACT


@pytest.mark.parametrize("name", ["llama", "qwen2_sliding", "gemma2"])
def test_long_prompts_and_short_texts_are_exact_either_way(name, monkeypatch):
    """Those that torch's attention reads, and those that the kernel reads, at each side."""
    model = build(name)
    for longest, shortest in ((0, 0), (4, 12), (10_000, 10_000)):
        monkeypatch.setattr(slot, "LONGEST_PROMPT", longest)
        monkeypatch.setattr(slot, "SHORT_TEXT", shortest)
        rows = Rows(member(model), batch_size=2, capacity=64)
        rows.forward([6, 5])
        rows.rollback([5, 5])
        for count in (1, 2, 1, 6, 1):
            rows.forward([count, count])
        assert rows.worst < EXACT


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral_sliding", "deepseek_v3"])
def test_tree_scores_equal_those_of_its_paths(name):
    model = build(name)
    one = member(model)
    rows = Rows(one, batch_size=2, capacity=64)
    rows.forward([11, 6])
    # So deep that a window of 8 hides the first nodes from the last ones.
    parents = torch.tensor([-1, 0, 0, 1, 1, 3, 5, 6, 7, 8, 9, 2])
    depths = tree.depths(parents)[0].tolist()
    assert max(depths) >= WINDOW
    seen = tree.ancestors(parents)[0]
    tokens = torch.arange(20, 44).view(2, 12)
    logits = one.forward_tree(tokens, depths, seen)
    for b in range(2):
        for i in range(12):
            path = tokens[b, seen[i]].tolist()
            assert error(logits[b, i], fresh(model, rows.rows[b] + path)[-1]) < EXACT
    rows.forward([2, 1])
    assert rows.worst < EXACT


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("window", [0, 1, 8, 64, 100])
def test_words_of_a_chain_are_those_of_its_tree(count, window):
    layers = Slots(torch.tensor([3]), count).layers(window)
    assert torch.equal(layers.visible, tree.visible(tree.chain(count - 1), window))
    if window:
        assert torch.equal(layers.depths, tree.depths(tree.chain(count - 1)))
    seen = torch.ones(count, count).tril().bool()[None]
    drawn = Slots(torch.tensor([3]), count, None, seen).layers(window)
    assert torch.equal(drawn.visible, layers.visible)


def test_keys_are_read_where_they_lie_and_no_mask_is_made(monkeypatch):
    """In the strides of their capacity, rows by a table, and in a window only what it shows."""
    calls: list[tuple[Tensor, Tensor, int]] = []
    attend = Layers.__call__

    def watched(self: Layers, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Any:
        calls.append((keys, self.block_table, options["window"]))
        return attend(self, query, keys, values, **options)

    monkeypatch.setattr(Layers, "__call__", watched)
    monkeypatch.setattr(slot.Masks, "build", lambda *_: pytest.fail("a mask was made"))
    one = member(build("mistral_sliding"))
    rows = Rows(one, batch_size=3, capacity=64)
    rows.forward([20, 14, 17])
    for layer in one.cache.layers:
        layer.keys[0, :, :9] = float("nan")  # out of the window of whatever is next
    calls.clear()
    rows.forward([2, 3], [0, 2])
    assert rows.worst < EXACT
    assert len(calls) == 4
    for keys, block_table, window in calls:
        assert keys.stride(1) == one.cache.capacity * keys.shape[3]
        assert block_table.tolist() == [[0], [2]]
        assert window == WINDOW


def masked(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Any:
    """A decoder whose members' layers get masks."""
    with monkeypatch.context() as patch:
        patch.setattr(probes, "serves", lambda *_: "masks are asked for")
        made = decoder(*arguments, **options)
    assert not any(one._kernel for one in made.members)
    return made


# Windows, a softcap, sinks, values of another size, positions that are learned.
KINDS = ("llama", "qwen2_sliding", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_with_masks(kind, monkeypatch):
    model = toy(0, 64, kind=kind, spread=3, amplify=20)
    models = [model, noisy(model, 0.2)]
    for lengths in ((7,), (5, 17, 1)):
        settings = {**prompts(lengths, 64), "max_new_tokens": 16, "do_sample": False}
        for schedule in ("alternating", "draft"):
            fast = decoder(models, 2 if schedule == "alternating" else 1, schedule)
            assert all(one._kernel for one in fast.members)
            slow = masked(monkeypatch, models, len(fast.members) - (schedule == "draft"), schedule)
            same(fast.generate(**settings), slow.generate(**settings))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_forwards_of_others_are_what_they_are_alone(name):
    """In threads, with the members' forwards inside of the same model at the same time."""
    model = build(name)
    text = torch.arange(3, 33).view(2, 15)
    alone = model(text).logits
    own = model.config._attn_implementation
    barrier = threading.Barrier(3, timeout=60)
    names: set[str] = set()

    def wait(*_: Any) -> None:
        barrier.wait()
        names.add(model.config._attn_implementation)
        barrier.wait()

    members = member(model), SlotMember(model, per_type=name == "gemma2")

    def work(i: int) -> Any:
        if i == 2:
            return model(text).logits  # transformers makes the mask
        members[i].start(2, 32)
        return members[i].forward(text, [15, 15])

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(3) as pool:
        for logits in pool.map(work, range(3)):
            assert error(logits, alone) < EXACT
    hook.remove()
    assert names == {f"specens_{own}"}
    assert model.config._attn_implementation == own
    assert not kernel._forwards


def test_configuration_is_as_it_was_whatever_ends_a_forward():
    model = build("llama")
    one = member(model)
    one.start(1, 8)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        one.forward(torch.tensor([[3, 4]]), [2])
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert not kernel._forwards


def test_dropout_is_refused():
    model = build("gpt2")
    one = member(model)
    one.start(1, 8)
    model.train()
    with pytest.raises(Refusal, match=r"^member: model: expected evaluation mode, got dropout of"):
        one.forward(torch.tensor([[3, 4]]), [2])


def test_windows_too_long_to_be_crossed_are_compared_with_the_configuration():
    model = build("mistral_sliding", sliding_window=100)
    assert probe(model).attention == "kernel"
    model = build("qwen2_sliding", sliding_window=100)
    assert probe(model).attention == "kernel"
    other = build("qwen2_sliding", sliding_window=100)
    other.model.layers[3].self_attn.sliding_window = None  # as a model that relies on its mask
    found = probe(other)
    assert found.attention == "mask"
    assert "layers say windows of [0, 0, 100, 0]" in found.mask_reason


def test_a_layer_that_does_not_ask_is_noticed():
    """Without an error, its logits would be those of no law."""
    model = build("llama")
    attention_of_one = model.model.layers[2].self_attn
    own = attention_of_one.config
    attention_of_one.config = type(own)(**own.to_dict())
    attention_of_one.config._attn_implementation = "sdpa"
    found = probe(model)
    assert found.attention == "mask"
    assert found.mask_reason == "3 of 4 layers ask for it"


def test_where_no_kernel_serves_there_are_masks():
    assert probe(build("llama", dtype=torch.float64)).mask_reason.startswith("no kernel takes")
    model = build("llama")
    with backend("reference"):
        found = probe(model)
        assert found.mask_reason == "attention runs 'reference' on cpu"
    assert probe(model).attention == "kernel"  # what was found is remembered for what was asked
    compiled = torch.compile(build("llama"), backend="eager")
    assert kernel.serves(compiled, "sdpa") == "the model is compiled"
    assert "is not stood in for" in kernel.serves(model, "flash_attention_2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_low_precision_goes_through_the_kernel(name, dtype):
    model = build(name, dtype=dtype)
    assert probe(model).attention == "kernel"
