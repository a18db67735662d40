# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, looked at where vLLM admits it: vLLM's plug-in `specens`.

vLLM runs `admit` in each of its processes. For engines without our worker nothing changes. For
those with it, a request with wrong settings is refused by itself, before the engine hears of it,
and min-p is let through to a drafter's engine, for which vLLM has none, but the ops have.
"""

import copy
from typing import Any

from specens_kernels import Refusal

from .settings import OP, Settings, differences

WORKER = "specens.engines.vllm.Worker"


def admit() -> None:
    """Look at requests, once in a process, if vLLM asks where it is expected to ask."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    known: Any = InputProcessor._validate_params
    asked = (InputProcessor, "_validate_params", "self params supported_tasks")
    if hasattr(known, OP) or differences([asked]):
        return

    def validate(self: Any, params: Any, supported_tasks: Any) -> Any:
        config = self.vllm_config
        given = config.additional_config
        ours = config.parallel_config.worker_cls == WORKER or (
            isinstance(given, dict) and OP in given
        )
        if not ours or not hasattr(params, "min_p"):  # of a task that draws no tokens
            return known(self, params, supported_tasks)
        try:
            settings = Settings.parse(given.get(OP, {}))
            settings.check_request(params, config.use_v2_model_runner and not settings.alone)
        except Refusal as refusal:
            raise VLLMValidationError(str(refusal)) from None
        if params.min_p and config.speculative_config is not None and _decides(config):
            params = copy.copy(params)
            params.min_p = 0.0
        return known(self, params, supported_tasks)

    setattr(validate, OP, True)
    InputProcessor._validate_params = validate


def _decides(config: Any) -> bool:
    """Whether the worker will decide tokens, or leave it to vLLM, which forgets min-p."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from .reliance import relied_upon

    return not config.use_v2_model_runner and not differences(relied_upon(GPUModelRunner))
