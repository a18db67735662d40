# SPDX-License-Identifier: Apache-2.0
"""The command `specens generate`: text on standard output, statistics on standard error.

Who decodes is in `ways.py`.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specens.cli import loading, options
from specens.cli.ways import way_of
from specens.methods import METHODS
from specens_kernels import Refusal

if TYPE_CHECKING:
    from specens.decoder import SpeculativeDecoder
    from specens.loop.statistics import Statistics


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
    raw: Annotated[
        bool,
        typer.Option("--raw", help="To a terminal, too, write control characters as they are."),
    ] = False,
) -> None:
    """Continue a prompt. The text goes to standard output, the statistics to standard error.

    Nothing but the options here shapes the text. Of the models' own generation configs only the
    first one's end-of-sequence tokens count.
    """
    prompts = loading.read_prompts(prompt, file, lines)
    if stop and not all(stop):
        raise Refusal("generate", "stop", "text", "an empty string")
    for text in stop or ():
        loading.check_text("generate", "stop", text)
    how = loading.Loading(dtype, device, threads, trust_remote_code)
    loading.check_names("models", models)
    loading.check_names("drafts", drafts)
    way = way_of(
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
    way.check(warp)
    call = _call(max_new_tokens, warp, stop)
    call["seed"] = secrets.randbits(32) if seed is None else seed
    loaded = loading.load_ensemble(
        way.models, way.drafts, replace(how, threads=threads or way.threads)
    )
    encoded = loaded.encode(prompts, chat=chat)
    decoder = way.decoder(loaded, encoded, call)
    if as_json:
        _write_json(decoder, loaded.tokenizers[0], prompts, encoded, call)
    else:
        _write_text(decoder, loaded.tokenizers[0], encoded, call, raw=raw)


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
    encoded: Sequence[Any],
    call: Mapping[str, Any],
    *,
    raw: bool,
) -> None:
    """Texts with a blank line between as they come; then what they took, on standard error."""
    from specens.cli import output, tables
    from specens.tuning.compare import total

    calls = []
    write = output.writer(raw=raw)
    for i, ids in enumerate(encoded):
        seeded = {**call, "seed": call["seed"] + i}
        *_, statistics = _continued(decoder, tokenizer, ids, seeded, write)
        calls.append(statistics)
        output.write_text("\n" if i == len(encoded) - 1 else "\n\n")
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
