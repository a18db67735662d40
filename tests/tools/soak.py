# SPDX-License-Identifier: Apache-2.0
"""Calls that are cancelled at random places, and what a fault is.

A fault raises once, at some moment that is counted and not timed, so that a seed is a place. To
cancel calls in another way, add an entry to `FAULTS`.
"""

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

import specens

# Where an interrupt may come: the product's own Python, and what enters and leaves its contexts.
PRODUCT = str(Path(specens.__file__).parent)


class Cancelled(Exception):
    """What a user's own function raises."""


class Fault:
    """Raises at the `at`-th moment; happened: whether it has."""

    def __init__(self, at: int, error: type[BaseException] = Cancelled) -> None:
        self.left, self.error, self.happened = at, error, False

    def moment(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happened = True
            raise self.error


class Streamer(Fault):
    def put(self, value: Any) -> None:
        self.moment()

    def end(self) -> None:
        self.moment()


@contextmanager
def streaming(dice: random.Random, model: Any, settings: dict[str, Any]) -> Iterator[Fault]:
    """A streamer raises; it takes one row."""
    for name in ("input_ids", "attention_mask"):
        settings[name] = settings[name][:1]
    settings["streamer"] = Streamer(dice.randint(1, 12))
    yield settings["streamer"]


@contextmanager
def stopping(dice: random.Random, model: Any, settings: dict[str, Any]) -> Iterator[Fault]:
    """A stopping criterion raises."""
    fault = Fault(dice.randint(1, settings["max_new_tokens"]))

    def stop(*_: Any, **__: Any) -> bool:
        fault.moment()
        return False

    settings["stopping_criteria"] = StoppingCriteriaList([stop])
    yield fault


@contextmanager
def processing(dice: random.Random, model: Any, settings: dict[str, Any]) -> Iterator[Fault]:
    """A logits processor raises."""
    fault = Fault(dice.randint(1, settings["max_new_tokens"]))

    def process(_: Any, scores: Any) -> Any:
        fault.moment()
        return scores

    settings["logits_processor"] = LogitsProcessorList([process])
    yield fault


@contextmanager
def computing(dice: random.Random, model: Any, settings: dict[str, Any]) -> Iterator[Fault]:
    """A model's forward raises, as it does where memory is short."""
    fault = Fault(dice.randint(1, settings["max_new_tokens"]), torch.OutOfMemoryError)
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda *_: fault.moment())
    try:
        yield fault
    finally:
        hook.remove()


@contextmanager
def interrupted(dice: random.Random, model: Any, settings: dict[str, Any]) -> Iterator[Fault]:
    """An interrupt comes, as from a keyboard."""
    with interrupted_at(int(2 ** dice.uniform(0, 13))) as fault:
        yield fault


@contextmanager
def interrupted_at(at: int) -> Iterator[Fault]:
    """An interrupt comes at the `at`-th place in the product where Python looks for signals.

    That is where a function of Python begins, and where one of C has returned.
    """
    fault = Fault(at, KeyboardInterrupt)

    def watch(frame: FrameType | None, event: str, argument: Any) -> None:
        if frame is not None and frame.f_code.co_filename == contextlib.__file__:
            frame = frame.f_back
        if frame is None or not frame.f_code.co_filename.startswith(PRODUCT):
            return
        # A generator that is closed begins, too, but looks for nothing.
        begins = event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if begins or event in ("c_return", "c_exception"):
            fault.moment()

    sys.setprofile(watch)
    try:
        yield fault
    finally:
        sys.setprofile(None)


FAULTS: tuple[Callable[..., Any], ...] = (
    streaming,
    stopping,
    processing,
    computing,
    interrupted,
    interrupted,
    interrupted,
)
