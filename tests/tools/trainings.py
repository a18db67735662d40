# SPDX-License-Identifier: Apache-2.0
"""Short runs of training: what they learn from, their settings, and how they are interrupted."""

from collections.abc import Callable

from specens.training import rewards
from specens.training.examples import Example
from specens.training.settings import HeadSettings, StepPlan

ENSEMBLES = ("mixture", "product")


class Interrupted(Exception):
    """Raised by a progress bar."""


def interrupt_after(steps: int) -> Callable[[int], None]:
    def advance(done: int) -> None:
        if done == steps:
            raise Interrupted

    return advance


TEXTS = [Example("def f(x):\n", "    return x\n"), Example("class A:\n", "    pass\n")]
TINY = HeadSettings(
    prompts_per_step=2,
    samples_per_prompt=2,
    new_tokens=4,
    baseline="ema",
    plan=StepPlan(5, 0.05, warmup_steps=2, save_every=2),
)
LIKELIHOOD = rewards.REWARDS["likelihood"]
