# SPDX-License-Identifier: Apache-2.0
"""`specens tune`, and `generate` with what it found."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from commands import run

from specens import family
from specens.cli import loading

pytestmark = pytest.mark.usefixtures("one_thread")

PAIR = ("--model", "family:code", "--model", "family:prose", "--draft", "family:draft")


def test_tune_check_and_generate_with_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    result = run(
        "tune", "def f(x):", *PAIR, "--max-new-tokens", "48", "--check", "--repeats", "1",
        "--threads", "1", "--output", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert result.stdout.count("best") == 1
    assert saved["drafts"] == ["family:draft"]
    assert [one["name"] for one in saved["candidates"] if one["measured"]]
    for one in saved["candidates"]:
        assert one["name"].split()[0] in result.stdout
    assert set(saved["stops"]) == {"code", "prose", "draft"}
    result = run("generate", "def f(x):", "--config", file, "--max-new-tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    statistics = json.loads(result.stdout)["statistics"]
    drafts = ["draft"] if saved["best"]["drafts"] else []
    assert statistics["members"] == ["code", "prose", *drafts]


def test_a_lossy_rule_is_reported_and_not_chosen(tmp_path: Path) -> None:
    pair = ("--model", "family:code", "--draft", "family:draft", "--max-new-tokens", "24")
    file = tmp_path / "tuned.json"
    rules = ("--acceptance", "cactus", "--acceptance", "js:threshold=0.3")
    result = run("tune", "def f(x):", *pair, *rules, "--threads", "1", "--output", file)
    assert result.exit_code == 0, result.output
    for rule in ("cactus:divergence=0.75", "js:threshold=0.3"):
        assert f"{rule}: lossy. The text's law is" in result.stdout
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["best"]["law"] == "target"
    lossy = [one for one in saved["candidates"] if one["law"] != "target"]
    assert {one["acceptance"] for one in lossy} == {
        "cactus:divergence=0.75",
        "js:threshold=0.3",
    }
    assert all(0 < one["divergence"] < 1 for one in lossy)
    exact = run("tune", "def f(x):", *pair, "--threads", "1")
    assert "lossy" not in exact.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--draft", "family:draft", "--acceptance", "block"), "lossy rule that judges each token"),
        (("--draft", "family:draft", "--acceptance", "jss"), "got 'jss'"),
        (("--acceptance", "js"), "--acceptance: expected a draft or a second member to judge"),
        (("--max-new-tokens", "2"), "--max-new-tokens: expected enough to time every model"),
    ],
)
def test_mistakes_of_tune(arguments: tuple[str, ...], words: str) -> None:
    result = run("tune", "x", "--model", "family:draft", *arguments, "--threads", "1")
    assert result.exit_code == 2
    assert words in result.stderr


def test_auto_tunes_where_every_text_ends_at_once(tmp_path: Path) -> None:
    for file in family.path("code").iterdir():
        if file.name != "generation_config.json":
            (tmp_path / file.name).symlink_to(file)
    vocab_size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    ends = json.dumps({"eos_token_id": list(range(vocab_size)), "pad_token_id": 1})
    (tmp_path / "generation_config.json").write_text(ends)
    pair = ("--model", tmp_path, "--draft", "family:draft", "--threads", "1")
    for temperature in ("0", "1"):
        result = run("generate", "x = [", *pair, "--auto", "--temperature", temperature, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["statistics"]["num_tokens"] == 1


def test_auto_says_what_it_took() -> None:
    result = run("generate", "x = [", *PAIR, "--auto", "--max-new-tokens", "8", "--threads", "1")
    assert result.exit_code == 0, result.output
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("auto: ")]
    assert "times as fast as plain; found in" in line


def test_only_the_drafts_of_the_best_candidate_are_loaded(tmp_path: Path) -> None:
    """Of three that were tuned with, two are not there any more."""
    file = tmp_path / "tuned.json"
    listed = {"models": ["family:code"], "drafts": ["/no/such", "family:draft", "/nor/this"]}
    for schedule, drafts in (("plain", []), ("speculative", [1])):
        best = {"name": "x", "schedule": schedule, "drafts": drafts, "seconds": 1}
        file.write_text(json.dumps({**listed, "threads": 1, "law": {}, "best": best}))
        result = run("generate", "x", "--config", file, "--max-new-tokens", "4", "--json")
        assert result.exit_code == 0, result.output
        members = json.loads(result.stdout)["statistics"]["members"]
        assert members == ["code", *["draft" for _ in drafts]]
    file.write_text(
        json.dumps({**listed, "threads": 1, "law": {}, "best": {**best, "drafts": [0]}})
    )
    assert "got '/no/such'" in run("generate", "x", "--config", file).stderr


def test_a_file_that_is_not_of_tune_is_refused(tmp_path: Path) -> None:
    best = {
        "name": "x",
        "schedule": "speculative:tokens=2,stop=confidence(least=0.25)",
        "drafts": [0],
        "seconds": 1.0,
    }
    whole = {"models": ["family:code"], "drafts": ["family:draft"], "threads": 1, "law": {}}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps(whole | {"best": best}))
    result = run("generate", "x", "--config", file, "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    for text, why in (
        ("[" * 100_000, "JSON that is too deep"),
        ("[]", "all: expected an object, got []"),
        ("{", "Expecting"),
        (json.dumps(whole), "best: expected a value, got none"),
        (json.dumps(whole | {"best": best, "threads": math.nan}), "NaN is no number of JSON"),
    ):
        file.write_text(text)
        refused(file, why)
    for facts, why in WRONG:
        file.write_text(json.dumps(whole | {"best": best} | facts))
        refused(file, why)
    for entry, why in WRONG_BEST:
        file.write_text(json.dumps(whole | {"best": best | entry}))
        refused(file, f"best.{why}")
    for entry, why in WRONG_BEST_WORDS:
        file.write_text(json.dumps(whole | {"best": best | entry}))
        refused(file, why)


def refused(file: Path, why: str) -> None:
    result = run("generate", "x", "--config", file)
    assert result.exit_code == 2, (why, result.exception)
    assert "--config: expected a file that `specens tune --output` wrote" in result.stderr
    assert why in result.stderr


# What is not of `tune`, and what is said of it.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"threads": "two"}, "threads: expected a count in [1, 1024], got 'two'"),
    *(({"threads": each}, "threads: expected a count") for each in (0, -1, 10**9, True, 2.0, [1])),
    *(
        ({"models": each}, "models: expected a list of 1 to 64 names")
        for each in ([1], [], "family:code", {"family:code": 1}, [""], ["x"] * 65, None)
    ),
    *(({"drafts": each}, "drafts: expected a list") for each in ("family:draft", [None], None)),
    ({"law": []}, "law: expected an object"),
    ({"law": {"sum": 1}}, "law: expected one of weights, ensemble, scope, plausibility"),
    *(
        ({"law": {"weights": each}}, "law.weights: expected a ")
        for each in ("half", ["1"], [True], [10**400], [], {"a": 1})
    ),
    ({"law": {"weights": [0.5, 0.5]}}, "weights: expected 1 numbers, one for each of family:code"),
    ({"law": {"weights": [0.5]}}, "weights: expected numbers >= 0 that sum to 1"),
    ({"law": {"plausibility": "low"}}, "law.plausibility: expected a finite number"),
    ({"law": {"plausibility": -1}}, "law.plausibility: expected a number >= 0"),
    ({"law": {"plausibility": 2}}, "plausibility: expected a number in [0, 1]"),
    ({"law": {"plausibility": 0.5}}, "plausibility: expected 0 for 'mixture'"),
    ({"law": {"ensemble": ["mixture"]}}, "law.ensemble: expected one of mixture, product"),
    ({"law": {"scope": "all"}}, "law.scope: expected one of member, ensemble"),
    ({"best": None}, "best: expected an object"),
]
WRONG_BEST: list[tuple[dict[str, Any], str]] = [
    *(({"drafts": each}, "drafts: expected a count in") for each in ([1], [-1], [True], ["0"])),
    ({"drafts": [0, 0]}, "drafts: expected each place once"),
    ({"drafts": 0}, "drafts: expected a list"),
    ({"name": 3}, "name: expected text"),
    ({"seconds": "1"}, "seconds: expected a finite number"),
    ({"schedule": 3}, "schedule: expected text"),
    ({"acceptance": 3}, "acceptance: expected text"),
    ({"law": None}, "law: expected text"),
    ({"divergence": []}, "divergence: expected a finite number"),
]
WRONG_BEST_WORDS: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "speculative:stop=whim"}, "got 'whim'"),
    ({"schedule": "fast"}, "got 'fast'"),
    ({"acceptance": "typcal"}, "got 'typcal'"),
    ({"extra": 0}, "best: expected one of name, schedule"),
]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--auto", "--schedule", "plain"), "--schedule: expected none beside --auto"),
        (("--auto", "--gamma", "2"), "--gamma: expected none beside --auto"),
        (("--config", "/no/such.json"), "--config: expected a file that `specens tune"),
        (("--config", "x", "--auto"), "--auto: expected none beside --config"),
        (("--config", "x", "--weights", "0.5,0.5"), "--weights: expected none beside --config"),
        (("--config", "x", "--scope", "ensemble"), "--scope: expected none beside --config"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str) -> None:
    result = run("generate", "x", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert loading.FAMILY_PREFIX not in result.stderr
