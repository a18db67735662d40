# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process: what it prints, and the one line that a mistake costs."""

import json
import os
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from specens.cli import app

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", "12", "--seed", "7")


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def complaint(result: Result) -> str:
    """The one line on standard error; nothing on standard output."""
    assert result.exit_code == 2, (result.exception, result.output)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("specens: error: ")
    return line


def results(*arguments: str, stdin: str | None = None) -> list[dict[str, Any]]:
    """What `generate --json` prints."""
    result = run("generate", "--json", *SHORT, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def environment() -> dict[str, str]:
    """For a process that imports what is tested here, and stays offline."""
    paths = [str(ROOT), str(ROOT / "python")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
