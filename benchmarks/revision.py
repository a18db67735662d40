# SPDX-License-Identifier: Apache-2.0
"""Which sources a number belongs to, with git or without.

A machine may be given a copy of the files and no repository. Then the environment variable COMMIT,
or a file of that name beside the Makefile, says what git would have said; else the sources' hash
does.
Needs the standard library alone.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("specens_kernels", "python", "csrc", "tests", "benchmarks")
RESULTS = "benchmarks/results"
FILES = ("CMakeLists.txt", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".pyi", ".h", ".cpp", ".inc", ".cu", ".cuh", ".json", ".safetensors")


def commit(root: Path = ROOT) -> str:
    """As `git describe --always --dirty`; `tree-` and a hash where nobody knows the commit."""
    told = os.environ.get("COMMIT", "").strip()
    file = root / "COMMIT"
    if not told and file.is_file():
        told = file.read_text().strip()
    return told or _described(root) or f"tree-{tree(root)}"


def tree(root: Path = ROOT, folders: Sequence[str] = FOLDERS, files: Sequence[str] = FILES) -> str:
    """Hash of the sources, by their names and contents; results and builds play no part."""
    digest = hashlib.sha256()
    for path in sorted(_sources(root, folders, files)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()[:12]


def _sources(root: Path, folders: Sequence[str], files: Sequence[str]) -> Iterator[Path]:
    yield from (root / name for name in files if (root / name).is_file())
    results = root / RESULTS
    for name in folders:
        for path in (root / name).rglob("*"):
            if path.suffix in SUFFIXES and path.is_file() and results not in path.parents:
                yield path


def _described(root: Path) -> str:
    """What git says of this very folder; empty without git, or inside another repository.

    A result that was saved a moment ago does not make the sources of the next one dirty.
    """
    asked = (
        ("rev-parse", "--show-toplevel"),
        ("describe", "--always", "--abbrev=12"),
        ("status", "--porcelain", "--untracked-files=no", "--", ".", f":(exclude){RESULTS}"),
    )
    answers = []
    for words in asked:
        try:
            command = ["git", "-C", str(root), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        answers.append(done.stdout.strip())
    top, described, changed = answers
    dirty = "-dirty" if changed else ""
    return f"{described}{dirty}" if Path(top).resolve() == root.resolve() else ""
