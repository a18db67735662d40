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
from torch import Tensor

from specens import SpeculativeDecoder, family, terminal
from specens.benchmark import Row, compare, sampling, workload
from specens.members import member
from specens.methods import METHODS, Method, build
from specens.statistics import Statistics
from specens.weights import last_hidden
from specens_kernels import Acceptance
from specens_kernels.acceptance.rules import Situation

# Tokens of the draft's law that are looked at; the rest of its mass is treated as they are.
_CANDIDATES = 128
_TARGET_ALONE = "target alone"
PARTS = ("all", "methods", "mixtures")
# Methods with something that is trained for the family alone: a head.
_FAMILY_ONLY = {"diversed"}


def main() -> int:
    """Measure, print the tables, draw the plot."""
    parser = harness.arguments(__doc__.splitlines()[0])
    parser.add_argument("--target", default="family:code", help="of methods with one target")
    parser.add_argument("--qualifier", default="family:code", help="between draft and target")
    parser.add_argument("--draft", default="family:draft")
    parser.add_argument("--members", default="family:code,family:prose", help="of an ensemble")
    parser.add_argument("--name", help="of other models: results are bench_methods_NAME")
    parser.add_argument("--dtype", choices=terminal.DTYPES, default="auto", help="of the weights")
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="which table to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="written for each prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads[0])
    if options.quick:
        options.rounds, options.tokens = 1, 16
    names = [options.target, options.qualifier, options.draft, *options.members.split(",")]
    if options.name is None and not all(map(is_shipped, names)):
        parser.error("--name: expected one beside other models than the family's, got none")
    if options.save and options.name is None and options.part != PARTS[0]:
        parser.error("--part: expected all where the family's results are saved, got a part")
    suffix = "" if options.name is None else f"_{options.name}"
    models, tokenizers = terminal.load("bench_methods", names, dtype=options.dtype)
    cast = Cast(models, tokenizers)
    prompts = [terminal.encode("bench_methods", tokenizers[0], one) for one in family.PROMPTS]
    rows, mixtures, tables = [], [], {}
    how = f"{str(cast.target.dtype).removeprefix('torch.')}, {options.tokens} tokens for each of "
    how += f"{len(prompts)} prompts, threads: {options.threads[0]}"
    if options.part != "mixtures":
        rows = method_rows(cast, prompts, options)
        print(harness.table(COLUMNS, [cells(row) for row in rows]), end="\n\n", flush=True)
        tables[f"methods{suffix}"] = {
            "caption": f"every method, sampled, {how}",
            "columns": COLUMNS,
            "rows": [cells(row) for row in rows],
        }
        if options.name is None:  # for the README
            words = ("method", "law of the text", "needs", "use it for")
            tables["methods"] |= {
                "columns": (*words, *COLUMNS[3:]),
                "rows": [described(row) for row in rows if row["method"] in METHODS],
            }
    if options.part != "methods":
        mixtures = mixture_rows(cast, prompts, options)
        print(harness.table(MIXTURE_COLUMNS, [mixture_cells(row) for row in mixtures]))
        tables[f"mixtures{suffix}"] = {
            "caption": f"schedules that sample one mixture, {how}",
            "columns": MIXTURE_COLUMNS,
            "rows": [mixture_cells(row) for row in mixtures],
        }
    headline = {"methods": sum(row["method"] in METHODS for row in rows)}
    for kind, exact in (("fastest_exact", True), ("fastest_relaxed", False)):
        among = [row for row in rows if row["lossless"] == exact]
        headline[kind] = max(among, key=lambda row: row["ratio"])["method"] if among else None
    for part in ("target", "qualifier", "draft", "members"):
        asked = getattr(options, part).split(",")
        setattr(
            options, part, ",".join(one if is_shipped(one) else Path(one).name for one in asked)
        )
    name = f"bench_methods{suffix}"
    status = harness.finish(name, options, [*rows, *mixtures], tables, headline)
    # A plot that is drawn before would make the tree look changed.
    if options.save and rows:
        draw(rows, harness.RESULTS / f"{name}.png")
    return status


def is_shipped(model: str) -> bool:
    """Whether it is one of the family."""
    return model.startswith(terminal.FAMILY_PREFIX)


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


# --- methods --------------------------------------------------------------------------------------

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
        works = {name: workload(one, prompts, **arguments) for name, one in decoders.items()}
        for found in measured(f"methods beside {first}", works, options.rounds):
            method = METHODS.get(found.name)
            far = 0.0
            if method is not None and not method.lossless:
                far = divergence(cast, method, decoders[found.name], prompts, options.quick)
            exact = method is None or method.lossless
            row = found.as_dict() | {"method": found.name, "lossless": exact, "divergence": far}
            rows.append(row | {"baseline": first})
    return rows


def measured(label: str, works: dict[str, Callable[[], Statistics]], rounds: int) -> list[Row]:
    """The rows of contestants, with a bar for whoever waits."""
    with terminal.progress(label, len(works) * (rounds + 1)) as step:
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


