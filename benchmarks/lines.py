# SPDX-License-Identifier: Apache-2.0
"""How long things are: the lines of each part, and what is longer than the house likes.

    make lines

Prints each part, the reading path, files over 500 lines, functions over 60 and signatures over 8
parameters. It is no gate: it names what is to be mended next. Signatures are those of Python
functions outside the command line, `self` not counted. C++ is formatted by clang-format, so that a
function ends where a brace stands under its first letter. Needs the standard library alone.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PARTS = ("specens_kernels", "python", "csrc", "tests", "benchmarks", "recipes", "docs")
SUFFIXES = (".py", ".h", ".cpp", ".inc", ".cu", ".cuh")
FILE, FUNCTION, SIGNATURE = 500, 60, 8
# What a newcomer reads to know how a token is made; where each name lives.
READING_PATH = (
    "specens.decoder",
    "specens.calls",
    "specens.loop.run",
    "specens.loop.schedule",
    "specens.schedules.speculative",
    "specens_kernels.ops.verify",
    "specens_kernels.reference.verify",
)
AIM = 1_800
PACKAGES = {"specens": ROOT / "python", "specens_kernels": ROOT}
# The first line of a function's definition, which is neither a type, a statement nor a directive.
OTHERS = "namespace|struct|class|enum|union|extern|return|else|for|if|while|switch|do|using|case"
DEFINITION = re.compile(rf"(?!(?:{OTHERS})\b)\w")


class Function(NamedTuple):
    """A function, and how long it and its signature are."""

    name: str
    lines: int
    parameters: int = 0


def python_functions(text: str) -> Iterator[Function]:
    """Every function of a Python file, methods and inner ones too."""

    def within(node: ast.AST, path: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from within(child, path)
                continue
            name = f"{path}{child.name}"
            if not isinstance(child, ast.ClassDef):
                taken = child.args
                every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
                own = [each for each in every if each.arg not in ("self", "cls")]
                assert child.end_lineno is not None
                yield Function(name, child.end_lineno - child.lineno + 1, len(own))
            yield from within(child, f"{name}.")

    yield from within(ast.parse(text), "")


def cpp_functions(text: str) -> Iterator[Function]:
    """Every function of a C++ file: at no indentation, and methods in a class there."""
    lines = text.splitlines()
    in_class = False
    for start, line in enumerate(lines):
        if re.match(r"(?:template\b.*)?(?:struct|class)\b.*\{$", line):
            in_class = True
        elif line.startswith("}"):
            in_class = False
        indent = "  " if in_class else ""
        if not line.startswith(indent) or not DEFINITION.match(line[len(indent) :]):
            continue
        opening = next((n for n in range(start, len(lines)) if lines[n][-1:] in "{;}"), start)
        signature = " ".join(lines[start : opening + 1])
        if not signature.endswith("{") or "(" not in signature or "= {" in signature:
            continue
        closed = (n for n in range(opening, len(lines)) if lines[n].startswith(f"{indent}}}"))
        name = re.search(r"([\w:~]+)\(", signature)
        yield Function(name[1] if name else signature, next(closed, opening) - start + 1)


def functions(path: Path) -> list[Function]:
    """Every function of a file."""
    text = path.read_text(encoding="utf-8")
    return list(python_functions(text) if path.suffix == ".py" else cpp_functions(text))


def home(name: str) -> Path:
    """The file that a dotted name lives in."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        raise ValueError(f"lines: name: expected one of {', '.join(PACKAGES)}, got {name!r}")
    for size in range(len(parts), 0, -1):
        stem = PACKAGES[parts[0]].joinpath(*parts[:size])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.exists():
                return path
    raise ValueError(f"lines: name: expected a name of a module, got {name!r}")


def length(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def show(title: str, rows: list[tuple[str, int]]) -> None:
    """A title with the number of rows, and the rows, the longest first."""
    print(f"\n{title}: {len(rows)}")
    for name, number in sorted(rows, key=lambda row: (-row[1], row[0])):
        print(f"{number:7,}  {name}")


def main() -> None:
    """Print everything."""
    files = {
        part: [path for path in sorted((ROOT / part).rglob("*")) if path.suffix in SUFFIXES]
        for part in PARTS
    }
    for part, paths in files.items():
        print(f"{sum(map(length, paths)):7,}  {part}")
    named = {str(path.relative_to(ROOT)): path for paths in files.values() for path in paths}
    path_of = {str(home(name).relative_to(ROOT)): length(home(name)) for name in READING_PATH}
    print(f"\nreading path: {sum(path_of.values()):,} lines, aim {AIM:,}")
    for name, number in path_of.items():
        print(f"{number:7,}  {name}")
    every = [
        (f"{name}: {each.name}", each) for name, path in named.items() for each in functions(path)
    ]
    long = [(name, length(path)) for name, path in named.items() if length(path) > FILE]
    show(f"files over {FILE} lines", long)
    show(
        f"functions over {FUNCTION} lines",
        [(name, each.lines) for name, each in every if each.lines > FUNCTION],
    )
    show(
        f"signatures over {SIGNATURE} parameters, outside the command line",
        [
            (name, each.parameters)
            for name, each in every
            if each.parameters > SIGNATURE and "specens/cli/" not in name
        ],
    )


if __name__ == "__main__":
    main()
