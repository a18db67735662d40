# SPDX-License-Identifier: Apache-2.0
"""Every method on one pair of models: speed, acceptance, and how far from the target its text is.

Methods whose law is one target's, exactly or not, are compared with that target alone; methods
whose law is an ensemble's, with the plain ensemble. All write the same prompts with the same seeds,
others in each round, and take turns. `divergence` is the total variation between the law of a
drafted token's place and the law that was asked for, in [0, 1], computed in closed form from the
models' laws along text of the target's; it is 0 where a method is exact. A second table compares
ways of sampling a mixture. The plot shows speed against divergence. To add a method, add it to
`specens.methods`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from divergence import divergence
from torch import Tensor

from specens import (
    Alternating,
    Component,
    LookAhead,
    Plain,
    Schedule,
    Speculative,
    SpeculativeDecoder,
    family,
)
from specens.cli import loading
from specens.cli.output import progress
from specens.loop.statistics import Statistics
from specens.members.probe import member
from specens.methods import METHODS, Method, build
from specens.tuning.compare import Comparison, compare, sampling, workload
from specens_kernels import Refusal

_TARGET_ALONE = "target alone"
PARTS = ("all", "methods", "mixtures")
# Methods with something that is trained for the family alone: a head.
_FAMILY_ONLY = {"diversed"}


def main() -> int:
    """Measure, or say in one line what cannot be."""
    try:
        return measure(parsed())
    except Refusal as refusal:
        sys.stderr.write(f"bench_methods.py: error: {refusal}\n")
        return 2


def measure(options: argparse.Namespace) -> int:
    """Print the tables, draw the plot."""
    torch.set_num_threads(options.threads[0])
    names = [options.target, options.qualifier, options.draft, *options.members.split(",")]
    suffix = "" if options.name is None else f"_{options.name}"
    models, tokenizers = loading.load(names, loading.Loading(options.dtype))
    cast = Cast(models, tokenizers)
    prompts = [loading.encode(tokenizers[0], text) for text in family.PROMPTS]
    rows, mixtures, tables = [], [], {}
    how = f"{str(cast.target.dtype).removeprefix('torch.')}, {options.tokens} tokens for each of "
    how += f"{len(prompts)} prompts, threads: {options.threads[0]}"
    if options.part != "mixtures":
        rows = method_rows(cast, prompts, options)
        print(harness.table(COLUMNS, [cells(row) for row in rows]), end="\n\n", flush=True)
        tables[f"methods{suffix}"] = methods_table(rows, how, for_readme=options.name is None)
    if options.part != "methods":
        mixtures = mixture_rows(cast, prompts, options)
        print(harness.table(MIXTURE_COLUMNS, [mixture_cells(row) for row in mixtures]))
        tables[f"mixtures{suffix}"] = {
            "caption": f"schedules that sample one mixture, {how}",
            "columns": MIXTURE_COLUMNS,
            "rows": [mixture_cells(row) for row in mixtures],
        }
    for part in ("target", "qualifier", "draft", "members"):
        names = getattr(options, part).split(",")
        known = (name if is_shipped(name) else Path(name).name for name in names)
        setattr(options, part, ",".join(known))
    name = f"bench_methods{suffix}"
    status = harness.finish(name, options, [*rows, *mixtures], tables, headline(rows))
    # A plot that is drawn before would make the tree look changed.
    if options.save and rows:
        draw(rows, options.results / f"{name}.png")
    return status


def parsed() -> argparse.Namespace:
    """What was asked for, if it goes together."""
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--target", default="family:code", help="of methods with one target")
    parser.add_argument("--qualifier", default="family:code", help="between draft and target")
    parser.add_argument("--draft", default="family:draft")
    parser.add_argument("--members", default="family:code,family:prose", help="of an ensemble")
    parser.add_argument("--name", help="of other models: results are bench_methods_NAME")
    parser.add_argument("--dtype", choices=loading.DTYPES, default="auto", help="of the weights")
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="which table to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="written for each prompt")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.tokens = 1, 16
    names = [options.target, options.qualifier, options.draft, *options.members.split(",")]
    loading.check_names("model", names)
    if min(options.rounds, options.tokens, *options.threads) < 1:
        parser.error("--rounds, --tokens, --threads: expected counts >= 1, got one below")
    if options.name is None and not all(map(is_shipped, names)):
        parser.error("--name: expected one beside other models than the family's, got none")
    if options.save and options.name is None and options.part != PARTS[0]:
        parser.error("--part: expected all where the family's results are saved, got a part")
    return options


def methods_table(rows: Sequence[dict[str, Any]], how: str, *, for_readme: bool) -> dict[str, Any]:
    """Every method; what is known of it beside what was measured, where it is for the README."""
    table = {"caption": f"every method, sampled, {how}", "columns": COLUMNS}
    if not for_readme:
        return table | {"rows": [cells(row) for row in rows]}
    words = ("method", "law of the text", "needs", "use it for")
    listed = [described(row) for row in rows if row["method"] in METHODS]
    return table | {"columns": (*words, *COLUMNS[3:]), "rows": listed}


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many methods there are, and the fastest ones."""
    numbers: dict[str, Any] = {"methods": sum(row["method"] in METHODS for row in rows)}
    for kind, exact in (("fastest_exact", True), ("fastest_relaxed", False)):
        among = [row for row in rows if row["lossless"] == exact]
        numbers[kind] = max(among, key=lambda row: row["ratio"])["method"] if among else None
    return numbers


