# SPDX-License-Identifier: Apache-2.0
"""`verify` against the same maths in torch, and against the cheapest sweep of the same bytes.

Contestants: `ours`, the op; `told draft`, the op with the log-sum-exps that `sample` gives when it
drafts, which spare it the draft's rows; `told all`, with those of every row, as a fused LM head has
them; `eager`, the straightforward batched torch program; `compiled`, the
same under torch.compile(fullgraph=True); `floor`, one max and sum-exp sweep, by the native code, of
as many rows as a verification must read. Situations: `accepted`, all drafts are kept, every row is
read and a bonus token drawn; `rejected`, a draft is refused at a typical place (the third of five
for one sequence), which the op turns into less work and the batched program cannot. Last, the
overhead of a call, at a vocabulary of 32.

    python benchmarks/bench_verify.py --tree

times draft trees, as verify_trees.py says, and

    python benchmarks/bench_verify.py --backend triton,cuda

times these backends on a CUDA device, as device.py says, beside the same programs and FlashInfer's
chain of speculative sampling, where it is installed. vLLM's `rejection_sample` is not among them:
it takes one model's logits, a bonus token drawn elsewhere and random numbers of its own.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import device
import harness
import torch
import verify_trees
from harness import WRONG, Spread
from verify_contestants import NUM_DRAFTS, Case, Inputs, OwnNumbers, contestants, ours

from specens_kernels import Law, backend, native, sample

VOCAB_SIZES = (32000, 49152, 128256, 151936)
HEADLINE_VOCAB_SIZE = 128256
TARGETS = {"eager_over_ours": 10.0, "compiled_over_ours": 4.0, "ours_over_floor": 1.5}
OURS = ("ours", "told draft", "told all")
TOLD = ("ours_over_told_draft", "ours_over_told_all")
RATIOS = [(over, "ours") for over in ("eager", "compiled")]
RATIOS += [("ours", under) for under in ("floor", "told draft", "told all")]


def gate(expected: Any) -> Callable[[str, Any], bool]:
    """Whether an answer is the reference's: the same tokens, log-probabilities up to rounding."""

    def agrees(name: str, answer: Any) -> bool:
        if name == "floor":
            return True
        counts = expected.num_accepted.long()
        if isinstance(answer, OwnNumbers):  # the last token is open
            kept = torch.arange(NUM_DRAFTS + 1) < counts[:, None]
            drafts = answer.tokens.cpu().long()[kept]
            same_counts = torch.equal(answer.num_accepted.cpu().long(), counts)
            return same_counts and torch.equal(drafts, expected.tokens[kept])
        in_place = hasattr(answer, "status")
        if in_place:
            last = answer.tokens.gather(1, answer.num_accepted[:, None].long())[:, 0]
            answer = (last, answer.num_accepted, answer.log_probs)
        last, num_accepted, log_probs = (value.cpu() for value in answer)
        emitted = torch.arange(NUM_DRAFTS + 1) <= counts[:, None]
        right = expected.tokens.gather(1, counts[:, None])[:, 0]
        if not torch.equal(num_accepted.long(), counts) or not torch.equal(last, right):
            return False
        # The program keeps the last token's log-probability in its last column, the op in place.
        places = counts if in_place else NUM_DRAFTS
        mine = log_probs.clone()
        mine[torch.arange(len(mine)), counts] = log_probs[torch.arange(len(mine)), places]
        return torch.allclose(mine[emitted], expected.log_probs[emitted], atol=1e-3)

    return agrees


def measure(
    case: Case, threads: int, compiled: bool, rounds: int, budget_s: float
) -> dict[str, Any]:
    """One row of the result."""
    inputs = Inputs.make(case)
    with backend("reference"):
        expected = ours(inputs)()
    torch.set_num_threads(threads)
    found = contestants(case, inputs, compiled)
    agrees = gate(expected)
    right = {name: function for name, function in found.items() if agrees(name, function())}
    wrong = found.keys() - right.keys()
    clocks = {name: harness.clock(function) for name, function in right.items()}
    samples = harness.interleave(clocks, rounds, budget_s)
    times: dict[str, Any] = {name: Spread.of(values) for name, values in samples.items()}
    times |= dict.fromkeys(wrong, WRONG)
    row = {**asdict(case), "threads": threads, "bytes": case.bytes_read, "seconds": times}
    for over, under in RATIOS:
        if over in samples and under in samples:
            paired = harness.ratios(samples[over], samples[under])
            row[f"{over}_over_{under}".replace(" ", "_")] = Spread.of(paired)
    return row


