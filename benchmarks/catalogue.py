# SPDX-License-Identifier: Apache-2.0
"""What pages take from the registries: methods, rules, schedules, public names.

A place of a page calls one of these functions (report.py), so that no page tells otherwise than the
code. To show another registry, add its function to `LISTED`, or to `MEASURED` if it is shown
beside results.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from statements import Results, markdown, source

import specens
import specens_kernels
from specens.loop.named import Named
from specens.methods import METHODS, Method
from specens.schedules import SCHEDULES, STOPS
from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")
# Numbers of tokens are not bounded by anything else.
LARGEST = 2**31 - 1


def linked(text: str) -> str:
    """The text with its papers linked."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _rules_of(method: Method) -> str:
    names = dict.fromkeys(rule.partition(":")[0] for rule in method.acceptance)
    return ", ".join(f"[`{name}`](rules.md#{name})" for name in names)


def methods(exact: bool) -> str:
    """What each method is: the exact ones, or the others."""
    rows = [
        (
            f"`{method.name}`",
            method.use,
            method.needs,
            method.law,
            f"`{method.schedule}`",
            _rules_of(method),
            linked(method.source),
        )
        for method in METHODS.values()
        if method.lossless == exact
    ]
    columns = ("method", "use it for", "needs", "law of the text", "schedule", "rule", "source")
    if exact:  # their law is the one that was asked for
        columns = columns[:3] + columns[4:]
        rows = [row[:3] + row[4:] for row in rows]
    return f"{markdown(columns, rows, words=True)}\n"


def measured_methods(results: Results) -> str:
    """How fast each method was, on every pair that was measured."""
    files = [file for file in results if re.fullmatch(r"bench_methods(_[a-z0-9]+)?\.json", file)]
    of_file = {
        file: {row["method"]: row for row in results[file]["rows"] if "method" in row}
        for file in files
        if any(key.startswith("methods") for key in results[file]["tables"])
    }
    parts = []
    for file, by_method in of_file.items():
        name = file.removeprefix("bench_methods").removesuffix(".json").strip("_")
        options, tables = results[file]["options"], results[file]["tables"]
        rows = [_measured(method, by_method.get(method)) for method in METHODS]
        columns = ("method", "speed-up", "10-90 %", "acceptance", "calls/token", "divergence")
        captions = [each["caption"] for key, each in tables.items() if key.startswith("methods")]
        heading = (
            f"**{name or 'shipped'}**, target `{options['target']}`, draft `{options['draft']}`: "
            f"{captions[0]}:"
        )
        parts.append(f"{heading}\n\n{markdown(columns, rows)}\n\n{source(results[file], file)}\n")
    return "\n".join(parts)


def _measured(name: str, row: Mapping[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return (f"`{name}`", *["-"] * 5)
    rate = row["acceptance_rate"]
    return (
        f"`{name}`",
        f"{row['ratio']:.2f}x",
        f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
        "-" if rate is None else f"{rate:.2f}",
        f"{row['calls_per_token']:.2f}",
        f"{row['divergence']:.3f}",
    )


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return "2³¹ - 1" if value == LARGEST else f"{value:g}"


def rule(name: str) -> str:
    """What the registry says of a rule: its law, its parameters, where it comes from."""
    entry = ACCEPTANCE_RULES[name]
    law = "the target's, whatever the draft" if entry.lossless else entry.law
    lines = [f"* law: {law}".replace("||", r"\|\|")]
    for each in entry.parameters:
        low = f"{'(' if each.open_low else '['}{_number(each.low)}"
        high = f"{_number(each.high)}{')' if math.isinf(each.high) else ']'}"
        lines.append(f"* `{each.name}`: {low}, {high}, default {_number(each.default)}")
    users = [f"`{m.name}`" for m in METHODS.values() if name in _names(m)]
    if users:
        lines.append(f"* methods: {', '.join(users)}")
    return "\n".join([*lines, f"* source: {linked(entry.source)}"]) + "\n"


def _names(method: Method) -> list[str]:
    return [each.partition(":")[0] for each in method.acceptance]


def schedules() -> str:
    """Every schedule, and the models outside the ensemble that it takes."""
    rows = [
        (f"`{name}`", schedule.summary, schedule.drafts_in_words.strip(",").replace("None", "-"))
        for name, schedule in SCHEDULES.items()
    ]
    return f"{markdown(('schedule', 'what it does', 'models besides'), rows, words=True)}\n"


def arguments(known: Mapping[str, type[Named]]) -> str:
    """The arguments of schedules or stops, as they are written in Python and in a shell."""
    rows = [
        (
            f"`{name}`",
            f"`{field.name}`",
            field.metadata["kind"].range,
            f"`{field.default}`",
            field.metadata["description"],
        )
        for name, each in known.items()
        for field in dataclasses.fields(each)
    ]
    return f"{markdown(('of', 'argument', 'range', 'default', 'meaning'), rows, words=True)}\n"


def stops() -> str:
    """When a proposer ends before its number of tokens."""
    rows = [(f"`{name}`", stop.summary) for name, stop in STOPS.items()]
    return f"{markdown(('stop', 'it ends where'), rows, words=True)}\n"


def ensembles() -> str:
    """The ensembles that every backend computes."""
    sums = {"probabilities": "weighted sum of probabilities", "logits": "softmax of a weighted sum"}
    rows = [(f"`{e.name}`", sums[e.space], linked(e.source)) for e in ENSEMBLES.values()]
    return f"{markdown(('ensemble', 'law', 'source'), rows, words=True)}\n"


def public(package: ModuleType) -> str:
    """A page of the public names, each with its docstring, by the module that they live in."""
    sections = []
    for home, names in package._HOMES.items():
        entries = "\n".join(f"::: {package.__name__}.{name}\n" for name in names)
        sections.append(f"## {package.__name__}.{home}\n\n{entries}")
    return "\n" + "\n".join(sections) + "\n"


LISTED: Mapping[str, Callable[[], str]] = {
    "exact_methods": partial(methods, exact=True),
    "lossy_methods": partial(methods, exact=False),
    **{f"rule.{name}": partial(rule, name) for name in ACCEPTANCE_RULES},
    "schedules": schedules,
    "schedule_arguments": partial(arguments, SCHEDULES),
    "stops": stops,
    "stop_arguments": partial(arguments, STOPS),
    "ensembles": ensembles,
    "api.specens": partial(public, specens),
    "api.specens_kernels": partial(public, specens_kernels),
}
MEASURED: Mapping[str, Callable[[Results], str]] = {"measured_methods": measured_methods}
