# SPDX-License-Identifier: Apache-2.0
"""Pages are true: code runs and prints what stands below it, commands parse, named files exist.

What a page takes from registries and results is what benchmarks/report.py would write. That links
hold is shown by `make docs`.
"""

import itertools
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import typer

from specens.cli import app
from specens_kernels import ACCEPTANCE_RULES

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [block for text in PAGES.values() for block in BLOCK.findall(text)]
COMMANDS = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
README = BLOCK.findall(PAGES["README.md"])
# A code block, and the output that follows it.
OUTPUTS = [(*block, after[1]) for block, after in itertools.pairwise(README) if after[0] == "text"]
PYTHON = [
    code
    for language, code in BLOCKS
    if language == "python" and not any(code == shown for _, shown, _ in OUTPUTS)
]
SUFFIXES = "md|py|pyi|h|cpp|inc|cu|cuh|json|txt|yml"
# Rooms that a page may leave out: `loop/run.py` is a file of python/specens/.
ROOMS = (
    "",
    "python/specens/",
    "specens_kernels/",
    "csrc/",
    "csrc/cuda/",
    "tests/",
    "benchmarks/",
    "python/specens/members/",
)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("report")


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.split("(")[0].splitlines()[-1])
def test_python_blocks_run(code: str) -> None:
    if "from vllm import" in code:
        pytest.skip("vLLM: not in this environment; tests/engines runs what its page shows")
    exec(compile(code, "page", "exec"), {"__name__": "page"})


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code", "output"), OUTPUTS, ids=lambda part: part[:12])
def test_what_is_printed_stands_below(
    language: str, code: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if language == "python":
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    else:
        with pytest.raises(SystemExit, match="0"):
            app(shlex.split(code)[1:])
    assert capsys.readouterr().out.strip("\n") == output.strip("\n")


def test_the_readme_is_short_and_shows_its_output() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 180
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 150
    assert [language for language, *_ in OUTPUTS] == ["python", "sh"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("specens")])
def test_commands_parse(line: str) -> None:
    command, context = typer.main.get_command(app), None
    _, *words = shlex.split(line, comments=True)
    while hasattr(command, "commands"):  # a command of commands, such as train
        command = command.commands[words.pop(0)]
    context = command.make_context("page", words)
    assert context.params


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for text in PAGES.values() for name in re.findall(r"`make ([a-z-]+)", text)}
    targets |= {line.split()[1] for line in COMMANDS if line.startswith("make ")}
    assert targets >= {"demo", "test", "docs", "lines"}
    assert not [target for target in targets if f"\n{target}: " not in makefile]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = set(re.findall(rf"`([\w./-]+\.(?:{SUFFIXES}))`", PAGES[page]))
    named |= set(
        re.findall(r"`((?:python|csrc|tests|docs|benchmarks|recipes)/[\w./-]*)`", PAGES[page])
    )
    named |= set(re.findall(r"`(specens_kernels/[\w./-]*)`", PAGES[page]))
    gone = {name for name in named if not any((ROOT / room / name).exists() for room in ROOMS)}
    written = {"card.json", "evaluation.json"}  # by what the page tells of
    assert gone <= written


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "<!-- BEGIN" in text])
def test_pages_say_what_registries_and_results_say(page: str, report: ModuleType) -> None:
    """Else run benchmarks/report.py, or `make docs`."""
    assert report.main(["--check", "--page", str(ROOT / page)]) == 0


def test_every_mark_is_closed() -> None:
    for page, text in PAGES.items():
        begun = re.findall(r"<!-- BEGIN ([\w.-]+) -->", text)
        assert begun == re.findall(r"<!-- END ([\w.-]+) -->", text), page


def test_every_rule_has_its_formula() -> None:
    text = PAGES["docs/rules.md"]
    parts = re.findall(
        r"^### (\w+)\n\n(.+?)\n\n<!-- BEGIN rule\.(\w+) -->", text, re.DOTALL | re.MULTILINE
    )
    assert {name for name, formula, marked in parts if name == marked and formula} == set(
        ACCEPTANCE_RULES
    )
