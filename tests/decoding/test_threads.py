# SPDX-License-Identifier: Apache-2.0
"""Calls of several threads on the same models: each goes by the states of its own forwards.

A barrier forces the worst interleaving: all threads are inside the model's forward before any of
them leaves it.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoders import VOCAB_SIZE, same
from toys import prompts, toy

from specens import SpeculativeDecoder
from specens.members.weight_head import WeightHead, last_hidden
from specens.training.rollouts import read_text, roll_out

pytestmark = pytest.mark.usefixtures("one_thread")

THREADS = 3


@contextmanager
def abreast(*models: Any) -> Iterator[None]:
    """Forwards begin when all threads have come to theirs, and end when all threads' have."""
    barrier = threading.Barrier(THREADS, timeout=60)

    def wait(*_: Any) -> None:
        barrier.wait()

    hooks = [
        register(wait)
        for model in models
        for register in (model.register_forward_pre_hook, model.register_forward_hook)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def together(call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, range(THREADS)))


def pair() -> tuple[Any, Any, WeightHead]:
    """Draft and target, and a head whose weights differ from state to state."""
    torch.manual_seed(0)
    sizes = toy(0, VOCAB_SIZE), toy(1, VOCAB_SIZE, hidden_size=32)
    return *sizes, WeightHead(torch.randn(48), torch.tensor(0.0))


def test_decoders_of_one_pair_write_what_they_write_alone() -> None:
    draft, target, head = pair()
    # As many forwards in each thread, whatever is written.
    decoders = [
        SpeculativeDecoder([draft, target], weights=head, schedule="plain") for _ in range(THREADS)
    ]

    def write(i: int) -> Any:
        settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "seed": 0}
        inputs = prompts((4,), VOCAB_SIZE, seed=i)
        return decoders[i].generate(**inputs, **settings, return_dict_in_generate=True)

    alone = [write(i) for i in range(THREADS)]
    with abreast(draft, target):
        texts = together(write)
    for text, expected in zip(texts, alone, strict=True):
        same(text.sequences, expected.sequences)
        same(text.log_probs, expected.log_probs)
    assert not draft.lm_head._forward_pre_hooks
    assert not target.lm_head._forward_pre_hooks


def test_rollouts_of_one_pair_are_those_they_are_alone() -> None:
    draft, target, head = pair()

    def write(i: int) -> Any:
        options = {"new_tokens": 8, "seeds": torch.tensor([i, 7]), "vocab_size": VOCAB_SIZE}
        return roll_out(draft, target, head, [[3, 1 + i], [5, 2, 9 + i]], **options)

    alone = [write(i) for i in range(THREADS)]
    with abreast(draft, target):
        rollouts = together(write)
    for rollout, expected in zip(rollouts, alone, strict=True):
        same(rollout.tokens, expected.tokens)
        assert torch.equal(rollout.draft_weight, expected.draft_weight)
        assert torch.equal(rollout.log_prob, expected.log_prob)


def test_states_that_are_read_are_the_readers_own() -> None:
    draft, _, _ = pair()
    text = torch.arange(1, 19).view(THREADS, 6)
    alone = [read_text(draft, row, 1, VOCAB_SIZE) for row in text]
    with abreast(draft):
        states = together(lambda i: read_text(draft, text[i], 1, VOCAB_SIZE))
    for got, expected in zip(states, alone, strict=True):
        assert torch.equal(got[1], expected[1])


def test_a_hook_goes_whatever_ends_its_forward() -> None:
    draft, _, _ = pair()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), last_hidden(draft):
        interrupt()
    before = draft.lm_head.register_forward_pre_hook(lambda *_: None)
    with last_hidden(draft) as states:
        draft(torch.ones(1, 3).long())
        assert len(draft.lm_head._forward_pre_hooks) == 2
    assert len(states) == 1
    assert list(draft.lm_head._forward_pre_hooks) == [before.id]


def test_models_in_training_mode_stay_in_evaluation_until_the_last_thread_has_left() -> None:
    model = toy(0, VOCAB_SIZE, kind="gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    short, long = (SpeculativeDecoder([model], schedule="plain") for _ in range(2))
    settings = {**prompts((5,), VOCAB_SIZE), "do_sample": False, "pad_token_id": 0}
    expected = long.generate(**settings, max_new_tokens=20)
    model.train()
    inside, joined = threading.Event(), threading.Event()

    def begin(*_: Any) -> bool:
        inside.set()
        assert joined.wait(60)
        return False

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(short.generate, **settings, max_new_tokens=2, stopping_criteria=[begin])

        def let_go(*_: Any) -> bool:
            joined.set()
            first.result(60)
            return False

        assert inside.wait(60)
        same(long.generate(**settings, max_new_tokens=20, stopping_criteria=[let_go]), expected)
    assert all(module.training for module in model.modules())
