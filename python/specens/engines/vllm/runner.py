# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner (V1), whose tokens the ops decide: `sample` without drafts, else `verify`.

One path for all: a target alone is an ensemble of one. Drafts are drawn under the law that judges
them (drafter.py), and `verify` is handed the very logits they were drawn from. Drafts whose logits
nobody kept are points to it, which is exact whoever drew them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from specens_kernels import Law, Refusal, mix, sample, verify

from .drafter import take_over
from .members import Reading, load_readers
from .rows import Rows, changes_logits, law_of, min_p_of, random_numbers
from .settings import DRAFT, OP, TARGET, Settings


class EnsembleRunner:
    """What a V1 model runner does otherwise; `Worker` puts it before the platform's."""

    specens: Settings

    def load_model(self: Any, *args: Any, **more: Any) -> None:
        """Load vLLM's models, then the further members."""
        super().load_model(*args, **more)  # type: ignore[misc]
        drafter: Any = getattr(self, "drafter", None)
        # Of this drafter it is known that it keeps what `_sample_from_logits` returns.
        self._drafts_have_laws = drafter and self.speculative_config.method == "draft_model"
        if self._drafts_have_laws:
            take_over(self, drafter, is_member=DRAFT in self.specens.members)
        if self.specens.alone:
            return
        readers = load_readers(self, getattr(drafter, "model", None))
        self.model = Reading(self.model, readers, self.input_ids.gpu)

    def get_model(self) -> Any:
        """The bare target, whose class vLLM inspects."""
        model: Any = super().get_model()  # type: ignore[misc]
        model = model.target if isinstance(model, Reading) else model
        return model.unwrap() if hasattr(model, "unwrap") else model

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """Keep what masks the members' logits."""
        state = self.execute_model_state
        self._grammar = grammar_output and state and (state.scheduler_output, grammar_output)
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def parameters(self: Any) -> list[Any]:
        """The sampling parameters of the batch's requests."""
        return [self.requests[name].sampling_params for name in self.input_batch.req_ids]

    def _asked(self: Any) -> list[Settings]:
        """The settings of the batch's requests, read once each."""
        for state in map(self.requests.get, self.input_batch.req_ids):
            if not hasattr(state, OP):
                state.specens = self.specens.of_request(state.sampling_params.extra_args)
        return [self.requests[name].specens for name in self.input_batch.req_ids]

    def _sample(self: Any, logits: Tensor, spec_decode_metadata: Any) -> Any:
        drafts, metadata = spec_decode_metadata, self.input_batch.sampling_metadata
        self.input_batch.update_async_output_token_ids()
        batch = self.input_batch.num_reqs
        counts = [0] * batch if drafts is None else drafts.num_draft_tokens
        rows = Rows(counts, logits.device)
        members = raw = [logits] if self.specens.alone else self._read(logits, metadata, drafts)
        if changes_logits(metadata):
            members = [self._processed(member, metadata, drafts) for member in members]
        padded = [rows.padded(member) for member in members]
        parameters, asked = self.parameters(), self._asked()
        weights = self._weights(asked, rows)
        law = partial(law_of, metadata, batch, weights, self.specens.ensemble)
        law = partial(law, min_p_of(parameters, logits.device))
        numbers = random_numbers(metadata, batch, rows.drafts + 1, logits.device)
        if drafts is None:
            tokens = sample(padded, numbers, law()).tokens
        else:
            kept = self._drafts_have_laws and self._get_spec_decode_draft_probs(drafts)
            drafted = rows.drafted(kept) if isinstance(kept, Tensor) else None
            proposal = (rows.tokens(drafts.draft_token_ids), numbers, drafted)
            tokens = self._verified(padded, proposal, law, [each.acceptance for each in asked])
        tokens, log_probs = tokens.to(torch.int32), None
        if metadata.max_num_logprobs is not None:
            shown = law()
            if self.model_config.logprobs_mode == "raw_logprobs":
                shown, padded = Law(shown.weights, shown.ensemble), list(map(rows.padded, raw))
            log_probs = rows.packed(mix(padded, shown)[0])
            log_probs = self._logprobs(log_probs, tokens, metadata, drafts)
        return SamplerOutput(tokens, logprobs_tensors=log_probs)

    def _verified(self, members: list[Tensor], proposal: Any, law: Any, rules: list[Any]) -> Tensor:
        """(B, N + 1) tokens: requests of one rule are verified together."""
        tokens, numbers, drafted = proposal
        kinds = [(rule.rule.name, *rule.numbers) for rule in rules]
        shape = (len(tokens), tokens.shape[1] + 1)
        emitted: Tensor = tokens.new_empty(shape, dtype=torch.int64)
        for kind in set(kinds):
            requests = [request for request, other in enumerate(kinds) if other == kind]
            of = slice(None) if len(requests) == len(kinds) else requests
            emitted[of] = verify(
                [member[of] for member in members],
                tokens[of],
                numbers[of],
                law(of),
                draft_logits=None if drafted is None else drafted[of],
                acceptance=rules[requests[0]],
            ).tokens
        return emitted

    def _read(self: Any, logits: Tensor, metadata: Any, drafts: Any) -> list[Tensor]:
        """Each member's packed logits, in the order of the weights; a grammar masks all."""
        if self.num_prompt_logprobs or metadata.logprob_token_ids:
            # What a request asks for is looked at when it comes; this one came another way.
            raise Refusal(OP, "prompt_logprobs, logprob_token_ids", "None of an ensemble", "some")
        ends = self.query_start_loc.gpu[1 : self.input_batch.num_reqs + 1] - 1
        members: list[Tensor] = self.model.read(ends if drafts is None else drafts.logits_indices)
        for member in members if self._grammar else ():
            apply_grammar_bitmask(*self._grammar, self.input_batch, member)
        members.insert(self.specens.members.index(TARGET), logits)
        return members

    def _weights(self: Any, asked: list[Settings], rows: Rows) -> Any:
        """The engine's; (B, M) where a request has its own; (B, N + 1, M) where rows differ."""
        settings = self.specens
        every = [each.weights for each in asked]
        if settings.bonus == TARGET and not settings.alone:
            weights = torch.tensor(every, device=self.device)[:, None]
            weights = weights.repeat(1, rows.drafts + 1, 1)
            alone = [float(name == TARGET) for name in settings.members]
            weights[rows.is_bonus] = torch.tensor(alone, device=self.device)
            return weights
        if all(weights == settings.weights for weights in every):
            return settings.weights
        return torch.tensor(every, device=self.device)

    def _processed(self: Any, logits: Tensor, metadata: Any, drafts: Any) -> Any:
        """Packed logits with penalties, biases and bans, by vLLM's own functions."""
        logits, sampler = logits.to(torch.float32, copy=True), self.sampler
        if drafts is None:
            return sampler.apply_logits_processors(logits, metadata, False)
        target, bonus = drafts.target_logits_indices, drafts.bonus_logits_indices
        judge = self.rejection_sampler
        logits[target] = judge.apply_logits_processors(logits[target], metadata, drafts)
        logits[bonus] = sampler.apply_logits_processors(logits[bonus], metadata, True)
        return logits

    def _logprobs(self: Any, log_probs: Tensor, tokens: Tensor, metadata: Any, drafts: Any) -> Any:
        """Of packed rows of the ensemble's log-probabilities, in vLLM's form."""
        count = metadata.max_num_logprobs
        if drafts is None:
            return self.sampler.gather_logprobs(log_probs, count, tokens[:, 0].long())
        target, bonus = drafts.target_logits_indices, drafts.bonus_logits_indices
        return self.rejection_sampler._get_logprobs_tensors(
            count, drafts, log_probs, log_probs[target], log_probs[bonus], tokens
        )
