# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner (V1), whose tokens the ops decide: `sample` without drafts, else `verify`.

One path for all: a target alone is an ensemble of one. Drafts are drawn under the law that judges
them, and `verify` is handed the very logits they were drawn from. Drafts whose logits nobody kept
are points to it, which is exact whoever drew them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, replace
from vllm.model_executor.model_loader import get_model
from vllm.tokenizers.registry import get_tokenizer
from vllm.v1.outputs import SamplerOutput
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
        pairs: Any = zip(self.readers, self._hidden, strict=True)
        return [reader.compute_logits(hidden[rows]) for reader, hidden in pairs]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("target"), name)


def sample_from_logits(self: Any, logits: Tensor, metadata: Any) -> tuple[Tensor, Tensor | None]:
    """A drafter's `_sample_from_logits` under the law that judges the drafts, filters included.

    What is kept beside the tokens are bare logits; most probable tokens are points.
    """
    sampled = self._enable_probabilistic_draft_probs and not metadata.all_greedy
    if not sampled or len(logits) != len(metadata.temperature):
        return logits.argmax(-1), None
    numbers = random_numbers(metadata, len(logits), 1, logits.device)
    drawn = sample([logits[:, None]], numbers, law_of(metadata, len(logits)))
    return drawn.tokens[:, 0], logits


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
            drafter._sample_from_logits = sample_from_logits.__get__(drafter)
        if self.specens.alone:
            return
        readers = []
        for index, name in enumerate(self.specens.members):
            if name == DRAFT:
                check_member(self.vllm_config, self.speculative_config.draft_model_config)
                readers.append(drafter.model)
            elif name != TARGET:
                readers.append(load_member(self.vllm_config, name, f"member_{index}"))
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

    def _sample(self: Any, logits: Tensor, spec_decode_metadata: Any) -> Any:
        drafts, metadata = spec_decode_metadata, self.input_batch.sampling_metadata
        self.input_batch.update_async_output_token_ids()
        batch = self.input_batch.num_reqs
        rows = Rows([0] * batch if drafts is None else drafts.num_draft_tokens, logits.device)
        members = raw = [logits] if self.specens.alone else self._read(logits, metadata, drafts)
        if changes_logits(metadata):
            members = [self._processed(member, metadata, drafts) for member in members]
        padded = [rows.padded(member) for member in members]
        law = law_of(metadata, batch, self._weights(), self.specens.ensemble)
        numbers = random_numbers(metadata, batch, rows.drafts + 1, logits.device)
        if drafts is None:
            tokens = sample(padded, numbers, law).tokens
        else:
            kept = self._drafts_have_laws and self._get_spec_decode_draft_probs(drafts)
            tokens = verify(
                padded,
                rows.tokens(drafts.draft_token_ids),
                numbers,
                law,
                draft_logits=rows.drafted(kept) if isinstance(kept, Tensor) else None,
                acceptance=self.specens.acceptance,
            ).tokens
        tokens, log_probs = tokens.to(torch.int32), None
        if metadata.max_num_logprobs is not None:
            if self.model_config.logprobs_mode == "raw_logprobs":
                law, padded = Law(law.weights, law.ensemble), [rows.padded(each) for each in raw]
            log_probs = self._logprobs(rows.packed(mix(padded, law)[0]), tokens, metadata, drafts)
        return SamplerOutput(tokens, logprobs_tensors=log_probs)

    def _read(self: Any, logits: Tensor, metadata: Any, drafts: Any) -> list[Tensor]:
        """Each member's packed logits, in the order of the weights; a grammar masks all."""
        if self.num_prompt_logprobs or metadata.logprob_token_ids:
            # vLLM computes them of the target alone.
            raise Refusal(OP, "prompt_logprobs, logprob_token_ids", "None of an ensemble", "some")
        ends = self.query_start_loc.gpu[1 : self.input_batch.num_reqs + 1] - 1
        members: list[Tensor] = self.model.read(ends if drafts is None else drafts.logits_indices)
        for member in members if self._grammar else ():
            apply_grammar_bitmask(*self._grammar, self.input_batch, member)
        members.insert(self.specens.members.index(TARGET), logits)
        return members

    def _weights(self: Any) -> Any:
        """The engine's, or (B, M) where a request has its own."""
        extras = [
            self.requests[request].sampling_params.extra_args
            for request in self.input_batch.req_ids
        ]
        if not any(extra and OP in extra for extra in extras):
            return self.specens.weights
        weights = [self.specens.request_weights(extra) for extra in extras]
        return torch.tensor(weights, device=self.device)

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


def check_member(vllm_config: Any, config: Any) -> None:
    """Refuse a member whose tokens or whose attention window are not the target's."""
    target, key = vllm_config.model_config, f"members: {config.model}"
    # An attention layer takes its window from the cache's config, which is the target's.
    for what in ("get_vocab_size", "get_sliding_window"):
        expected, got = getattr(target, what)(), getattr(config, what)()
        if expected != got:
            raise Refusal(OP, key, f"the target's {what[4:]}, {expected}", got)
    own, others = (get_tokenizer(name).get_vocab() for name in (target.tokenizer, config.model))
    if own != others:
        raise Refusal(OP, key, "the target's token for every id", "others")


def load_member(vllm_config: Any, model: str, prefix: str) -> Any:
    """A further model, whose attention layers have a KV cache of their own under a prefix."""
    target = vllm_config.model_config
    names = ["tokenizer", "trust_remote_code", "dtype", "seed", "max_model_len", "enforce_eager"]
    config = ModelConfig(model=model, **{name: getattr(target, name) for name in names})
    check_member(vllm_config, config)
    with set_model_tag(prefix):
        own = replace(vllm_config, model_config=config, quant_config=None)
        return get_model(vllm_config=own, prefix=prefix)
