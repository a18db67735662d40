# SPDX-License-Identifier: Apache-2.0
"""What the site takes from outside of docs/, and links that hold in both places.

Pages link one another as files of the repository, so that they can be read there. A hook of mkdocs:
it adds the files of `OUTSIDE` and turns each link into one of the site. A link to any other file
stays as it is, and `mkdocs build --strict` refuses it: files that are not pages are named in code
font. To show one more file, add it to `OUTSIDE`.

`Fields` is for mkdocstrings: a class says what its fields are, a line each; the page lists them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
# File of the repository -> page or picture of the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "python/specens/family/CARD.md": "family.md",
    **{
        f"{RESULTS}/{picture.name}": f"results/{picture.name}"
        for picture in sorted((ROOT / RESULTS).glob("*.png"))
    },
}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?\))")

FIELD = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add what stands outside of docs/."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links between files of the repository links between pages."""
    places = {uri: path for path, uri in OUTSIDE.items()}
    folder = posixpath.dirname(places.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        uri = OUTSIDE.get(path) or (path[5:] if path.startswith("docs/") else None)
        if uri is None:
            return match[0]
        target = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{target}{match[3]}"

    return LINK.sub(link, markdown)


class Fields(griffe.Extension):
    """Make the lines "name: meaning." of a class's docstring a list."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called for every class that has been read."""
        if cls.docstring and FIELD.search(cls.docstring.value):
            first, *rest = FIELD.sub(r"* `\1`: ", cls.docstring.value).split("\n* ")
            cls.docstring.value = "\n* ".join((f"{first}\n", *rest)) if rest else first
