# SPDX-License-Identifier: Apache-2.0
"""Fill the result tables of the README and of docs/ from benchmarks/results/*.json.

A benchmark saves small tables beside its rows, each under a name. A page gets the table of that
name, where it was measured, and the file it came from, between `<!-- RESULTS:BEGIN name -->` and
`<!-- RESULTS:END name -->`. `--check` changes nothing and fails if a page would change.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKED = re.compile(
    r"(<!-- RESULTS:BEGIN (?P<name>[\w.-]+) -->\n).*?(<!-- RESULTS:END (?P=name) -->)", re.DOTALL
)


def tables(results: Path) -> dict[str, str]:
    """Markdown of every table in the result files, by name."""
    found = {}
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        for name, table in result["tables"].items():
            found[name] = f"{_markdown(table)}\n\n{_source(result, path.name)}\n"
    return found


def _markdown(table: dict[str, Any]) -> str:
    columns = table["columns"]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *table["rows"]]
    escaped = ([str(cell).replace("|", r"\|") for cell in cells] for cells in lines)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)
    caption = table["caption"]
    return f"{caption[:1].upper()}{caption[1:]}:\n\n{text}"


def _source(result: dict[str, Any], file: str) -> str:
    machine, versions = result["machine"], result["versions"]
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_isa']}; {packages}; "
        f"{result['date'][:10]}, commit {result['commit']}. Medians; more, and their spread, in "
        f"`benchmarks/results/{file}`."
    )


def fill(text: str, found: dict[str, str]) -> str:
    """The text with its marked places filled.

    Raises:
        ValueError: the text asks for a table that no result has.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise ValueError(f"report: {name}: expected a saved table, got none; known: {known}")
        return f"{match[1]}{found[name]}{match[3]}"

    return MARKED.sub(table, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill, or check."""
    parser = argparse.ArgumentParser(description="Fill the pages' tables from the results.")
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    parser.add_argument("--page", type=Path, action="append", help="None is README.md and docs/")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    found = tables(options.results)
    for page in options.page or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = page.read_text()
        try:
            after = fill(before, found)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        if options.check and after != before:
            print(f"{page.name} is out of date: run benchmarks/report.py", file=sys.stderr)
            return 1
        if not options.check:
            page.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