def on_backend(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, its ops on this backend."""

    def run() -> Any:
        with backend(name):
            return function()

    return run


def measure_on_device(
    case: Case,
    names: Sequence[str],
    copy: device.Copy,
    compiled: bool,
    rounds: int,
    budget_s: float,
) -> list[dict[str, Any]]:
    """Two rows of the result: with a cold L2 and with a warm one."""
    inputs = Inputs.make(case)
    with backend("reference"):
        expected = ours(inputs)()
    peers = contestants(case, inputs.cuda(), compiled)
    mine = {kind: peers.pop(kind) for kind in OURS}
    found = {
        name if kind == "ours" else f"{name} {kind}": on_backend(name, function)
        for name in names
        for kind, function in mine.items()
    } | peers
    programs = {name: device.captured(function) for name, function in found.items()}
    agrees = gate(expected)
    right = {name: program for name, program in programs.items() if agrees(name, program.run())}
    hows = {name: program.how for name, program in programs.items()}
    rows = []
    for cache in device.CACHES:
        samples = harness.interleave(device.clocks(right, copy, cache), rounds, budget_s)
        speed = copy.bytes / Spread.of(samples["copy"]).median
        times: dict[str, Any] = {name: Spread.of(values) for name, values in samples.items()}
        shares = {
            f"{name}_of_bandwidth": case.bytes_read / times[name].median / speed
            for name in right.keys() & set(names)
        }
        times |= dict.fromkeys(found.keys() - right.keys(), WRONG)
        row = {**asdict(case), "cache": cache, "how": hows, "bytes": case.bytes_read}
        rows.append({**row, "bandwidth": speed, "seconds": times, **shares})
    return rows


def overhead(threads: int, rounds: int) -> dict[str, Spread]:
    """Seconds of one call at a vocabulary of 32, where there is nothing to compute."""
    torch.set_num_threads(threads)
    inputs = Inputs.make(Case(32, 2, 1, "bfloat16", "accepted"))
    law = Law([0.5, 0.5])
    last = [tensor[:, :1] for tensor in inputs.logits]
    calls = {
        "verify": ours(inputs),
        "sample": lambda: sample(last, inputs.uniforms[:, :1], law),
    }
    clocks = {name: harness.clock(function) for name, function in calls.items()}
    samples = harness.interleave(clocks, rounds)
    return {name: Spread.of(values) for name, values in samples.items()}


def cases(options: argparse.Namespace) -> list[Case]:
    """What is measured; --quick keeps the headline's shape and one batched shape."""
    if options.quick:
        largest, smallest = sorted(options.vocab_sizes)[-2:][0], min(options.vocab_sizes)
        shapes = [([largest], 2, 1, "bfloat16"), ([smallest], 2, 8, "float32")]
    else:
        grid = itertools.product((1, 2, 3), (1, 8), ("bfloat16", "float32"))
        shapes = [(options.vocab_sizes, *rest) for rest in grid]
    return [
        Case(vocab_size, members, batch, dtype, situation)
        for vocab_sizes, members, batch, dtype in shapes
        for vocab_size in vocab_sizes
        for situation in ("accepted", "rejected")
    ]


def is_compiled(case: Case, threads: int, options: argparse.Namespace) -> bool:
    """Compiling takes seconds per shape and thread count: by default one sequence only."""
    if options.compiled == "all":
        return True
    headline = case.members == 2 and case.dtype == "bfloat16" and threads == max(options.threads)
    if options.compiled == "some":
        return case.batch == 1 and (headline or not options.quick)
    return False


COLUMNS = (
    *("vocabulary", "members", "batch", "dtype", "drafts", "threads"),
    *("ours µs", "told draft µs", "told all µs", "eager µs", "compiled µs", "floor µs"),
    *("eager/ours", "compiled/ours", "ours/floor", "GB/s"),
)


def time_of(row: dict[str, Any], name: str, digits: int = 0) -> str:
    """Median (10 %-90 %, minimum) in µs."""
    value = row["seconds"].get(name, "-")
    return value.text(1e6, digits) if isinstance(value, Spread) else value


def shown(row: dict[str, Any]) -> list[str]:
    """The row as it is printed."""

    def ratio_of(name: str) -> str:
        return f"{row[name].median:.2f}" if name in row else "-"

    mine = row["seconds"]["ours"]
    speed = "-" if mine == WRONG else f"{row['bytes'] / mine.median / 1e9:.1f}"
    return [
        *(str(row[k]) for k in ("vocab_size", "members", "batch", "dtype", "situation", "threads")),
        *(time_of(row, name) for name in (*OURS, "eager", "compiled", "floor")),
        *map(ratio_of, TARGETS),
        speed,
    ]


def readme_tables(rows: Sequence[dict[str, Any]], calls: dict[str, Any]) -> dict[str, Any]:
    """What the README shows: one sequence, bfloat16, the largest thread count."""
    most = max(row["threads"] for row in rows)
    lines = []
    for row in rows:
        if (row["batch"], row["dtype"], row["threads"]) != (1, "bfloat16", most):
            continue
        if row["members"] != 2 and row["vocab_size"] != HEADLINE_VOCAB_SIZE:
            continue
        mine = row["seconds"]["ours"]
        lines.append(
            [
                f"{row['vocab_size']:,}",
                row["members"],
                row["situation"],
                mine if mine == WRONG else f"{mine.median * 1e6:.0f}",
                *(f"{row[k].median:.1f}" if k in row else "-" for k in (*TARGETS, *TOLD)),
            ]
        )
    columns = ["vocabulary", "members", "drafts", "µs", "eager/ours", "compiled/ours", "ours/floor"]
    columns += ["ours/told draft", "ours/told all"]
    caption = f"`verify`, 5 drafts, 1 sequence, bfloat16, threads: {most}"
    return {"verify": {"caption": caption, "columns": columns, "rows": lines}}


def headline(rows: Sequence[dict[str, Any]], calls: dict[str, dict[str, Spread]]) -> dict[str, Any]:
    """The ratios that have targets: M = 2, B = 1, bfloat16, most threads."""
    most = max(row["threads"] for row in rows)
    found: dict[str, Any] = {"threads": most, "native": native.AVAILABLE}
    for row in rows:
        shape = (row["members"], row["batch"], row["dtype"], row["threads"])
        if shape != (2, 1, "bfloat16", most) or row["vocab_size"] != HEADLINE_VOCAB_SIZE:
            continue
        for name in (*TARGETS, *TOLD):
            if name in row:
                found[f"{name}_{row['situation']}"] = round(row[name].median, 2)
    for name, spread in calls[str(most)].items():
        found[f"{name}_call_us"] = round(spread.median * 1e6, 1)
    wrong = sum(WRONG in row["seconds"].values() for row in rows)
    return {**found, "wrong_rows": wrong, "targets": TARGETS | {"call_us": 30.0}}


PEERS = ("eager", "compiled", "flashinfer")


def _kinds(names: Sequence[str]) -> list[str]:
    return [name if kind == "ours" else f"{name} {kind}" for name in names for kind in OURS]


def device_table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """What is printed for backends of a CUDA device; %: of the copy's bandwidth."""
    columns = [*COLUMNS[:5], "L2", *(f"{name} µs" for name in (*_kinds(names), *PEERS))]
    columns += [*(f"{name} %" for name in names), "copy GB/s", "no graph"]
    lines = []
    for row in rows:
        keys = ("vocab_size", "members", "batch", "dtype", "situation", "cache")
        shares = [row.get(f"{name}_of_bandwidth") for name in names]
        lines.append(
            [
                *(row[key] for key in keys),
                *(time_of(row, name, 1) for name in (*_kinds(names), *PEERS)),
                *("-" if share is None else f"{share:.0%}" for share in shares),
                f"{row['bandwidth'] / 1e9:.0f}",
                " ".join(name for name, how in row["how"].items() if how != "graph") or "-",
            ]
        )
    reasons = {(name, how) for row in rows for name, how in row["how"].items() if how != "graph"}
    notes = [f"{name} is timed with what launching costs: {how}" for name, how in sorted(reasons)]
    return "\n".join([harness.table(columns, lines), *notes])


def device_headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians in µs: M = 2, B = 1, bfloat16, the headline's vocabulary."""
    found: dict[str, Any] = {}
    for row in rows:
        shape = (row["vocab_size"], row["members"], row["batch"], row["dtype"])
        if shape != (HEADLINE_VOCAB_SIZE, 2, 1, "bfloat16"):
            continue
        for name, value in row["seconds"].items():
            time = value if value == WRONG else round(value.median * 1e6, 1)
            name = name.replace(" ", "_")
            found[f"{name}_{row['situation']}_{row['cache']}_us"] = time
    return {**found, "wrong_rows": sum(WRONG in row["seconds"].values() for row in rows)}


def on_device(options: argparse.Namespace) -> int:
    """`main` for backends of a CUDA device."""
    rows: list[dict[str, Any]] = []
    copy = device.Copy.make()
    rounds, budget_s = (50, 1.0) if options.quick else (200, 10.0)
    for case in harness.in_time(options, cases(options)):
        compiled = is_compiled(case, max(options.threads), options)
        rows += measure_on_device(case, options.backend, copy, compiled, rounds, budget_s)
        print(*asdict(case).values(), "done", flush=True)
    print(device_table(options.backend, rows))
    return harness.finish("bench_verify_gpu", options, rows, {}, device_headline(rows))


def chosen(text: str) -> list[str]:
    """Backends, for argparse: `native`, or some of a CUDA device."""
    names = text.split(",")
    if names != ["native"] and not set(names) <= {"triton", "cuda"}:
        raise argparse.ArgumentTypeError(f"expected native, or triton and cuda, got {text}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = harness.arguments("verify against torch eager, torch.compile and the floor.")
    parser.add_argument("--vocab-sizes", type=harness.numbers, default=list(VOCAB_SIZES))
    parser.add_argument("--compiled", choices=("some", "all", "none"), default="some")
    parser.add_argument("--backend", type=chosen, default=["native"], help="e.g. triton,cuda")
    parser.add_argument("--tree", action="store_true", help="draft trees instead of chains")
    options = parser.parse_args(arguments)
    if options.tree:
        return verify_trees.run(options)
    if options.backend != ["native"]:
        if not torch.cuda.is_available():
            wanted = ", ".join(options.backend)
            line = f"bench_verify: --backend: expected a CUDA device for {wanted}, got none"
            print(line, file=sys.stderr)
            return 2
        return on_device(options)
    if not native.AVAILABLE:
        print(f"{native.REASON}: `ours` is the reference, and there is no floor")
    rounds, budget_s = (9, 1.5) if options.quick else (21, 20.0)
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    grid = list(itertools.product(cases(options), sorted(options.threads, reverse=True)))
    for case, threads in harness.in_time(options, grid):
        compiled = is_compiled(case, threads, options)
        rows.append(measure(case, threads, compiled, rounds, budget_s))
        print(" ".join(shown(rows[-1])[:6]), "done", flush=True)
    calls = {str(threads): overhead(threads, rounds) for threads in options.threads}
    torch.set_num_threads(before)
    print(harness.table(COLUMNS, [shown(row) for row in rows]))
    for threads, found in calls.items():
        for name, spread in found.items():
            print(f"call overhead at V = 32, {threads} threads: {name} {spread.text(1e6)} µs")
    extra = [{"overhead": calls}]
    return harness.finish(
        "bench_verify", options, rows + extra, readme_tables(rows, calls), headline(rows, calls)
    )


if __name__ == "__main__":
    raise SystemExit(main())
