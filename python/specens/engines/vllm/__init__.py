# SPDX-License-Identifier: Apache-2.0
"""The door that vLLM opens, which is imported with it: `worker_cls="specens.engines.vllm.Worker"`.

`settings.py` says what may be set, `requests.py` has vLLM refuse requests that set another thing,
`members.py` loads further models, `rows.py` turns vLLM's batch into what the ops take, `runner.py`
decides tokens, in model runner V2 `v2.py`, `drafter.py` draws drafts, `worker.py` puts them in, if
vLLM is as `reliance.py` says.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .worker import Worker as Worker


def __getattr__(name: str) -> Any:
    if name != "Worker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(f"{__name__}: vllm: expected an installed package, got none")
    from .worker import Worker

    return Worker