def is_shipped(model: str) -> bool:
    """Whether it is one of the family."""
    return model.startswith(loading.FAMILY_PREFIX)


class Cast:
    """The models by their parts: target, qualifier, draft and the ensemble's members."""

    def __init__(self, models: Sequence[Any], tokenizers: Sequence[Any]) -> None:
        """`models`: the target, the qualifier, the draft, then the members."""
        self.target, self.qualifier, self.draft, *self.members = models
        self.tokenizer = tokenizers[0]

    def models(self, method: Method) -> list[Any]:
        """The ensemble's models of a method."""
        return [self.target] if len(method.models) == 1 else list(self.members)

    def drafts(self, method: Method) -> list[Any]:
        """The drafts of a method, the smallest first."""
        return [self.draft, self.qualifier][: len(method.drafts)]

    def decoder(self, method: Method) -> SpeculativeDecoder:
        """What writes."""
        models, drafts = self.models(method), self.drafts(method)
        return build(method, models, drafts, [self.tokenizer] * (len(models) + len(drafts)))

    def alone(self) -> SpeculativeDecoder:
        """The target by itself."""
        return SpeculativeDecoder([self.target], schedule="plain", tokenizers=[self.tokenizer])


COLUMNS = (
    "method",
    "exact",
    "tok/s",
    "speed-up",
    "10-90 %",
    "acceptance",
    "calls/token",
    "divergence",
)


