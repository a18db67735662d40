# SPDX-License-Identifier: Apache-2.0
"""The arrows between modules: `specens → specens_kernels → torch`, and nowhere a circle.

Imports inside of functions count, and so do those for type checkers alone: a circle that a late
import hides is one all the same.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"specens": ROOT / "python" / "specens", "specens_kernels": ROOT / "specens_kernels"}


def name_of(file: Path, folder: Path) -> str:
    parts = [folder.name, *file.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(file, folder): file for folder in FOLDERS.values() for file in folder.rglob("*.py")
}


def parsed(name: str) -> ast.AST:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def for_type_checkers(tree: ast.AST) -> set[ast.AST]:
    """The nodes below `if TYPE_CHECKING`."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {inner for block in blocks for inner in ast.walk(block)}


def targets(name: str, node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = name if FILES[name].stem == "__init__" else name.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        home = ".".join(filter(None, (package, node.module))) if node.level else node.module or ""
        for alias in node.names:
            yield f"{home}.{alias.name}" if f"{home}.{alias.name}" in FILES else home


def imports(name: str, *, types: bool) -> set[str]:
    """The project's modules that a module imports; with `types`, those for type checkers, too.

    The doors of the two packages import nothing by themselves, they find names on first use: what
    they hand out is looked up where it lives.
    """
    tree = parsed(name)
    skipped = set() if types else for_type_checkers(tree)
    return {
        target
        for node in ast.walk(tree)
        if node not in skipped
        for target in targets(name, node)
        if target in FILES and target not in FOLDERS and target != name
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, or nothing."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in sorted(graph[name]):
                if ring := search(target, [*path, name]):
                    return ring
            done.add(name)
        return []

    return next((ring for name in sorted(graph) if (ring := search(name, []))), [])


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_make_no_circle_late_imports_counted() -> None:
    graph = {name: imports(name, types=False) for name in FILES if name not in FOLDERS}
    assert circle(graph) == []
    assert graph["specens.decoder"] > {"specens.loop.run", "specens.schedules"}, "it sees imports"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("specens_kernels")])
def test_kernels_know_nothing_of_decoding(name: str) -> None:
    modules = {target for node in ast.walk(parsed(name)) for target in targets(name, node)}
    assert not {target for target in modules if target.split(".")[0] in ("specens", "transformers")}


def test_rooms_are_entered_from_above() -> None:
    """Which rooms of `specens` may import which; a new arrow is a decision, made here."""
    above = {
        "loop": {"members"},
        "members": set(),
        "schedules": {"loop"},
        "tuning": {"loop", "members", "schedules", "decoder"},
        "training": {"loop", "members", "schedules", "decoder", "tuning", "family"},
        "engines": set(),
        "export": set(),
    }
    for room, allowed in above.items():
        for name in FILES:
            if name.startswith(f"specens.{room}"):
                rooms = {
                    target.split(".")[1]
                    for target in imports(name, types=False)
                    if target.startswith("specens.")
                }
                assert rooms <= {room, *allowed}, name


@pytest.mark.parametrize("module", ["specens.cli", "specens.schedules", "specens.methods"])
def test_what_answers_at_once_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
