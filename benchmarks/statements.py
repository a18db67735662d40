# SPDX-License-Identifier: Apache-2.0
"""Numbers in prose and small tables, made of the results: no page has a number of its own.

Each statement is a function of all result files, {file name: content}. To add one, write the
function, name it in `STATEMENTS` and mark its place in a page.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
# The pages' words for the sets of models that benchmarks name.
FAMILIES = {"shipped": "the shipped models", "smollm2": "SmolLM2"}


def markdown(columns: Sequence[Any], rows: Iterable[Sequence[Any]], words: bool = False) -> str:
    """A table; its first column is on the left and, unless they are words, the others right."""
    rule = ["---"] * len(columns) if words else ["---"] + ["---:"] * (len(columns) - 1)
    escaped = ([str(cell).replace("|", r"\|") for cell in row] for row in (columns, rule, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def source(result: Mapping[str, Any], file: str) -> str:
    """Where and when a result was measured, and its file."""
    machine, versions = result["machine"], result["versions"]
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_isa']}; {packages}; "
        f"{result['date'][:10]}, commit {result['commit']}. Medians; more, and their spread, in "
        f"`benchmarks/results/{file}`."
    )


def wrapped(text: str) -> str:
    """A paragraph, in lines as long as those of the pages."""
    return f"{textwrap.fill(text, 104, break_long_words=False, break_on_hyphens=False)}\n"


def spread(values: Iterable[float], digits: int = 1) -> str:
    """From the least to the largest, or the one number that both are."""
    every = sorted(values)
    low, high = f"{every[0]:.{digits}f}", f"{every[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _over(results: Results, what: str) -> list[float]:
    """A ratio of two members of 128,256 tokens on all cores: all drafts kept, one refused."""
    case = {"vocab_size": 128_256, "members": 2, "batch": 1, "dtype": "bfloat16"}
    case["threads"] = results["bench_verify.json"]["headline"]["threads"]
    rows = results["bench_verify.json"]["rows"]
    return [row[what]["median"] for row in rows if case.items() <= row.items()]


def _own_times(results: Results, loop: str) -> list[float]:
    """Milliseconds a turn, one sequence, at every vocabulary and number of threads."""
    headline = results["bench_loop.json"]["headline"]
    return [value for name, value in headline.items() if name.startswith(f"{loop}_V")]


def _assisted(results: Results) -> list[float]:
    headline = results["bench_loop.json"]["headline"]
    return [value for name, value in headline.items() if name.endswith("_over_ours")]


def _alternating(results: Results) -> dict[str, list[float]]:
    """The best ratio to the plain ensemble in every cell, by family."""
    by_family: dict[str, list[float]] = {}
    for file, result in results.items():
        if file.startswith("bench_generate"):
            for cell, best in result["headline"]["best_alternating_over_plain"].items():
                by_family.setdefault(cell.split()[0], []).extend(best.values())
    return by_family


def _pairs(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Speed relative to the plain ensemble: pair -> schedule -> ratio."""
    pairs: dict[str, dict[str, float]] = {}
    for row in rows:
        if "pair" in row:
            pairs.setdefault(row["pair"], {})[row["schedule"]] = row["ratio"]
    return pairs


def strongest(results: Results) -> str:
    """The first number of the README."""
    cores = results["bench_verify.json"]["machine"]["cores"]
    eager, compiled = (_over(results, f"{each}_over_ours") for each in ("eager", "compiled"))
    return wrapped(
        f"The op that checks their drafts is **{spread(eager)} times as fast as eager torch** and "
        f"{spread(compiled)} times as fast as `torch.compile`, for two models with 128,256 tokens "
        f"in bfloat16 on {cores} CPU cores (`benchmarks/results/bench_verify.json`)."
    )


