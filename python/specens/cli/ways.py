# SPDX-License-Identifier: Apache-2.0
"""Who decodes: said by options of the decoder, by a published method, by what `specens tune` has
saved, or by a short tuning at the start. Each makes a `Way`. Needs no torch until it is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specens.cli import checks, loading
from specens.cli.saved import Saved
from specens.loop.profile import Candidate
from specens.loop.schedule import Schedule
from specens.methods import check_counts, method_named
from specens.schedules import read_schedule, with_tokens
from specens_kernels import Acceptance, Refusal

if TYPE_CHECKING:
    from specens.decoder import SpeculativeDecoder
    from specens.methods import Method

# What --auto may cost at the start.
_AUTO_PROMPTS, _AUTO_TOKENS, _AUTO_SECONDS = 3, 48, 20.0
# The law that is asked for where nothing is said.
_LAW = {"ensemble": "mixture", "scope": "member", "plausibility": 0.0}


@dataclass(frozen=True)
class Way:
    """Who decodes.

    models, drafts: their names; None is the family, and no draft.
    options: of the decoder.
    method: what the options are for, if it is published. best: of a tuning that was saved.
    auto: whether there is a tuning first. threads: that the tuning had.
    """

    models: Sequence[str] | None
    drafts: Sequence[str] | None
    options: dict[str, Any]
    method: "Method | None" = None
    best: Candidate | None = None
    auto: bool = False
    threads: int | None = None

    def check(self, warp: Mapping[str, Any]) -> None:
        """Refuse what does not go together, before anything is loaded.

        warp: temperature and filters.
        """
        method, drafts = self.method, list(self.drafts or ())
        models = list(self.models or loading.WHOLE_FAMILY)
        schedule = self.options.get("schedule") or (self.best.schedule if self.best else None)
        rules: Any = self.options.get("acceptance", Acceptance())
        if method is not None:
            check_counts(method, len(models), len(drafts))
            schedule = schedule or read_schedule(method.schedule)
            own = [Acceptance.parse(rule) for rule in method.acceptance]
            rules = self.options.get("acceptance", own)
            if method.joins:
                models, drafts = [*drafts, *models], []
        law = checks.law_of(self.options, models, warp)
        if schedule is None:
            return
        if method is None:
            checks.check_drafts(schedule, drafts)
        made = method is not None and method.prepare is not None
        rules = rules if isinstance(rules, list) else [rules]
        checks.check_schedule(schedule, law, len(drafts) + made, rules)

    def decoder(
        self, loaded: loading.Loaded, encoded: Sequence[Any], call: Mapping[str, Any]
    ) -> "SpeculativeDecoder":
        """Of the models that were loaded by these names."""
        from specens.decoder import SpeculativeDecoder
        from specens.methods import build
        from specens.tuning import decoder_of

        members, drafts, tokenizers = loaded.members, loaded.drafts, loaded.tokenizers
        if self.method is not None:
            return build(self.method, members, drafts, tokenizers, **self.options)
        best = _tune_shortly(loaded, encoded, call, self.options) if self.auto else self.best
        if best is not None:
            return decoder_of(best, members, drafts=drafts, tokenizers=tokenizers, **self.options)
        return SpeculativeDecoder(
            members, draft=drafts or None, tokenizers=tokenizers, **self.options
        )


def way_of(
    models: Sequence[str] | None,
    drafts: Sequence[str] | None,
    *,
    law: dict[str, Any],
    asked: Mapping[str, Any],
    method: str | None,
    mixing: Mapping[str, Any],
    auto: bool,
    config: Path | None,
) -> Way:
    """What was asked for, if it goes together; what is None was not asked for.

    law, asked: of the decoder. mixing: of methods that mix draft and target.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    mixed = {name: value for name, value in mixing.items() if value is not None}
    if auto or config is not None:
        _check_tuned("--auto" if config is None else "--config", {"method": method} | given)
    if config is not None:
        _check_saved({"auto": auto, "models": models, "drafts": drafts} | given | law)
        return _saved_way(config)
    if method is None:
        for name in mixed:
            raise Refusal("generate", name, "a --method that mixes", "none")
    if "acceptance" in given:
        given["acceptance"] = _rules(given["acceptance"])
    tokens = given.pop("gamma", None)
    if method is not None:
        return _published_way(models, drafts, given, law, method, mixed, tokens)
    if not auto:
        written = given.get("schedule", "alternating")
        given["schedule"] = read_schedule(written)
        if tokens is not None:
            _check_has_tokens(given["schedule"], tokens)
            given["schedule"] = read_schedule(with_tokens(written, tokens))
    return Way(models, drafts, given | law, auto=auto)


