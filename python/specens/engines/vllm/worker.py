# SPDX-License-Identifier: Apache-2.0
"""The platform's worker, whose model runner is ours.

The class of one object is replaced, the runner's, and only where every function that is called or
replaced takes the arguments that it is expected to take (`relied_upon`).
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
        unknown = differences(relied_upon(type(self.model_runner)))
        if self.use_v2_model_runner:
            unknown = ["model runner V2 (VLLM_USE_V2_MODEL_RUNNER=0 takes V1)"]
        if not unknown:
            runner = type("Runner", (EnsembleRunner, type(self.model_runner)), {})
            self.model_runner.__class__ = runner
            self.model_runner.specens = self.specens
        elif not self.specens.alone:
            raise Refusal(OP, "members", "a vLLM that is known", ", ".join(unknown))
        else:
            message = "specens: vLLM's own sampler decides; not known are %s"
            logging.getLogger(__name__).warning(message, ", ".join(unknown))


def relied_upon(runner: type) -> Iterator[tuple[Any, str, str]]:
    """What of vLLM runner.py and rows.py call, replace and read, for `differences`."""
    drafter, processors = SpecDecodeBaseProposer, "self logits sampling_metadata"
    yield runner, "load_model", "... self load_dummy_weights"  # and more, where it is a GPU's
    yield runner, "sample_tokens", "self grammar_output"
    yield runner, "_sample", "self logits spec_decode_metadata"
    yield runner, "_get_spec_decode_draft_probs", "self spec_decode_metadata"
    yield drafter, "_sample_from_logits", "self logits sampling_metadata"
    tokens = "self target_token_ids next_token_ids target_positions target_hidden_states"
    last = "token_indices_to_sample cad num_rejected_tokens_gpu"
    yield drafter, "set_inputs_first_pass", f"{tokens} {last}"
    yield Sampler, "apply_logits_processors", f"{processors} predict_bonus_token"
    yield Sampler, "gather_logprobs", "logprobs num_logprobs token_ids"
    yield RejectionSampler, "apply_logits_processors", f"{processors} metadata"
    arguments = "max_num_logprobs metadata logits target_logits bonus_logits sampled_token_ids"
    yield RejectionSampler, "_get_logprobs_tensors", f"self {arguments}"
    yield grammar, "apply_grammar_bitmask", "scheduler_output grammar_output input_batch logits"
    fields = "temperature top_k top_p all_greedy generators logitsprocs no_penalties"
    yield SamplingMetadata, "__init__", f"... {fields} max_num_logprobs logprob_token_ids"
