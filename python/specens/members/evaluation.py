# SPDX-License-Identifier: Apache-2.0
"""Models in evaluation mode for a while, each module put back as it was.

In training mode a model drops out, and with gradient checkpointing transformers takes its cache
away: what it says is then neither its law nor its text.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(models: Iterable[Any]) -> Iterator[None]:
    """Evaluation mode; flags that differ between modules come back module by module."""
    training = [module for model in models for module in model.modules() if module.training]
    try:
        # The flag alone: a module's own `train` may do more, such as merging adapters.
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