def _rules(texts: Sequence[str]) -> Any:
    """One rule, or one per draft."""
    rules = [Acceptance.parse(text) for text in texts]
    return rules[0] if len(rules) == 1 else rules


def _published_way(
    models: Sequence[str] | None,
    drafts: Sequence[str] | None,
    given: dict[str, Any],
    law: dict[str, Any],
    name: str,
    mixed: dict[str, Any],
    tokens: str | None,
) -> Way:
    """The method's own models where none are named; `tokens` in place of its own."""
    method = method_named(name)
    _check_method(method, mixed, given)
    if tokens is not None:
        given["schedule"] = _with_tokens_instead(method.schedule, tokens)
    if law["ensemble"] == _LAW["ensemble"]:
        law = {name: value for name, value in law.items() if name != "ensemble"}  # a head knows it
    if not models:
        models = [loading.FAMILY_PREFIX + name for name in method.models]
        drafts = drafts or [loading.FAMILY_PREFIX + name for name in method.drafts]
    return Way(models, drafts, given | law | mixed, method)


def _with_tokens_instead(text: str, tokens: str) -> Schedule:
    """The schedule that is written so, with other tokens than it says."""
    schedule: Any = read_schedule(text)
    _check_has_tokens(schedule, tokens)
    default = {each.name: each.default for each in fields(schedule) if each.name == "tokens"}
    return read_schedule(with_tokens(str(replace(schedule, **default)), tokens))


def _check_has_tokens(schedule: Schedule, tokens: str) -> None:
    """Refuse --gamma for a schedule that proposes nothing."""
    if not any(each.name == "tokens" for each in fields(schedule)):  # type: ignore[arg-type]
        expected = f"none for schedule {schedule.name!r}, which proposes no tokens"
        raise Refusal("generate", "gamma", expected, repr(tokens))


def _check_method(method: "Method", mixed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what does not go with the method."""
    none = f"none for method {method.name!r}"
    if "head" in mixed:
        if method.name != "diversed":
            raise Refusal("generate", "head", none, repr(mixed["head"]))
        checks.check_head(mixed["head"])
    if "draft_weight" in mixed and (not method.joins or method.name == "diversed"):
        raise Refusal("generate", "draft_weight", none, mixed["draft_weight"])
    if "schedule" in given:
        expected = f"none beside --method {method.name}"
        raise Refusal("generate", "schedule", expected, repr(given["schedule"]))
    if method.joins and "weights" in given:
        expected = f"--draft-weight for {method.name!r}"
        raise Refusal("generate", "weights", expected, given["weights"])


def _check_tuned(option: str, given: Mapping[str, Any]) -> None:
    """Refuse what a tuning decides."""
    for name in ("method", "schedule", "gamma", "acceptance"):
        if given.get(name) is not None:
            raise Refusal("generate", name, f"none beside {option}", repr(given[name]))


def _check_saved(given: Mapping[str, Any]) -> None:
    """Refuse what a file of `tune` says."""
    for name, value in given.items():
        if value and value != _LAW.get(name):
            raise Refusal("generate", name, "none beside --config", repr(value))


def _saved_way(path: Path) -> Way:
    """Models, threads, law, the best candidate, and the drafts of that."""
    saved = Saved.read(path)
    drafts = [saved.drafts[i] for i in saved.best.drafts]
    best = replace(saved.best, drafts=tuple(range(len(drafts))))
    return Way(saved.models, drafts, saved.law, best=best, threads=saved.threads)


def _tune_shortly(
    loaded: loading.Loaded,
    encoded: Sequence[Any],
    call: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Candidate:
    """The candidate that a short tuning on the first prompts finds; a line says what it took."""
    from specens.cli import output
    from specens.tuning import tune

    writing = {name: value for name, value in call.items() if name != "seed"}
    try:
        tuning = tune(
            loaded.members,
            encoded[:_AUTO_PROMPTS],
            writing | {"max_new_tokens": _AUTO_TOKENS, "stop_strings": ()},
            drafts=loaded.drafts,
            tokenizers=loaded.tokenizers,
            limit_s=_AUTO_SECONDS,
            **arguments,
        )
    except Refusal as refusal:
        if (refusal.op, refusal.argument) != ("tune", "max_new_tokens"):
            raise
        expected = f"models that take a few turns in {_AUTO_SECONDS:g} s"
        got = "fewer; choose a --schedule, or run `specens tune`"
        raise Refusal("generate", "auto", expected, got) from refusal
    best = tuning.candidates[0]
    output.errors().print(
        f"auto: {best.name}, expected to be {tuning.speedup(best):.2f} times as fast as plain; "
        f"found in {tuning.seconds:.1f} s",
        soft_wrap=True,
    )
    return best
