# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner V2, whose tokens the ops decide as in runner.py.

Seeds and positions are at hand there: a request's random numbers are those of its seed and of each
token's position, in any batch. What of a request is not read here is refused when the request comes
(`_UNREAD` in settings.py): to add it, read it here, and take its name out there.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import gather_draft_sampled

from specens_kernels import PADDING, Law, Stream, sample, uniforms, verify

from .members import Reading, load_readers
from .rows import Rows
from .settings import TARGET, Settings


class EnsembleRunner:
    """What a V2 model runner does otherwise; `Worker` puts it before vLLM's."""

    specens: Settings

    def load_model(self: Any, *args: Any, **more: Any) -> None:
        """Load vLLM's models, then the further members."""
        super().load_model(*args, **more)  # type: ignore[misc]
        if not self.specens.alone:
            draft = getattr(self.speculator, "model", None)
            readers = load_readers(self, draft)
            self.model = Reading(self.model, readers, self.input_buffers.input_ids)

    def get_model(self: Any) -> Any:
        """The bare target, whose class vLLM inspects."""
        return self.model.target if isinstance(self.model, Reading) else self.model

    def sample(self: Any, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        """The tokens of a step, how many each request gets, and how many of its drafts are lost."""
        places, index = input_batch.logits_indices, input_batch.idx_mapping
        ends = input_batch.cu_num_logits_np
        rows = Rows([int(b - a) - 1 for a, b in pairwise(ends)], places.device)
        members = [] if self.specens.alone else self.model.read(places)
        target = self.model.compute_logits(hidden_states[places])
        members.insert(self.specens.members.index(TARGET), target)
        padded = [rows.padded(member) for member in members]
        prefill = self.sampler.req_states.prefill_len.gpu
        drafted, positions = gather_draft_sampled(
            input_batch.input_ids,
            input_batch.positions,
            places,
            input_batch.expanded_idx_mapping,
            input_batch.expanded_local_pos,
            prefill,
        )
        states = self.sampler.sampling_states
        law, filtered = self._law(states, index, input_batch.idx_mapping_np)
        seeds, positions = states.seeds.gpu[index], rows.padded(positions).long()
        numbers = uniforms(seeds, positions, Stream.VERIFY)
        if rows.drafts == 0:
            tokens = sample(padded, numbers, law).tokens
            count = torch.ones_like(tokens[:, 0])
        else:
            kept = getattr(self.speculator, "draft_logits", None)
            verdict = verify(
                padded,
                # Row i + 1 of a request holds its draft i, row 0 its last token.
                torch.where(rows.is_bonus[:, :-1], PADDING, rows.padded(drafted)[:, 1:]),
                numbers,
                law,
                draft_logits=None if kept is None else kept[index, : rows.drafts],
                # vLLM's drafts obey the temperature alone.
                draft_filtered=kept is None or not filtered,
                acceptance=self.specens.acceptance,
            )
            missing = self.num_speculative_steps - rows.drafts
            tokens = nn.functional.pad(verdict.tokens, (0, missing), value=PADDING)
            count = verdict.num_accepted + 1
        count, rejected = get_num_sampled_and_rejected(
            count.to(torch.int32), input_batch.seq_lens, input_batch.cu_num_logits, index, prefill
        )
        return SamplerOutput(tokens.long(), None, None, count, rejected), count, rejected

    def _law(self: Any, states: Any, index: Tensor, on_host: Any) -> tuple[Law, bool]:
        """The requests' law, and whether one of them has a filter."""
        none = {"top_k": states.vocab_size, "top_p": 1.0, "min_p": 0.0}
        filters = {
            name: getattr(states, name).gpu[index]
            for name, value in none.items()
            if (getattr(states, name).np[on_host] != value).any()
        }
        temperature = states.temperature.gpu[index]
        law = Law(self.specens.weights, self.specens.ensemble, temperature, **filters)
        return law, bool(filters)
