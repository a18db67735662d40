# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of every schedule, on real text, beside transformers.

A round is one prompt: every contestant continues it, with the same seed and as many tokens (no
token ends the text), and the ratio to the plain ensemble is taken prompt by prompt. Times are of
the whole call, prefill included; `decode` ratios leave it out. Weights are float32. Greedy text
must be the plain ensemble's, or the row is WRONG. Numbers in brackets are tokens per proposal.

Rows marked as peers do another job. Transformers with an `assistant_model` writes the text of one
member, so its counterpart is ours with one member. The law of transformers'
`assistant_ensemble_weight` is not the mixture: tokens that were not drafted come from one model
alone, and its greedy text depends on the number of drafts.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
from harness import WRONG, Spread
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import specens
from specens import (
    Alternating,
    Component,
    Plain,
    Schedule,
    Speculative,
    SpeculativeDecoder,
    Statistics,
)
from specens_kernels import native

SHIPPED = Path(specens.__file__).parent / "family"
# name -> folders of the members, folder of the separate draft; the first is the members' [0]
FAMILIES = {
    "shipped": (("code", "prose"), "draft"),
    "smollm2": (("smollm2-135m", "smollm2-135m-drop13-14"), "smollm2-draft-h192-2L"),
    "smollm2-close": (("smollm2-135m", "smollm2-135m-drop17"), "smollm2-draft-h192-2L"),
    "smollm2-three": (
        ("smollm2-135m", "smollm2-135m-drop13-14", "smollm2-135m-drop17"),
        "smollm2-draft-h192-2L",
    ),
}
PROMPTS = {
    "code": [
        'def read_lines(path):\n    """Return the lines of a text file, without line ends."""\n',
        "import os\nimport sys\n\n\nclass Cache:\n    def __init__(self, size):\n",
        "def is_prime(n: int) -> bool:\n",
        "for name, value in sorted(self.items()):\n",
    ],
    "prose": [
        "In the beginning",
        "It was a truth that every one in the village knew:",
        "The old man went down to the river, and",
        "She had not been long in the house before",
    ],
}
DATA = {
    "humaneval": ("humaneval.jsonl", lambda entry: entry["prompt"]),
    "gsm8k": ("gsm8k_test.jsonl", lambda entry: f"Question: {entry['question']}\nAnswer:"),
}
# Ours -> transformers' row that does the same job.
COUNTERPARTS = {
    "plain, 1 member": "transformers, 1 member",
    "speculative with draft, 1 member [4]": "transformers assistant_model, 1 member [4]",
}


@dataclass(frozen=True)
class Family:
    """Models with one tokenizer."""

    name: str
    members: list[Any]
    draft: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str, folder: Path) -> "Family":
        """Weights in float32; generation defaults are plain and no token ends the text."""
        members, draft = FAMILIES[name]
        has_draft = (folder / draft).is_dir()
        return cls(
            name,
            [_load(folder / member) for member in members],
            _load(folder / draft) if has_draft else None,
            AutoTokenizer.from_pretrained(folder / members[0]),
        )


