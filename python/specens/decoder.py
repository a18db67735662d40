# SPDX-License-Identifier: Apache-2.0
"""`SpeculativeDecoder`: any number of Hugging Face causal LMs write one text, exactly.

`model.generate(**inputs, custom_generate=decoder)` or `decoder.generate(**inputs)`: transformers
keeps generation config, processors and stopping criteria; `loop/run.py` has the loop. A streamer
needs `decoder.generate`: transformers does not hand it on to `custom_generate`. What is checked
about the user's arguments is checked here.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specens.arguments import Asked, integers, unknown, wrong
from specens.loop.processors import Stopper, Warp, per_row, split
from specens.loop.run import Run
from specens.loop.statistics import Statistics
from specens.members.drafts import Translated
from specens.members.member import ReplayMember, member, unwrapped
from specens.members.vocabulary import shared_vocabulary
from specens.members.weight_head import WeightHead, hidden_size
from specens.schedules import (
    SCHEDULES,
    Companion,
    Component,
    DraftStop,
    LookAhead,
    Lookup,
    made,
)
from specens_kernels import ENSEMBLES, Acceptance, Law, Status

_logger = logging.getLogger("specens")
# What transformers adds, and the loop checks or does not need.
_KNOWN = frozenset(
    {
        "attention_mask",
        "position_ids",
        "cache_position",
        "logits_to_keep",
        "past_key_values",
        "use_cache",
        "logits_processor",
        "synced_gpus",
    }
)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    sequences: (B, S) int64. Prompts and generated tokens, padded after a row's end.
    log_probs: (B, S - S_prompt) float32. Log-probability of each generated token under the
        ensemble; NaN past a row's end, and for schedules "component" and "lookahead", which do not
        score with all members.
    statistics: counts and times of the call.
    """

    log_probs: Tensor | None = None
    statistics: Statistics | None = None


