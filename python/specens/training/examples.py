# SPDX-License-Identifier: Apache-2.0
"""What models are trained and measured on: JSON lines of the user's, or Python's standard library.

The shipped family has read the standard library but for some modules (`family/CARD.md`). Of those
held-out modules some give prompts to train heads on and the others evaluate, so that no text is in
both; drafts train on modules that the family has read, and are measured on all that are held out.
To add a field of the JSON lines, add it to `Example` and `read_examples`.
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def read_examples(command: str, file: Path) -> list[Example]:
    """JSON lines with "prompt", and "reference" or "answer", and "tests" (text or list of texts).

    Raises:
        ValueError: the file cannot be read, has no examples, or a line is no such object.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(
            f"{command}: data: expected a text file that can be read, got {str(file)!r} ({why})"
        ) from error
    examples = [
        _example(command, f"line {number} of {file.name}", line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if len(examples) < 2:
        raise ValueError(
            f"{command}: data: expected at least 2 examples, got {len(examples)} in {file.name}"
        )
    return examples


def _example(command: str, where: str, line: str) -> Example:
    try:
        fields: Any = json.loads(line)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{command}: data: expected a JSON object in {where}, got {line[:40]!r}")
    tests = fields.get("tests", "")
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    found = {
        "prompt": fields.get("prompt"),
        "reference": fields.get("reference", fields.get("answer", "")),
        "tests": tests,
    }
    for name, value in found.items():
        if not isinstance(value, str) or (name == "prompt" and not value.strip()):
            raise ValueError(
                f'{command}: data: expected text as "{name}" in {where}, got {value!r}'
            )
    return Example(**found)


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
    found: list[str] = []
    for text in texts:
        if sum(map(len, found)) >= characters:
            break
        found.append(text)
    return found


def token_windows(tokenizer: Any, texts: Sequence[str], tokens: int, seed: int) -> Tensor:
    """(W, tokens) int64. The texts one after the other, cut and shuffled.

    Raises:
        ValueError: the texts do not fill one window.
    """
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor([token for row in rows for token in (*separator, *row)])
    count = len(stream) // tokens
    if count == 0:
        raise ValueError(
            f"train: data: expected text of at least {tokens} tokens, got {len(stream)}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return stream[: count * tokens].reshape(count, tokens)[order]


def in_turn(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Which of `count` examples step `step` takes: each comes once before any comes again.

    It depends on nothing but the arguments, so that a run can be resumed anywhere.
    """
    places = (divmod(place, count) for place in range(step * batch, (step + 1) * batch))
    return [_order(count, epoch, seed)[within] for epoch, within in places]


# Two: a step may end one epoch and begin the next.
@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> list[int]:
    dice = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(count, generator=dice).tolist()
    return order


def row_seeds(seed: int, step: int, rows: int) -> Tensor:
    """(rows,) int64: seeds for `uniforms`, from nothing but the arguments."""
    dice = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(2**62, (rows,), generator=dice)
