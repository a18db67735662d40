# SPDX-License-Identifier: Apache-2.0
"""A mistake costs one line and exit code 2, and needs neither torch nor a model where none is read.

A new way to go wrong is one more entry of `MISTAKES`.
"""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from commands import complaint, environment, run

from specens.cli import loading
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("quick")

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
        "alternating: tokens: expected integers from 1 to 4096, got 0 (here: --gamma)",
    ),
    "gamma text": (
        ("generate", "x", "--gamma", "two"),
        "alternating: tokens: expected integers from 1 to 4096, got 'two'",
    ),
    "four gammas": (("generate", "x", "--gamma", "1,2,3,4"), "expected 1 or 3 integers"),
    "weights": (("generate", "x", "--weights", "0.5,0.3,0.3"), "sum to 1"),
    "one weight": (
        ("generate", "x", "--weights", "1"),
        "--weights: expected 3 numbers, one for each of family:code, family:prose, family:draft",
    ),
    "two weights for one": (
        ("bench", "--model", "family:code", "--weights", "0.5,0.5"),
        "bench: --weights: expected 1 numbers, one for each of family:code, got 2",
    ),
    "weights of tune": (("tune", "--weights", "1,1,1"), "tune: --weights: expected numbers >= 0"),
    "weights of a method": (
        ("generate", "x", "--method", "speculative_ensemble", "--weights", "1"),
        "generate: --weights: expected 2 numbers, one for each of family:code, family:prose",
    ),
    "weights that are none": (
        ("generate", "x", "--ensemble", "product", "--weights", "nan,1,inf"),
        "generate: --weights: expected M >= 1 finite numbers",
    ),
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
    "head's folder": (
        ("generate", "x", "--method", "diversed", "--head", "/no/such"),
        "generate: --head: path: expected a folder with weight_head.safetensors",
    ),
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
    "draft": (
        ("generate", "x", "--draft", "family:draft"),
        "generate: --draft: expected None for schedule 'alternating', or --schedule speculative or "
        "hierarchy, or --auto, got family:draft",
    ),
    "two drafts": (
        (
            "generate",
            "x",
            "--draft",
            "family:draft",
            "--draft",
            "family:prose",
            "--schedule",
            "speculative",
        ),
        "generate: --draft: expected one model at most for schedule 'speculative', or --schedule "
        "companion or hierarchy, or --auto",
    ),
    "no draft": (
        ("generate", "x", "--schedule", "hierarchy"),
        "generate: --draft: expected one model at least for schedule 'hierarchy', got none",
    ),
    "gamma in the schedule": (
        ("generate", "x", "--schedule", "alternating:tokens=1,2,3,4"),
        "alternating: tokens: expected 1 or 3 integers, got (1, 2, 3, 4)",
    ),
    "gamma for nobody": (
        ("generate", "x", "--schedule", "plain", "--gamma", "2"),
        "generate: --gamma: expected none for schedule 'plain', which proposes no tokens, got '2'",
    ),
    "gamma for nobody's method": (
        ("generate", "x", "--method", "plain", "--gamma", "2"),
        "generate: --gamma: expected none for schedule 'plain', which proposes no tokens, got '2'",
    ),
    "two targets": (
        (
            "generate",
            "x",
            "--method",
            "static",
            "--model",
            "family:code",
            "--model",
            "family:prose",
            "--draft",
            "family:draft",
        ),
        "generate: --model: expected one target for 'static', got 2",
    ),
    "rules": (
        ("generate", "x", "--acceptance", "js", "--acceptance", "block"),
        "generate: --acceptance: expected one rule or a list of 1, got 2",
    ),
    "filter": (
        ("generate", "x", "--method", "companion_token", "--top-k", "3"),
        "generate: --top-k: expected none for a companion that cuts by the token",
    ),
    "product": (
        ("generate", "x", "--ensemble", "product", "--schedule", "component"),
        "generate: --schedule: expected a mixture of scope 'member' for 'component'",
    ),
    "rule of tune": (
        ("tune", "--acceptance", "block"),
        "tune: --acceptance: expected a lossy rule that judges each token by itself, got 'block'",
    ),
    "threads": (("generate", "x", "--threads", "100000"), "--threads"),
    "no threads": (("demo", "--threads", "0"), "--threads"),
    "limit": (("demo", "--limit-s", "nan"), "demo: --limit-s: expected seconds >= 0, got nan"),
    "surrogates": (
        ("generate", "a\udc80"),
        "generate: prompt: expected text that UTF-8 has, got a lone surrogate in the argument",
    ),
    "surrogates to stop at": (("generate", "x", "--stop", "\udc80"), "--stop: expected text"),
    "no number": (("generate", "x", "--temperature", "nan"), "'--temperature'"),
    "component": (
        ("generate", "x", "--schedule", "component", "--temperature", "0"),
        "do_sample: expected True for schedule 'component', got False (here: --temperature above 0",
    ),
    "temperature": (("generate", "x", "--temperature", "-1"), "--temperature"),
    "hot": (("generate", "x", "--temperature", "1e31"), "--temperature: expected 0 or numbers in"),
    "cold": (("tune", "--temperature", "1e-40"), "tune: --temperature: expected 0 or numbers in ["),
    "top-p": (("generate", "x", "--top-p", "1.1"), "--top-p: expected a mass in [0, 1]"),
    "top-p of tune": (("tune", "--top-p", "7"), "tune: --top-p: expected a mass in [0, 1]"),
    "min-p": (("generate", "x", "--min-p", "1.1"), "--min-p: expected a ratio in [0, 1]"),
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


# Mistakes that show only where there is torch, or a model.
NEED_TORCH = {name for name in MISTAKES if "device" in name} | {"chat"}
HELP = (("--help",), ("generate", "--help"), ("train", "draft", "--help"), ("bench", "--help"))


# These have tables.
SHOWN = (("methods",), ("methods", "--json"))


def test_help_and_mistakes_need_neither_torch_nor_rich() -> None:
    commands = [(2, [*words]) for name, (words, _) in MISTAKES.items() if name not in NEED_TORCH]
    commands += [(0, [*words]) for words in (*HELP, ("--version",))]
    without(("torch", "rich"), commands)
    without(("torch",), [(0, [*words]) for words in SHOWN])


def without(modules: Sequence[str], commands: Sequence[tuple[int, Sequence[str]]]) -> None:
    """Each command gives its exit code in a process that cannot import the modules."""
    program = f"""
import sys
from typer.testing import CliRunner
sys.modules |= dict.fromkeys({modules})
from specens.cli import app
for expected, command in {commands}:
    result = CliRunner().invoke(app, command)
    assert result.exit_code == expected, (command, result.output, result.exception)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_no_prompt_and_no_pipe_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="expected an argument, --file or a pipe, got none"):
        loading.read_prompts(None, None, lines=False)


@pytest.mark.parametrize("method", ["quantised", "mlspecqd"])
def test_what_is_not_installed_is_one_line(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers imports it, too, with its models.
    loading.load(["family:code", "family:draft"])
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