def headlines(results: Results) -> str:
    """Six rows for the README, each with the way to its table."""
    traffic = results["bench_traffic.json"]["headline"]
    eager, compiled = (_over(results, f"{each}_over_ours") for each in ("eager", "compiled"))
    families = ", ".join(
        f"{spread(ratios, 2)} times the plain ensemble ({FAMILIES.get(family, family)})"
        for family, ratios in _alternating(results).items()
    )
    pairs = _pairs(results["bench_methods.json"]["rows"]).values()
    ahead = [pair["lookahead"] for pair in pairs]
    peers = {
        name: min(
            value
            for key, value in traffic.items()
            if key.startswith(f"{name}_over_cuda_dense_M")
            or key.startswith(f"{name}_over_cuda_one")
        )
        for name in ("flashinfer-like", "mrv2-like")
    }
    rows = [
        (
            "[one verification](docs/results.md#one-verification), 2 models, 128,256 tokens",
            f"{spread(eager)} times as fast as eager torch, {spread(compiled)} times as compiled",
        ),
        ("[whole texts](docs/results.md#whole-texts), `alternating`", families),
        (
            "[sampling a mixture](docs/results.md#sampling-a-mixture), `lookahead`",
            f"{spread(ahead, 2)} times the plain ensemble (the shipped models)",
        ),
        (
            "[the loop itself](docs/results.md#the-loop-itself), `speculative`",
            f"{spread(_own_times(results, 'speculative'))} ms a turn; transformers' assisted loop "
            f"takes {spread(_assisted(results))} times as long",
        ),
        (
            "[bytes on a GPU](docs/gpu.md#bytes-of-one-verification), counted, 3 models",
            f"at most {traffic['cuda_over_floor']:.2f} times the floor, at least "
            f"{peers['mrv2-like']:.1f} times fewer than a pipeline like vLLM's runner, "
            f"{peers['flashinfer-like']:.1f} than one like FlashInfer's",
        ),
    ]
    engine = results["bench_engine.json"]["headline"]["targets"]
    steps = {
        target["filters"]: f"{target['figure']:.1f} to {target['most']:.0f}" for target in engine
    }
    rows.append(
        (
            "[a step's sampler in vLLM](docs/engines.md#the-sampler-alone), on a CPU",
            f"{steps['top-k, top-p']} times as fast as vLLM's own with top-k and top-p, "
            f"{steps['none']} without",
        )
    )
    machine = results["bench_verify.json"]["machine"]
    where = wrapped(
        f"On {machine['cores']} cores of a virtual machine ({machine['cpu']}); contestants take "
        "turns, so ratios mean more than times. [All results](docs/results.md), with what was "
        "aimed at and missed."
    )
    return f"{markdown(('what', 'measured'), rows, words=True)}\n\n{where}"


def aims(results: Results) -> str:
    """What was aimed at, what was found, and whether that is enough."""
    verify, loop, generate, traffic = (
        results[f"bench_{name}.json"]["headline"]
        for name in ("verify", "loop", "generate", "traffic")
    )
    targets, bytes_of = verify["targets"], traffic["targets"]
    of_verify = "`verify`, 2 members, 128,256 tokens, bfloat16: "
    rows: list[tuple[str, str, bool]] = []
    for other in ("eager", "compiled"):
        times, least = _over(results, f"{other}_over_ours"), targets[f"{other}_over_ours"]
        aim = f"{of_verify}{least:g} times as fast as {other} torch"
        rows.append((aim, f"{spread(times)}, all kept and one refused", min(times) >= least))
    floor, most = _over(results, "ours_over_floor"), targets["ours_over_floor"]
    rows.append((f"{of_verify}at most {most:g} times the floor", spread(floor), max(floor) <= most))
    call, most = verify["verify_call_us"], targets["call_us"]
    rows.append((f"a call of `verify`: at most {most:g} µs", f"{call:g} µs", call <= most))
    own, most = _own_times(results, "speculative"), loop["target_ms"]
    aim = f"the loop's own time of a `speculative` turn: at most {most:g} ms"
    rows.append((aim, f"{spread(own)} ms", max(own) <= most))
    slow, cells = generate["alternating_rows_slower_than_plain"], _alternating(results)
    best = min(ratio for ratios in cells.values() for ratio in ratios)
    found = f"{slow} rows are slower; the best of each cell is at least {best:.2f} times as fast"
    rows.append(("`alternating`: no number of drafts slower than plain", found, slow == 0))
    most = bytes_of["over_floor"]
    for backend in ("cuda", "triton"):
        over = traffic[f"{backend}_over_floor"]
        aim = f"bytes on a GPU, {backend}: at most {most:g} times the floor"
        rows.append((aim, f"{over:.2f}", over <= most))
    for name, key in (("mrv2-like", "mrv2_over_ours"), ("flashinfer-like", "flashinfer_over_ours")):
        least = bytes_of[key]
        dense, told = (traffic[f"{name}_over_cuda_{kind}_M3"] for kind in ("dense", "dense_lse"))
        aim = f"bytes on a GPU, 3 members: {least:g} times fewer than {name}"
        found = f"{dense:.1f}; {told:.1f} where `verify` is told the draft's log-sum-exps"
        rows.append((aim, found, dense >= least))
    table = [(aim, found, "yes" if enough else "**no**") for aim, found, enough in rows]
    return f"{markdown(('aim', 'found', 'reached'), table, words=True)}\n"


