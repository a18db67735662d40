# SPDX-License-Identifier: Apache-2.0
"""What the decoder decides where nothing is said: who drafts, and how far it looks ahead."""

from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCAB_SIZE, decoder, same
from torch import Tensor
from toys import prompts, toy

from specens import SpeculativeDecoder
from specens.schedules import SCHEDULES, Alternating, LookAhead, Speculative
from specens_kernels import Acceptance

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_cheapest_member_drafts():
    large, small, middle = (
        toy(seed, VOCAB_SIZE, hidden_size=size) for seed, size in enumerate((48, 16, 32))
    )
    members = [large, small, middle]
    assert SpeculativeDecoder(members).schedule == Alternating((1, 1, 1), (1, 2, 0))
    fast = SpeculativeDecoder(members, schedule=Alternating(tokens=4))
    assert fast.schedule == Alternating((4, 1, 1), (1, 2, 0))
    fast = SpeculativeDecoder(members, schedule=Alternating(tokens=(3, 2, 1), order=(2, 0, 1)))
    assert fast.schedule == Alternating((3, 2, 1), (2, 0, 1))
    fast = SpeculativeDecoder(members, schedule="speculative")
    assert fast.schedule == Speculative(4, 1)
    fast = SpeculativeDecoder(members, schedule=Speculative(proposer=2))
    assert fast.schedule == Speculative(4, 2)
    fast = SpeculativeDecoder([small], schedule="speculative", draft=large)
    assert fast.schedule == Speculative(4, 1)
    assert SpeculativeDecoder(members).weights == (1 / 3, 1 / 3, 1 / 3)


def test_looking_ahead_goes_by_every_members_size():
    """Who asks another member runs it: four that are asked cost more than one."""
    cheap = toy(0, VOCAB_SIZE, hidden_size=8)
    dear = [toy(seed, VOCAB_SIZE, hidden_size=64, num_hidden_layers=2) for seed in range(1, 5)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (cheap, dear[0])]
    assert sizes[1] > 20 * sizes[0]
    two = SpeculativeDecoder([cheap, dear[0]], weights=[0.2, 0.8], schedule="lookahead")
    five = SpeculativeDecoder([cheap, *dear], schedule="lookahead")
    assert two.schedule.proposer == five.schedule.proposer == 0
    assert sum(five.schedule.ahead) < sum(two.schedule.ahead)
    fixed = SpeculativeDecoder([cheap, *dear], schedule=LookAhead(ahead=3))
    assert fixed.schedule == LookAhead(16, 0, 3)
    with pytest.raises(ValueError, match=r"^lookahead: token_cost: expected None beside ahead"):
        SpeculativeDecoder([cheap, *dear], schedule=LookAhead(ahead=3, token_cost=0.2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_bound_can_be_bound_again(schedule, models):
    """To the same models: in another decoder, and from its text."""
    drafts = {"speculative": models[2], "companion": models[2:4], "hierarchy": models[2:4]}
    options = {"draft": drafts.get(schedule)}
    bound = SpeculativeDecoder(models[:2], schedule=schedule, **options).schedule
    assert SpeculativeDecoder(models[:2], schedule=bound, **options).schedule == bound
    assert SpeculativeDecoder(models[:2], schedule=str(bound), **options).schedule == bound
    if schedule == "speculative":
        assert bound.proposer == 2
        with pytest.raises(ValueError, match=r"^speculative: proposer: expected None with a draft"):
            SpeculativeDecoder(models[:1], schedule=bound, **options)


def test_numbers_may_be_those_of_numpy(models):
    def both(number: Any, real: Any) -> Tensor:
        fast = [
            SpeculativeDecoder(
                models[:2],
                schedule=Alternating(tokens=[number(2), number(1)], order=[number(1), number(0)]),
                weights=[real(0.25), real(0.75)],
                acceptance=Acceptance("lenient", lenience=real(0.5)),
                seed=number(7),
            ),
            SpeculativeDecoder(
                models[:2],
                schedule=Speculative(tokens=number(2), proposer=number(1)),
                ensemble="product",
                plausibility=real(0.25),
            ),
        ]
        settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": True}
        return torch.cat(
            [
                fast[0].generate(**settings),
                fast[0].generate(**settings, seed=[number(4), number(9)]),
                fast[1].generate(**settings, seed=number(3)),
            ]
        )

    expected = both(int, float)
    same(both(np.int64, np.float32), expected)
    same(both(np.uint8, np.float64), expected)
    fast = decoder(models, 2, "alternating", gamma=np.array([2, 1]))
    assert fast.schedule.tokens == (2, 1)
    settings = {**prompts((5, 3), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": True}
    text = fast.generate(**settings, seed=[5, 6])
    for seeds in (np.array([5, 6]), torch.tensor([5, 6])):
        same(fast.generate(**settings, seed=seeds), text)
    same(fast.generate(**settings, seed=5), text)
