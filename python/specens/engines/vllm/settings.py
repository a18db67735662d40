# SPDX-License-Identifier: Apache-2.0
"""What a user may set for the ensemble in vLLM, checked before anything is loaded.

Needs no vLLM: its configuration is read by attribute. To add a setting, add its field, read it in
`parse`, and say in `check_engine` what of vLLM it excludes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from specens_kernels import Acceptance, Law, Refusal
from specens_kernels.refusal import shown

OP = "specens"
# The names of members that vLLM loads by itself: its model, and its draft model.
TARGET, DRAFT = "target", "draft"
# Drafters that were tried: with them further members may be read.
_DRAFTERS = ("draft_model", "ngram")


@dataclass(frozen=True)
class Settings:
    """`additional_config={"specens": {...}}` of an engine.

    members: names in the order of the weights: "target", "draft", or a model that is loaded
        besides. Written as pairs [name, weight]; without it the law is the target's.
    weights: M numbers, as `Law` takes them; a request may have its own.
    ensemble: "mixture" or "product".
    acceptance: the rule by which drafts are kept, "rejection" or "js:threshold=0.3".
    """

    members: tuple[str, ...] = (TARGET,)
    weights: tuple[float, ...] = (1.0,)
    ensemble: str = "mixture"
    acceptance: Acceptance = Acceptance()

    @classmethod
    def parse(cls, given: object) -> "Settings":
        """Of the value of the key "specens"; raises a Refusal that names the key."""
        if not isinstance(given, Mapping):
            raise Refusal(OP, "additional_config", "a mapping of settings", shown(given))
        known = [field.name for field in fields(cls) if field.name != "weights"]
        for name in given:
            if name not in known:
                raise Refusal.unknown(OP, "additional_config", name, known)
        settings: dict[str, Any] = {}
        if "members" in given:
            settings["members"], settings["weights"] = _members(given["members"])
        if "ensemble" in given:
            settings["ensemble"] = given["ensemble"]
        with _named("ensemble"):
            Law((1.0,), settings.get("ensemble", "mixture"))
        if "acceptance" in given:
            with _named("acceptance"):
                settings["acceptance"] = Acceptance.of(given["acceptance"])
        parsed = cls(**settings)
        with _named("members"):
            Law(parsed.weights, parsed.ensemble)
        return parsed

    def request_weights(self, extra: Mapping[str, Any] | None) -> tuple[float, ...]:
        """Of one request, by its `extra_args={"specens": {"weights": [...]}}`."""
        given = (extra or {}).get(OP)
        if given is None:
            return self.weights
        if not isinstance(given, Mapping) or list(given) != ["weights"]:
            raise Refusal(OP, "extra_args", '{"weights": [...]}', shown(given))
        with _named("extra_args.weights"):
            weights = tuple(Law(given["weights"], self.ensemble).weights)
        if len(weights) != len(self.weights):
            expected = f"{len(self.weights)} numbers, one for each member"
            raise Refusal(OP, "extra_args.weights", expected, len(weights))
        return weights

    def check_engine(self, config: Any) -> None:
        """Refuse a configuration of vLLM in which this law would not be emitted."""
        model, drafter, parallel = (
            config.model_config,
            config.speculative_config,
            config.parallel_config,
        )
        method = drafter and drafter.method
        facts = [
            ("logprobs_mode", model.logprobs_mode, ("raw_logprobs", "processed_logprobs")),
            ("watermark_config", getattr(config, "watermark_config", None), (None,)),
            ("return_sampling_mask", getattr(model, "return_sampling_mask", False), (False,)),
        ]
        if drafter is not None:
            facts += [
                ("rejection_sample_method", drafter.rejection_sample_method, ("standard",)),
                ("async_scheduling", bool(config.scheduler_config.async_scheduling), (False,)),
            ]
        if self.members != (TARGET,):
            facts += [
                ("speculative_config.method", method, (None, *_DRAFTERS)),
                ("use_v2_model_runner", config.use_v2_model_runner, (False,)),
                ("tensor_parallel_size", parallel.tensor_parallel_size, (1,)),
                ("pipeline_parallel_size", parallel.pipeline_parallel_size, (1,)),
                ("enable_lora", config.lora_config is not None, (False,)),
                ("is_multimodal_model", model.is_multimodal_model, (False,)),
                ("enable_prompt_embeds", model.enable_prompt_embeds, (False,)),
            ]
        for key, value, allowed in facts:
            if value not in allowed:
                expected = " or ".join(map(str, allowed))
                raise Refusal(OP, key, f"{expected} with these settings", shown(value))
        if DRAFT in self.members and method != "draft_model":
            expected = 'a speculative_config of method "draft_model" for the member "draft"'
            raise Refusal(OP, "members", expected, shown(method))


def _members(given: object) -> tuple[tuple[str, ...], Any]:
    """Names and weights of pairs."""
    pairs = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
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
    """A refusal of what the kernels take, in the words of the key that it was set by."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(OP, key, refusal.expected, refusal.got) from None
