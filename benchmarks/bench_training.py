# SPDX-License-Identifier: Apache-2.0
"""What do `specens train diversed` and `specens train draft` reach on the shipped family?

Each runs once, as a user would run it, with no option but its folder. What it measured on held-out
text is saved with where it ran, beside its curves: results/train_diversed.* and train_draft.*.
"""

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


def train(command: str, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Run one command; what it found."""
    words = [sys.executable, "-m", "specens.cli", "train", command, "--out", str(folder)]
    subprocess.run([*words, *options], check=True)
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
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


def draft_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Acceptance before and after, for the README."""
    return {
        "caption": "acceptance of drafts by the target on held-out modules, mean ± standard error",
        "columns": ["", "before", "after"],
        "rows": [["draft", shown(result["acceptance_before"]), shown(result["acceptance_after"])]],
    }


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers to quote."""
    times = ("training_seconds", "training_cpu_seconds")
    found: dict[str, Any] = {name: round(result[name], 1) for name in times}
    for quality, gain in result.get("above_front", {}).items():
        found[f"{quality}_above_front"] = round(gain["gain"], 4)
        found[f"{quality}_above_front_standard_error"] = round(gain["standard_error"], 4)
    for when in ("acceptance_before", "acceptance_after"):
        if when in result:
            found[when] = round(result[when]["mean"], 4)
    return found


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
            folder = Path(name)
            result = train(command, folder, given)
            table = (head_table if command == "diversed" else draft_table)(result)
            print(harness.table(table["columns"], table["rows"]))
            title = f"train_{command}"
            harness.finish(title, options, [result], {title: table}, headline(result))
            for suffix in ("csv", "png"):
                curves = folder / f"curves.{suffix}"
                if options.save and curves.exists():
                    shutil.copy(curves, harness.RESULTS / f"{title}.{suffix}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
