# SPDX-License-Identifier: Apache-2.0
"""The command `specens`: generate, tune, methods, demo, probe, bench and train.

A command parses, calls the library and shows what came back (`terminal.py`). What the library
refuses becomes one line on standard error and exit code 2; anything unexpected keeps its traceback.
Torch is imported inside the commands, so that help and mistakes are answered at once. To add a
command, add a function with `@app.command()`.
"""

import json
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specens import family
from specens.cli import train as training

# The class is public in click, but typer has a copy of click that does not export it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
# How this library words what it refuses, and the types that it has; see CONTRIBUTING.md.
_ABOUT_AN_ARGUMENT = re.compile(r"\w+: (.*?: )?(expected|unknown) ", re.DOTALL)
_REFUSALS = (ValueError, ImportError, NotImplementedError)
# Arguments of the library that have another name here.
_OPTIONS = {
    "num_speculative_tokens": "--gamma",
    "do_sample": "--temperature above 0",
    "max_new_tokens": "--max-new-tokens",
    "drafts": "--draft",
    "models": "--model",
}


class _OneLine(TyperGroup):
    """Says what is wrong with a command line in one line, and exits with 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; every way out is an exit code."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except _UsageError as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            _fail(f"{getattr(error, 'format_message', error.__str__)()}{hint}")
        except _REFUSALS as error:
            if not _ABOUT_AN_ARGUMENT.match(str(error)):
                raise
            _fail(_as_option(str(error)))
        sys.exit(code if isinstance(code, int) else 0)


def _as_option(message: str) -> str:
    """The message, and how what it is about is written on a command line."""
    option = _OPTIONS.get(message.split(": ")[1])
    return message if option is None else f"{message} (here: {option})"


def _fail(message: str) -> None:
    sys.stderr.write(f"specens: error: {' '.join(message.split())}\n")
    sys.exit(2)


app = typer.Typer(
    cls=_OneLine,
    help="Write one text with several language models, speculatively and exactly.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(training.app, name="train")

_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Folder, hub name, or family:code, family:prose, family:draft. Repeat it for an "
        "ensemble. None is the family that ships with specens.",
    ),
]
_Weights = Annotated[
    str | None, typer.Option(help="One number per model, such as 0.5,0.5. None is equal shares.")
]
_EnsembleName = Annotated[str, typer.Option("--ensemble", help="mixture or product.")]
_Drafts = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        help="A model outside the ensemble that drafts. Repeat it for more, the smallest first.",
    ),
]
_Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
# Memory for all of them is taken at once.
_MAX_TOKENS = 2**20
_MaxNewTokens = Annotated[
    int, typer.Option(min=1, max=_MAX_TOKENS, help="Most tokens to write per prompt.")
]
_Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own; float32 for the family), float32, bfloat16 or float16."
    ),
]
_Device = Annotated[
    str,
    typer.Option(help="auto (a GPU if torch has one, else the CPU), or as torch has it: cuda:1."),
]
_Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads. None is 1 if all models are family:..., else torch's choice."
    ),
]
_Scope = Annotated[
    str,
    typer.Option(
        help="What temperature and filters warp: member (each, before they are mixed) or ensemble."
    ),
]
_Plausibility = Annotated[
    float,
    typer.Option(
        help="'product': drop tokens that the first model finds less probable than this times its "
        "best; 0 is off."
    ),
]
_TopK = Annotated[int, typer.Option(min=0, help="Only the k most probable tokens; 0 is off.")]
_Share = Annotated[
    float, typer.Option(help="Only the most probable tokens that hold this mass; 1 is off.")
]
_MinP = Annotated[
    float, typer.Option(help="Only tokens this times as probable as the best; 0 is off.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
_Trust = Annotated[bool, typer.Option(help="Run code that comes with a model. Off unless asked.")]
_File = Annotated[Path | None, typer.Option(help="Read the prompt from a file; - is a pipe.")]
_Lines = Annotated[
    bool, typer.Option("--lines", help='Each line is a prompt, or JSON with a "prompt".')
]
_MAX_SEED = 2**62
# What --auto may cost at the start.
_AUTO_PROMPTS, _AUTO_TOKENS, _AUTO_SECONDS = 3, 48, 20.0


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; else a pipe.")] = None,
    file: _File = None,
    lines: _Lines = False,
    models: _Models = None,
    weights: _Weights = None,
    ensemble: _EnsembleName = "mixture",
    method: Annotated[
        str | None,
        typer.Option(help="A published method, its schedule and rule: see `specens methods`."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="plain, component, lookahead, speculative, companion, lookup, hierarchy or "
            "alternating, which None is; the README says who proposes and who verifies."
        ),
    ] = None,
    gamma: Annotated[
        str | None,
        typer.Option(
            help="Tokens per proposal; for 'alternating' also one per model: 4,2; for 'hierarchy' "
            "one per draft. None is 1 for 'alternating', 16 for 'lookahead', 8 for 'companion', "
            "4 for the others, and for the drafts of a 'hierarchy' 4, 8, ..."
        ),
    ] = None,
    proposer: Annotated[
        int | None,
        typer.Option(
            help="'speculative', 'lookahead': which model drafts, counted from 0. None is the "
            "cheapest."
        ),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="'alternating': the rotation, such as 1,0: models from 0.")
    ] = None,
    drafts: _Drafts = None,
    acceptance: Annotated[
        list[str] | None,
        typer.Option(
            help="A rule of the README's table and its parameters, such as js:threshold=0.3; for "
            "'hierarchy' one per draft. None is rejection, which is exact."
        ),
    ] = None,
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
    scope: _Scope = "member",
    plausibility: _Plausibility = 0.0,
    max_new_tokens: _MaxNewTokens = 128,
    temperature: _Temperature = 1.0,
    top_k: _TopK = 0,
    top_p: _Share = 1.0,
    min_p: _MinP = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=_MAX_SEED, help="Same seed, same text. None draws one.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop after this text. Repeatable.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a turn of a chat.")] = False,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    threads: _Threads = None,
    trust_remote_code: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Continue a prompt. The text goes to standard output, the statistics to standard error.

    Nothing but the options here shapes the text. Of the models' own generation configs only the
    first one's end-of-sequence tokens count.
    """
    from specens.cli import terminal

    prompts = terminal.read_prompts("generate", prompt, file, lines)
    gammas = None if gamma is None else _integers("generate: --gamma", gamma)
    shares = None if weights is None else _numbers("generate: --weights", weights)
    if stop and not all(stop):
        raise ValueError("generate: --stop: expected text, got an empty string")
    rotation = None if order is None else _integers("generate: --order", order)

    from specens.methods import method_named
    from specens.tuning.compare import sampling, total
    from specens_kernels import Acceptance, Law

    rules = [Acceptance.parse(one) for one in acceptance or []]
    options: dict[str, Any] = {
        "weights": shares,
        "schedule": schedule,
        "num_speculative_tokens": gammas[0] if gammas and len(gammas) == 1 else gammas,
        "proposer": proposer,
        "order": rotation,
        "acceptance": rules[0] if len(rules) == 1 else rules or None,
    }
    options = {name: value for name, value in options.items() if value is not None}
    law: dict[str, Any] = {"ensemble": ensemble, "scope": scope, "plausibility": plausibility}
    if auto or config is not None:
        _check_tuned("--auto" if config is None else "--config", {"method": method} | options)
    best = None
    if config is not None:
        saved = _read_config(config, auto, models, drafts, options | law)
        models, drafts, threads = saved["models"], saved["drafts"], threads or saved["threads"]
        best, law, options = saved["best"], saved["law"], {}
    options |= law
    chosen = None if method is None else method_named(method)
    if chosen is not None and ensemble == "mixture":
        del options["ensemble"]  # a head knows its own
    _check_method(chosen, draft_weight, head, options)
    mixing = {"draft_weight": draft_weight, "head": head}
    options |= {name: value for name, value in mixing.items() if value is not None}
    Law(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)  # checks, before loading
    arguments = sampling(
        max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    if chosen is not None and not models:
        models = [terminal.FAMILY_PREFIX + name for name in chosen.models]
        drafts = drafts or [terminal.FAMILY_PREFIX + name for name in chosen.drafts]
    loaded, tokenizers = _load(
        "generate", models, drafts, dtype, device, trust_remote_code, threads
    )
    tokenizer = tokenizers[0]
    size = len(loaded) - len(drafts or [])
    encoded = [
        terminal.encode("generate", tokenizer, one, chat=chat, device=loaded[0].device)
        for one in prompts
    ]
    if auto:
        best = _tune_shortly(loaded, size, encoded, tokenizers, arguments, options)
    decoder = _decoder(chosen, best, loaded[:size], loaded[size:], tokenizers, options)
    first_seed = secrets.randbits(32) if seed is None else seed
    found = []
    with terminal.progress("prompts", len(prompts) if as_json and lines else 0) as step:
        for i, (one, ids) in enumerate(zip(prompts, encoded, strict=True)):
            call = arguments | {"stop_strings": stop or (), "seed": first_seed + i}
            found.append(_continue(decoder, tokenizer, one, ids, call, as_json))
            if not as_json:
                terminal.write_text("\n" if i == len(prompts) - 1 else "\n\n")
            step()
    if not as_json:
        whole = total(found)
        console = terminal.errors()
        console.print(terminal.members_table(whole))
        console.print(f"{terminal.summary(whole)}\nseed {first_seed}")


def _check_method(
    method: Any, draft_weight: float | None, head: str | None, options: dict[str, Any]
) -> None:
    """Refuse what does not go with the method, and without one what only methods take."""
    for option, value in (("--draft-weight", draft_weight), ("--head", head)):
        if value is not None and method is None:
            raise ValueError(f"generate: {option}: expected a --method that mixes, got none")
    if method is None:
        return
    if head is not None and method.name != "diversed":
        raise ValueError(f"generate: --head: expected none for method {method.name!r}")
    if draft_weight is not None and (not method.joins or method.name == "diversed"):
        raise ValueError(f"generate: --draft-weight: expected none for method {method.name!r}")
    if "schedule" in options:
        expected = f"none beside --method {method.name}"
        raise ValueError(f"generate: --schedule: expected {expected}, got {options['schedule']!r}")
    if method.joins and "weights" in options:
        raise ValueError(f"generate: --weights: expected --draft-weight for {method.name!r}")


def _check_tuned(option: str, options: dict[str, Any]) -> None:
    """Refuse what a tuning decides."""
    names = {"num_speculative_tokens": "gamma"}
    for name in ("method", "schedule", "num_speculative_tokens", "proposer", "order", "acceptance"):
        if options.get(name) is not None:
            raise ValueError(
                f"generate: --{names.get(name, name)}: expected none beside {option}, "
                f"got {options[name]!r}"
            )


def _read_config(
    path: Path,
    auto: bool,
    models: Sequence[str] | None,
    drafts: Sequence[str] | None,
    law: dict[str, Any],
) -> dict[str, Any]:
    """What `tune` has written: models, threads, law, the best candidate, and the drafts of that."""
    from specens.tuning import Candidate
    from specens.tuning.stops import stop_of
    from specens_kernels import Acceptance

    default = {"ensemble": "mixture", "scope": "member", "plausibility": 0.0}
    given = {"auto": auto, "model": models, "draft": drafts} | law
    for name, value in given.items():
        if value and value != default.get(name):
            raise ValueError(f"generate: --{name}: expected none beside --config, got {value!r}")
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved["best"] = Candidate(**saved["best"])
        lists = [*saved["models"], *saved["drafts"]]
        places = set(saved["best"].drafts)
        if not isinstance(saved["law"], dict) or not all(isinstance(one, str) for one in lists):
            raise TypeError("law, models or drafts are of other types")
        if not places <= set(range(len(saved["drafts"]))):
            raise ValueError("its best candidate has drafts that are not listed")
        if "stop" in saved["best"].arguments:
            stop_of(saved["best"].arguments["stop"])
        if "acceptance" in saved["best"].arguments:
            Acceptance.parse(str(saved["best"].arguments["acceptance"]))
        saved["drafts"] = [saved["drafts"][i] for i in saved["best"].drafts]
        saved["best"] = replace(saved["best"], drafts=tuple(range(len(saved["drafts"]))))
        return {name: saved[name] for name in ("models", "drafts", "threads", "law", "best")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"generate: --config: expected a file that `specens tune --output` wrote, "
            f"got {str(path)!r} ({type(error).__name__})"
        ) from error


def _tune_shortly(
    loaded: Sequence[Any],
    size: int,
    prompts: Sequence[Any],
    tokenizers: Sequence[Any],
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """The candidate that a short tuning on the first prompts finds; a line says what it took."""
    from specens.cli import terminal
    from specens.tuning import tune

    try:
        found = tune(
            loaded[:size],
            prompts[:_AUTO_PROMPTS],
            arguments | {"max_new_tokens": _AUTO_TOKENS},
            drafts=loaded[size:],
            tokenizers=tokenizers,
            limit_s=_AUTO_SECONDS,
            **options,
        )
    except ValueError as error:
        if not str(error).startswith("tune: max_new_tokens"):
            raise
        raise ValueError(
            f"generate: --auto: expected models that take a few turns in {_AUTO_SECONDS:g} s, got "
            "fewer; choose a --schedule, or run `specens tune`"
        ) from error
    best = found.candidates[0]
    terminal.errors().print(
        f"auto: {best.name}, expected to be {found.speedup(best):.2f} times as fast as plain; "
        f"found in {found.seconds:.1f} s",
        soft_wrap=True,
    )
    return best


def _decoder(
    method: Any,
    best: Any,
    models: Sequence[Any],
    drafts: Sequence[Any],
    tokenizers: Sequence[Any],
    options: dict[str, Any],
) -> Any:
    """As the method says, or the best candidate of a tuning, or else the options alone."""
    from specens.decoder import SpeculativeDecoder
    from specens.methods import build
    from specens.tuning import decoder_of

    if method is not None:
        return build(method, models, drafts, tokenizers, **options)
    if best is not None:
        return decoder_of(best, models, drafts=drafts, tokenizers=tokenizers, **options)
    return SpeculativeDecoder(models, draft=drafts or None, tokenizers=tokenizers, **options)


def _continue(
    decoder: Any, tokenizer: Any, prompt: str, ids: Any, options: dict[str, Any], as_json: bool
) -> Any:
    """Write one prompt's continuation as it comes, or its JSON at the end; its statistics."""
    from specens.cli import terminal

    stream = terminal.TextStream(tokenizer, None if as_json else terminal.write_text)
    mask = ids.new_ones(ids.shape)
    sequences = decoder.generate(
        ids, attention_mask=mask, streamer=stream, tokenizer=tokenizer, **options
    )
    if as_json:
        terminal.write_json(
            {
                "prompt": prompt,
                "text": stream.text,
                "token_ids": sequences[0, ids.shape[1] :].tolist(),
                "seed": options["seed"],
                "statistics": decoder.statistics.as_dict(),
            }
        )
    return decoder.statistics


@app.command()
def demo(
    max_new_tokens: _MaxNewTokens = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, if time allows.")] = 5,
    limit_s: Annotated[float, typer.Option(min=0.0, help="Seconds for each table.")] = 15.0,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens per proposal.")] = 2,
    device: _Device = "auto",
    threads: _Threads = None,
    as_json: _Json = False,
) -> None:
    """Three small models write together: the text, and its speed beside the plain ensemble's."""
    from rich.console import Console
    from rich.text import Text

    from specens.cli import terminal
    from specens.decoder import SpeculativeDecoder
    from specens.tuning.compare import compare, sampling, total, workload

    models, tokenizers = _load("demo", None, None, "auto", device, False, threads)
    tokenizer = tokenizers[0]
    plain = SpeculativeDecoder(models, schedule="plain", tokenizers=tokenizers)
    alternating = SpeculativeDecoder(models, num_speculative_tokens=gamma, tokenizers=tokenizers)
    prompts = [
        terminal.encode("demo", tokenizer, one, device=models[0].device) for one in family.PROMPTS
    ]
    console = Console(highlight=False, quiet=as_json)
    console.print(
        "Three models write one text: the even mixture of "
        + ", ".join(terminal.FAMILY_PREFIX + name for name in family.FAMILY)
        + ".\n"
    )
    sampled = sampling(max_new_tokens, temperature=0.8)
    texts, found = [], []
    for i, ids in enumerate(prompts):
        stream = terminal.TextStream(tokenizer)
        alternating.generate(ids, streamer=stream, seed=i, **sampled)
        assert alternating.statistics is not None
        found.append(alternating.statistics)
        texts.append({"prompt": family.PROMPTS[i], "text": stream.text})
        console.print(Text.assemble((family.PROMPTS[i], "dim"), stream.text, "\n"), soft_wrap=True)
    console.print(terminal.members_table(total(found)))
    console.print(terminal.summary(total(found)) + "\n")

    greedy = sampling(max_new_tokens, temperature=0.0)
    same = sum(
        plain.generate(ids, **greedy).tolist() == alternating.generate(ids, **greedy).tolist()
        for ids in prompts
    )
    tables = {}
    for title, arguments in (("greedy", greedy), ("sampled, temperature 0.8", sampled)):
        with terminal.progress(title, 2 * (repeats + 1)) as step:
            rows = compare(
                {
                    name: workload(decoder, prompts, **arguments)
                    for name, decoder in (("plain", plain), ("alternating", alternating))
                },
                repeats,
                limit_s=limit_s,
                progress=step,
            )
        tables[title] = [row.as_dict() for row in rows]
        rounds = "round" if rows[0].rounds == 1 else "rounds"
        console.print(terminal.rows_table(f"{title}: medians of {rows[0].rounds} {rounds}", rows))
    console.print(f"Greedy text equal to the plain ensemble's: {same} of {len(prompts)} prompts.")
    if as_json:
        terminal.write_json(
            {
                "texts": texts,
                "statistics": total(found).as_dict(),
                "same_greedy_text": same,
                "tables": tables,
            }
        )


@app.command()
def tune(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; else built in.")] = None,
    file: _File = None,
    lines: _Lines = False,
    models: _Models = None,
    weights: _Weights = None,
    ensemble: _EnsembleName = "mixture",
    drafts: _Drafts = None,
    acceptance: Annotated[
        list[str] | None,
        typer.Option(
            help="A lossy rule to measure beside the exact ones, such as js:threshold=0.3. "
            "Repeatable; never chosen by itself."
        ),
    ] = None,
    most: Annotated[
        int, typer.Option(min=1, max=16, help="Most tokens that a model may propose at a time.")
    ] = 8,
    check: Annotated[
        bool, typer.Option("--check", help="Run the best ones for real: measured beside predicted.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="--check: measured rounds.")] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON here, for `specens generate --config`.")
    ] = None,
    scope: _Scope = "member",
    plausibility: _Plausibility = 0.0,
    max_new_tokens: _MaxNewTokens = 64,
    temperature: _Temperature = 1.0,
    top_k: _TopK = 0,
    top_p: _Share = 1.0,
    min_p: _MinP = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Of the random numbers.")] = 0,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    threads: _Threads = None,
    trust_remote_code: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Find the fastest schedule for these models, from their forward times and agreement.

    Tune at the temperature that you will generate at. With --output F, `specens generate --config
    F` decodes with the best schedule that was found.
    """
    from rich.console import Console

    from specens.cli import terminal

    prompts: Sequence[str] = family.PROMPTS
    if prompt is not None or file is not None:
        prompts = terminal.read_prompts("tune", prompt, file, lines)
    shares = None if weights is None else _numbers("tune: --weights", weights)

    import torch

    from specens import tuning
    from specens.tuning.compare import sampling
    from specens.tuning.relaxation import check_lossy
    from specens_kernels import Acceptance

    rules = [check_lossy(Acceptance.parse(one)) for one in acceptance or []]
    if output is not None:
        terminal.check_folder("tune", "--output", output)
    loaded, tokenizers = _load("tune", models, drafts, dtype, device, trust_remote_code, threads)
    size = len(loaded) - len(drafts or [])
    encoded = [
        terminal.encode("tune", tokenizers[0], one, device=loaded[0].device) for one in prompts
    ]
    law: dict[str, Any] = {
        "weights": shares,
        "ensemble": ensemble,
        "scope": scope,
        "plausibility": plausibility,
    }
    bound: dict[str, Any] = {"drafts": loaded[size:], "tokenizers": tokenizers, **law}
    warp: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    options = sampling(max_new_tokens, **warp)
    found = tuning.tune(
        loaded[:size], encoded, options, most=most, seed=seed, acceptances=rules, **bound
    )
    rows = None
    if check:
        with terminal.progress("rounds", len(found.checked()) * (repeats + 1)) as step:
            rows = tuning.check(
                found,
                loaded[:size],
                encoded,
                options,
                repeats=repeats,
                seed=seed,
                progress=step,
                **bound,
            )
    result = {
        "models": models or [terminal.FAMILY_PREFIX + name for name in family.FAMILY],
        "drafts": drafts or [],
        "device": str(loaded[0].device),
        "threads": torch.get_num_threads(),
        "law": law,
        "sampling": warp,
        **found.as_dict(rows),
    }
    if output is not None:
        terminal.write_file("tune", output, result)
    if as_json:
        terminal.write_json(result)
    else:
        console = Console(highlight=False)
        console.print(terminal.tuning_table(found, rows))
        for note in terminal.lossy_notes(found):
            console.print(note, soft_wrap=True)
        console.print(f"{found.num_tokens} tokens written in {found.seconds:.1f} s of tuning.")


@app.command()
def methods(as_json: _Json = False) -> None:
    """List the methods of `generate --method`: their law, what they need, when to use them."""
    from rich.console import Console

    from specens.cli import terminal
    from specens.methods import METHODS

    if as_json:
        keys = ("name", "law", "lossless", "needs", "use", "source")
        terminal.write_json([{key: getattr(m, key) for key in keys} for m in METHODS.values()])
    else:
        Console(highlight=False).print(terminal.methods_table(METHODS.values()))


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or family:code.")],
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    trust_remote_code: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Run a model in a few tiny forwards and say how it can be decoded exactly."""
    from rich.console import Console

    from specens.cli import terminal

    loaded, _ = terminal.load(
        "probe", [model], dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )

    from specens.members.probe import probe as examine

    found = examine(loaded[0])
    if as_json:
        facts = asdict(found)
        del facts["layout"]
        terminal.write_json(facts)
    else:
        Console(highlight=False).print(terminal.probe_table(found))


@app.command()
def bench(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; else built in.")] = None,
    file: _File = None,
    lines: _Lines = False,
    models: _Models = None,
    weights: _Weights = None,
    ensemble: _EnsembleName = "mixture",
    draft: Annotated[
        str | None, typer.Option(help="A model outside the ensemble that drafts.")
    ] = None,
    gamma: Annotated[str, typer.Option(help="Numbers of tokens per proposal to try.")] = "1,2,4",
    max_new_tokens: _MaxNewTokens = 64,
    temperature: _Temperature = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=_MAX_SEED, help="Of the random numbers.")] = 0,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    threads: _Threads = None,
    trust_remote_code: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Compare the schedules on the same prompts and seeds, taking turns; the prefill apart."""
    from rich.console import Console

    from specens.cli import terminal

    prompts: Sequence[str] = family.PROMPTS
    if prompt is not None or file is not None:
        prompts = terminal.read_prompts("bench", prompt, file, lines)
    gammas = _integers("bench: --gamma", gamma)
    shares = None if weights is None else _numbers("bench: --weights", weights)

    from specens.tuning.compare import compare, contestants, sampling, workload

    drafts = None if draft is None else [draft]
    loaded, tokenizers = _load("bench", models, drafts, dtype, device, trust_remote_code, threads)
    decoders = contestants(
        loaded[:-1] if draft is not None else loaded,
        gammas=gammas,
        draft=loaded[-1] if draft is not None else None,
        sampled=temperature > 0,
        tokenizers=tokenizers,
        weights=shares,
        ensemble=ensemble,
    )
    encoded = [
        terminal.encode("bench", tokenizers[0], one, device=loaded[0].device) for one in prompts
    ]
    arguments = sampling(max_new_tokens, temperature=temperature)
    works = {
        name: workload(decoder, encoded, seed=seed, **arguments)
        for name, decoder in decoders.items()
    }
    with terminal.progress("rounds", len(works) * (repeats + 1)) as step:
        rows = compare(works, repeats, progress=step)
    if as_json:
        terminal.write_json({"temperature": temperature, "rows": [row.as_dict() for row in rows]})
    else:
        title = f"{len(encoded)} prompts, temperature {temperature:g}: medians of {repeats} rounds"
        Console(highlight=False).print(terminal.rows_table(title, rows))


def _load(
    command: str,
    models: Sequence[str] | None,
    drafts: Sequence[str] | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    threads: int | None,
) -> tuple[list[Any], list[Any]]:
    """The ensemble's models, then the drafts, and the tokenizers of all."""
    from specens.cli import terminal

    names = list(models or [terminal.FAMILY_PREFIX + name for name in family.FAMILY])
    names += drafts or []
    terminal.use_threads(threads, names)
    return terminal.load(
        command, names, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option}: expected numbers with commas between, got {text!r}") from error


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{option}: expected integers with commas between, got {text!r}"
        ) from error


def main() -> None:
    """The entry point of `specens`."""
    app()


if __name__ == "__main__":
    main()
