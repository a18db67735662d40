# SPDX-License-Identifier: Apache-2.0
"""vLLM in a Python that has it: ENGINES_PYTHON, which `make test-engines` sets.

Without it, tests of a real engine are skipped.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_engines import Engines

from specens import family


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    python = os.environ.get("ENGINES_PYTHON")
    if not python:
        pytest.skip("vLLM: not in this environment; `make test-engines` makes one")
    engines = Engines(python, tmp_path_factory.mktemp("engines"))
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def members() -> dict[str, Any]:
    """The shipped models, by transformers."""
    return {
        name: AutoModelForCausalLM.from_pretrained(family.path(name), dtype=torch.float32)
        for name in ("draft", "code", "prose")
    }