def _load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(
        pad_token_id=0,
        # As an assistant: as many drafts as it is told, whatever it thinks of them.
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    return model


@dataclass
class Contestant:
    """One way to continue a prompt.

    generate: (ids, options, seed) -> sequences.
    reference: name of the contestant whose greedy text this one's must equal; None if no other's.
    decoder: ours, for its statistics.
    modes: in which it can run.
    """

    generate: Callable[[Tensor, dict[str, Any], int], Tensor]
    reference: str | None
    decoder: SpeculativeDecoder | None = None
    modes: tuple[str, ...] = ("greedy", "sampled")
    peer: bool = False
    seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)
    statistics: list[Statistics] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was measured."""
        for measured in (self.seconds, self.decode_seconds, self.texts, self.statistics):
            measured.clear()

    def run(self, ids: Tensor, options: dict[str, Any], seed: int) -> float:
        """Continue one prompt; seconds per new token."""
        began = time.perf_counter()
        text = self.generate(ids, options, seed)
        seconds = time.perf_counter() - began
        count = text.shape[1] - ids.shape[1]
        self.texts.append(text)
        self.seconds.append(seconds / count)
        if self.decoder is not None:
            statistics = self.decoder.statistics
            assert statistics is not None
            self.statistics.append(statistics)
            self.decode_seconds.append(statistics.decode_seconds / count)
        return self.seconds[-1]


def ours(members: list[Any], schedule: Schedule, **arguments: Any) -> Contestant:
    """One of our schedules; `modes` and `peer` as for `Contestant`."""
    modes = ("sampled",) if schedule.sampled_mixture else ("greedy", "sampled")
    single = len(members) == 1
    decoder = SpeculativeDecoder(members, schedule=schedule, **arguments)
    return Contestant(
        lambda ids, options, seed: decoder.generate(ids, seed=seed, **options),
        None if schedule.sampled_mixture else ("plain, 1 member" if single else "plain"),
        decoder,
        modes,
        peer=single,
    )


def theirs(model: Any, assistant: Any = None, gamma: int = 0, **extra: Any) -> Contestant:
    """Transformers' own loop with one model, or with an assistant that drafts `gamma` tokens."""

    def generate(ids: Tensor, options: dict[str, Any], seed: int) -> Tensor:
        torch.manual_seed(seed)
        if assistant is None:
            return model.generate(ids, **options)
        assistant.generation_config.num_assistant_tokens = gamma
        return model.generate(ids, assistant_model=assistant, **options, **extra)

    reference = None if "assistant_ensemble_weight" in extra else "plain, 1 member"
    return Contestant(generate, reference, peer=True)


def contestants(family: Family, quick: bool) -> dict[str, Contestant]:
    """Every schedule over the draft lengths that make sense for it, and the peers."""
    members, draft = family.members, family.draft
    others = [1] * (len(members) - 1)
    listed = {"plain": ours(members, Plain()), "component": ours(members, Component())}
    for gamma in (2,) if quick else (1, 2, 4):
        listed[f"speculative [{gamma}]"] = ours(members, Speculative(gamma))
    for gamma in () if draft is None else (4,) if quick else (2, 4, 6):
        listed[f"speculative with draft [{gamma}]"] = ours(members, Speculative(gamma), draft=draft)
    for gamma in (1, 4) if quick else range(1, 7):
        name = f"alternating [{','.join(map(str, (gamma, *others)))}]"
        listed[name] = ours(members, Alternating((gamma, *others)))
    listed["plain, 1 member"] = ours(members[:1], Plain())
    listed["transformers, 1 member"] = theirs(members[0])
    if draft is not None:
        listed["speculative with draft, 1 member [4]"] = ours(
            members[:1], Speculative(4), draft=draft
        )
        listed["transformers assistant_model, 1 member [4]"] = theirs(members[0], draft, 4)
    if len(members) == 2:
        for gamma in (2,) if quick else (1, 2, 4):
            listed[f"transformers assistant_ensemble_weight [{gamma}]"] = theirs(
                members[0], members[1], gamma, assistant_ensemble_weight=0.5
            )
    return listed


def prompts(data: Path | None, count: int) -> Iterator[tuple[str, list[str]]]:
    """(name, first prompts) of each data set that is there; else of those in this file."""
    there = False
    for name, (file, text) in DATA.items():
        if data is not None and (data / file).is_file():
            there = True
            with (data / file).open() as lines:
                yield name, [text(json.loads(line)) for line in itertools.islice(lines, count)]
    if not there:
        for name, texts in PROMPTS.items():
            yield name, texts[:count]


def gate(contestants: dict[str, Contestant], ids: Tensor, new_tokens: int) -> list[str]:
    """Names whose greedy text is not their reference's. This warms everything up."""
    greedy = {"max_new_tokens": new_tokens, "do_sample": False}
    sampled = {"max_new_tokens": new_tokens, "do_sample": True, "top_k": 0}
    texts = {
        name: contestant.generate(ids, greedy if "greedy" in contestant.modes else sampled, 0)
        for name, contestant in contestants.items()
    }
    return [
        name
        for name, contestant in contestants.items()
        if contestant.reference is not None
        and not torch.equal(texts[name], texts[contestant.reference])
    ]


