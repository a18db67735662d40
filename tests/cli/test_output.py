# SPDX-License-Identifier: Apache-2.0
"""What reaches a terminal, a pipe, a full disk and nobody; files that try to do harm."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, complaint, environment, run
from typer.testing import CliRunner

from specens import family
from specens.cli import app, output, streams
from specens.methods import METHODS
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("quick")

HARM = "a\x1b[31mb\rc\x9b2Jd\x07e\bf\x7fg\0h\x85i\tj\nk\u202el\U0001f600"
HARMLESS = "a[31mbc2JdefghI\tj\nk\u202el\U0001f600".replace("I", "i")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal gets on standard output."""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    with pytest.raises(SystemExit) as ended:
        app([*arguments])
    assert ended.value.code == 0
    return terminal.getvalue()


def test_a_terminal_gets_no_control_characters_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.TextStream, "_decode", lambda self, tokens: HARM * len(tokens))
    arguments = ("generate", "x", "--max-new-tokens", "2", "--model", "family:draft")
    assert on_a_terminal(*arguments, monkeypatch=monkeypatch) == HARMLESS * 2 + "\n"
    assert on_a_terminal(*arguments, "--raw", monkeypatch=monkeypatch) == HARM * 2 + "\n"
    (prompted,) = (json.loads(run(*arguments, "--json").stdout)["text"],)
    assert prompted == HARM * 2
    assert CliRunner().invoke(app, [*arguments]).stdout_bytes.decode() == HARM * 2 + "\n"
    assert streams.printable(HARM) == HARMLESS


def test_names_are_no_markup_and_no_commands(tmp_path: Path) -> None:
    folder = tmp_path / "[red]\x1b[31m[bold]\x9b:smile:"
    folder.symlink_to(family.path("draft"))
    result = run("generate", "x", "--model", folder, *SHORT)
    assert result.exit_code == 0, result.exception
    assert "[red][31m[bold]:smile:" in result.stderr
    assert "\x1b" not in result.stderr
    output.errors().print("[/x]")  # as markup it would be an error
    line = complaint(run("generate", "x", "--model", "/no/\x1b[31m\x9b2J"))
    assert line == streams.printable(line)


def test_a_pipe_gets_lines_as_long_as_they_are() -> None:
    lines = run("methods").stdout.splitlines()
    assert [line.split(" ")[0] for line in lines[1:]] == list(METHODS)
    for line, method in zip(lines[1:], METHODS.values(), strict=True):
        assert method.use in line
        assert method.law in line


def test_json_holds_every_text_and_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    text = HARM + "\ud800"
    for encoding in ("utf-8", "ascii", "latin-1"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        output.write_json({"text": text, "none": float("nan")})
        written = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert json.loads(written) == {"text": text, "none": None}
        assert written[:-1] == streams.printable(written[:-1])


def test_an_encoding_without_the_characters_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(Refusal, match=r"stdout: expected an encoding with '\\u20ac' .* got ascii"):
        output.write_text("a\u20ac")
    with pytest.raises(Refusal, match="PYTHONIOENCODING=utf-8"):
        output.console().print("½")


def shell(command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    words = command.replace("specens ", f"{sys.executable} -m specens.cli ")
    return subprocess.run(
        ["bash", "-c", f"{words}"],
        capture_output=True,
        text=True,
        env=environment() | variables,
        check=False,
    )


@pytest.mark.parametrize("command", ["methods", "methods --json", "--help", "--version"])
def test_a_full_disk_is_one_line(command: str) -> None:
    result = shell(f"specens {command} > /dev/full")
    assert (result.returncode, result.stderr) == (1, "specens: error: No space left on device\n")


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("specens methods >&-", 2, "expected an open standard output, got a closed one"),
        ("specens methods >&- 2>&-", 2, ""),
        ("specens generate --gamma 2>&-", 2, ""),
        ("specens generate --gamma 2>/dev/full", 2, ""),
        ("specens methods <&-", 0, ""),
        ("specens generate <&-", 2, "prompt: expected an argument, --file or a pipe, got none"),
        ("set -o pipefail; specens methods | true", 1, ""),
        ("LC_ALL=C specens methods", 0, ""),
        ("LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 specens methods --json", 0, ""),
        ("printf '\\xff' | LC_ALL=C specens generate", 2, "expected text that UTF-8 has"),
        ("LC_ALL=C specens generate $'\\xff'", 2, "expected text that UTF-8 has, got a lone"),
        ("printf '\\xff' | LC_ALL=C.UTF-8 specens generate", 2, "expected text"),
    ],
)
def test_streams_that_are_closed_or_odd_end_in_one_line(
    command: str, code: int, words: str
) -> None:
    result = shell(command)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert len(result.stderr.splitlines()) == (1 if words else 0)
    assert words in result.stderr


@pytest.mark.slow
def test_nothing_is_said_of_other_libraries_at_import() -> None:
    """What torchao and torch miss, and deprecate of each other's, is for their authors."""
    result = shell("specens generate x --model family:draft --max-new-tokens 2 --seed 1")
    assert result.returncode == 0, result.stderr
    first = result.stderr.splitlines()[0]
    assert set(first) <= set("┏━┳┓"), result.stderr


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--lines", "--file", "FILE"), "--lines: expected a JSON object"),
        (("generate", "x", "--config", "FILE"), "(JSON that is too deep)"),
        (("train", "diversed", "--data", "FILE"), "--data: expected a JSON object in line 1"),
    ],
)
def test_deep_json_is_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    file.write_text('{"prompt": ' + DEEP)
    given = [str(file) if each == "FILE" else each for each in arguments]
    assert words in complaint(run(*given))


def test_deep_json_of_a_head_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(family.head_path(), tmp_path / "head")
    (tmp_path / "head" / "weight_head.json").write_text(DEEP)
    line = complaint(run("generate", "x", "--method", "diversed", "--head", tmp_path / "head"))
    assert "--head: weight_head.json: expected a JSON file" in line


HOSTILE: dict[str, Any] = {
    "config.json": [DEEP, "{}", "[]", "null", '{"model_type": "\\u001b[31m"}', "{", "\0", ""],
    "tokenizer.json": [DEEP, "{}", "[]", "null", '{"model": 3}', "{", ""],
    "tokenizer_config.json": [DEEP, "[]", "3", "{"],
    "generation_config.json": [DEEP, "[]", '{"eos_token_id": "x"}', "{"],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name, texts in HOSTILE.items() for text in texts],
    ids=lambda value: value[:12],
)
def test_a_folder_of_hostile_files_is_one_line(name: str, text: str, tmp_path: Path) -> None:
    for file in family.path("draft").iterdir():
        if file.name != name and file.is_file():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).write_text(text)
    result = run("generate", "x", "--model", tmp_path, *SHORT)
    if result.exit_code == 0:  # what is not needed may be anything
        return
    line = complaint(result)
    assert line == streams.printable(line)
    assert len(line) < 600


def test_a_config_of_other_types_is_one_line(tmp_path: Path) -> None:
    whole = json.loads((family.path("draft") / "config.json").read_text())
    for file in family.path("draft").iterdir():
        if file.name != "config.json" and file.is_file():
            (tmp_path / file.name).symlink_to(file)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"):
        for value in ("x", -1, 0, None, [1], {}, 1e400, True):
            (tmp_path / "config.json").write_text(json.dumps({**whole, name: value}))
            result = run("generate", "x", "--model", tmp_path, *SHORT)
            assert result.exit_code in (0, 2), (name, value, result.exception)
