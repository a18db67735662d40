# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, whatever ends the process that writes them. Needs no torch."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from specens_kernels import Refusal

CHECKPOINT = "checkpoint.safetensors"


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file anew: until all of it is on the disk, the old one is there.

    Args:
        file: what is replaced; what is no ordinary file, such as a pipe, is written to as it is.
        write: (path) writes the new content there.
    Raises:
        OSError: there is no room, or no leave; the old file is as it was.
    """
    file = file.resolve()
    if file.exists() and not file.is_file():
        write(file)
        return
    new = file.with_name(f"{file.name}.new")
    try:
        write(new)
        _sync(new)
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(file.parent)


def replace_text(file: Path, text: str) -> None:
    """`replace` with this text, in UTF-8."""
    replace(file, lambda new: new.write_text(text, encoding="utf-8"))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What a training writes into its folder.

    Raises:
        Refusal: there is no room, or no leave.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        expected = "a folder with room that can be written"
        raise Refusal("train", "folder", expected, f"{str(folder)!r} ({why})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
