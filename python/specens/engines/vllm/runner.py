# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner (V1), whose tokens the ops decide: `sample` without drafts, else `verify`.

One path for all: a target alone is an ensemble of one. Drafts are drawn by `sample` under the law
that judges them, and `verify` is handed the very logits they were drawn from; drafts of which none
are kept count as points, which is exact whoever drew them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, replace
from vllm.model_executor.model_loader import get_model
from vllm.tokenizers.registry import get_tokenizer
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.structured_output.utils import apply_grammar_bitmask

from specens_kernels import Law, Refusal, mix, sample, verify

from .rows import Rows, changes_logits, law_of, random_numbers
from .settings import DRAFT, OP, TARGET, Settings


class Reading(nn.Module):
    """A target whose forward pass is followed by the readers', on the same tokens.

    They run in the target's forward context, which has the metadata and the slots of every layer
    with a KV cache. What profiles or captures the target thus includes the readers.
    """

    def __init__(self, target: nn.Module, readers: list[nn.Module], tokens: Tensor) -> None:
        super().__init__()
        self.target, self.readers, self._tokens = target, nn.ModuleList(readers), tokens
        # A graph that is replayed writes where it wrote when it was captured.
        self._hidden: list[Tensor] = []

    def forward(self, input_ids: Any = None, positions: Any = None, **more: Any) -> Any:
        """The target's output; the readers' hidden states are kept."""
        out = self.target(input_ids=input_ids, positions=positions, **more)
        tokens = self._tokens[: positions.shape[-1]] if input_ids is None else input_ids
        for index, reader in enumerate(self.readers):
            hidden = reader(input_ids=tokens, positions=positions)
            if index == len(self._hidden):
                self._hidden.append(hidden.new_zeros(len(self._tokens), hidden.shape[-1]))
            self._hidden[index][: len(hidden)] = hidden
        return out

    def read(self, rows: Tensor) -> list[Tensor]:
        """The readers' logits at rows of the last batch."""
        pairs = zip(self.readers, self._hidden, strict=True)
        return [reader.compute_logits(hidden[rows]) for reader, hidden in pairs]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("target"), name)


def sample_from_logits(self: Any, logits: Tensor, metadata: Any) -> tuple[Tensor, Tensor | None]:
    """`SpecDecodeBaseProposer._sample_from_logits` under the law that judges the drafts.

    What is kept beside the tokens are bare logits. Drafts that are their law's most probable token
    need none.
    """
    sampled = self._enable_probabilistic_draft_probs and not metadata.all_greedy
    if not sampled or len(logits) != len(metadata.temperature):
        return logits.argmax(-1), None
    numbers = random_numbers(metadata, len(logits), 1, logits.device)
    drawn = sample([logits[:, None]], numbers, law_of(metadata, len(logits)))
    return drawn.tokens[:, 0], logits


