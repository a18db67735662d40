# SPDX-License-Identifier: Apache-2.0
"""The emulator: builds the CUDA kernels for the CPU, with CMake, and calls the ops on them.

simt.h runs CUDA's threads; module.cpp is the module that CMake builds. To add to that module, bind
it there.
"""

import fcntl
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from specens_kernels import cuda

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "simt"


def what_is_missing() -> str:
    """Why the emulated kernels cannot be built here; empty if they can."""
    for name in ("cmake", "ninja", "pybind11"):
        try:
            __import__(name)
        except ImportError:
            return f"no package {name}"
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "no C++ compiler"
    return "" if sysconfig.get_platform().endswith("x86_64") else "the emulator knows x86-64 only"


@cache
def build() -> Any:
    """The module `specens_simt`; one process builds at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> Any:
    import cmake
    import ninja
    import pybind11

    tool = Path(cmake.CMAKE_BIN_DIR, "cmake")
    configure = [tool, "-S", ROOT, "-B", BUILD, "-G", "Ninja", "--log-level=WARNING"]
    configure.append(f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}")
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    configure += ["-DSPECENS_CUDA=OFF", "-DSPECENS_WERROR=ON"]
    for command in (configure, [tool, "--build", BUILD, "--target", "specens_simt"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return load(BUILD / "tests" / f"specens_simt{sysconfig.get_config_var('EXT_SUFFIX')}")


def load(path: Path) -> Any:
    """The module `specens_simt` in this file."""
    loader = ExtensionFileLoader("specens_simt", str(path))
    spec = spec_from_file_location("specens_simt", path, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def emulated() -> Iterator[Any]:
    """Inside, the backend "cuda" is the emulator, which takes CPU tensors; gives its module."""
    before = cuda.module, cuda.AVAILABLE
    cuda.module, cuda.AVAILABLE = build(), True
    try:
        yield cuda.module
    finally:
        cuda.module, cuda.AVAILABLE = before
