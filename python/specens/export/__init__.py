# SPDX-License-Identifier: Apache-2.0
"""Folders that other libraries load: transformers' `custom_generate`, and Hugging Face's `kernels`.

What is written is copies of sources as they stand, and a file that says what they are. Imports no
torch, so that a wrong folder is answered at once. To export to another library, write its function
here and its command in `cli/export.py`.
"""

import hashlib
import json
import shutil
from importlib.resources import as_file, files
from pathlib import Path

from specens_kernels import Refusal, __version__

_DISTRIBUTION = "specens-kernels"
_PACKAGE = "specens_kernels"


def custom_generate(folder: Path) -> list[Path]:
    """Write `generate.py` and its requirements, for `model.generate(custom_generate=folder)`.

    Args:
        folder: may hold more, such as a model; a `custom_generate` in it may not be there.
    Returns:
        The files that were written.
    Raises:
        Refusal: the folder has a `custom_generate`, or is a file.
    """
    home = _fresh(folder, "custom_generate")
    source = (files(__name__) / "generate.py").read_text(encoding="utf-8")
    contents = {"generate.py": source, "requirements.txt": f"{_DISTRIBUTION}>={__version__}\n"}
    for name, text in contents.items():
        (home / name).write_text(text, encoding="utf-8")
    return [home / name for name in contents]


def kernels(folder: Path) -> list[Path]:
    """Write `specens_kernels` as a universal kernel: the reference and the Triton ops, uncompiled.

    Args:
        folder: a kernel repository, for `kernels.get_local_kernel(folder)`; a `build` in it may not
            be there.
    Returns:
        The files that were written.
    Raises:
        Refusal: the folder has a `build`, or is a file.
    """
    home = _fresh(folder, "build") / "torch-universal"
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    with as_file(files(_PACKAGE)) as package:
        shutil.copytree(package, home / _PACKAGE, ignore=ignored)
    written = sorted(path for path in (home / _PACKAGE).rglob("*") if path.is_file())
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in written)).hexdigest()
    metadata = {
        "name": _DISTRIBUTION,
        # The name under which it is imported and registers its ops, so that versions do not meet.
        "id": f"_{_PACKAGE}_{digest[:8]}",
        "version": 1,  # of a kernel's interface, as hubs count
        "license": "Apache-2.0",
        "python-depends": [],
        # The loader asks for one of its own names; a universal variant is loaded for any.
        "backend": {"type": "cpu"},
    }
    path = home / "metadata.json"
    path.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return [*written, path]


def _fresh(folder: Path, name: str) -> Path:
    """A new folder of this name in a folder."""
    home = folder / name
    if folder.exists() and not folder.is_dir():
        raise Refusal("export", "folder", "a folder, or the path of a new one", repr(str(folder)))
    if home.exists():
        raise Refusal("export", "folder", f"one without {name!r}", repr(str(folder)))
    home.mkdir(parents=True)
    return home