class EnsembleRunner:
    """What a V1 model runner does otherwise; put before the platform's runner by `Worker`."""

    settings: Settings

    def load_model(self: Any, *args: Any, **more: Any) -> None:
        """Load vLLM's models, then the further members."""
        super().load_model(*args, **more)
        settings, drafter = self.settings, getattr(self, "drafter", None)
        if self.draws_drafts:
            drafter._sample_from_logits = sample_from_logits.__get__(drafter)
        if settings.members == (TARGET,):
            return
        readers = []
        for index, name in enumerate(settings.members):
            if name == DRAFT:
                check_member(self.vllm_config, self.speculative_config.draft_model_config)
                readers.append(drafter.model)
            elif name != TARGET:
                readers.append(load_member(self.vllm_config, name, f"member_{index}"))
        self.model = Reading(self.model, readers, self.input_ids.gpu)

    @property
    def draws_drafts(self: Any) -> bool:
        """Whether drafts are drawn by `sample_from_logits` wherever the drafter keeps a law."""
        drafter = self.speculative_config
        return drafter is not None and drafter.method == "draft_model"

    def get_model(self: Any) -> nn.Module:
        """The bare target, whose class vLLM inspects."""
        model: Any = super().get_model()  # type: ignore[misc]
        model = model.target if isinstance(model, Reading) else model
        return model.unwrap() if hasattr(model, "unwrap") else model

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """Keep what masks the members' logits."""
        state = self.execute_model_state
        self._grammar = grammar_output and (state.scheduler_output, grammar_output)
        return super().sample_tokens(grammar_output)

    def _sample(self: Any, logits: Tensor, spec_decode_metadata: Any) -> Any:
        drafts, metadata = spec_decode_metadata, self.input_batch.sampling_metadata
        self.input_batch.update_async_output_token_ids()
        batch = self.input_batch.num_reqs
        self._refuse_requests(metadata)
        rows = Rows([0] * batch if drafts is None else drafts.num_draft_tokens, logits.device)
        raw = members = self._members(logits, drafts)
        if changes_logits(metadata):
            members = [self._processed(member, metadata, drafts) for member in members]
        law = law_of(metadata, batch, self._weights(), self.settings.ensemble)
        numbers = random_numbers(metadata, batch, rows.drafts + 1, logits.device)
        padded = [rows.padded(member) for member in members]
        if drafts is None:
            tokens = sample(padded, numbers, law).tokens
        else:
            kept = self._get_spec_decode_draft_probs(drafts) if self.draws_drafts else None
            tokens = verify(
                padded,
                rows.tokens(drafts.draft_token_ids),
                numbers,
                law,
                draft_logits=None if kept is None else rows.drafted(kept),
                acceptance=self.settings.acceptance,
            ).tokens
        tokens = tokens.to(torch.int32)
        if metadata.max_num_logprobs is None:
            return SamplerOutput(tokens, logprobs_tensors=None)
        if self.model_config.logprobs_mode == "raw_logprobs":
            law = Law(law.weights, law.ensemble)
            padded = [rows.padded(member) for member in raw]
        log_probs = rows.packed(mix(padded, law)[0])
        return SamplerOutput(tokens, self._logprobs(log_probs, tokens, metadata, drafts))

    def _members(self: Any, logits: Tensor, drafts: Any) -> list[Tensor]:
        """Each member's packed logits, in the order of the weights; a grammar masks all."""
        if self.settings.members == (TARGET,):
            return [logits]
        ends = self.query_start_loc.gpu[1 : self.input_batch.num_reqs + 1] - 1
        members = self.model.read((ends if drafts is None else drafts.logits_indices).long())
        for member in members if self._grammar else ():
            apply_grammar_bitmask(*self._grammar, self.input_batch, member)
        members.insert(self.settings.members.index(TARGET), logits)
        return list(members)

    def _weights(self: Any) -> Any:
        """The engine's, or (B, M) where a request has its own."""
        requests = [self.requests[name] for name in self.input_batch.req_ids]
        if not any((request.sampling_params.extra_args or {}).get(OP) for request in requests):
            return self.settings.weights
        weights = [
            self.settings.request_weights(request.sampling_params.extra_args)
            for request in requests
        ]
        return torch.tensor(weights, device=self.device)

    def _refuse_requests(self: Any, metadata: Any) -> None:
        """Of several members: what vLLM computes from the target alone."""
        if self.settings.members == (TARGET,):
            return
        for key, given in (
            ("prompt_logprobs", self.num_prompt_logprobs),
            ("logprob_token_ids", metadata.logprob_token_ids),
        ):
            if given:
                raise Refusal(OP, key, "None for an ensemble of several members", "a request of it")

    def _processed(self: Any, logits: Tensor, metadata: Any, drafts: Any) -> Tensor:
        """Packed logits with penalties, biases and bans, by vLLM's own functions."""
        logits = logits.to(torch.float32, copy=True)
        if drafts is None:
            processed: Tensor = self.sampler.apply_logits_processors(logits, metadata, False)
            return processed
        target, bonus = drafts.target_logits_indices, drafts.bonus_logits_indices
        judge = self.rejection_sampler
        logits[target] = judge.apply_logits_processors(logits[target], metadata, drafts)
        logits[bonus] = self.sampler.apply_logits_processors(logits[bonus], metadata, True)
        return logits

    def _logprobs(
        self: Any, log_probs: Tensor, tokens: Tensor, metadata: Any, drafts: Any
    ) -> LogprobsTensors:
        """Of packed rows of the ensemble's log-probabilities, in vLLM's form."""
        count = metadata.max_num_logprobs
        if drafts is None:
            return self.sampler.gather_logprobs(log_probs, count, tokens[:, 0].long())
        target, bonus = drafts.target_logits_indices, drafts.bonus_logits_indices
        return self.rejection_sampler._get_logprobs_tensors(
            count, drafts, log_probs, log_probs[target], log_probs[bonus], tokens
        )


def check_member(vllm_config: Any, config: Any) -> None:
    """Refuse a member whose tokens or whose attention window are not the target's."""
    target, name = vllm_config.model_config, f"members: {config.model}"
    # An attention layer takes its window from the cache's config, which is the target's.
    for what in ("get_vocab_size", "get_sliding_window"):
        expected, got = getattr(target, what)(), getattr(config, what)()
        if expected != got:
            raise Refusal(OP, name, f"the target's {what[4:]}, {expected}", got)
    tokenizers = [get_tokenizer(model) for model in (target.tokenizer, config.model)]
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise Refusal(OP, name, "the target's token for every id", "another tokenizer")


def load_member(vllm_config: Any, model: str, prefix: str) -> nn.Module:
    """A further model, whose attention layers have a KV cache of their own under a prefix."""
    from vllm.compilation.backends import set_model_tag

    target = vllm_config.model_config
    config = ModelConfig(
        model=model,
        tokenizer=target.tokenizer,
        trust_remote_code=target.trust_remote_code,
        dtype=target.dtype,
        seed=target.seed,
        max_model_len=target.max_model_len,
        enforce_eager=target.enforce_eager,
    )
    check_member(vllm_config, config)
    with set_model_tag(prefix):
        own = replace(vllm_config, model_config=config, quant_config=None)
        return get_model(vllm_config=own, prefix=prefix)
