# SPDX-License-Identifier: Apache-2.0
"""The commands `specens export`: folders that other libraries load."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from specens import export

_Folder = Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")]


def custom_generate(folder: _Folder) -> None:
    """Write a folder for transformers' `model.generate(custom_generate=FOLDER)`."""
    _show(export.custom_generate(folder))


def kernels(folder: _Folder) -> None:
    """Write the Triton ops and the reference as a kernel that Hugging Face's `kernels` loads."""
    _show(export.kernels(folder)[-1:])


def _show(written: list[Path]) -> None:
    sys.stdout.writelines(f"{path}\n" for path in written)
