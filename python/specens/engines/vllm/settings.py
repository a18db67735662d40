# SPDX-License-Identifier: Apache-2.0
"""What is checked before anything is loaded: settings, vLLM's configuration, vLLM's functions.

Needs no vLLM, which is read by attribute. To add a setting, add its field, read it in `parse`, and
say in `check_engine` what of vLLM it excludes.
"""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from specens_kernels import Acceptance, Law, Refusal
from specens_kernels.refusal import shown

OP = "specens"
# The members that vLLM loads by itself: its model, and its draft model.
TARGET, DRAFT = "target", "draft"
# Of a request's parameters, what v2.py does not read yet, and what they are where nobody asks.
_UNREAD = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": None,
    "min_tokens": 0,
    "allowed_token_ids": None,
    "bad_words": None,
    "logprobs": None,
    "structured_outputs": None,
}


@dataclass(frozen=True)
class Settings:
    """`additional_config={"specens": {...}}` of an engine.

    members: names in the order of the weights: "target", "draft", or a model that is loaded
        besides. Written as pairs [name, weight]; without it the law is the target's.
    weights: M numbers, as `Law` takes them.
    ensemble: "mixture" or "product".
    acceptance: the rule by which drafts are kept, such as "rejection" or "js:threshold=0.3".
    bonus: whose law the token after a request's last draft has: the "ensemble"'s, or the "target"'s
        alone, as DIVERSED was published (arXiv:2604.07622).
    """

    members: tuple[str, ...] = (TARGET,)
    weights: tuple[float, ...] = (1.0,)
    ensemble: str = "mixture"
    acceptance: Acceptance = field(default_factory=Acceptance)
    bonus: str = "ensemble"

    @property
    def alone(self) -> bool:
        """Whether the target is the only member."""
        return self.members == (TARGET,)

    @classmethod
    def parse(cls, given: object) -> "Settings":
        """The value of the key "specens"; raises a Refusal that names the key."""
        if not isinstance(given, Mapping):
            raise Refusal(OP, "additional_config", "a mapping of settings", shown(given))
        known = ("members", "ensemble", "acceptance", "bonus")
        for name in given:
            if name not in known:
                raise Refusal.unknown(OP, "additional_config", name, known)
        settings: dict[str, Any] = dict(given)
        if "members" in given:
            settings["members"], settings["weights"] = _members(given["members"])
        with _named("ensemble"):
            Law(ensemble=settings.get("ensemble", "mixture"))
        with _named("acceptance"):
            settings["acceptance"] = Acceptance.of(given.get("acceptance", "rejection"))
        if settings.get("bonus", "ensemble") not in ("ensemble", TARGET):
            raise Refusal(OP, "bonus", f"'ensemble' or '{TARGET}'", shown(given["bonus"]))
        with _named("members"):
            law = Law(settings.get("weights", (1.0,)), settings.get("ensemble", "mixture"))
        return cls(**settings | {"weights": law.weights})

    def of_request(self, extra: Mapping[str, Any] | None) -> "Settings":
        """Those of one request, by its `extra_args={"specens": {"weights": [...], ...}}`.

        Over HTTP, where vLLM nests no mappings: a list, which is the weights, or JSON.
        """
        if extra is None or OP not in extra:
            return self
        given, known = extra[OP], ("weights", "acceptance")
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError:
                raise Refusal(OP, "extra_args", "JSON", shown(given)) from None
        if isinstance(given, Sequence) and not isinstance(given, str):
            given = {"weights": given}
        if not isinstance(given, Mapping):
            raise Refusal(OP, "extra_args", "a mapping of settings", shown(given))
        for name in given:
            if name not in known:
                raise Refusal.unknown(OP, "extra_args", name, known)
        changes: dict[str, Any] = {}
        if "acceptance" in given:
            with _named("extra_args.acceptance"):
                changes["acceptance"] = Acceptance.of(given["acceptance"])
        if "weights" in given:
            with _named("extra_args.weights"):
                changes["weights"] = Law(given["weights"], self.ensemble).weights
            if len(changes["weights"]) != len(self.weights):
                expected = f"{len(self.weights)} numbers, one for each member"
                raise Refusal(OP, "extra_args.weights", expected, len(changes["weights"]))
        return replace(self, **changes)

    def check_request(self, parameters: Any, is_v2: bool = False) -> None:
        """Refuse a request, a `SamplingParams`, that this engine has another law for.

        is_v2: whether its model runner is V2.
        """
        self.of_request(parameters.extra_args)
        for name, none in _UNREAD.items() if is_v2 else ():
            value = getattr(parameters, name, None)
            if value and value != none:
                raise Refusal(OP, name, f"{none} under model runner V2", shown(value))
        if is_v2 and OP in (parameters.extra_args or {}):
            raise Refusal(OP, "extra_args", "the engine's settings under model runner V2", "others")
        for name in ("prompt_logprobs", "logprob_token_ids"):
            # vLLM computes them of the target alone.
            if not self.alone and getattr(parameters, name, None):
                raise Refusal(OP, name, "None of an ensemble", shown(getattr(parameters, name)))

    def check_engine(self, config: Any) -> None:
        """Refuse a configuration of vLLM under which another law would be emitted."""
        model, drafter = config.model_config, config.speculative_config
        method = drafter and drafter.method
        allowed = {
            "logprobs_mode": (model.logprobs_mode, "raw_logprobs", "processed_logprobs"),
            "return_sampling_mask": (model.return_sampling_mask, False),
        }
        if drafter is not None:
            asynchronous = bool(config.scheduler_config.async_scheduling)
            allowed |= {
                "rejection_sample_method": (drafter.rejection_sample_method, "standard"),
                "async_scheduling": (asynchronous, False),
            }
        if config.use_v2_model_runner:
            allowed["bonus"] = (self.bonus, "ensemble")
        if not self.alone:
            parallel = config.parallel_config
            allowed |= {
                "speculative_config.method": (method, None, "draft_model", "ngram"),
                "tensor_parallel_size": (parallel.tensor_parallel_size, 1),
                "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
                "enable_lora": (config.lora_config is not None, False),
                "is_multimodal_model": (model.is_multimodal_model, False),
                "enable_prompt_embeds": (model.enable_prompt_embeds, False),
            }
        for key, (value, *values) in allowed.items():
            if value not in values:
                raise Refusal(OP, key, " or ".join(map(str, values)), shown(value))
        if DRAFT in self.members and method != "draft_model":
            expected = f'speculative_config.method "draft_model" for "{DRAFT}"'
            raise Refusal(OP, "members", expected, shown(method))


def _members(given: object) -> tuple[tuple[str, ...], list[Any]]:
    pairs: Any = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for pair in pairs:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str):
            raise Refusal(OP, "members", "pairs [name, weight]", shown(pair))
    names = tuple(name for name, _ in pairs)
    if names.count(TARGET) != 1 or names.count(DRAFT) > 1:
        raise Refusal(OP, "members", f'"{TARGET}" once, "{DRAFT}" at most once', shown(list(names)))
    return names, [weight for _, weight in pairs]


@contextmanager
def _named(key: str) -> Iterator[None]:
    """A refusal of what the kernels take, under the key that it was set by."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(OP, key, refusal.expected, refusal.got) from None


def differences(functions: Iterable[tuple[Any, str, str]]) -> list[str]:
    """Of (owner, function's name, names of its arguments in order): those that are otherwise.

    After "..." the names may stand among others: fields of a class.
    """
    otherwise = []
    for owner, name, arguments in functions:
        there = list(inspect.signature(getattr(owner, name, lambda: None)).parameters)
        first, *rest = expected = arguments.split()
        if there != expected and not (first == "..." and set(rest) <= set(there)):
            otherwise.append(f"{owner.__name__}.{name}({', '.join(there)})")
    return otherwise
