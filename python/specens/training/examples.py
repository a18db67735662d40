# SPDX-License-Identifier: Apache-2.0
"""What models are trained and measured on: JSON lines of the user's, or Python's standard library.

The shipped family has read the standard library but for some modules (`family/CARD.md`). Of those
held-out modules some give prompts to train heads on and the others evaluate, so that no text is in
both; drafts train on modules that the family has read, and are measured on all that are held out.
`batches.py` makes tensors of it. To add a field of the JSON lines, add it to `Example` and
`read_examples`.
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specens_kernels import Refusal

# Source and documentation pages of these modules are never trained on.
HELD_OUT_MODULES = re.compile(
    "bisect|calendar|contextlib|csv|difflib|fractions|functools|heapq|queue|random|sched|shlex"
    "|shutil|statistics|textwrap"
)
# Tests repeat themselves, and tables of characters teach nothing.
SKIPPED = {"encodings", "idle_test", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
# Held-out modules whose prompts heads are trained on.
HEAD_MODULES = (
    "bisect",
    "difflib",
    "fractions",
    "functools",
    "queue",
    "random",
    "sched",
    "shlex",
    "shutil",
)
# Held-out modules that nothing is trained on but by name: what heads are evaluated on.
EVALUATION_MODULES = ("calendar", "contextlib", "csv", "heapq", "statistics", "textwrap")


@dataclass(frozen=True)
class Example:
    """A prompt, and what is known of its continuation.

    reference: the text that should follow, or the answer; empty where there is none.
    tests: Python code that fails where the continuation is wrong; empty where there is none.
    """

    prompt: str
    reference: str = ""
    tests: str = ""


def read_examples(file: Path, argument: str = "data") -> list[Example]:
    """JSON lines with "prompt", and "reference" or "answer", and "tests" (text or list of texts).

    Raises:
        Refusal: the file, which was given as `argument`, cannot be read, has no examples, or a line
            is no such object.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        got = f"{str(file)!r} ({why})"
        raise Refusal("train", argument, "a text file that can be read", got) from error
    examples = [
        _example(argument, f"line {number} of {file.name}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len(examples) < 2:
        got = f"{len(examples)} in {file.name}"
        raise Refusal("train", argument, "at least 2 examples", got)
    return examples


def _example(argument: str, where: str, line: str) -> Example:
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise Refusal("train", argument, f"a JSON object in {where}", repr(line[:40]))
    tests = fields.get("tests", "")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    texts = {
        "prompt": fields.get("prompt"),
        "reference": fields.get("reference", fields.get("answer", "")),
        "tests": tests,
    }
    for name, text in texts.items():
        if not isinstance(text, str) or (name == "prompt" and not text.strip()):
            raise Refusal("train", argument, f'text as "{name}" in {where}', repr(text))
        # JSON may hold halves of characters, which no tokenizer and no file takes.
        if any("\ud800" <= character <= "\udfff" for character in text):
            expected = f'whole characters as "{name}" in {where}'
            raise Refusal("train", argument, expected, "a lone surrogate")
    return Example(**texts)


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Four fifths to train on, and every fifth example to evaluate; each at least one."""
    held_out = list(examples[4::5]) or [examples[-1]]
    kept = [example for example in examples if not any(example is other for other in held_out)]
    return kept, held_out


def library_examples(
    modules: Sequence[str], *, prompt_characters: int = 256, reference_characters: int = 768
) -> list[Example]:
    """Windows of whole lines of standard library modules, one after the other."""
    library = Path(sysconfig.get_path("stdlib"))
    return [
        Example(prompt, reference)
        for module in modules
        for prompt, reference in _windows(
            (library / f"{module}.py").read_text(encoding="utf-8"),
            prompt_characters,
            reference_characters,
        )
    ]


def _windows(text: str, first: int, second: int) -> Iterator[tuple[str, str]]:
    """Pairs of texts of at least so many characters; what is left at the end is dropped."""
    parts = ["", ""]
    for line in text.splitlines(keepends=True):
        parts[len(parts[0]) >= first] += line
        if len(parts[1]) >= second:
            yield parts[0], parts[1]
            parts = ["", ""]


def read_code() -> Iterator[tuple[str, str]]:
    """Name and text of the standard library's modules."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED.isdisjoint(parts):
            # Only a module of the top level is held out by name: `random.py`, not `x/random.py`.
            yield "/".join(parts).removesuffix(".py"), path.read_text(errors="replace")


def held_out_texts() -> list[str]:
    """The modules of the standard library that the shipped family has not read."""
    library = Path(sysconfig.get_path("stdlib"))
    names = HELD_OUT_MODULES.pattern.split("|")
    return [(library / f"{name}.py").read_text(encoding="utf-8") for name in names]


def read_texts(seed: int, characters: int) -> list[str]:
    """Modules that the shipped family has read, shuffled, until there are so many characters."""
    texts = [text for name, text in read_code() if text and not HELD_OUT_MODULES.fullmatch(name)]
    random.Random(seed).shuffle(texts)
    chosen: list[str] = []
    for text in texts:
        if sum(map(len, chosen)) >= characters:
            break
        chosen.append(text)
    return chosen
