# SPDX-License-Identifier: Apache-2.0
"""What do `specens train diversed` and `specens train draft` reach on the shipped family?

Each runs once, as a user would run it, with no option but its folder; the draft again by AdaSPEC's
selection of tokens, the draft just distilled being the reference, and by online updates. What was
measured on held-out text is saved with where it ran, beside the curves of the runs without options:
results/train_diversed.* and train_draft.*.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

QUICK = {
    "diversed": ("--steps=2", "--evaluation-samples=1", "--new-tokens=4", "--prompts=2"),
    "draft": ("--steps=2",),
}


# Ways to train a draft: what they are called, and their options; {first} is the first one's folder.
DRAFTS = {
    "draft": (),
    "select": ("--select=0.4", "--reference={first}"),
    "online": ("--online",),
}


def train(command: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run one command; what it found."""
    words = [sys.executable, "-m", "specens.cli", "train", command, "--out", str(folder)]
    subprocess.run([*words, *options], check=True)
    return read_result(folder)


def read_result(folder: Path) -> dict[str, Any]:
    """What was measured there, without this machine's folders."""
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    result["models"] = [Path(model).name for model in result["models"]]
    return result


def shown(measure: Mapping[str, float]) -> str:
    """Mean and standard error."""
    return f"{measure['mean']:.3f} ± {measure['standard_error']:.3f}"


def head_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Static weights and the learned one, for the README."""
    columns = ("acceptance", "target_log_likelihood", "closeness_to_target")
    columns = (*columns, "text_acceptance", "text_log_likelihood")
    rows = [
        [name, *(shown(measures[column]) for column in columns)]
        for name, measures in result["candidates"].items()
    ]
    names = [column.replace("_", " ") for column in columns]
    return {
        "caption": "means ± standard errors on held-out modules of the standard library",
        "columns": ["draft weight", *names],
        "rows": rows,
    }


def draft_table(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Acceptance before and after, for the README."""
    rows = [
        [
            " ".join(("specens train draft", *DRAFTS[name])).format(first="FIRST"),
            shown(result["acceptance_before"]),
            shown(result["acceptance_after"]),
            f"{result['last_steps']['trained_tokens']:.0f}",
            f"{result['training_cpu_seconds']:.0f}",
        ]
        for name, result in results.items()
    ]
    return {
        "caption": "acceptance of drafts by the target on held-out modules, mean ± standard error",
        "columns": ["", "before", "after", "tokens a step", "CPU s"],
        "rows": rows,
    }


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers to quote."""
    times = ("training_seconds", "training_cpu_seconds")
    numbers: dict[str, Any] = {name: round(result[name], 1) for name in times}
    for quality, gain in result.get("above_front", {}).items():
        numbers[f"{quality}_above_front"] = round(gain["gain"], 4)
        numbers[f"{quality}_above_front_standard_error"] = round(gain["standard_error"], 4)
    for when in ("acceptance_before", "acceptance_after"):
        if when in result:
            numbers[when] = round(result[when]["mean"], 4)
    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both commands, or the one that is asked for."""
    parser = harness.arguments("Train the shipped family's head and draft.")
    parser.add_argument("--command", choices=("diversed", "draft", "both"), default="both")
    parser.set_defaults(threads=[1])
    options = parser.parse_args(arguments)
    commands = ("diversed", "draft") if options.command == "both" else (options.command,)
    for command in commands:
        given = (f"--threads={options.threads[0]}", *(QUICK[command] if options.quick else ()))
        with tempfile.TemporaryDirectory() as name:
            first = Path(name, command)
            results = {command: train(command, first, given)}
            for variant in () if command == "diversed" else [*DRAFTS][1:]:
                asked = [option.format(first=first) for option in DRAFTS[variant]]
                results[variant] = train(command, Path(name, variant), (*given, *asked))
            finish(command, options, results)
            for suffix in ("csv", "png"):
                curves = first / f"curves.{suffix}"
                if options.save and curves.exists():
                    shutil.copy(curves, options.results / f"train_{command}.{suffix}")
    return 0


def summary(
    command: str, results: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table and the headline of a command's runs, the one without options first."""
    first = results[command]
    table = head_table(first) if command == "diversed" else draft_table(results)
    numbers = headline(first)
    for variant, result in results.items():
        if variant != command:
            numbers[f"acceptance_after_{variant}"] = round(result["acceptance_after"]["mean"], 4)
    return table, numbers


def finish(
    command: str, options: argparse.Namespace, results: Mapping[str, Mapping[str, Any]]
) -> None:
    """Print the table and the headline; save them if asked to."""
    table, numbers = summary(command, results)
    print(harness.table(table["columns"], table["rows"]))
    title = f"train_{command}"
    harness.finish(title, options, list(results.values()), {title: table}, numbers)


if __name__ == "__main__":
    raise SystemExit(main())
