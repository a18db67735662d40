# SPDX-License-Identifier: Apache-2.0
"""Write what the README and docs/ take from the results and from the registries.

A page gets it between `<!-- BEGIN name -->` and `<!-- END name -->`. A name is that of a table in a
result file (benchmarks/results), which a benchmark saved beside its rows; of a sentence or a small
table that is made of several results (statements.py); or of what a registry lists (catalogue.py).
`--check` changes nothing and fails if a page would change. What a registry lists and no page shows
is an error. To add a place, mark it in a page.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import catalogue
import statements
from statements import Results

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- BEGIN (?P<name>[\w.-]+) -->\n).*?(<!-- END (?P=name) -->)", re.DOTALL)


def places(results: Results) -> dict[str, Callable[[], str]]:
    """Markdown of every place that a page can have, by name."""
    tables = {
        name: partial(_table, table, result, file)
        for file, result in results.items()
        for name, table in result["tables"].items()
    }
    of_results = {name: partial(state, results) for name, state in statements.STATEMENTS.items()}
    of_both = {name: partial(made, results) for name, made in catalogue.MEASURED.items()}
    return {**tables, **of_results, **of_both, **catalogue.LISTED}


def _table(table: dict[str, Any], result: dict[str, Any], file: str) -> str:
    text = statements.markdown(table["columns"], table["rows"])
    caption = table["caption"]
    source = statements.source(result, file)
    return f"{caption[:1].upper()}{caption[1:]}:\n\n{text}\n\n{source}\n"


def fill(text: str, known: Mapping[str, Callable[[], str]]) -> str:
    """The text with its marked places filled.

    Raises:
        ValueError: the text asks for what nothing is known of.
    """

    def place(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"report: {name}: expected one of {names}, got none")
        return f"{match[1]}{known[name]()}{match[3]}"

    return MARKED.sub(place, text)


def pages() -> list[Path]:
    """The pages with marked places."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill, or check."""
    parser = argparse.ArgumentParser(description="Fill the pages' marked places.")
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    parser.add_argument("--page", type=Path, action="append", help="None is README.md and docs/")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    known = places({path.name: json.loads(path.read_text(encoding="utf-8")) for path in files})
    used: set[str] = set()
    for page in options.page or pages():
        before = page.read_text(encoding="utf-8")
        try:
            after = fill(before, known)
        except ValueError as error:
            print(f"{page.name}: {error}", file=sys.stderr)
            return 1
        used.update(match["name"] for match in MARKED.finditer(before))
        if options.check and after != before:
            print(f"{page.name} is out of date: run benchmarks/report.py", file=sys.stderr)
            return 1
        if after != before:
            page.write_text(after, encoding="utf-8")
    missing = set() if options.page else {*catalogue.LISTED} - used
    if missing:
        print(f"no page has a place for {', '.join(sorted(missing))}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
