# SPDX-License-Identifier: Apache-2.0
"""vLLM's model runner (V1), whose tokens the ops decide: `sample` without drafts, else `verify`.

One path for all: a target alone is an ensemble of one. Drafts are drawn under the law that judges
them (drafter.py), and `verify` is handed the very logits they were drawn from. Drafts whose logits
nobody kept are points to it, which is exact whoever drew them.
"""

from functools import partial
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

from .drafter import take_over
from .rows import Rows, changes_logits, law_of, min_p_of, random_numbers
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