def measure(
    family: Family, data: str, texts: list[str], threads: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of the result: greedy and sampled, each contestant."""
    torch.set_num_threads(threads)
    ids = [family.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    every = contestants(family, options.quick)
    wrong = gate(every, ids[0], min(options.new_tokens, 24))
    rows = []
    for mode in ("greedy", "sampled"):
        asked = {"max_new_tokens": options.new_tokens, "do_sample": mode == "sampled"}
        if mode == "sampled":
            asked |= {"temperature": 1.0, "top_k": 0}
        right = {name: c for name, c in every.items() if mode in c.modes and name not in wrong}
        for contestant in right.values():
            contestant.clear()
        runs = {
            name: (lambda number, c=contestant, asked=asked: c.run(ids[number], asked, number))
            for name, contestant in right.items()
        }
        harness.interleave(runs, len(ids), options.budget_s)
        cell = {"family": family.name, "data": data, "mode": mode, "threads": threads}
        cell["members"] = len(family.members)
        rows += [cell | row(name, mode, right) for name in right]
        rows += [
            cell | {"schedule": name, "tokens_per_second": WRONG, "peer": every[name].peer}
            for name in wrong
            if mode in every[name].modes
        ]
    return rows


def row(name: str, mode: str, contestants: dict[str, Contestant]) -> dict[str, Any]:
    """What is reported of one contestant in one cell."""
    contestant, plain = contestants[name], contestants.get("plain")
    result: dict[str, Any] = {"schedule": name, "peer": contestant.peer}
    result["tokens_per_second"] = Spread.of([1 / seconds for seconds in contestant.seconds])
    other = contestants.get(COUNTERPARTS.get(name, ""))
    if other is not None:
        result["over_counterpart"] = Spread.of(harness.ratios(other.seconds, contestant.seconds))
    if plain is not None:
        result["ratio"] = Spread.of(harness.ratios(plain.seconds, contestant.seconds))
        if contestant.decode_seconds:
            paired = harness.ratios(plain.decode_seconds, contestant.decode_seconds)
            result["decode_ratio"] = Spread.of(paired)
    if contestant.statistics:
        tested = sum(sum(s.tested) for s in contestant.statistics)
        tokens = sum(s.num_tokens for s in contestant.statistics)
        if tested:
            result["acceptance"] = sum(sum(s.accepted) for s in contestant.statistics) / tested
        result["calls_per_token"] = sum(sum(s.calls) for s in contestant.statistics) / tokens
    reference = contestants.get(contestant.reference or "plain")
    if mode == "greedy" and reference is not None:
        same = [torch.equal(a, b) for a, b in zip(contestant.texts, reference.texts, strict=True)]
        result["same_text"] = f"{sum(same)}/{len(same)}"
    return result


def cells_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what they are compared within."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for entry in rows:
        name = " ".join(str(entry[key]) for key in ("family", "data", "mode"))
        cells.setdefault(f"{name} {entry['threads']}t", []).append(entry)
    return cells


def alternating(cell: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ratio to plain of each alternating row of a cell; 0 where it is wrong."""
    return {
        entry["schedule"]: entry["ratio"].median if "ratio" in entry else 0.0
        for entry in cell
        if entry["schedule"].startswith("alternating")
    }


def misses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every alternating row that is slower than plain decoding, in words."""
    return [
        f"{cell}: {name} {ratio:.2f}x"
        for cell, entries in cells_of(rows).items()
        for name, ratio in alternating(entries).items()
        if ratio < 1
    ]


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per cell the best alternating ratio; how many cells and rows fall short of plain."""
    best = {}
    for cell, entries in cells_of(rows).items():
        ratios = alternating(entries)
        fastest = max(ratios, key=lambda name: ratios[name])
        best[cell] = {fastest: round(ratios[fastest], 2)}
    slow = [cell for cell, ratios in best.items() if max(ratios.values()) < 1]
    counterparts = {
        f"{cell}: {entry['schedule']}": round(entry["over_counterpart"].median, 2)
        for cell, entries in cells_of(rows).items()
        for entry in entries
        if "over_counterpart" in entry
    }
    return {
        "native": native.AVAILABLE,
        "over_transformers": counterparts,
        "best_alternating_over_plain": best,
        "cells_where_best_alternating_is_slower": slow,
        "alternating_rows_slower_than_plain": len(misses(rows)),
        "wrong_rows": sum(entry["tokens_per_second"] == WRONG for entry in rows),
    }


COLUMNS = (
    *("family", "data", "mode", "threads", "schedule", "tokens/s", "x plain", "x plain decode"),
    *("acceptance", "calls/token", "same text"),
)


def shown(entry: dict[str, Any]) -> list[str]:
    """The row as it is printed: median (10 %-90 %, minimum)."""

    def spread(name: str, digits: int) -> str:
        value = entry.get(name, "-")
        return value.text(1, digits) if isinstance(value, Spread) else value

    def number(name: str) -> str:
        return f"{entry[name]:.2f}" if name in entry else "-"

    return [
        *(str(entry[key]) for key in ("family", "data", "mode", "threads", "schedule")),
        *(spread("tokens_per_second", 1), spread("ratio", 2), spread("decode_ratio", 2)),
        *(number("acceptance"), number("calls_per_token"), entry.get("same_text", "-")),
    ]


def readme_tables(rows: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """What the pages show of a family: per data set and mode, the best of each schedule."""
    most = max(entry["threads"] for entry in rows)
    columns = ["models", "prompts", "mode", "plain tok/s", "component", "speculative"]
    columns += ["speculative with draft", "alternating", "acceptance", "calls per token"]
    lines = []
    for entries in cells_of(rows).values():
        own = [e for e in entries if e["threads"] == most and not e["peer"] and "ratio" in e]
        if not own:
            continue

        def best(prefix: str, own: list[dict[str, Any]] = own) -> dict[str, Any] | None:
            fits = [e for e in own if e["schedule"].split(" [")[0] == prefix]
            return max(fits, key=lambda e: e["ratio"].median) if fits else None

        plain, chosen = best("plain"), best("alternating")
        cells = [own[0][key] for key in ("family", "data", "mode")]
        cells.append(f"{plain['tokens_per_second'].median:.0f}" if plain else "-")
        for prefix in ("component", "speculative", "speculative with draft", "alternating"):
            fastest = best(prefix)
            drafts = "" if fastest is None else "".join(fastest["schedule"].partition(" [")[1:])
            cells.append("-" if fastest is None else f"{fastest['ratio'].median:.2f}x{drafts}")
        for key in ("acceptance", "calls_per_token"):
            cells.append(f"{chosen[key]:.2f}" if chosen and key in chosen else "-")
        lines.append(cells)
    caption = (
        "speed relative to the plain ensemble, each schedule at its best number of drafts [in "
        f"brackets]; float32, 1 sequence, threads: {most}; acceptance and calls of `alternating`"
    )
    return {title: {"caption": caption, "columns": columns, "rows": lines}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = harness.arguments("Tokens per second of every schedule, against transformers.")
    parser.set_defaults(threads=[2])
    parser.add_argument("--families", default="", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--models", type=Path, help="folder of the SmolLM2 models")
    data = os.environ.get("SPECENS_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None)
    parser.add_argument("--prompts", type=int, default=8, help="of each data set")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="a cell, at most")
    options = parser.parse_args(arguments)
    sets = dict(prompts(options.data, options.prompts))
    names = options.families.split(",") if options.families else ["shipped"]
    if not options.families and options.models is not None and not options.quick:
        names.append("smollm2")
    if options.quick:
        options.new_tokens = min(options.new_tokens, 24)
        sets = {name: texts[:3] for name, texts in sets.items()}
        cells = 2 * len(options.threads) * len(names) * len(sets)
        options.budget_s = min(options.budget_s, 30.0 / cells)
    if not native.AVAILABLE:
        print(f"{native.REASON}: `verify` and `sample` are the reference, which is slow")
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for name in names:
        folder = SHIPPED if name == "shipped" else options.models
        if folder is None or not all((folder / m).is_dir() for m in FAMILIES[name][0]):
            parser.error(f"{name}: its models are not in --models")
        family = Family.load(name, folder)
        grid = list(itertools.product(sets.items(), options.threads))
        for (title, texts), threads in harness.in_time(options, grid):
            rows += measure(family, title, texts, threads, options)
            print(f"{name} {title} {threads} threads done", flush=True)
    torch.set_num_threads(before)
    print(harness.table(COLUMNS, [shown(entry) for entry in rows]))
    print("transformers assistant_ensemble_weight does not sample from the mixture: peer only")
    for line in misses(rows) or ["no cell"]:
        print(f"alternating slower than plain: {line}")
    for name in names:
        own = [entry for entry in rows if entry["family"] == name]
        title = "generate" if name == "shipped" else f"generate_{name}"
        harness.finish(f"bench_{title}", options, own, readme_tables(own, title), headline(own))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
