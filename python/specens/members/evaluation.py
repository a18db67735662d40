# SPDX-License-Identifier: Apache-2.0
"""Models in evaluation mode for a while, each module put back as it was.

In training mode a model drops out, and with gradient checkpointing transformers takes its cache
away: what it says is then neither its law nor its text.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
# Modules that were in training mode, and those who read them now.
_readers: dict[Any, set[object]] = {}


@contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Evaluation mode; the last to leave puts back what was in training, module by module."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    reader = object()
    try:
        with _lock:
            for module in modules:
                if module.training or module in _readers:
                    _readers.setdefault(module, set()).add(reader)
                    # The flag alone: a module's own `train` may do more, such as merging adapters.
                    module.training = False
        yield
    finally:
        try:
            _leave(modules, reader)
        except BaseException:  # an interrupt that came just now
            _leave(modules, reader)
            raise


def _leave(modules: Iterable[Any], reader: object) -> None:
    """To leave twice is as to leave once."""
    with _lock:
        for module in modules:
            others = _readers.get(module)
            if others is None:
                continue
            others.discard(reader)
            if not others:
                module.training = True
                _readers.pop(module, None)