# --- divergence -----------------------------------------------------------------------------------


def divergence(
    cast: Cast,
    method: Method,
    decoder: SpeculativeDecoder,
    prompts: Sequence[Tensor],
    quick: bool,
) -> float:
    """Mean total variation between what a drafted place emits and the law that was asked for."""
    distances = []
    models, drafts = cast.models(method), cast.drafts(method)
    plain = SpeculativeDecoder(models, schedule="plain")
    for i, prompt in enumerate(prompts):
        settings = sampling(8 if quick else 24)
        text = plain.generate(prompt, attention_mask=torch.ones_like(prompt), seed=i, **settings)
        at = slice(prompt.shape[1] - 1, -1)
        target = torch.stack([law(model, text)[at] for model in models]).mean(0)
        memory = torch.zeros((), dtype=torch.float64)  # of rules that remember: as at the start
        if method.joins:
            draft = law(drafts[0], text)[at]
            weight = draft_weights(decoder, drafts[0], models[0], text)[at, None]
            distances += list(weight[:, 0] * (target - draft).abs().sum(-1) / 2)
            continue
        levels = [law(model, text)[at] for model in drafts] + [target]
        for row in zip(*levels, strict=True):
            emitted = row[0]
            for rule, q, p in zip(decoder.acceptances, row, row[1:], strict=False):
                emitted = emitted_law(rule, p, q, emitted, memory)
            distances.append((emitted - row[-1]).abs().sum() / 2)
    return float(torch.stack(distances).mean())


def law(model: Any, text: Tensor) -> Tensor:
    """(S, V) float64: the model's laws along (1, S) text."""
    with torch.no_grad():
        return model(text).logits[0].double().softmax(-1)


def draft_weights(decoder: SpeculativeDecoder, draft: Any, target: Any, text: Tensor) -> Tensor:
    """(S,): the draft's share of the mixture along the text."""
    if decoder.head is None:
        return torch.full((text.shape[1],), decoder.weights[0], dtype=torch.float64)
    hidden = []
    for model in (draft, target):
        with torch.no_grad(), last_hidden(model) as collected:
            model(text)
        hidden.append(collected[-1])
    return decoder.head.draft_weight(*hidden)[0].double()


def emitted_law(
    acceptance: Acceptance, target: Tensor, draft: Tensor, drawn: Tensor, memory: Tensor
) -> Tensor:
    """(V,): the law of what a rule emits for tokens that were `drawn` and pass for the draft's."""
    if acceptance.rule.lossless and drawn is draft:
        return target
    tokens = drawn.topk(min(_CANDIDATES, len(drawn))).indices
    shape = (len(tokens), len(target))
    at = Situation(target.expand(shape), draft.expand(shape), tokens, memory.expand(len(tokens)))
    judgement = acceptance.rule.judge(at, *acceptance.parameters)
    kept = judgement.kept.gather(-1, tokens[:, None])[:, 0]
    kept = (kept / draft[tokens]).clamp(max=1).nan_to_num(0.0)
    left = judgement.left / judgement.left.sum(-1, keepdim=True)
    left = torch.where(left.isfinite(), left, target)
    share = drawn[tokens] / drawn[tokens].sum()
    emitted = ((share * (1 - kept))[:, None] * left).sum(0)
    return emitted.scatter_add(0, tokens, share * kept)


# --- ways of sampling a mixture -------------------------------------------------------------------

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
        schedules: dict[str, dict[str, Any]] = {
            "plain": {"schedule": "plain"},
            "component": {"schedule": "component"},
            "lookahead": {"schedule": "lookahead"},
        }
        for gamma in (1, 2, 4):
            given = {"num_speculative_tokens": gamma}
            schedules[f"speculative {gamma}"] = {"schedule": "speculative", **given}
            schedules[f"alternating {gamma}"] = {"schedule": "alternating", **given}
        works = {
            key: workload(
                SpeculativeDecoder(models, weights=weights, **one),
                prompts,
                **sampling(options.tokens),
            )
            for key, one in schedules.items()
        }
        costs = forward_times(models)
        for found in measured(name, works, options.rounds):
            row = found.as_dict() | {"pair": name, "schedule": found.name, "forward_ms": costs}
            rows.append(row)
    return rows


def forward_times(models: Sequence[Any]) -> list[float]:
    """Median milliseconds of one token's forward of each model, interleaved."""
    members = [member(model) for model in models]
    for one in members:
        one.start(1, 256)
        one.forward(torch.ones(1, 64, dtype=torch.int64), [64])
    token = torch.ones(1, 1, dtype=torch.int64)
    works = {
        str(i): harness.clock(lambda one=one: (one.forward(token, [1]), one.rollback([64])))
        for i, one in enumerate(members)
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


# --- the plot -------------------------------------------------------------------------------------


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
