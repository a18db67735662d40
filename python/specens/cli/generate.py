# SPDX-License-Identifier: Apache-2.0
"""The command `specens generate`: text on standard output, statistics on standard error.

Who decodes is said in one of four ways: by options of the decoder, by a published method, by what
`specens tune` has saved, or by a short tuning at the start. Each way makes a `_Way`.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specens.cli import loading, options
from specens.loop.profile import Candidate
from specens.loop.schedule import Schedule
from specens.methods import METHODS, method_named
from specens.schedules import read_schedule, with_tokens
from specens_kernels import Acceptance, Ensemble, Refusal

if TYPE_CHECKING:
    from specens.decoder import SpeculativeDecoder
    from specens.loop.statistics import Statistics
    from specens.methods import Method

# What --auto may cost at the start.
_AUTO_PROMPTS, _AUTO_TOKENS, _AUTO_SECONDS = 3, 48, 20.0
# The law that is asked for where nothing is said.
_LAW = {"ensemble": "mixture", "scope": "member", "plausibility": 0.0}


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; else a pipe.")] = None,
    file: options.File = None,
    lines: options.Lines = False,
    models: options.Models = None,
    weights: options.Weights = None,
    ensemble: options.EnsembleName = "mixture",
    method: Annotated[
        str | None,
        typer.Option(
            help="A published method, its schedule and rule; `specens methods` says when to use "
            f"which: {', '.join(METHODS)}."
        ),
    ] = None,
    schedule: options.ScheduleText = None,
    gamma: Annotated[
        str | None,
        typer.Option(help="Tokens per proposal: short for tokens=N of the schedule."),
    ] = None,
    drafts: options.Drafts = None,
    acceptance: options.AcceptanceTexts = None,
    draft_weight: Annotated[
        float | None, typer.Option(help="Methods that mix draft and target: the draft's share.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Method 'diversed': the folder of a trained head.")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Find schedule and drafts by a short tuning at start.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Models and schedule as `specens tune --output` wrote them.")
    ] = None,
    scope: options.Scope = "member",
    plausibility: options.Plausibility = 0.0,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=options.MAX_SEED, help="Same seed, same text. None draws one."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop after this text. Repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a turn of a chat.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt. The text goes to standard output, the statistics to standard error.

    Nothing but the options here shapes the text. Of the models' own generation configs only the
    first one's end-of-sequence tokens count.
    """
    prompts = loading.read_prompts(prompt, file, lines)
    if stop and not all(stop):
        raise Refusal("generate", "stop", "text", "an empty string")
    how = loading.Loading(dtype, device, threads, trust_remote_code)
    loading.check_names("models", models)
    loading.check_names("drafts", drafts)
    way = _way(
        models,
        drafts,
        law={"ensemble": ensemble, "scope": scope, "plausibility": plausibility},
        asked={
            "weights": None if weights is None else options.numbers("weights", weights),
            "schedule": schedule,
            "gamma": gamma,
            "acceptance": acceptance or None,
        },
        method=method,
        mixing={"draft_weight": draft_weight, "head": head},
        auto=auto,
        config=config,
    )
    warp = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    call = _call(max_new_tokens, warp, stop)
    call["seed"] = secrets.randbits(32) if seed is None else seed
    loaded = loading.load_ensemble(
        way.models, way.drafts, replace(how, threads=threads or way.threads)
    )
    encoded = loaded.encode(prompts, chat=chat)
    decoder = way.decoder(loaded, encoded, call)
    show = _write_json if as_json else _write_text
    show(decoder, loaded.tokenizers[0], prompts, encoded, call)


@dataclass(frozen=True)
class _Way:
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


def _way(
    models: Sequence[str] | None,
    drafts: Sequence[str] | None,
    *,
    law: dict[str, Any],
    asked: Mapping[str, Any],
    method: str | None,
    mixing: Mapping[str, Any],
    auto: bool,
    config: Path | None,
) -> _Way:
    """What was asked for, if it goes together; what is None was not asked for.

    law, asked: of the decoder. mixing: of methods that mix draft and target.
    """
    Ensemble.of(law["ensemble"])  # a name that is not known is answered before anything is loaded
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
        given["schedule"] = read_schedule(
            written if tokens is None else with_tokens(written, tokens)
        )
    return _Way(models, drafts, given | law, auto=auto)


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
) -> _Way:
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
    return _Way(models, drafts, given | law | mixed, method)


