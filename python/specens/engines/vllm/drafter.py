# SPDX-License-Identifier: Apache-2.0
"""What a draft model of vLLM does otherwise: it draws by the law that judges, and reads once."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID

from specens_kernels import sample

from .rows import law_of, min_p_of, random_numbers


def take_over(runner: Any, drafter: Any, is_member: bool) -> None:
    """Have a runner's drafter draw by our law; one that is a member has read what is committed."""
    drafter._sample_from_logits = partial(sample_from_logits, runner)
    if is_member:
        drafter.set_inputs_first_pass = partial(next_tokens_only, drafter)


def sample_from_logits(runner: Any, logits: Tensor, metadata: Any) -> tuple[Tensor, Tensor | None]:
    """A drafter's `_sample_from_logits` under the law that judges the drafts, filters included.

    What is kept beside the tokens are bare logits; most probable tokens are points.
    """
    sampled = runner.drafter._enable_probabilistic_draft_probs and not metadata.all_greedy
    if not sampled or len(logits) != len(metadata.temperature):
        return logits.argmax(-1), None
    numbers = random_numbers(metadata, len(logits), 1, logits.device)
    law = law_of(metadata, len(logits), min_p=min_p_of(runner.parameters(), logits.device))
    return sample([logits[:, None]], numbers, law).tokens[:, 0], logits


def next_tokens_only(
    drafter: Any,
    target_token_ids: Tensor,
    next_token_ids: Tensor,
    target_positions: Tensor,
    target_hidden_states: Tensor,
    token_indices_to_sample: Tensor | None,
    cad: Any,
    num_rejected_tokens_gpu: Tensor | None,
) -> tuple[int, Tensor, Any]:
    """A drafter's `set_inputs_first_pass` where all tokens but the one just emitted were read.

    Args:
        next_token_ids: (B,). The tokens just emitted.
        target_positions: of all tokens that the step has read.
        cad: vLLM's metadata of that step, which become those of one token a request.
        num_rejected_tokens_gpu: (B,), how many of a request's tokens are taken back.
    """
    batch = cad.batch_size()
    last, lengths = cad.query_start_loc[1:].long() - 1, cad.seq_lens + 1
    if num_rejected_tokens_gpu is not None:
        last, lengths = last - num_rejected_tokens_gpu, lengths - num_rejected_tokens_gpu
        num_rejected_tokens_gpu.zero_()  # the caller would take them off once more
    positions = target_positions[last] + 1
    drafter.input_ids[:batch] = next_token_ids
    drafter.positions[:batch] = positions
    inside, size = positions.clamp(max=drafter.max_model_len - 1), drafter.block_size
    blocks = cad.block_table_tensor.gather(1, (inside // size)[:, None])[:, 0]
    slots = blocks * size + inside % size
    cad = cad.replace(
        query_start_loc=drafter.arange[: batch + 1],
        query_start_loc_cpu=torch.arange(batch + 1, dtype=torch.int32),
        seq_lens=lengths,
        num_actual_tokens=batch,
        max_query_len=1,
        max_seq_len=cad.max_seq_len + 1,
        slot_mapping=slots.masked_fill(positions >= drafter.max_model_len, PADDING_SLOT_ID),
    )
    return batch, drafter.arange[:batch].long(), cad
