# SPDX-License-Identifier: Apache-2.0
"""The command `specens tune`: which schedule is the fastest for the user's models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specens.cli import checks, loading, options
from specens.tuning.lossy import check_lossy
from specens_kernels import Acceptance

if TYPE_CHECKING:
    from specens.tuning import Comparison, Tuning


def tune(
    prompt: options.Prompt = None,
    file: options.File = None,
    lines: options.Lines = False,
    models: options.Models = None,
    weights: options.Weights = None,
    ensemble: options.EnsembleName = "mixture",
    drafts: options.Drafts = None,
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
    scope: options.Scope = "member",
    plausibility: options.Plausibility = 0.0,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Find the fastest schedule for these models, from their forward times and agreement.

    Tune at the temperature that you will generate at. With --output F, `specens generate --config
    F` decodes with the best schedule that was found.
    """
    prompts = loading.read_prompts_or_built_in(prompt, file, lines)
    shares = None if weights is None else options.numbers("weights", weights)
    law = {"weights": shares, "ensemble": ensemble, "scope": scope, "plausibility": plausibility}
    warp: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    how = loading.Loading(dtype, device, threads, trust_remote_code)
    loading.check_names("models", models)
    loading.check_names("drafts", drafts)
    if output is not None:
        options.check_folder("output", output)

    checks.law_of(law, models or loading.WHOLE_FAMILY, warp)
    rules = [check_lossy(Acceptance.parse(text)) for text in acceptance or []]

    from specens.tuning.compare import sampling
    from specens_kernels import Law

    Law(**warp)  # else transformers would take a top_p above 1 for none
    loaded = loading.load_ensemble(models, drafts, how)
    call = sampling(max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    rounds = repeats if check else 0
    search = {"most": most, "acceptances": rules}
    tuning, comparisons = _tuned(loaded, prompts, call, law, search, seed=seed, rounds=rounds)
    facts = {
        "models": models or loading.WHOLE_FAMILY,
        "drafts": drafts or [],
        "device": str(loaded.device),
        "threads": _threads(),
        "law": law,
        "sampling": warp,
        **tuning.as_dict(comparisons),
    }
    _show(facts, tuning, comparisons, output, as_json)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _tuned(
    loaded: loading.Loaded,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    law: Mapping[str, Any],
    search: Mapping[str, Any],
    *,
    seed: int,
    rounds: int,
) -> "tuple[Tuning, list[Comparison] | None]":
    """What is predicted, and what is measured in so many rounds; none is None."""
    from specens import tuning
    from specens.cli import output

    encoded = loaded.encode(prompts)
    arguments = {"drafts": loaded.drafts, "tokenizers": loaded.tokenizers, **law}
    tuned = tuning.tune(loaded.members, encoded, call, seed=seed, **search, **arguments)
    if not rounds:
        return tuned, None
    with output.progress("rounds", len(tuned.checked()) * (rounds + 1)) as step:
        comparisons = tuning.check(
            tuned,
            loaded.members,
            encoded,
            call,
            repeats=rounds,
            seed=seed,
            progress=step,
            **arguments,
        )
    return tuned, comparisons


def _show(
    facts: Mapping[str, Any],
    tuning: "Tuning",
    comparisons: "Sequence[Comparison] | None",
    file: Path | None,
    as_json: bool,
) -> None:
    """Write the file, and what was found as JSON or as a table."""
    from specens.cli import output, tables

    if file is not None:
        output.write_file("output", file, facts)
    if as_json:
        output.write_json(facts)
        return
    console = output.console()
    console.print(tables.tuning_table(tuning, comparisons))
    for note in tables.lossy_notes(tuning):
        console.print(note, soft_wrap=True)
    console.print(f"{tuning.num_tokens} tokens written in {tuning.seconds:.1f} s of tuning.")