class _OneCall:
    """Lets one call in at a time and refuses the next at once; a deep copy is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["_OneCall"], tuple[()]]:
        return _OneCall, ()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "generate: decoder: expected one call at a time, got another before it has ended"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class SpeculativeDecoder:
    """Decodes from an ensemble of causal LMs as fast as their agreement allows.

    The emitted text has exactly the ensemble's law at every position (rules that are not lossless
    aside), and its greedy text is the plain ensemble's, whatever the schedule and the number of
    speculative tokens. Models, configs and tokenizers are never modified. A decoder runs one call
    at a time: a nested or concurrent one raises RuntimeError.
    """

    statistics: Statistics | None = None  # of the latest call

    def __init__(
        self,
        members: Sequence[Any],
        *,
        weights: Sequence[float] | WeightHead | None = None,
        ensemble: str = "mixture",
        schedule: str = "alternating",
        num_speculative_tokens: int | Sequence[int] | None = None,
        proposer: int | None = None,
        order: Sequence[int] | None = None,
        draft: Any = None,
        draft_vocabulary: str = "same",
        stop: DraftStop | None = None,
        ahead: int | None = None,
        token_cost: float | None = None,
        cut: str | None = None,
        acceptance: Acceptance | str | Sequence[Acceptance | str] = "rejection",
        bonus: str = "ensemble",
        scope: str = "member",
        plausibility: float = 0.0,
        tokenizers: Sequence[Any] | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        """Bind the models; a few tiny forwards find out what each can do (`probe`).

        Args:
            members: M >= 1 causal LMs whose ensemble writes the text.
            weights: M numbers. None is 1/M each. For "mixture" they are >= 0 and sum to 1. A
                `WeightHead` says them at each position, of two members, the draft first.
            ensemble: "mixture" or "product"; see `specens_kernels.ensembles`.
            schedule: "plain", "component", "lookahead", "speculative", "companion", "lookup",
                "hierarchy" or "alternating"; see `schedules.py`.
            num_speculative_tokens: >= 1. Tokens per proposal; for "alternating" also one number per
                member, in `order` (a single number is the first one's; the others propose 1); for
                "hierarchy" one per draft (a single number is the first one's; the i-th then has i
                times as many). None is 4 for "speculative", "lookup" and "hierarchy", 8 for
                "companion", 16 for "lookahead" and 1 for "alternating", which then makes no more
                calls for one sequence than "plain"; "plain" and "component" take None only.
            proposer: "speculative", "lookahead": the member that drafts. None is the cheapest, or
                `draft`.
            order: "alternating": the rotation, default proposer first. None is cheapest first.
            draft: "speculative": a causal LM outside the ensemble that drafts. "hierarchy": a list
                of them, the one that proposes first. "companion": the one that proposes and the one
                that scores what it proposes. `drafts.py` makes some of the models there are.
            draft_vocabulary: "same": a draft has the members' ids. "shared": each draft has its own
                tokenizer, and proposes the tokens that both have; needs `tokenizers`.
            stop: "speculative": when the draft ends before its number of tokens: a `DraftStop`.
            ahead: "lookahead": tokens of other members that are proposed before these are asked.
                None goes by the members' sizes and by how many of them have been kept; members of
                one size then take 0.
            token_cost: "companion", "lookahead": >= 0. Time that a draft token adds to its
                verification, as a part of what a verification without any takes; None is 0.1.
            cut: "companion": what decides whether a token is worth its verification. "law": the law
                that it was drawn from. "token": the token itself, too, which says more; for the
                rule "rejection", and without filters. None is "law".
            acceptance: a rule with its parameters, `specens_kernels.Acceptance`, or the name of an
                entry of `ACCEPTANCE_RULES`; for "hierarchy" also one per draft: who verifies the
                first draft, and so on; the ensemble is the last.
            bonus: whose law the token after a proposal that was kept whole has: "ensemble", or
                "last", the last member's alone, as DIVERSED has published it: then the text has no
                law that does not depend on the number of speculative tokens.
            scope: "member" warps each member and then folds; "ensemble" folds first.
            plausibility: [0, 1]. "product": drops what the first member finds implausible.
            tokenizers: one per model (the draft's last). Needed where vocabularies are padded
                differently, to check that ids mean the same. With None nothing is compared: models
                of one width are taken at their word, and where their ids differ the text is wrong.
            seed: of the random numbers: row b uses seed + b, or the b-th of a sequence. None draws
                from torch's global generator.
        Raises:
            ValueError: an argument is out of range, or the vocabularies disagree.
        """
        if isinstance(members, torch.nn.Module):
            raise wrong("members", "a list of models", type(members).__name__)
        drafts = _drafts(draft)
        models = [*members, *drafts]
        if not members:
            raise ValueError("decoder: members: expected at least one model, got none")
        size = len(members)
        self.head = weights if isinstance(weights, WeightHead) else None
        given = None if isinstance(weights, WeightHead) else weights
        self.weights = tuple([1 / size] * size if given is None else map(float, given))
        if len(self.weights) != size:
            raise wrong("weights", f"{size} numbers", f"{len(self.weights)}")
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        if ensemble not in ENSEMBLES:
            raise unknown("ensemble", ensemble, ENSEMBLES)
        entry = SCHEDULES[schedule]
        if not entry.fewest_drafts <= len(drafts) <= entry.most_drafts:
            expected = f"{entry.drafts} for schedule {schedule!r}"
            raise wrong("draft", expected, _names(drafts) or "none")
        if entry.mixture and (ensemble != "mixture" or scope != "member"):
            found = f"a {ensemble} of scope {scope!r}"
            raise wrong("schedule", f"a mixture of scope 'member' for {schedule!r}", found)
        self.ensemble, self.scope, self.plausibility = ensemble, scope, float(plausibility)
        self.acceptances = _acceptances(acceptance, len(drafts) if entry.levels else 1)
        self.acceptance, self.seed = self.acceptances[-1], seed
        if bonus not in ("ensemble", "last"):
            raise wrong("bonus", "'ensemble' or 'last'", repr(bonus))
        self.bonus_weights = None if bonus == "ensemble" else (*[0.0] * (size - 1), 1.0)
        for argument, used in (("weights", self.head), ("bonus", self.bonus_weights)):
            if used is not None and not entry.by_position:
                known = [repr(name) for name, one in SCHEDULES.items() if one.by_position]
                expected = f"{', '.join(known[:-1])} or {known[-1]} for such {argument}"
                raise wrong("schedule", expected, repr(schedule))
        if self.head is not None and (size != 2 or self.head.ensemble != ensemble):
            expected = f"two members and ensemble {self.head.ensemble!r} for this head"
            raise wrong("weights", expected, f"{size} and {ensemble!r}")
        compared = _compared(draft_vocabulary, size, drafts, tokenizers)
        self.vocab_size = shared_vocabulary(
            models[:compared], None if tokenizers is None else tokenizers[:compared]
        )
        self._law(Warp())  # checks weights, scope and plausibility before any model runs
        self._tokenizer = None if tokenizers is None else tokenizers[0]
        self.models = models
        self.num_ensemble = size
        self.members = [member(model) for model in models]
        for i in range(compared, len(models)):
            assert tokenizers is not None
            pair = tokenizers[0], tokenizers[i]
            self.members[i] = Translated(self.members[i], *pair, self.vocab_size)
        asked = Asked(
            sizes=[_num_parameters(model) for model in models],
            weights=self.weights,
            rule=self.acceptance.rule.name,
            tokens=num_speculative_tokens,
            proposer=proposer,
            order=order,
            stop=stop,
            ahead=ahead,
            token_cost=token_cost,
            cut=cut,
        )
        self.schedule = made(schedule, asked)
        if self.head is not None:
            self._bind(self.head)
        self._one_call = _OneCall()

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`members[0].generate(inputs, **kwargs)` with this decoder as the loop.

        Args:
            inputs: (B, S) int64. Prompts, left-padded; or input_ids= and attention_mask=.
            streamer: gets the prompt, every token and `end()`; batch size 1.
            tokenizer: for stop_strings; None is the first of the constructor's.
            stop_strings: generation ends with the token that completes one of them. None is what
                the generation config says, an empty list is none.
            seed: as for the constructor, for this call.
            kwargs: what transformers' `generate` takes.
        Returns:
            (B, S) int64 sequences, or a `SpeculativeOutput` with return_dict_in_generate=True.
        """
        if kwargs.get("assistant_model") is not None:  # transformers would drop it silently
            raise ValueError(
                "generate: assistant_model: expected None, since the decoder's draft= is what "
                f"drafts, got {type(kwargs['assistant_model']).__name__}"
            )
        for config in (kwargs.get("generation_config"), self.models[0].generation_config):
            said = getattr(config, "stop_strings", None)
            if said is not None:
                stop_strings = said if stop_strings is None else stop_strings
                kwargs["stop_strings"] = None  # transformers would ask for the tokenizer itself
        bound = {"streamer": streamer, "tokenizer": tokenizer, "seed": seed}

        # Not a partial: transformers hands over what it finds in the signature, stop_strings too.
        def loop(model: Any, input_ids: Tensor, **options: Any) -> Any:
            return self(model, input_ids, stop_strings=stop_strings, **bound, **options)

        return self.models[0].generate(inputs, streamer=streamer, custom_generate=loop, **kwargs)

    # Not inference_mode: what a model keeps of a forward must stay usable outside of it.
    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The loop, as transformers calls it: `model.generate(..., custom_generate=decoder)`.

        `model` must be one of the members. Transformers hands neither a streamer nor a tokenizer to
        a callable: `stop_strings` need the constructor's tokenizers or `decoder.generate`, and a
        streamer needs `decoder.generate`; given to `model.generate` it gets the prompt and nothing
        more, not even its end, and a reader of it waits for ever.
        """
        if stop_strings:
            stop = self._stop_at(stop_strings, tokenizer)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, stop])
        with self._one_call:
            try:
                return self._write(
                    model,
                    input_ids,
                    logits_processor,
                    stopping_criteria,
                    generation_config,
                    streamer,
                    seed if seed is not None else self.seed,
                    model_kwargs,
                )
            finally:
                for one in self.members:
                    one.release()

    def _stop_at(self, stop_strings: str | Sequence[str], tokenizer: Any) -> StopStringCriteria:
        tokenizer = self._tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError(
                "generate: tokenizer: expected one for stop_strings, given to decoder.generate or "
                "as the decoder's tokenizers (model.generate does not hand it on), got None"
            )
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        return StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)

    def _write(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any,
        seed: int | Sequence[int] | None,
        model_kwargs: Mapping[str, Any],
    ) -> Any:
        lengths = self._check_call(model, input_ids, generation_config, streamer, model_kwargs)
        batch, width = input_ids.shape
        warp, processors = split(logits_processor, do_sample=bool(generation_config.do_sample))
        if processors and self.scope == "ensemble":
            names = ", ".join(type(p).__name__ for p in processors)
            raise ValueError(
                f"generate: logits_processor: expected none but temperature, top-k, top-p and "
                f"min-p for scope 'ensemble', got {names}"
            )
        if isinstance(self.schedule, (Component, LookAhead)) and warp.temperature == 0:
            name = type(self.schedule).__name__.lower()
            raise ValueError(f"generate: do_sample: expected True for schedule {name!r}, got False")
        if isinstance(self.schedule, Companion) and self.schedule.cut == "token" and warp.filters:
            raise ValueError(
                f"generate: {warp.filters[0]}: expected none for a companion that cuts by the "
                "token (cut='token'), whose drafts' laws are not to be filtered again"
            )
        # What is looked up has no model; it is counted last.
        looked_up = ["lookup"] if isinstance(self.schedule, Lookup) else []
        statistics = Statistics([*(m.name for m in self.members), *looked_up])
        stopper = Stopper(stopping_criteria, generation_config, width)
        run = Run(
            self.members,
            num_ensemble=self.num_ensemble,
            law=self._law(warp),
            member_laws=[self._member_law(warp)] * len(self.members),
            schedule=self.schedule,
            acceptances=self.acceptances,
            input_ids=input_ids,
            lengths=lengths,
            seeds=self._seeds(seed, input_ids),
            processors=per_row(processors, batch),
            stopper=stopper,
            statistics=statistics,
            head=self.head,
            bonus_weights=self.bonus_weights,
        )
        began = time.perf_counter()
        while run.rows:
            emitted = run.turn()
            if streamer is not None:
                streamer.put(torch.tensor(emitted[0]))
        statistics.decode_seconds = time.perf_counter() - began
        if streamer is not None:
            streamer.end()
        if statistics.status:
            names = ", ".join(str(bit.name) for bit in Status if bit & statistics.status)
            _logger.warning("generate: degenerate logits: %s", names)
        self.statistics = statistics
        return self._output(run, width, generation_config)

    # --- what a call is made of -------------------------------------------------------------------

    def _bind(self, head: WeightHead) -> None:
        """Have each member multiply its share of the head with its last hidden states."""
        sizes = [hidden_size(model) for model in self.models[:2]]
        known = [head.draft_size, head.target_size]
        if sum(sizes) != head.delta.numel() or (None not in known and sizes != known):
            found = head.delta.numel() if None in known else f"{known[0]} + {known[1]}"
            raise wrong("weights", f"a head for {sizes[0]} + {sizes[1]}", found)
        shares = torch.split(head.delta, sizes)
        for one, share in zip(self.members, shares, strict=False):
            if isinstance(one, ReplayMember):
                raise wrong("weights", "numbers for a model whose states are replayed", "a head")
            one.score_by = share

    def _law(self, warp: Warp) -> Law:
        return Law(
            self.weights,
            self.ensemble,
            temperature=warp.temperature,
            top_k=warp.top_k,
            top_p=warp.top_p,
            min_p=warp.min_p,
            scope=self.scope,
            plausibility=self.plausibility,
            vocab_size=self.vocab_size,
        )

    def _member_law(self, warp: Warp) -> Law:
        return Law(
            (1.0,),
            temperature=warp.temperature,
            top_k=warp.top_k,
            top_p=warp.top_p,
            min_p=warp.min_p,
            vocab_size=self.vocab_size,
        )

    def _seeds(self, seed: int | Sequence[int] | None, input_ids: Tensor) -> Tensor:
        batch = len(input_ids)
        if seed is None:
            seeds = torch.randint(2**63 - 1, (batch,))
        else:
            given = integers(seed)
            if given is None:
                raise ValueError(
                    f"generate: seed: expected an integer or {batch}, one a row, got {seed!r}"
                )
            seeds = torch.tensor(given, dtype=torch.int64)
            if not isinstance(seed, Iterable):
                seeds = seeds + torch.arange(batch)
            if len(seeds) != batch:
                raise ValueError(
                    f"generate: seed: expected {batch} seeds, one a row, got {len(seeds)}"
                )
        return seeds.to(input_ids.device)

    def _check_call(
        self,
        model: Any,
        input_ids: Tensor,
        generation_config: Any,
        streamer: Any,
        model_kwargs: Mapping[str, Any],
    ) -> list[int]:
        """The prompts' lengths; refuses what the loop cannot honour."""
        # A wrapper's `generate` is that of the model inside, which is then what calls the loop.
        mine = [unwrapped(one) for one in self.models[: self.num_ensemble]]
        if not any(unwrapped(model) is one for one in mine):
            raise ValueError(
                f"generate: model: expected one of the decoder's members, got another "
                f"{type(model).__name__}"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("generate: past_key_values: expected an empty cache, got a filled one")
        for name, value in model_kwargs.items():
            if value is not None and name not in _KNOWN and not isinstance(value, bool):
                raise ValueError(f"generate: {name}: expected None, got {type(value).__name__}")
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if getattr(generation_config, name, False):
                raise NotImplementedError(
                    f"generate: {name}: expected False, got True; log_probs are returned instead"
                )
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise NotImplementedError(
                f"generate: generation_config: expected greedy_search or sample, got {mode.value}"
            )
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"generate: streamer: expected batch size 1, got {len(input_ids)}")
        mask = model_kwargs.get("attention_mask")
        width = input_ids.shape[1]
        if mask is None:
            lengths = [width] * len(input_ids)
        else:
            if mask.dim() != 2 or bool((mask.bool() != mask.bool().cummax(1).values).any()):
                raise ValueError(
                    "generate: attention_mask: expected left padding only, got zeros after ones"
                )
            lengths = mask.sum(1).tolist()
        if min(lengths, default=0) < 1:
            raise ValueError("generate: input_ids: expected at least one token a row, got none")
        position_ids = model_kwargs.get("position_ids")
        if position_ids is not None and not _are_implied(position_ids, lengths, width):
            raise ValueError(
                "generate: position_ids: expected those that attention_mask implies, got others"
            )
        return lengths

    def _output(self, run: Run, width: int, generation_config: Any) -> Any:
        rows = sorted(run.finished, key=lambda row: row.index)
        columns = max(row.pad + row.length for row in rows)
        pad = getattr(generation_config, "_pad_token_tensor", None)
        sequences = run.text[:, :columns].clone()
        for row in rows:
            if row.pad + row.length < columns:
                # Transformers fills in the end-of-sequence token where no padding token is set.
                sequences[row.index, row.pad + row.length :] = 0 if pad is None else int(pad)
        if not generation_config.return_dict_in_generate:
            return sequences
        log_probs = torch.full((len(rows), columns - width), torch.nan)
        for row in rows:
            mine = torch.cat(run.log_probs[row.index]).cpu()
            log_probs[row.index, : len(mine)] = mine
        return SpeculativeOutput(
            sequences=cast(Any, sequences), log_probs=log_probs, statistics=run.statistics
        )


def _drafts(draft: Any) -> list[Any]:
    if draft is None:
        return []
    return list(draft) if isinstance(draft, Sequence) else [draft]


def _compared(
    draft_vocabulary: str, size: int, drafts: Sequence[Any], tokenizers: Sequence[Any] | None
) -> int:
    """How many models' tokenizers must agree: the members', or the drafts' too."""
    if draft_vocabulary not in ("same", "shared"):
        raise wrong("draft_vocabulary", "'same' or 'shared'", repr(draft_vocabulary))
    if draft_vocabulary == "same":
        return size + len(drafts)
    if not drafts:
        raise wrong("draft_vocabulary", "'same' without a draft", "'shared'")
    if tokenizers is None or len(tokenizers) != size + len(drafts):
        expected = f"{size + len(drafts)}, one per model, for draft_vocabulary 'shared'"
        raise wrong("tokenizers", expected, "None" if tokenizers is None else len(tokenizers))
    return size


def _names(models: Sequence[Any]) -> str:
    return ", ".join(type(model).__name__ for model in models)


def _acceptances(given: Any, levels: int) -> list[Acceptance]:
    """One for each level; a single one is the last level's, the others' is "rejection"."""
    if isinstance(given, (str, Acceptance)):
        return [Acceptance()] * (levels - 1) + [Acceptance.of(given)]
    if not isinstance(given, (list, tuple)):
        raise wrong("acceptance", "a rule or a list of them", repr(given))
    if len(given) != levels:
        raise wrong("acceptance", f"one rule or a list of {levels}", len(given))
    found = [Acceptance.of(one) for one in given]
    if any(one.rule.remembers for one in found[:-1]):
        raise wrong("acceptance", "a rule without a memory below the last level", found)
    return found


def _are_implied(position_ids: Tensor, lengths: Sequence[int], width: int) -> bool:
    """Whether every row counts from 0 at its first token; padding may have any position.

    position_ids: (B or 1, S), or (..., B or 1, S) where a model has several for a token.
    """
    if position_ids.shape[-1] != width or position_ids.shape[-2] not in (1, len(lengths)):
        return False
    pads = width - torch.tensor(lengths, device=position_ids.device)[:, None]
    implied = torch.arange(width, device=position_ids.device) - pads
    return bool(((position_ids == implied) | (implied < 0)).all())


def _num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
