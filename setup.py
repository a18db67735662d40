# SPDX-License-Identifier: Apache-2.0
"""Build the native module with CMake; everything else lives in pyproject.toml.

Without a compiler the package installs without the module and runs on its reference kernels.
SPECENS_NATIVE=1 makes that an error; SPECENS_NATIVE=0 does not look for a compiler. Where there is
nvcc, the module has CUDA kernels, too: SPECENS_CUDA=ON makes its absence an error, OFF ignores it.
"""

import os
import sys
from pathlib import Path
from subprocess import CalledProcessError, run

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("SPECENS_NATIVE", "auto")
CUDA = os.environ.get("SPECENS_CUDA", "AUTO")


class CMakeBuild(build_ext):
    """Run CMake where setuptools would run a compiler."""

    def build_extension(self, ext):
        """Build the module, or none: setuptools turns the error of an optional one into a line."""
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.unlink(missing_ok=True)  # a module of older sources is worse than none
        if self.editable_mode:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        if NATIVE == "0":
            raise CompileError("skipped, as SPECENS_NATIVE=0 asks")
        tool = Path(cmake.CMAKE_BIN_DIR, "cmake")
        build = ROOT / "build" / sys.implementation.cache_tag
        configure = [tool, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}")
        configure.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}")
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        configure.append(f"-DSPECENS_CUDA={CUDA}")
        try:
            run(configure, check=True)
        except CalledProcessError:
            raise CompileError("no native kernels: CMake says above what is missing") from None
        run([tool, "--build", build], check=True)


native = Extension("specens_kernels._C", sources=[], optional=NATIVE != "1")
setup(ext_modules=[native], cmdclass={"build_ext": CMakeBuild})
