# SPDX-License-Identifier: Apache-2.0
"""Build the native module with CMake; everything else lives in pyproject.toml.

Without a compiler the package installs without the module and runs on its reference kernels; such a
wheel fits every platform.
SPECENS_NATIVE=1 makes that an error; SPECENS_NATIVE=0 does not look for a compiler. Where there is
nvcc, the module has CUDA kernels, too: SPECENS_CUDA=ON makes its absence an error, OFF ignores it.
SPECENS_CUDA_ARCHITECTURES=90a-real builds for one device only.
"""

import os
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError, run

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("SPECENS_NATIVE", "auto")
CUDA = os.environ.get("SPECENS_CUDA", "AUTO")
ARCHITECTURES = os.environ.get("SPECENS_CUDA_ARCHITECTURES")


def tool(package, folder):
    """The program of a package, or of the system where there is no such package."""
    if find_spec(package) is not None:
        return Path(getattr(import_module(package), folder), package)
    path = shutil.which(package)
    if path is None:
        raise CompileError(f"no native kernels: there is no {package}")
    return path


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
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        build = ROOT / "build" / sys.implementation.cache_tag
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={tool('ninja', 'BIN_DIR')}")
        configure.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}")
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        if find_spec("pybind11") is not None:  # else CMake looks for the system's
            configure.append(f"-Dpybind11_DIR={import_module('pybind11').get_cmake_dir()}")
        configure.append(f"-DSPECENS_CUDA={CUDA}")
        if ARCHITECTURES:
            configure.append(f"-DSPECENS_CUDA_ARCHITECTURES={ARCHITECTURES}")
        try:
            run(configure, check=True)
        except CalledProcessError:
            raise CompileError("no native kernels: CMake says above what is missing") from None
        run([cmake, "--build", build], check=True)


class Wheel(bdist_wheel):
    """Name a wheel by what is in it."""

    def get_tag(self):
        """Any platform's, unless the module was built."""
        built = any(Path(self.bdist_dir).glob("**/_C.*.so"))
        return super().get_tag() if built else ("py3", "none", "any")


native = Extension("specens_kernels._C", sources=[], optional=NATIVE != "1")
setup(ext_modules=[native], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
