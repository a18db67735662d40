# SPDX-License-Identifier: Apache-2.0
"""The platform's worker, whose model runner is ours.

The class of one object is replaced, the runner's, and only where every function that is called or
replaced takes the arguments that it is expected to take (`relied_upon`).
"""

import logging
from typing import Any

from vllm.platforms import current_platform

from specens_kernels import Refusal

from .reliance import relied_upon, relied_upon_of_v2
from .requests import admit
from .runner import EnsembleRunner
from .settings import OP, Settings, differences

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


# An engine of one process need not have vLLM's plug-ins loaded.
admit()


class Worker(Base):  # type: ignore[misc]
    """The platform's worker; its settings are `additional_config={"specens": {...}}`."""

    def __init__(self, vllm_config: Any, *args: Any, **more: Any) -> None:
        """Check the settings, then let vLLM begin."""
        given = vllm_config.additional_config
        self.specens = Settings.parse(given.get(OP, {}) if isinstance(given, dict) else given)
        self.specens.check_engine(vllm_config)
        super().__init__(vllm_config, *args, **more)

    def init_device(self) -> None:
        """Have the runner that vLLM has made decide by our ops, if it is one that we know."""
        super().init_device()
        theirs: type = type(self.model_runner)
        ours: type = EnsembleRunner
        if not self.use_v2_model_runner:
            unknown = differences(relied_upon(theirs))
        elif self.specens.alone:
            unknown = ["model runner V2 (VLLM_USE_V2_MODEL_RUNNER=0 takes V1)"]
        else:
            from .v2 import EnsembleRunner as ours

            unknown = differences(relied_upon_of_v2(theirs))
        if not unknown:
            self.model_runner.__class__ = type("Runner", (ours, theirs), {})
            self.model_runner.specens = self.specens
        elif not self.specens.alone:
            raise Refusal(OP, "members", "a vLLM that is known", ", ".join(unknown))
        else:
            message = "specens: vLLM's own sampler decides; not known are %s"
            logging.getLogger(__name__).warning(message, ", ".join(unknown))