def _with_tokens_instead(text: str, tokens: str) -> Schedule:
    """The schedule that is written so, with other tokens than it says."""
    schedule: Any = read_schedule(text)
    default = {each.name: each.default for each in fields(schedule) if each.name == "tokens"}
    return read_schedule(with_tokens(str(replace(schedule, **default)), tokens))


def _check_method(method: "Method", mixed: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what does not go with the method."""
    none = f"none for method {method.name!r}"
    if "head" in mixed and method.name != "diversed":
        raise Refusal("generate", "head", none, repr(mixed["head"]))
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


def _saved_way(path: Path) -> _Way:
    """What `tune` has written: models, threads, law, the best candidate, and the drafts of that."""
    try:
        return _read_way(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "a file that `specens tune --output` wrote"
        got = f"{str(path)!r} ({type(error).__name__})"
        raise Refusal("generate", "config", expected, got) from error


def _read_way(saved: Mapping[str, Any]) -> _Way:
    best = Candidate(**{**saved["best"], "schedule": read_schedule(saved["best"]["schedule"])})
    law, threads = saved["law"], saved["threads"]
    words = [best.acceptance, *saved["models"], *saved["drafts"]]
    if not isinstance(law, dict) or not all(isinstance(word, str) for word in words):
        raise TypeError("law, rule, models or drafts are of other types")
    if not {*law} <= {"weights", *_LAW} or (threads is not None and not threads >= 1):
        raise ValueError("its law or its number of threads is another than `tune` writes")
    _rules([best.acceptance])
    for number in (law.get("plausibility", 0), *(law.get("weights") or ())):
        float(number)
    if not {*best.drafts} <= {*range(len(saved["drafts"]))}:
        raise ValueError("its best candidate has drafts that are not listed")
    drafts = [saved["drafts"][i] for i in best.drafts]
    best = replace(best, drafts=tuple(range(len(drafts))))
    return _Way(saved["models"], drafts, law, best=best, threads=threads)


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


def _call(
    max_new_tokens: int, warp: Mapping[str, Any], stop: Sequence[str] | None
) -> dict[str, Any]:
    """Arguments of the decoder's `generate`, checked before anything is loaded."""
    from specens.tuning.compare import sampling
    from specens_kernels import Law

    Law(**warp)
    return sampling(max_new_tokens, **warp) | {"stop_strings": stop or ()}


def _continued(
    decoder: "SpeculativeDecoder",
    tokenizer: Any,
    ids: Any,
    call: Mapping[str, Any],
    write: Callable[[str], object] | None = None,
) -> tuple[str, list[int], "Statistics"]:
    """Text, tokens and statistics of one prompt's continuation, written as it comes."""
    from specens.cli.output import TextStream

    stream = TextStream(tokenizer, write)
    mask = ids.new_ones(ids.shape)
    sequences = decoder.generate(
        ids, attention_mask=mask, streamer=stream, tokenizer=tokenizer, **call
    )
    assert decoder.statistics is not None
    return stream.text, sequences[0, ids.shape[1] :].tolist(), decoder.statistics


def _write_text(
    decoder: "SpeculativeDecoder",
    tokenizer: Any,
    prompts: Sequence[str],
    encoded: Sequence[Any],
    call: Mapping[str, Any],
) -> None:
    """Texts with a blank line between as they come; then what they took, on standard error."""
    from specens.cli import output, tables
    from specens.tuning.compare import total

    calls = []
    for i, ids in enumerate(encoded):
        seeded = {**call, "seed": call["seed"] + i}
        *_, statistics = _continued(decoder, tokenizer, ids, seeded, output.write_text)
        calls.append(statistics)
        output.write_text("\n" if i == len(prompts) - 1 else "\n\n")
    console = output.errors()
    console.print(tables.members_table(total(calls)))
    console.print(f"{tables.summary(total(calls))}\nseed {call['seed']}")


def _write_json(
    decoder: "SpeculativeDecoder",
    tokenizer: Any,
    prompts: Sequence[str],
    encoded: Sequence[Any],
    call: Mapping[str, Any],
) -> None:
    """One line for each prompt."""
    from specens.cli import output

    with output.progress("prompts", len(prompts)) as step:
        for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            seeded = {**call, "seed": call["seed"] + i}
            text, tokens, statistics = _continued(decoder, tokenizer, ids, seeded)
            output.write_json(
                {
                    "prompt": prompt,
                    "text": text,
                    "token_ids": tokens,
                    "seed": seeded["seed"],
                    "statistics": statistics.as_dict(),
                }
            )
            step()
