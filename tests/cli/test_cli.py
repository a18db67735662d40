# SPDX-License-Identifier: Apache-2.0
"""The command line: what is written where, and that a mistake costs one line and exit code 2.

A new way to go wrong is one more entry of `MISTAKES`. The shipped family is package data, so
nothing here needs a network.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import toy
from transformers import GenerationConfig, WatermarkingConfig
from typer.testing import CliRunner, Result

from specens import SpeculativeDecoder, Statistics, family
from specens.cli import app, loading, output
from specens.methods import METHODS
from specens.schedules import SCHEDULES
from specens.tuning.compare import compare, sampling, total
from specens_kernels import ENSEMBLES, Refusal

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", "12", "--seed", "7")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, which is the fastest for models this small, and no model is loaded twice."""
    threads, load = torch.get_num_threads(), loading._load
    torch.set_num_threads(1)
    loading._load = functools.cache(load)
    yield
    loading._load = load
    torch.set_num_threads(threads)


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


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[Sequence[str], str]] = {
    "no command": ((), "Missing command"),
    "unknown command": (("write",), "No such command 'write'"),
    "unknown option": (("generate", "x", "--gama", "2"), "No such option: --gama"),
    "empty prompt": (("generate", " "), "expected text, got none in the argument"),
    "empty pipe": (("generate",), "expected text, got none in standard input"),
    "no such file": (("generate", "--file", "/no/such.txt"), "No such file"),
    "prompt and file": (("generate", "x", "--file", "y"), "got both"),
    "no such folder": (("generate", "x", "--model", "/no/such"), "expected a folder or a hub name"),
    "no such draft": (
        ("generate", "x", "--schedule", "speculative", "--draft", "/no/such"),
        "generate: --draft: expected a folder or a hub name, got '/no/such'",
    ),
    "no drafts": (
        ("generate", "x", "--method", "fsd", "--model", "family:code"),
        "generate: --draft: expected 1 for 'fsd', got 0",
    ),
    "no place for what tune finds": (
        ("tune", "--output", "/no/such/folder/tuned.json"),
        "tune: --output: expected a file in a folder that exists",
    ),
    "a folder for what tune finds": (
        ("tune", "--output", "/"),
        "tune: --output: expected a file in a folder that exists, got '/'",
    ),
    "no such target": (
        ("train", "draft", "--target", "/no/such"),
        "train draft: --target: expected a folder or a hub name",
    ),
    "no such member": (
        ("generate", "x", "--model", "family:poet"),
        "--model: expected one of family:code",
    ),
    "gamma 0": (
        ("generate", "x", "--gamma", "0"),
        "alternating: tokens: expected integers >= 1, got 0 (here: --gamma)",
    ),
    "gamma text": (
        ("generate", "x", "--gamma", "two"),
        "alternating: tokens: expected integers >= 1, got 'two'",
    ),
    "four gammas": (("generate", "x", "--gamma", "1,2,3,4"), "expected 1 or 3 integers"),
    "weights": (("generate", "x", "--weights", "0.5,0.3,0.3"), "sum to 1"),
    "one weight": (("generate", "x", "--weights", "1"), "--weights: expected 3 numbers"),
    "weights text": (("generate", "x", "--weights", "a,b"), "--weights: expected numbers"),
    "ensemble": (("generate", "x", "--ensemble", "sum"), "got 'sum'"),
    "schedule": (("generate", "x", "--schedule", "fast"), "got 'fast'"),
    "acceptance": (("generate", "x", "--acceptance", "typcal"), "generate: --acceptance: name: "),
    "method": (("generate", "x", "--method", "fast"), "--method: expected one of plain, "),
    "method and schedule": (
        ("generate", "x", "--method", "fsd", "--schedule", "plain"),
        "--schedule: expected none beside --method fsd",
    ),
    "head": (("generate", "x", "--method", "fsd", "--head", "h"), "--head: expected none for"),
    "draft weight": (
        ("generate", "x", "--method", "fsd", "--draft-weight", "0.5"),
        "--draft-weight: expected none for method 'fsd'",
    ),
    "draft weight alone": (
        ("generate", "x", "--draft-weight", "0.5"),
        "--draft-weight: expected a --method that mixes",
    ),
    "scope": (("generate", "x", "--scope", "all"), "got 'all'"),
    "lenience": (
        ("generate", "x", "--acceptance", "lenient:lenience=0"),
        "lenience: expected a number in (0, 1]",
    ),
    "plausibility": (("generate", "x", "--plausibility", "0.1"), "--plausibility: expected 0"),
    "proposer": (
        ("generate", "x", "--schedule", "speculative:proposer=3"),
        "speculative: proposer: expected None with a draft, else 0 to 2",
    ),
    "order": (
        ("generate", "x", "--schedule", "alternating:order=0,0"),
        "order: expected every member 0 to 2 once",
    ),
    "draft": (("generate", "x", "--draft", "family:draft"), "draft: expected None"),
    "component": (
        ("generate", "x", "--schedule", "component", "--temperature", "0"),
        "do_sample: expected True for schedule 'component', got False (here: --temperature above 0",
    ),
    "temperature": (("generate", "x", "--temperature", "-1"), "--temperature"),
    "top-p": (("generate", "x", "--top-p", "0"), "--top-p: expected a mass in (0, 1]"),
    "min-p": (("generate", "x", "--min-p", "1"), "--min-p: expected a ratio in [0, 1)"),
    "dtype": (("generate", "x", "--dtype", "float8"), "--dtype: expected one of auto, bfloat16"),
    "no such device": (
        ("generate", "x", "--device", "banana"),
        "generate: --device: expected auto",
    ),
    "device that computes nothing": (("generate", "x", "--device", "meta"), "got 'meta'"),
    "device of tune": (("tune", "--device", "meta"), "tune: --device: expected auto"),
    "device of probe": (("probe", "family:draft", "--device", "meta"), "probe: --device: expected"),
    "device of bench": (("bench", "--device", "meta"), "bench: --device: expected auto"),
    "device of demo": (("demo", "--device", "meta"), "demo: --device: expected auto"),
    "device of a draft's training": (
        ("train", "draft", "--device", "meta", "--steps", "1"),
        "--device: expected auto",
    ),
    "device of a head's training": (
        ("train", "diversed", "--device", "meta", "--steps", "1"),
        "--device: expected auto",
    ),
    "chat": (("generate", "x", "--chat"), "expected a tokenizer with a chat template"),
    "stop": (("generate", "x", "--stop", ""), "--stop: expected text"),
    "max new tokens": (("generate", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
    "too many tokens": (
        ("generate", "x", "--max-new-tokens", "100000000000"),
        "--max-new-tokens",
    ),
    "probe nothing": (("probe",), "Missing argument 'model'"),
    "probe no folder": (("probe", "/no/such"), "expected a folder or a hub name"),
    "bench gamma": (("bench", "--gamma", "1,,2"), "bench: --gamma: expected integers"),
    "bench repeats": (("bench", "--repeats", "0"), "--repeats"),
    "demo gamma": (("demo", "--gamma", "0"), "--gamma"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    assert words in complaint(run(*arguments))


# Mistakes that show without a model.
NEED_NO_TORCH = (
    *("no command", "unknown command", "unknown option", "empty prompt", "no such file"),
    *("prompt and file", "no such folder", "no such draft", "no place for what tune finds"),
    "a folder for what tune finds",
    *("no such target", "no such member", "gamma text", "weights text", "draft weight alone"),
    *("gamma 0", "ensemble", "schedule", "acceptance", "lenience", "method", "head"),
    *("method and schedule", "draft weight"),
    *("temperature", "dtype", "stop", "max new tokens", "too many tokens", "probe nothing"),
    *("probe no folder", "bench gamma", "bench repeats", "demo gamma"),
)
HELP = (("--help",), ("generate", "--help"), ("train", "draft", "--help"), ("bench", "--help"))


def environment() -> dict[str, str]:
    """For a process that imports what is tested here, and stays offline."""
    paths = [str(ROOT), str(ROOT / "python")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def test_help_and_mistakes_need_neither_torch_nor_rich() -> None:
    commands = [(2, [*MISTAKES[name][0]]) for name in NEED_NO_TORCH]
    commands += [(0, [*words]) for words in HELP]
    program = f"""
import sys
from typer.testing import CliRunner
sys.modules |= {{"torch": None, "rich": None}}
from specens.cli import app
for expected, command in {commands}:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == expected, (command, result.output, result.exception)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_a_mistake() -> None:
    line = complaint(run("generate", "x", "--device", "cuda"))
    assert "generate: --device: expected auto, or a device that torch has here" in line
    assert "got 'cuda' (" in line


def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    zeros = torch.zeros

    def noted(*shape: int, device: torch.device) -> torch.Tensor:
        made.append(str(device))
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", noted)
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert loading.device_named("auto") == expected
        assert loading.device_named("cuda:1") == "cuda:1"
    assert made == ["cuda", "cuda:1", "cpu", "cuda:1"]


def test_models_and_prompts_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """To "meta", which every build of torch has, where nothing is computed."""
    monkeypatch.setattr(loading, "device_named", lambda name: name)
    (model,), (tokenizer,) = loading.load(["family:draft"], loading.Loading(device="meta"))
    assert {one.device.type for one in model.parameters()} == {"meta"}
    ids = loading.encode(tokenizer, "x = 1", device=model.device)
    assert ids.device.type == "meta"
    assert loading.encode(tokenizer, "x = 1").device.type == "cpu"


def test_help_names_every_schedule() -> None:
    shown = " ".join(run("generate", "--help").output.split())
    for name, schedule in SCHEDULES.items():
        names = ", ".join(field.name for field in dataclasses.fields(schedule))
        assert f"{name} ({names}): {schedule.summary}." in shown or not names
        assert f"{schedule.summary}." in shown
    assert all(f" {name}" in shown for name in (*ENSEMBLES, *METHODS))


def test_a_hierarchy_takes_any_number_of_drafts() -> None:
    names = ("draft", "prose", "draft")
    for count in (1, 3):
        drafts = [word for name in names[:count] for word in ("--draft", f"family:{name}")]
        (found,) = results("x = [", "--method", "hierarchy", *drafts)
        assert len(found["statistics"]["members"]) == 2 + count
    line = complaint(run("generate", "x", "--method", "pyramid_fuzzy", "--draft", "family:draft"))
    assert "--draft: expected 2 for 'pyramid_fuzzy', got 1" in line


def test_the_device_is_an_option_of_generate() -> None:
    (found,) = results("def f(x):", "--device", "cpu")
    assert found["token_ids"] == results("def f(x):")[0]["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [1]),
        (("--model", "family:code"), [1]),
        (("--model", "family:code", "--schedule", "speculative", "--draft", "family:draft"), [1]),
        (("--method", "speculative"), [1]),
        (("--model", "FOLDER"), []),
        (("--model", "family:code", "--model", "FOLDER"), []),
        (("--method", "speculative", "--draft", "FOLDER"), []),
        (("--model", "FOLDER", "--threads", "3"), [3]),
        (("--threads", "3"), [3]),
    ],
    ids=str,
)
def test_the_family_alone_takes_one_thread(
    arguments: Sequence[str], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    given = [str(family.path("draft")) if one == "FOLDER" else one for one in arguments]
    results("def f(x):", *given, "--max-new-tokens", "1")
    assert taken == expected


def test_no_prompt_and_no_pipe_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="expected an argument, --file or a pipe, got none"):
        loading.read_prompts(None, None, lines=False)


def test_tokenizers_that_disagree_are_refused(tmp_path: Path) -> None:
    for file in family.path("prose").iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    described = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    one, other = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    line = complaint(run("generate", "x", "--model", "family:code", "--model", tmp_path))
    assert "expected the same token for every id, got 2 that differ" in line


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "safetensors" in complaint(run("generate", "x", "--model", tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(family.path("draft") / name)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "safetensors" in complaint(run("probe", tmp_path))


def test_weights_that_are_cut_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("cut", "header", "other"):
        shutil.copytree(family.path("draft"), tmp_path / name)
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "header" / "model.safetensors").write_bytes(weights[:5])
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["intermediate_size"] += 8
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for name, why in (
        ("cut", "not fully covered"),
        ("header", "header too small"),
        ("other", "weights of other shapes than its config.json says"),
    ):
        for command in (("generate", "x", "--model"), ("probe",)):
            line = complaint(run(*command, tmp_path / name))
            assert "expected a causal LM with tokenizer and safetensors" in line
            assert why in line


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    retries: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            retries.append(record)

    def unreachable(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect to the hub\nCheck your internet connection.")

    handler, hub = Kept(), logging.getLogger("huggingface_hub")
    level = hub.level
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    hub.addHandler(handler)
    hub.setLevel(logging.WARNING)
    try:
        line = complaint(run("generate", "x", "--model", "nobody-here/nothing-there"))
    finally:
        hub.removeHandler(handler)
        hub.setLevel(level)
    assert line.endswith("got 'nobody-here/nothing-there' (We couldn't connect to the hub)")
    assert retries == []


def test_lines_are_counted_and_parted_as_an_editor_does(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('\n{"prompt": "a"}\n\n \n{"text": "b"}\n', encoding="utf-8")
    assert "in line 5 of" in complaint(run("generate", "--lines", "--file", tmp_path / "lines"))
    parted = "a\u2028b\u0085c\x0cd"
    for text in (json.dumps({"prompt": parted}, ensure_ascii=False), parted):
        (tmp_path / "lines").write_text(f"{text}\n\n{text}\n", encoding="utf-8")
        found = loading.read_prompts(None, tmp_path / "lines", lines=True)
        assert found == [parted] * 2


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "not UTF-8" in complaint(run("generate", "--file", tmp_path / "latin"))
    assert "prompt: expected text in the pipe" in complaint(run("generate", stdin=b"caf\xe9"))
    (tmp_path / "lines").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in complaint(run("generate", "--lines", "--file", tmp_path / "lines"))


@pytest.mark.parametrize("method", ["quantised", "mlspecqd"])
def test_what_is_not_installed_is_one_line(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    line = complaint(run("generate", "x", "--method", method))
    assert line.endswith(
        "quantised: torchao: expected it installed (pip install torchao), got none"
    )


def test_a_refusal_is_said_by_command_and_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def line_for(argument: str) -> str:
        def refuse(*_: object) -> None:
            raise Refusal("law", argument, "a mass", 2)

        monkeypatch.setattr(loading, "read_prompts", refuse)
        return complaint(run("generate", "x")).removeprefix("specens: error: ")

    assert line_for("top_p") == "generate: --top-p: expected a mass, got 2"
    assert line_for("models") == "generate: --model: expected a mass, got 2"
    assert line_for("memory") == "generate: law: memory: expected a mass, got 2"
    assert line_for("do_sample").endswith("got 2 (here: --temperature above 0)")


def test_what_is_refused_is_one_line_and_what_is_unexpected_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(loading, "read_prompts", fail)
    error: Exception = Refusal("generate", "mode", "greedy_search,\nor sample", "beam_search")
    line = complaint(run("generate", "x"))
    assert line.endswith("generate: mode: expected greedy_search, or sample, got beam_search")
    error = ValueError("zip() argument 2 is shorter than argument 1")
    result = run("generate", "x")
    assert result.exception is error
    assert result.exit_code == 1


# --- generate -------------------------------------------------------------------------------------


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


# --- the other commands ---------------------------------------------------------------------------


def test_probe_says_what_it_found() -> None:
    found = json.loads(run("probe", "family:draft", "--json").stdout)
    assert (found["mode"], found["tree"]) == ("slot", True)
    table = run("probe", "family:draft")
    assert table.exit_code == 0
    assert "slot: all rows of a batch" in table.stdout


@pytest.mark.slow
def test_bench_compares_every_schedule() -> None:
    short = ("bench", "def f(x):", "--max-new-tokens", "6", "--repeats", "1", "--gamma", "1,2")
    rows = json.loads(run(*short, "--json").stdout)["rows"]
    names = ["plain", "component", "speculative 1", "alternating 1", "speculative 2"]
    assert [row["name"] for row in rows] == [*names, "alternating 2"]
    assert rows[0]["ratio"] == 1
    assert rows[0]["acceptance_rate"] is None
    assert rows[1]["calls_per_token"] == 1
    greedy = run(*short, "--temperature", "0", "--draft", "family:draft")
    assert greedy.exit_code == 0
    assert "component" not in greedy.stdout


@pytest.mark.slow
def test_demo_shows_text_and_speed() -> None:
    short = ("demo", "--max-new-tokens", "6", "--repeats", "1")
    found = json.loads(run(*short, "--json").stdout)
    assert found["same_greedy_text"] == len(found["texts"]) == 3
    assert all(one["text"] for one in found["texts"])
    assert [len(rows) for rows in found["tables"].values()] == [2, 2]
    shown = run(*short)
    assert shown.exit_code == 0
    assert "vs plain" in shown.stdout


# --- comparisons ----------------------------------------------------------------------------------


def counted(speed: float, log: list[str], name: str) -> Statistics:
    log.append(name)
    return Statistics(["a"], num_tokens=10, decode_seconds=10 / speed)


def test_compare_interleaves_and_takes_ratios_within_a_round() -> None:
    log: list[str] = []
    # The machine halves its speed from round to round; the first round warms up.
    slow = iter([1.0, 100.0, 50.0, 25.0])
    fast = iter([1.0, 200.0, 100.0, 50.0])
    first, second = compare(
        {
            "slow": lambda: counted(next(slow), log, "slow"),
            "fast": lambda: counted(next(fast), log, "fast"),
        },
        3,
    )
    assert log == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert (first.ratio, second.ratio, second.ratio_low, second.ratio_high) == (1, 2, 2, 2)
    assert (second.tokens_per_second, second.best, second.rounds) == (100, 200, 3)
    assert second.low == pytest.approx(60)
    assert math.isnan(second.acceptance_rate)
    assert second.as_dict()["acceptance_rate"] is None


def test_compare_stops_at_its_limit_after_one_measured_round() -> None:
    log: list[str] = []
    (row,) = compare({"one": lambda: counted(1.0, log, "one")}, 5, limit_s=0.0)
    assert (row.rounds, len(log)) == (1, 2)


# What a generation config may say, and a value that changes the text, or is refused. More than one
# where they act together alone.
SHAPING: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 4},
    "constraints": {"constraints": [1]},
    "force_words_ids": {"force_words_ids": [[1]]},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "use_mtp": {"use_mtp": True},
    "is_assistant": {"is_assistant": True},
    "guidance_scale": {"guidance_scale": 2.0},
    "sequence_bias": {"sequence_bias": [[[3], 10.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[1], [3], [5]]},
    "min_length": {"min_length": 20},
    "min_new_tokens": {"min_new_tokens": 20},
    "forced_bos_token_id": {"forced_bos_token_id": 1},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 3.0)},
    "suppress_tokens": {"suppress_tokens": [1, 3, 5]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 3, 4, 5]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "top_h": {"top_h": 0.1},
    "typical_p": {"typical_p": 0.1},
    "epsilon_cutoff": {"epsilon_cutoff": 0.4},
    "eta_cutoff": {"eta_cutoff": 0.4},
    "token_healing": {"token_healing": True},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": ["w2"]},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "output_scores": {"output_scores": True},
    "output_logits": {"output_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "temperature": {"temperature": 0.2},
    "top_k": {"top_k": 1},
    "top_p": {"top_p": 0.2},
    "min_p": {"min_p": 0.9},
}
# It acts on logits that are no numbers alone.
RARE = {"remove_invalid_values"}
# They shape nothing, or come with the call, or are the first model's to say.
IDLE = {
    *("max_new_tokens", "max_length", "do_sample", "eos_token_id"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits"),
    *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "low_memory"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"),
    *("continuous_batching_config", "transformers_version"),
}


def test_everything_that_a_generation_config_may_say_is_judged() -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known <= {*SHAPING, *RARE, *IDLE}
    assert {*SHAPING, *RARE} <= {*sampling(1)}


@pytest.mark.parametrize("name", SHAPING)
def test_sampling_leaves_nothing_to_a_generation_config(name: str) -> None:
    """Of what changes the text, or is refused, where the call does not say `sampling`."""
    model = toy(1, 7, spread=1.0)
    model.generation_config.eos_token_id = 2
    decoder = SpeculativeDecoder([model, toy(2, 7, spread=1.0)], schedule="plain")

    def write(**arguments: Any) -> Any:
        prompt = torch.tensor([[4]])
        try:
            found = decoder.generate(prompt, attention_mask=torch.ones(1, 1).long(), **arguments)
        except (ValueError, NotImplementedError, AttributeError, TypeError) as refusal:
            return type(refusal)
        return found.tolist() if isinstance(found, torch.Tensor) else type(found)

    def texts() -> tuple[list[Any], list[Any]]:
        """As `sampling` says, and with no more said than that it is sampled, or greedy."""
        heats = [(0, 1.0), (1, 1.0), (0, 0.0)]
        said = [write(seed=seed, **sampling(24, temperature=heat)) for seed, heat in heats]
        bare = [write(seed=s, max_new_tokens=24, do_sample=heat > 0) for s, heat in heats]
        return said, bare

    (said, bare), own = texts(), model.generation_config
    assert all(isinstance(one, list) for one in said + bare)
    model.generation_config = GenerationConfig(eos_token_id=2, **SHAPING[name])
    now_said, now_bare = texts()
    assert now_bare != bare
    assert now_said == said
    assert own.eos_token_id == 2


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


def test_compare_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="decoders: expected at least one"):
        compare({}, 1)
    with pytest.raises(ValueError, match="repeats: expected a count >= 1, got 0"):
        compare({"one": lambda: Statistics(["a"])}, 0)


def test_total_adds_counts_and_refuses_other_members() -> None:
    one = Statistics(["a", "b"], calls=[1, 2], by_position=[[3, 2]], num_tokens=4, status=1)
    two = Statistics(["a", "b"], calls=[3, 4], by_position=[[1, 1], [1, 0]], turns=5, status=2)
    whole = total([one, two])
    assert (whole.calls, whole.by_position) == ([4, 6], [[4, 3], [1, 0]])
    assert (whole.num_tokens, whole.turns, whole.status) == (4, 5, 3)
    with pytest.raises(ValueError, match="calls with the same members"):
        total([one, Statistics(["c"])])


def test_the_family_is_package_data() -> None:
    for name in family.FAMILY:
        assert (family.path(name) / "model.safetensors").is_file()
    with pytest.raises(Refusal, match="expected one of code, prose, draft, got 'poet'"):
        family.path("poet")
