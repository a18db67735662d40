# SPDX-License-Identifier: Apache-2.0
"""`SpeculativeDecoder`: any number of Hugging Face causal LMs write one text, exactly.

`model.generate(**inputs, custom_generate=decoder)` or `decoder.generate(**inputs)`: transformers
keeps generation config, processors and stopping criteria; `loop/run.py` has the loop. A streamer
needs `decoder.generate`: transformers does not hand it on to `custom_generate`. What the user may
say of the models is checked here; what a call brings, in `calls.py`.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from specens.arguments import (
    acceptances_of,
    check_tokenizer,
    drafts_of,
    models_of,
    number_of,
    seed_of,
    strings_of,
    tokenizers_of,
    weights_of,
    word_of,
)
from specens.calls import (
    SpeculativeOutput,
    check_ids,
    check_rope,
    check_types,
    output_of,
    prompt_lengths,
    seeds_of,
)
from specens.loop import generation_config as fields
from specens.loop.processors import Warp, per_row, split
from specens.loop.run import Plan, Run
from specens.loop.schedule import Models, Schedule
from specens.loop.statistics import Statistics
from specens.loop.stopping import Stopper
from specens.loop.weights import PositionWeights
from specens.members.by_row import ReplayMember
from specens.members.evaluation import evaluating
from specens.members.facts import check_causal_lm, num_parameters, vocab_size
from specens.members.probe import member
from specens.members.translated import Translated
from specens.members.vocabulary import shared_vocabulary
from specens.members.weight_head import WeightHead, hidden_size
from specens.schedules import SCHEDULES, Component, read_schedule
from specens_kernels import Acceptance, Ensemble, Law, Refusal, Status
from specens_kernels.refusal import shown

__all__ = ["SpeculativeDecoder", "SpeculativeOutput"]

_logger = logging.getLogger("specens")


class _OneCall:
    """Lets one call in at a time and refuses the next at once; a deep copy is open.

    caller: whose call is in, or None. Who is in leaves by setting it, which nothing interrupts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.caller: object = None

    def __reduce__(self) -> tuple[type["_OneCall"], tuple[()]]:
        return _OneCall, ()

    def enter(self, caller: object) -> None:
        """Let a caller in; `caller` tells it whether an interrupt came before."""
        with self._lock:
            if self.caller is not None:
                raise RuntimeError(
                    "generate: decoder: expected one call at a time, got another before it has "
                    "ended"
                )
            self.caller = caller


