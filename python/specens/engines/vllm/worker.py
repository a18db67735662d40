# SPDX-License-Identifier: Apache-2.0
"""`worker_cls="specens.engines.vllm.Worker"`: the platform's worker, whose runner is ours.

No module of vLLM is patched: the class of one object is replaced, and only where every function
that is relied upon takes the arguments that it is expected to take.
"""

import logging
from collections.abc import Iterator
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.structured_output import utils as grammar

from specens_kernels import Refusal

from .runner import EnsembleRunner
from .settings import OP, TARGET, Settings
from .signatures import Function, differences

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base

_LOG = logging.getLogger(__name__)


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
        runner = self.model_runner
        strange = differences(relied_upon(type(runner)))
        if self.vllm_config.use_v2_model_runner:
            strange = ["model runner V2 is in use (VLLM_USE_V2_MODEL_RUNNER=0 leaves it)"]
        if not strange:
            runner.__class__ = type("Runner", (EnsembleRunner, type(runner)), {})
            runner.settings = self.specens
        elif self.specens.members != (TARGET,):
            raise Refusal(OP, "members", "a vLLM that is known", "; ".join(strange))
        else:
            _LOG.warning("specens: vLLM's own sampler stays, for %s", "; ".join(strange))


def relied_upon(runner: type) -> Iterator[Function]:
    """The functions of vLLM that `runner.py` and `rows.py` call or replace."""
    drafter = SpecDecodeBaseProposer
    yield runner, "load_model", "self load_dummy_weights"
    yield runner, "sample_tokens", "self grammar_output"
    yield runner, "_sample", "self logits spec_decode_metadata"
    yield runner, "_get_spec_decode_draft_probs", "self spec_decode_metadata"
    yield drafter, "_sample_from_logits", "self logits sampling_metadata"
    yield Sampler, "apply_logits_processors", "self logits sampling_metadata predict_bonus_token"
    yield Sampler, "gather_logprobs", "logprobs num_logprobs token_ids"
    yield RejectionSampler, "apply_logits_processors", "self logits sampling_metadata metadata"
    yield (
        RejectionSampler,
        "_get_logprobs_tensors",
        "self max_num_logprobs metadata logits target_logits bonus_logits sampled_token_ids",
    )
    yield grammar, "apply_grammar_bitmask", "scheduler_output grammar_output input_batch logits"
    fields = "temperature top_k top_p all_greedy generators logitsprocs no_penalties"
    yield SamplingMetadata, "__init__", f"... {fields} max_num_logprobs logprob_token_ids"
