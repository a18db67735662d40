# SPDX-License-Identifier: Apache-2.0
"""The specification with a line gone wrong, which a test must tell from the right one."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from specens_kernels import reference


@contextmanager
def with_bug(line: str, instead: str, tmp_path: Path) -> Iterator[ModuleType]:
    """The specification with one line replaced, as a package of its own."""
    name, files = "specens_kernels.wrong", sorted(Path(reference.__path__[0]).glob("*.py"))
    sources = {file.name: file.read_text() for file in files}
    assert sum(source.count(line) for source in sources.values()) == 1, "this test must follow"
    for file, source in sources.items():
        (tmp_path / file).write_text(source.replace(line, instead))
    spec = importlib.util.spec_from_file_location(
        name, tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for loaded in [each for each in sys.modules if each.startswith(name)]:
            del sys.modules[loaded]