class SpeculativeDecoder:
    """Decodes from an ensemble of causal LMs as fast as their agreement allows.

    The emitted text has exactly the ensemble's law at every position (rules that are not lossless
    aside), and its greedy text is the plain ensemble's, whatever the schedule and the number of
    speculative tokens. Models, configs and tokenizers are never modified; a call runs models in
    evaluation mode and puts training mode back where it was. A decoder runs one call at a time: a
    nested or concurrent one raises RuntimeError.
    """

    statistics: Statistics | None = None  # of the latest call

    def __init__(
        self,
        members: Sequence[Any],
        *,
        weights: Sequence[float] | WeightHead | None = None,
        ensemble: Ensemble | str = "mixture",
        schedule: Schedule | str = "alternating",
        draft: Any = None,
        draft_vocabulary: str = "same",
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
            ensemble: "mixture", "product", or an `Ensemble` with a fold of your own; see
                `specens_kernels.ensembles`.
            schedule: who proposes and who verifies: a value such as `Speculative(tokens=4)`, the
                same as text, "speculative:tokens=4", or a name; see `specens.schedules`.
            draft: causal LMs outside the ensemble, as many as the schedule takes: one for
                "speculative"; a list for "hierarchy", the one that proposes first; two for
                "companion", the one that proposes and the one that scores what it proposes.
                `members/drafts.py` makes some of the models there are.
            draft_vocabulary: "same": a draft has the members' ids. "shared": each draft has its own
                tokenizer, and proposes the tokens that both have; needs `tokenizers`.
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
            Refusal: an argument is out of range, or the vocabularies disagree. It is a ValueError.
        """
        ensemble_models, drafts = models_of("members", members), drafts_of(draft)
        self.models = [*ensemble_models, *drafts]
        self.num_ensemble = size = len(ensemble_models)
        self.head = weights if isinstance(weights, WeightHead) else None
        self.weights = weights_of(weights, size)
        bonus = word_of("bonus", bonus, "ensemble", "last")
        self.bonus_weights = None if bonus == "ensemble" else (*[0.0] * (size - 1), 1.0)
        self.ensemble, self.scope = ensemble, scope
        self.plausibility = number_of("plausibility", plausibility)
        self.vocab_size: int | None = None
        law = self._law(Warp())  # checks weights, ensemble, scope and plausibility
        unbound = read_schedule(schedule) if isinstance(schedule, str) else schedule
        if not isinstance(unbound, Schedule):
            raise Refusal("decoder", "schedule", "a Schedule or its text", shown(schedule))
        self._check_schedule(unbound, drafts, law)
        levels = len(drafts) if unbound.verifies_drafts else 1
        self.acceptances = acceptances_of(acceptance, levels)
        self.acceptance, self.seed = self.acceptances[-1], seed_of("decoder", seed)
        sizes = [num_parameters(model) for model in self.models]
        self.schedule = unbound.bind(Models(sizes, self.weights, self.acceptance.rule.name))
        self._bind_members(draft_vocabulary, tokenizers_of(tokenizers))
        if self.head is not None:
            self._bind_head(self.head)
        self._one_call = _OneCall()

    def _check_schedule(self, schedule: Schedule, drafts: Sequence[Any], law: Law) -> None:
        """Refuse models, laws and weights that the schedule cannot serve."""
        if not schedule.fewest_drafts <= len(drafts) <= schedule.most_drafts:
            expected = f"{schedule.drafts_in_words} for schedule {schedule.name!r}"
            if len(drafts) > schedule.most_drafts:
                others = [
                    repr(name)
                    for name, each in SCHEDULES.items()
                    if each.fewest_drafts <= len(drafts) <= each.most_drafts
                ]
                expected += f" ({' or '.join(others)} would take {len(drafts)})"
            names = ", ".join(type(model).__name__ for model in drafts)
            raise Refusal("decoder", "draft", expected, names or "none")
        if not schedule.suits(law):
            expected = f"a mixture of scope 'member' for {schedule.name!r}"
            given = f"a {Ensemble.of(law.ensemble).name} of scope {law.scope!r}"
            raise Refusal("decoder", "schedule", expected, given)
        for argument, used in (("weights", self.head), ("bonus", self.bonus_weights)):
            if used is not None and not schedule.by_position:
                known = [repr(name) for name, each in SCHEDULES.items() if each.by_position]
                expected = f"{', '.join(known[:-1])} or {known[-1]} for such {argument}"
                raise Refusal("decoder", "schedule", expected, repr(schedule.name))
        head = self.head
        if head is not None and not (self.num_ensemble == 2 and head.is_for(law.ensemble)):
            expected = f"two members and ensemble {head.ensemble!r} for this head"
            given = f"{self.num_ensemble} and {Ensemble.of(law.ensemble).name!r}"
            raise Refusal("decoder", "weights", expected, given)

    def _bind_members(self, draft_vocabulary: str, tokenizers: Sequence[Any] | None) -> None:
        """Compare vocabularies, and wrap each model in what runs it exactly."""
        same = _num_of_one_vocabulary(
            draft_vocabulary, self.num_ensemble, len(self.models), tokenizers
        )
        self.vocab_size = shared_vocabulary(
            self.models[:same], None if tokenizers is None else tokenizers[:same], self.num_ensemble
        )
        self._widths = [vocab_size(model) for model in self.models]
        self._tokenizer = None if tokenizers is None else tokenizers[0]
        self.members = [member(model) for model in self.models]
        for i in range(same, len(self.models)):
            assert tokenizers is not None
            pair = tokenizers[0], tokenizers[i]
            self.members[i] = Translated(self.members[i], *pair, self.vocab_size)

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
        if kwargs.pop("custom_generate", None) is not None:
            expected = "None, since the decoder is the loop"
            raise Refusal("generate", "custom_generate", expected, "one")
        check_types(inputs, streamer, kwargs)
        if kwargs.get("assistant_model") is not None:  # transformers would drop it silently
            raise Refusal(
                "generate",
                "assistant_model",
                "None, since the decoder's draft= is what drafts",
                type(kwargs["assistant_model"]).__name__,
            )
        configs = [kwargs.get("generation_config"), self.models[0].generation_config]
        fields.check(partial(_said, kwargs, configs))  # some of it never comes as far as the loop
        for config in configs:
            configured = getattr(config, "stop_strings", None)
            if configured is not None:
                stop_strings = configured if stop_strings is None else stop_strings
                kwargs["stop_strings"] = None  # transformers would ask for the tokenizer itself
        bound = {"streamer": streamer, "tokenizer": tokenizer, "seed": seed}

        runs = 0

        # Not a partial: transformers hands over what it finds in the signature, stop_strings too.
        def loop(model: Any, input_ids: Tensor, **options: Any) -> Any:
            nonlocal runs
            runs += 1
            return self(model, input_ids, stop_strings=stop_strings, **bound, **options)

        model = self.models[0]
        output = model.generate(inputs, streamer=streamer, custom_generate=loop, **kwargs)
        if runs != 1:  # what was written is one model's text, or not the whole of a text
            expected = f"a {type(model).__name__} that hands each call to this loop once"
            raise Refusal("generate", "members", expected, f"{runs} times")
        return output

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
        more, not even its end, and a reader of it waits for ever. An `assistant_model` is not
        handed on either, and with `cache_implementation="paged"` nothing is: the text is then the
        model's own. `decoder.generate` refuses both.
        """
        if strings := strings_of(stop_strings):
            stop = self._stop_at(strings, tokenizer)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, stop])
        caller = object()
        try:
            self._one_call.enter(caller)
            with evaluating(self.models):
                return self._write(
                    model,
                    input_ids,
                    logits_processor,
                    stopping_criteria,
                    generation_config,
                    streamer,
                    self.seed if seed is None else seed_of("generate", seed),
                    model_kwargs,
                )
        finally:
            # Nothing is called between the test and the last line, where an interrupt could come.
            if self._one_call.caller is caller:
                try:
                    self._release()
                except BaseException:  # an interrupt that came just now
                    self._release()
                    raise
                finally:
                    self._one_call.caller = None

    def _release(self) -> None:
        """Give back the memory of all members."""
        for each in self.members:
            each.release()

    def _stop_at(self, strings: list[str], tokenizer: Any) -> StopStringCriteria:
        tokenizer = self._tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            expected = (
                "one for stop_strings, given to decoder.generate or as the decoder's tokenizers "
                "(model.generate does not hand it on)"
            )
            raise Refusal("generate", "tokenizer", expected, "None")
        check_tokenizer("generate", "tokenizer", tokenizer)
        return StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)

    def _write(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any,
        seed: int | list[int] | None,
        model_kwargs: Mapping[str, Any],
    ) -> Any:
        lengths = prompt_lengths(
            self.models[: self.num_ensemble],
            model,
            input_ids,
            generation_config,
            streamer,
            model_kwargs,
        )
        self._check_unchanged()
        # Of drafts with tokenizers of their own, these are the members' ids.
        check_ids(input_ids, lengths, min(each.vocab_size for each in self.members))
        warp, processors = split(logits_processor, do_sample=bool(generation_config.do_sample))
        law = self._law(warp)
        self._check_warp(warp, processors, law)
        # What is looked up has no model; it is counted last.
        looked_up = ["lookup"] if self.schedule.looks_up else []
        statistics = Statistics([*(each.name for each in self.members), *looked_up])
        weights = None
        if self.head is not None or self.bonus_weights is not None:
            weights = PositionWeights(self.head, self.bonus_weights, input_ids.device)
        plan = Plan(
            self.members,
            self.num_ensemble,
            law,
            self._member_law(warp),
            self.schedule,
            self.acceptances,
            weights,
        )
        width = input_ids.shape[1]
        stopper = Stopper(stopping_criteria, generation_config, width)
        check_rope(self.models[: self.num_ensemble], lengths, width, stopper.max_length)
        run = Run(
            plan,
            input_ids,
            lengths,
            seeds_of(seed, input_ids),
            per_row(processors, len(input_ids)),
            stopper,
            statistics,
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
        return output_of(run, width, generation_config)

    def _check_unchanged(self) -> None:
        """Refuse models that are not what they were when the decoder was made."""
        for i, (model, width) in enumerate(zip(self.models, self._widths, strict=True)):
            check_causal_lm(model, "generate", f"models[{i}]")
            if vocab_size(model) != width:
                expected = f"{width} columns of logits, as when the decoder was made; make another"
                raise Refusal("generate", f"models[{i}]", expected, vocab_size(model))

    def _check_warp(self, warp: Warp, processors: Sequence[Any], law: Law) -> None:
        """Refuse warpers and processors that the law or the schedule cannot serve."""
        if processors and self.scope == "ensemble":
            expected = "none but temperature, top-k, top-p and min-p for scope 'ensemble'"
            names = ", ".join(type(each).__name__ for each in processors)
            raise Refusal("generate", "logits_processor", expected, names)
        if not self.schedule.suits(law):
            expected = f"True for schedule {self.schedule.name!r}"
            raise Refusal("generate", "do_sample", expected, "False")
        if self.schedule.no_filters and warp.filters:
            expected = f"none for {self.schedule.no_filters}"
            raise Refusal("generate", warp.filters[0], expected, "one")

    def _bind_head(self, head: WeightHead) -> None:
        """Have each member multiply its share of the head with its last hidden states."""
        sizes = [hidden_size(model) for model in self.models[:2]]
        known = [head.draft_size, head.target_size]
        if sum(sizes) != head.delta.numel() or (None not in known and sizes != known):
            given = head.delta.numel() if None in known else f"{known[0]} + {known[1]}"
            raise Refusal("decoder", "weights", f"a head for {sizes[0]} + {sizes[1]}", given)
        shares = torch.split(head.delta, sizes)
        for each, share in zip(self.members, shares, strict=False):
            if isinstance(each, ReplayMember):
                expected = "numbers for a model whose states are replayed"
                raise Refusal("decoder", "weights", expected, "a head")
            each.score_by = share

    @property
    def averages_members(self) -> bool:
        """Whether each token of a sampled text may come from one member, drawn by its weight."""
        return Component.suits(self._law(Warp()))

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


def _said(arguments: Mapping[str, Any], configs: Sequence[Any], name: str, default: Any) -> Any:
    """A field of the generation config that transformers makes of a call's arguments."""
    if name in arguments:
        return arguments[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), default)


def _num_of_one_vocabulary(
    draft_vocabulary: str, num_members: int, num_models: int, tokenizers: Sequence[Any] | None
) -> int:
    """How many models' tokenizers must agree: the members', or the drafts' too."""
    if word_of("draft_vocabulary", draft_vocabulary, "same", "shared") == "same":
        return num_models
    if num_models == num_members:
        raise Refusal("decoder", "draft_vocabulary", "'same' without a draft", "'shared'")
    if tokenizers is None or len(tokenizers) != num_models:
        expected = f"{num_models}, one per model, for draft_vocabulary 'shared'"
        given = "None" if tokenizers is None else len(tokenizers)
        raise Refusal("decoder", "tokenizers", expected, given)
    return num_members
