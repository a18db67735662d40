# SPDX-License-Identifier: Apache-2.0
"""What of vLLM is relied upon: of each function its arguments, which another vLLM may change.

Whoever calls, replaces or reads another function of vLLM adds it here.
"""

from collections.abc import Iterator
from typing import Any

from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.structured_output import utils as grammar


def relied_upon(runner: type) -> Iterator[tuple[Any, str, str]]:
    """Of a model runner's class and of others, for `differences`."""
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


def relied_upon_of_v2(runner: type) -> Iterator[tuple[Any, str, str]]:
    """The same of model runner V2, whose modules ask for Triton."""
    from vllm.v1.worker.gpu import input_batch
    from vllm.v1.worker.gpu.sample.output import SamplerOutput
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    yield runner, "load_model", "... self load_dummy_weights"
    yield runner, "sample", "self hidden_states input_batch grammar_output"
    places = "input_ids positions logits_indices expanded_idx_mapping expanded_local_pos"
    yield rejection_sampler, "gather_draft_sampled", f"{places} prefill_len"
    arguments = "num_sampled seq_lens cu_num_logits idx_mapping prefill_len"
    yield input_batch, "get_num_sampled_and_rejected", arguments
    fields = "sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected"
    yield SamplerOutput, "__init__", f"... {fields}"
