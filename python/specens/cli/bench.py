# SPDX-License-Identifier: Apache-2.0
"""The commands `specens bench` and `specens demo`: schedules beside each other on the same work.

`bench` compares what `tuning.compare.contestants` lists on the user's models; `demo` shows what the
shipped family writes, and how fast beside the plain ensemble.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specens import family
from specens.cli import checks, loading, options
from specens.cli.streams import printable
from specens.schedules import Alternating, Speculative
from specens_kernels import Refusal

if TYPE_CHECKING:
    from rich.console import Console

    from specens.decoder import SpeculativeDecoder
    from specens.loop.statistics import Statistics


def bench(
    prompt: options.Prompt = None,
    file: options.File = None,
    lines: options.Lines = False,
    models: options.Models = None,
    weights: options.Weights = None,
    ensemble: options.EnsembleName = "mixture",
    draft: Annotated[
        str | None, typer.Option(help="A model outside the ensemble that drafts.")
    ] = None,
    gamma: Annotated[str, typer.Option(help="Numbers of tokens per proposal to try.")] = "1,2,4",
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Compare the schedules on the same prompts and seeds, taking turns; the prefill apart."""
    prompts = loading.read_prompts_or_built_in(prompt, file, lines)
    gammas = options.integers("gamma", gamma)
    shares = None if weights is None else options.numbers("weights", weights)
    drafts = None if draft is None else [draft]
    loading.check_names("models", models)
    loading.check_names("draft", drafts)
    how = loading.Loading(dtype, device, threads, trust_remote_code)
    law = {"weights": shares, "ensemble": ensemble}
    checks.law_of(law, models or loading.WHOLE_FAMILY, {"temperature": temperature})
    for count in gammas:
        Speculative(tokens=count)

    from specens.cli import output, tables
    from specens.tuning.compare import compare, contestants, sampling, workload

    loaded = loading.load_ensemble(models, drafts, how)
    decoders = contestants(
        loaded.members,
        gammas=gammas,
        draft=loaded.drafts[0] if drafts else None,
        sampled=temperature > 0,
        tokenizers=loaded.tokenizers,
        **law,
    )
    encoded = loaded.encode(prompts)
    call = sampling(max_new_tokens, temperature=temperature)
    works = {
        name: workload(decoder, encoded, seed=seed, **call) for name, decoder in decoders.items()
    }
    with output.progress("rounds", len(works) * (repeats + 1)) as step:
        comparisons = compare(works, repeats, progress=step)
    if as_json:
        rows = [comparison.as_dict() for comparison in comparisons]
        output.write_json({"temperature": temperature, "rows": rows})
    else:
        title = f"{len(encoded)} prompts, temperature {temperature:g}: medians of {repeats} rounds"
        output.console().print(tables.comparisons_table(title, comparisons))


def demo(
    max_new_tokens: options.MaxNewTokens = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, if time allows.")] = 5,
    limit_s: Annotated[float, typer.Option(help="Seconds for each table.")] = 15.0,
    gamma: Annotated[int, typer.Option(min=1, help="Tokens per proposal.")] = 2,
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Three small models write together: the text, and its speed beside the plain ensemble's."""
    if not limit_s >= 0:
        raise Refusal("demo", "limit_s", "seconds >= 0", limit_s)

    from specens.cli import output, tables
    from specens.decoder import SpeculativeDecoder
    from specens.tuning.compare import compare, sampling, total, workload

    how = loading.Loading(device=device, threads=threads)
    loaded = loading.load_ensemble(None, None, how)
    models, tokenizers = loaded.members, loaded.tokenizers
    plain = SpeculativeDecoder(models, schedule="plain", tokenizers=tokenizers)
    schedule = Alternating(tokens=gamma)
    alternating = SpeculativeDecoder(models, schedule=schedule, tokenizers=tokenizers)
    prompts = loaded.encode(family.PROMPTS)
    console = output.console()
    console.quiet = as_json
    names = ", ".join(loading.WHOLE_FAMILY)
    console.print(f"Three models write one text: the even mixture of {names}.\n")
    sampled = sampling(max_new_tokens, temperature=0.8)
    texts, statistics = _written(alternating, prompts, tokenizers[0], sampled, console)
    console.print(tables.members_table(total(statistics)))
    console.print(tables.summary(total(statistics)) + "\n")
    greedy = sampling(max_new_tokens, temperature=0.0)
    same = sum(
        plain.generate(ids, **greedy).tolist() == alternating.generate(ids, **greedy).tolist()
        for ids in prompts
    )
    rows = {}
    for title, call in (("greedy", greedy), ("sampled, temperature 0.8", sampled)):
        works = {
            name: workload(decoder, prompts, **call)
            for name, decoder in (("plain", plain), ("alternating", alternating))
        }
        with output.progress(title, 2 * (repeats + 1)) as step:
            comparisons = compare(works, repeats, limit_s=limit_s, progress=step)
        rows[title] = [comparison.as_dict() for comparison in comparisons]
        rounds = comparisons[0].rounds
        heading = f"{title}: medians of {rounds} {'round' if rounds == 1 else 'rounds'}"
        console.print(tables.comparisons_table(heading, comparisons))
    console.print(f"Greedy text equal to the plain ensemble's: {same} of {len(prompts)} prompts.")
    if as_json:
        facts = {"texts": texts, "statistics": total(statistics).as_dict()}
        output.write_json(facts | {"same_greedy_text": same, "tables": rows})


def _written(
    decoder: "SpeculativeDecoder",
    prompts: Sequence[Any],
    tokenizer: Any,
    call: Mapping[str, Any],
    console: "Console",
) -> "tuple[list[dict[str, str]], list[Statistics]]":
    """Show a text for each prompt; prompts and texts, and the statistics of each."""
    from rich.text import Text

    from specens.cli import output

    texts: list[dict[str, str]] = []
    statistics: list[Statistics] = []
    for i, ids in enumerate(prompts):
        stream = output.TextStream(tokenizer)
        decoder.generate(ids, streamer=stream, seed=i, **call)
        assert decoder.statistics is not None
        statistics.append(decoder.statistics)
        texts.append({"prompt": family.PROMPTS[i], "text": stream.text})
        shown = Text.assemble((family.PROMPTS[i], "dim"), printable(stream.text), "\n")
        console.print(shown, soft_wrap=True)
    return texts, statistics
