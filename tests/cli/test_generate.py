# SPDX-License-Identifier: Apache-2.0
"""`specens generate`: what it writes where, from which prompts, and with which options."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, complaint, environment, results, run

from specens import family, methods
from specens.cli import output

pytestmark = pytest.mark.usefixtures("quick")


def test_a_hierarchy_takes_any_number_of_drafts() -> None:
    names = ("draft", "prose", "draft")
    for count in (1, 3):
        drafts = [word for name in names[:count] for word in ("--draft", f"family:{name}")]
        (found,) = results("x = [", "--method", "hierarchy", *drafts)
        assert len(found["statistics"]["members"]) == 2 + count
    line = complaint(run("generate", "x", "--method", "pyramid_fuzzy", "--draft", "family:draft"))
    assert "--draft: expected 2 for 'pyramid_fuzzy', got 1" in line


@pytest.mark.parametrize(
    ("method", "gamma", "written"),
    [
        ("block", "2", "speculative:tokens=2"),
        ("confidence", "3", "speculative:tokens=3,stop=confidence"),
        ("pyramid_fuzzy", "1,2", "hierarchy:tokens=1,2"),
        ("static", "2", "speculative:tokens=2,proposer=0"),
    ],
)
def test_gamma_takes_the_place_of_a_methods_own_tokens(
    method: str, gamma: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules: list[str] = []
    build = methods.build

    def noting(*arguments: Any, **options: Any) -> Any:
        schedules.append(str(options["schedule"]))
        return build(*arguments, **options)

    monkeypatch.setattr(methods, "build", noting)
    (found,) = results("def f(x):", "--method", method, "--gamma", gamma)
    assert found["statistics"]["num_tokens"] > 0
    assert schedules == [written]


def test_the_device_is_an_option_of_generate() -> None:
    (found,) = results("def f(x):", "--device", "cpu")
    assert found["token_ids"] == results("def f(x):")[0]["token_ids"]


def test_the_text_is_alone_on_standard_output() -> None:
    result = run("generate", "def f(x):", *SHORT)
    (found,) = results("def f(x):")
    assert result.exit_code == 0
    assert result.stdout == found["text"] + "\n"
    assert "accepted by position" in result.stderr
    assert "seed 7" in result.stderr


def test_json_tells_text_tokens_and_statistics() -> None:
    (found,) = results("def f(x):")
    assert set(found) == {"prompt", "text", "token_ids", "seed", "statistics"}
    statistics = found["statistics"]
    assert len(found["token_ids"]) == statistics["num_tokens"] <= 12
    assert statistics["members"] == ["code", "prose", "draft"]
    assert 0 <= statistics["acceptance_rate"] <= 1
    assert statistics["by_position"]


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    def text(seed: str) -> str:
        return run("generate", "def f(x):", "--max-new-tokens", "12", "--seed", seed).stdout

    assert text("7") == text("7") != text("8")


def test_without_a_seed_the_text_differs_from_run_to_run() -> None:
    def draw() -> dict[str, Any]:
        found = run("generate", "def f(x):", "--max-new-tokens", "12", "--json")
        return dict(json.loads(found.stdout))

    first, second = draw(), draw()
    assert first["seed"] != second["seed"]
    assert first["token_ids"] != second["token_ids"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--schedule", "plain"),
        ("--schedule", "speculative:proposer=1", "--gamma", "3"),
        ("--schedule", "speculative", "--draft", "family:draft"),
        ("--gamma", "2,3,1", "--schedule", "alternating:order=1,0,2"),
    ],
    ids=" ".join,
)
def test_greedy_text_is_the_same_for_every_schedule(arguments: tuple[str, ...]) -> None:
    (expected,) = results("def f(x):", "--temperature", "0")
    (found,) = results("def f(x):", "--temperature", "0", *arguments)
    assert found["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--schedule", "component"),
        ("--model", "family:draft", "--schedule", "plain"),
        ("--model", "family:draft"),
        ("--ensemble", "product", "--weights", "1.5,-0.5,0", "--plausibility", "0.1"),
        ("--scope", "ensemble", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01"),
        ("--acceptance", "lenient:lenience=0.5", "--dtype", "bfloat16"),
    ],
    ids=" ".join,
)
def test_every_option_reaches_the_decoder(arguments: tuple[str, ...]) -> None:
    (found,) = results("def f(x):", *arguments)
    assert found["statistics"]["num_tokens"] == len(found["token_ids"]) > 0


def test_the_prompt_comes_from_a_pipe_or_a_file_without_its_last_newline(tmp_path: Path) -> None:
    (expected,) = results("def f(x):\n    pass")
    (tmp_path / "prompt").write_text("def f(x):\n    pass\n")
    for arguments, stdin in (
        ((), "def f(x):\n    pass\n"),
        (("--file", "-"), "def f(x):\n    pass\n"),
        (("--file", str(tmp_path / "prompt")), None),
    ):
        (found,) = results(*arguments, stdin=stdin)
        assert found["prompt"] == expected["prompt"]
        assert found["token_ids"] == expected["token_ids"]


def test_lines_are_prompts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"prompt": "def f(x):"}\n\n{"prompt": "She was"}\n')
    found = results("--lines", "--file", str(tmp_path / "lines"))
    assert [one["prompt"] for one in found] == ["def f(x):", "She was"]
    assert [one["seed"] for one in found] == [7, 8]
    assert found[0]["token_ids"] == results("def f(x):")[0]["token_ids"]
    text = run("generate", "--lines", *SHORT, stdin="def f(x):\nShe was\n")
    assert text.stdout == found[0]["text"] + "\n\n" + found[1]["text"] + "\n"


def test_the_text_ends_with_the_stop_string() -> None:
    (whole,) = results("def f(x):", "--max-new-tokens", "24")
    stop = whole["text"][3:6]
    (found,) = results("def f(x):", "--max-new-tokens", "24", "--stop", stop, "--stop", "\0")
    assert stop in found["text"]
    assert whole["text"].startswith(found["text"])
    assert found["statistics"]["num_tokens"] < whole["statistics"]["num_tokens"]


class Letters:
    """A tokenizer of UTF-8 bytes, three of which make one euro sign."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_a_stream_holds_back_half_a_character() -> None:
    written: list[str] = []
    stream = output.TextStream(Letters(), written.append)
    stream.put(torch.tensor([list(b"prompt")]))
    for byte in "a€b".encode():
        stream.put(torch.tensor([byte]))
    stream.put(torch.tensor([0xE2]))
    stream.end()
    assert written == ["a", "€", "b", "\ufffd"]
    assert stream.text == "a€b\ufffd"


@pytest.mark.slow
def test_a_pipe_works_from_outside() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "specens.cli", "generate", *SHORT, "--threads", "1"],
        input="def f(x):\n",
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert found.stdout == results("def f(x):")[0]["text"] + "\n"
    assert "calls/token" in found.stderr


def test_the_models_generation_config_does_not_shape_the_text(tmp_path: Path) -> None:
    (expected,) = results("def f(x):", "--model", "family:draft")
    for file in family.path("draft").iterdir():
        if file.is_file() and file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((family.path("draft") / "generation_config.json").read_text())
    config |= {"typical_p": 0.1, "num_beams": 4, "min_length": 100, "stop_strings": ["e"]}
    config |= {"suppress_tokens": expected["token_ids"], "repetition_penalty": 3.0, "top_k": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    (found,) = results("def f(x):", "--model", str(tmp_path), "--dtype", "float32")
    assert found["token_ids"] == expected["token_ids"]
