# SPDX-License-Identifier: Apache-2.0
"""Many calls, cancelled at random places: models, caches and memory are as they were.

`make soak` writes 100,000 tokens; here it is a few, from the same seed.
"""

import os
import random
import resource
import sys
from typing import Any

import pytest
import torch
from decoders import VOCAB_SIZE, same
from soak import FAULTS, Cancelled, interrupted_at
from test_side_effects import live_tensors, snapshot, unchanged
from toys import noisy, prompts, toy

from specens import SpeculativeDecoder
from specens.members import kernel
from specens.members.weight_head import WeightHead

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

TOKENS = int(os.environ.get("SOAK_TOKENS", "1000"))


def belongings() -> tuple[dict[str, Any], dict[str, SpeculativeDecoder], WeightHead]:
    """Models whose state is kept in each of the ways there are, and decoders that share them."""
    torch.manual_seed(0)
    models = {kind: toy(0, VOCAB_SIZE, kind=kind) for kind in ("llama", "bloom", "lfm2", "gpt2")}
    models |= {f"other {kind}": noisy(models[kind], 0.7) for kind in ("llama", "bloom", "lfm2")}
    models["third"] = noisy(models["llama"], 1.0, seed=2).train()  # without dropout
    llama, other, third = models["llama"], models["other llama"], models["third"]
    head = WeightHead(torch.randn(32), torch.tensor(0.0))
    decoders = {
        "plain": SpeculativeDecoder([llama, third], schedule="plain"),
        "draft": SpeculativeDecoder([llama], schedule="speculative:tokens=6", draft=other),
        "alternating": SpeculativeDecoder([llama, other, third], schedule="alternating:tokens=3"),
        "crop": SpeculativeDecoder([models["bloom"], models["other bloom"]]),
        "replay": SpeculativeDecoder([models["lfm2"], models["other lfm2"]]),
        "mixed": SpeculativeDecoder([models["gpt2"], llama, models["lfm2"]]),
        "lookup": SpeculativeDecoder([llama], schedule="lookup"),
        "head": SpeculativeDecoder([other, llama], schedule="speculative", weights=head),
        "block": SpeculativeDecoder(
            [llama], schedule="hierarchy", draft=[third, other], acceptance=["block", "block"]
        ),
        "companion": SpeculativeDecoder([llama], schedule="companion", draft=[third, other]),
    }
    return models, decoders, head


def resident_memory() -> int:
    """MiB that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def live_tensors_of_calls() -> dict[str, int]:
    """Without the words of short chains, which are kept for later calls, some hundred at most."""
    kernel._kept_chain.cache_clear()
    return live_tensors()


def drawn(dice: random.Random) -> dict[str, Any]:
    """A call that any of the decoders takes."""
    lengths = [dice.randint(1, 70) for _ in range(dice.choice([1, 1, 2, 4]))]
    settings: dict[str, Any] = prompts(lengths, VOCAB_SIZE, seed=dice.randrange(2**20))
    settings |= {"max_new_tokens": dice.choice([1, 8, 30, 90]), "pad_token_id": 0}
    settings |= {"do_sample": False, "eos_token_id": dice.choice([None, [1, 2]])}
    if dice.random() < 0.5:
        settings |= {"do_sample": True, "top_k": 0, "seed": dice.randrange(2**40)}
    return settings


def test_cancelled_calls_leave_everything_as_it_was() -> None:
    models, decoders, _ = belongings()
    before, dice = snapshot(*models.values()), random.Random(0)
    written, calls, cancelled = 0, 0, dict.fromkeys(FAULTS, 0)
    for fast in decoders.values():  # what is made at the first call stays
        fast.generate(**prompts((3,), VOCAB_SIZE), max_new_tokens=3)
    memory, resident = live_tensors_of_calls(), resident_memory()
    while written < TOKENS:
        name = dice.choice(sorted(decoders))
        fast, settings = decoders[name], drawn(dice)
        calls += 1
        way = dice.choice(FAULTS)
        faulty = dict(settings)
        with way(dice, fast.models[0], faulty) as fault:
            try:
                fast.generate(**faulty)
            except (Cancelled, KeyboardInterrupt, torch.OutOfMemoryError):
                assert fault.happened
                cancelled[way] += 1
        assert all(member.lengths == [] and member.capacity == 0 for member in fast.members), name
        # Another decoder on these models, and this one again: as if nothing had been cancelled.
        text = fast.generate(**settings)
        written += fast.statistics.num_tokens
        if calls % 16 == 0:
            assert unchanged(before, snapshot(*models.values())), name
            fresh = SpeculativeDecoder(
                fast.models[: fast.num_ensemble],
                weights=fast.head or fast.weights,
                schedule=fast.schedule,
                draft=fast.models[fast.num_ensemble :],
                acceptance=fast.acceptances,
            )
            same(fresh.generate(**settings), text)
            del fresh
    assert unchanged(before, snapshot(*models.values()))
    del fast, settings, faulty, text
    after = live_tensors_of_calls()
    counts = ", ".join(f"{count} by {way.__name__}" for way, count in cancelled.items())
    sys.stdout.write(
        f"{written} tokens in {calls} calls, cancelled {counts}; {memory} -> {after}; "
        f"resident at most {resident} -> {resident_memory()} MiB\n"
    )
    assert sum(cancelled.values()) > calls / 4
    # Statistics hold no tensors, and a member without rows a few empty ones.
    assert after["bytes"] <= memory["bytes"]
    assert after["tensors"] <= memory["tensors"] + 8 * len(decoders)


def test_an_interrupt_at_any_place_leaves_the_decoder_open() -> None:
    """Every so many of the places of one call, from its first to its last."""
    models, decoders, _ = belongings()
    before = snapshot(*models.values())
    fast = decoders["head"]
    settings = {**prompts((3, 1), VOCAB_SIZE), "max_new_tokens": 3, "do_sample": False}
    expected = fast.generate(**settings)
    with interrupted_at(10**9) as fault:
        fast.generate(**settings)
    places = 10**9 - fault.left
    assert places > 500
    step = 1 if TOKENS > 1000 else max(places // 150, 1)
    for at in range(1, places + 1, step):
        with interrupted_at(at) as fault, pytest.raises(KeyboardInterrupt):
            fast.generate(**settings)
        assert fault.happened
        assert not any(member.lengths or member.capacity for member in fast.members), at
        same(fast.generate(**settings), expected)
    assert unchanged(before, snapshot(*models.values()))
