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
# Modules that were in training mode, and by how many they are read now.
_readers: dict[Any, int] = {}


@contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Evaluation mode; the last to leave puts back what was in training, module by module."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    with _lock:
        held = [module for module in modules if module.training or module in _readers]
        for module in held:
            _readers[module] = _readers.get(module, 0) + 1
            # The flag alone: a module's own `train` may do more, such as merging adapters.
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in held:
                _readers[module] -= 1
                if _readers[module] == 0:
                    del _readers[module]
                    module.training = True