def method_rows(
    cast: Cast, prompts: Sequence[Tensor], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a method, each next to its baseline."""
    arguments = sampling(options.tokens)
    names = set(METHODS) if options.name is None else METHODS.keys() - _FAMILY_ONLY
    several = {name for name in names if len(METHODS[name].models) > 1}
    rows = []
    for group in (names - several, several):
        first = "plain" if "plain" in group else _TARGET_ALONE
        decoders = {first: cast.alone() if first == _TARGET_ALONE else cast.decoder(METHODS[first])}
        decoders |= {name: cast.decoder(METHODS[name]) for name in METHODS if name in group}
        for decoder in decoders.values():
            gate(decoder, prompts[0])
        works = {
            name: workload(decoder, prompts, **arguments) for name, decoder in decoders.items()
        }
        for comparison in measured(f"methods beside {first}", works, options.rounds):
            name = comparison.name
            method = METHODS.get(name)
            far = 0.0
            if method is not None and not method.lossless:
                far = divergence(
                    decoders[name],
                    cast.models(method),
                    cast.drafts(method),
                    prompts,
                    joins=method.joins,
                    tokens=8 if options.quick else 24,
                )
            exact = method is None or method.lossless
            row = {"method": name, "lossless": exact, "divergence": far, "baseline": first}
            rows.append(comparison.as_dict() | row)
    return rows


def measured(
    label: str, works: dict[str, Callable[[], Statistics]], rounds: int
) -> list[Comparison]:
    """The rows of contestants, with a bar for whoever waits."""
    with progress(label, len(works) * (rounds + 1)) as step:
        return compare(works, rounds, progress=step)


def gate(decoder: SpeculativeDecoder, prompt: Tensor) -> None:
    """The same seed writes the same text, and all of it."""
    texts = [
        decoder.generate(prompt, attention_mask=torch.ones_like(prompt), seed=1, **sampling(8))
        for _ in range(2)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape[1] == prompt.shape[1] + 8


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    rate = row["acceptance_rate"]
    return [
        row["method"],
        "yes" if row["lossless"] else "no",
        f"{row['tokens_per_second']:.0f}",
        f"{row['ratio']:.2f}x",
        f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
        "-" if rate is None else f"{rate:.2f}",
        f"{row['calls_per_token']:.2f}",
        f"{row['divergence']:.3f}",
    ]


def described(row: dict[str, Any]) -> list[str]:
    """A row with what there is to know of the method, for the README."""
    method = METHODS[row["method"]]
    about = (f"`{method.name}`", method.law, method.needs, method.use)
    return [*about, *cells(row)[3:]]


MIXTURE_COLUMNS = ("pair", "schedule", "tok/s", "speed-up", "10-90 %", "calls/token", "time/token")


def mixture_rows(
    cast: Cast, prompts: Sequence[Tensor], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Schedules for the same sampled mixture, for members of one cost and of different costs."""
    pairs = {"equal cost, ½ + ½": (cast.members[:2], (0.5, 0.5))}
    for share in (0.3, 0.5, 0.7):
        pairs[f"draft {share:g} + target {1 - share:.1f}"] = (
            [cast.draft, cast.target],
            (share, 1 - share),
        )
    rows = []
    for name, (models, weights) in pairs.items():
        schedules: dict[str, Schedule] = {
            "plain": Plain(),
            "component": Component(),
            "lookahead": LookAhead(),
        }
        for tokens in (1, 2, 4):
            schedules[f"speculative {tokens}"] = Speculative(tokens)
            schedules[f"alternating {tokens}"] = Alternating(tokens)
        works = {
            key: workload(
                SpeculativeDecoder(models, weights=weights, schedule=schedule),
                prompts,
                **sampling(options.tokens),
            )
            for key, schedule in schedules.items()
        }
        costs = forward_times(models)
        for comparison in measured(name, works, options.rounds):
            row = {"pair": name, "schedule": comparison.name, "forward_ms": costs}
            rows.append(comparison.as_dict() | row)
    return rows


def forward_times(models: Sequence[Any]) -> list[float]:
    """Median milliseconds of one token's forward of each model, interleaved."""
    members = [member(model) for model in models]
    for reader in members:
        reader.start(1, 256)
        reader.forward(torch.ones(1, 64, dtype=torch.int64), [64])
    token = torch.ones(1, 1, dtype=torch.int64)
    works = {
        str(i): harness.clock(lambda m=reader: (m.forward(token, [1]), m.rollback([64])))
        for i, reader in enumerate(members)
    }
    samples = harness.interleave(works, 9)
    return [round(1e3 * harness.Spread.of(times).median, 3) for times in samples.values()]


def mixture_cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    return [
        row["pair"],
        row["schedule"],
        f"{row['tokens_per_second']:.0f}",
        f"{row['ratio']:.2f}x",
        f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
        f"{row['calls_per_token']:.2f}",
        f"{1e3 / row['tokens_per_second']:.1f} ms",
    ]


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Speed against divergence, a point a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        colour = "tab:blue" if row["lossless"] else "tab:red"
        axes.scatter(row["divergence"], row["ratio"], color=colour, s=18)
        axes.annotate(
            row["method"],
            (row["divergence"], row["ratio"]),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=7,
        )
    axes.axhline(1, color="grey", linewidth=0.7)
    axes.set_xlabel("total variation to the law that was asked for, at drafted places")
    axes.set_ylabel("speed-up over plain decoding")
    figure.savefig(file, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
