# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, its commands parse and its marked places are whole.

A code block that loads models from the hub gets the shipped family instead.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from specens import family
from specens.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("(")[0].splitlines()[-1])
def test_python_blocks_run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shipped(load: Any) -> Any:
        def from_pretrained(name: str, **arguments: Any) -> Any:
            assert name.startswith("Qwen/")
            return load(family.path("code" if "Coder" in name else "prose"), **arguments)

        return from_pretrained

    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", shipped(loader.from_pretrained))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("specens")])
def test_commands_parse(line: str) -> None:
    words = re.findall(r'"[^"]*"|\S+', line)
    _, name, *arguments = [word.strip('"') for word in words]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


def test_make_targets_exist() -> None:
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["demo", "test"]
    assert all(f"\n{target}: " in makefile for target in targets)


def test_result_tables_are_marked() -> None:
    begun = re.findall(r"<!-- RESULTS:BEGIN (\w+) -->", README)
    assert begun == ["methods", "traffic", "verify", "loop", "generate"]
    assert begun == re.findall(r"<!-- RESULTS:END (\w+) -->", README)


def test_files_that_are_named_exist() -> None:
    for name in re.findall(r"`([\w./-]+/[\w-]+\.(?:md|py))`", README):
        assert (ROOT / name).exists(), name