def tree_aims(results: Results) -> str:
    """Each target of the ops for trees with its figure, a row for each kind of case."""
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for name in ("attention", "compact", "verify_tree"):
        for target in results[f"bench_{name}.json"]["headline"]["targets"]:
            keys = ("id", "dtype", "threads", "ratio", "target")
            kinds.setdefault(tuple(str(target.get(key, "")) for key in keys), []).append(target)
    rows = []
    for kind, targets in kinds.items():
        nodes = ", ".join(str(target["nodes"]) for target in targets if "nodes" in target)
        figures = ", ".join(f"{target['figure']:g}" for target in targets)
        reached = all(target["verdict"] == "pass" for target in targets)
        rows.append((*kind[:3], nodes, *kind[3:], figures, "yes" if reached else "**no**"))
    columns = ("target", "dtype", "threads", "nodes", "of", "aim", "found", "reached")
    return f"{markdown(columns, rows, words=True)}\n"


def fastest(results: Results) -> str:
    """Of every pair, the fastest schedule that samples its mixture, beside `lookahead`."""
    rows = []
    for file in ("bench_methods", "bench_methods_smollm2", "bench_methods_smollm2_bf16"):
        for pair, ratios in _pairs(results.get(f"{file}.json", {}).get("rows", ())).items():
            best = max(ratios, key=lambda schedule: ratios[schedule])
            models = file.removeprefix("bench_methods").strip("_").replace("_", ", ") or "shipped"
            ahead = f"{ratios['lookahead']:.2f}x"
            rows.append((models, pair, f"`{best}`", f"{ratios[best]:.2f}x", ahead))
    columns = ("models", "pair", "fastest", "its speed-up", "`lookahead`")
    return f"{markdown(columns, rows)}\n"


def head(results: Results) -> str:
    """What the default weight head is worth."""
    row = results["train_diversed.json"]["headline"]

    def above(measure: str) -> str:
        mean, error = (row[f"{measure}_above_front{end}"] for end in ("", "_standard_error"))
        return f"{mean:+.2f} ± {error:.2f}"

    return wrapped(
        "Above static weights of its own acceptance, in nats per token: "
        f"{above('target_log_likelihood')} in the target's log-likelihood of its texts, which it "
        f"was rewarded for; {above('closeness_to_target')} in closeness to the target; "
        f"{above('text_log_likelihood')} in the likelihood of real text."
    )


STATEMENTS: Mapping[str, Callable[[Results], str]] = {
    "strongest": strongest,
    "headlines": headlines,
    "aims": aims,
    "tree_aims": tree_aims,
    "fastest": fastest,
    "head": head,
}
