# SPDX-License-Identifier: Apache-2.0
"""The door that vLLM opens: `worker_cls="specens.engines.vllm.Worker"`.

vLLM is imported when the worker is asked for. `settings.py` says what may be set, `signatures.py`
what of vLLM is relied upon, `rows.py` turns vLLM's batch into what the ops take, `runner.py` decides
the tokens. A setting is added in `settings.py`, a function of vLLM that is called or replaced in
`signatures.py`.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .worker import Worker as Worker

__all__ = ["Worker"]


def __getattr__(name: str) -> Any:
    if name != "Worker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "specens.engines.vllm: vllm: expected vLLM to be installed, got no package of this name",
            name="vllm",
        )
    from .worker import Worker

    return Worker
