# SPDX-License-Identifier: Apache-2.0
"""Kernels with one bug of choice, which random trees have to show.

A mutant is a copy of `specens_kernels` in which one text stands for another: in a Triton kernel, or
in C++ or CUDA, which are then built anew. To add one: a line in `MUTANTS`.
"""

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = ("bindings.cpp", *(f"cpu/{name.name}" for name in (ROOT / "csrc" / "cpu").glob("*.cpp")))
# As CMakeLists.txt has them, but for the level: these are built to be wrong.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-DSPECENS_STAND_INS")
EMULATED = ("-DSPECENS_SIMT", "-fno-strict-aliasing", "-x", "c++")
FLAGS += ("-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off", "-fopenmp-simd")


class Mutant(NamedTuple):
    """A bug of the kernels that `part` of the random trees shows."""

    part: str
    name: str
    file: str
    text: str
    instead: str

    @property
    def backend(self) -> str:
        if self.file.startswith(CUDA):
            return "cuda"
        return "native" if self.file.endswith(".cpp") else "triton"

    def mutated(self) -> str:
        """The file's text with the bug.

        Raises:
            ValueError: the text that it stands for is not there once.
        """
        right = (ROOT / self.file).read_text(encoding="utf-8")
        if right.count(self.text) != 1:
            count = right.count(self.text)
            raise ValueError(f"{self.name}: {self.file}: expected {self.text!r} once, got {count}")
        return right.replace(self.text, self.instead)


MASK, WINDOW, ORDER, DESCENDING = (
    "a mask's bit off by one",
    "a window on slots",
    "a merge in an order of its own",
    "a compaction that descends",
)
CPU, CUDA, TRITON = "csrc/cpu", "csrc/cuda", "specens_kernels/triton"
MUTANTS = (
    Mutant(
        "attention",
        MASK,
        f"{CPU}/attention.cpp",
        "const int64_t at = slot - reach.length;",
        "const int64_t at = slot - reach.length + 1;",
    ),
    Mutant("attention", MASK, f"{TRITON}/attention.py", "half >> (t & 31)", "half >> (t + 1 & 31)"),
    Mutant(
        "attention",
        MASK,
        f"{CUDA}/attention.cuh",
        "bits = word(0) << -at;",
        "bits = word(0) << -at << 1;",
    ),
    Mutant(
        "attention",
        WINDOW,
        f"{CPU}/attention.cpp",
        "reach.length + params_.depths.at(batch, node) - params_.window + 1;",
        "reach.length + node - params_.window + 1;",
    ),
    Mutant(
        "attention",
        WINDOW,
        f"{TRITON}/attention.py",
        "(length + depth - tree.window)",
        "(length + node - tree.window)",
    ),
    Mutant(
        "attention",
        WINDOW,
        f"{CUDA}/attention.cuh",
        "first_bits(reach.length + depth - params.window + 1 - slot)",
        "first_bits(reach.length + node - params.window + 1 - slot)",
    ),
    Mutant(
        "attention",
        ORDER,
        f"{CPU}/attention.cpp",
        "  kernels().join_rows(first.out + i * value_stride_, stride, weights,",
        "  const bool last = batch % 2 == 1;\n"
        "  if (last) std::reverse(weights, weights + reach.splits);\n"
        "  kernels().join_rows(first.out + i * value_stride_ +\n"
        "      (last ? (reach.splits - 1) * stride : 0), last ? -stride : stride, weights,",
    ),
    Mutant(
        "attention",
        ORDER,
        f"{TRITON}/attention.py",
        "    c, f = tl.arange(0, together), tl.arange(0, shape.f)\n    stride",
        "    c, f = tl.arange(0, together), tl.arange(0, shape.f)\n"
        "    c = tl.where(b % 2 == 1, tl.maximum(count, 1) - 1 - c, c)\n"
        "    c = tl.where(c < 0, together, c)\n    stride",
    ),
    Mutant(
        "compact",
        DESCENDING,
        f"{CPU}/compact.cpp",
        "    ends[static_cast<size_t>(b)]",
        "    std::reverse(moves.begin() + (b > 0 ? ends[static_cast<size_t>(b - 1)] : 0),\n"
        "                 moves.end());\n"
        "    ends[static_cast<size_t>(b)]",
    ),
    Mutant(
        "compact",
        DESCENDING,
        f"{TRITON}/compact.py",
        "    for i in range(0, depth):\n",
        "    for k in range(0, depth):\n        i = depth - 1 - k\n",
    ),
    Mutant(
        "compact",
        DESCENDING,
        f"{CUDA}/compact.cu",
        "if (i < count) values[i] = load_fresh(from[i] + word);\n      }\n",
        "const int last = count - 1 - i;\n"
        "        if (i < count) store(to[last] + word, load_fresh(from[last] + word));\n"
        "      }\n      continue;\n",
    ),
)


class Builder:
    """Builds the CPU's kernels in a folder; what no mutant changes is compiled once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.objects: dict[str, Path] = {}

    def _compiled(self, source: Path, name: str, folder: Path) -> Path:
        """The object of one source, which may be a copy of the file that has this name."""
        target = self.place / f"{name.replace('/', '_')}.o"
        paths = (ROOT / "csrc", folder, pybind11.get_include(), sysconfig.get_path("include"))
        command = ["g++", *FLAGS, *(f"-I{path}" for path in paths), "-c", str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return target

    def emulator(self, mutant: Mutant) -> Path:
        """The module `specens_simt` with this bug: files that do not read it are compiled once."""
        folder = self.place / f"mutant_{MUTANTS.index(mutant)}"
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / mutant.file).write_text(mutant.mutated(), encoding="utf-8")
        paths = (ROOT / "tests", pybind11.get_include(), sysconfig.get_path("include"))
        command = ["g++", *FLAGS, *EMULATED, *(f"-I{path}" for path in paths)]
        names = ["tests/simt/module.cpp", "csrc/cuda/bindings.cpp"]
        names += [f"{CUDA}/{path.name}" for path in sorted((ROOT / CUDA).glob("*.cu"))]
        objects = []
        for name in names:
            source = folder / name if name.startswith(CUDA) else ROOT / name
            these = [*command, f"-I{folder / 'csrc'}", str(source)]
            read = subprocess.run([*these, "-MM"], capture_output=True, text=True, check=True)
            known = str(folder / mutant.file) not in read.stdout
            target = (self.place if known else folder) / f"{name.replace('/', '_')}.o"
            if not (known and target.exists()):
                subprocess.run([*these, "-c", "-o", str(target)], check=True)
            objects.append(str(target))
        module = folder / "specens_simt.so"
        subprocess.run(["g++", "-shared", *objects, "-o", str(module)], check=True)
        return module

    def module(self, mutant: Mutant | None = None) -> Path:
        """`_C` with this bug, or with none; without the CUDA kernels."""
        for name in SOURCES:
            if name not in self.objects:
                source = ROOT / "csrc" / name
                self.objects[name] = self._compiled(source, name, source.parent)
        objects = dict(self.objects)
        stem = "right"
        if mutant is not None:
            name = mutant.file.removeprefix("csrc/")
            stem = f"mutant_{MUTANTS.index(mutant)}"
            copy = self.place / f"{stem}.cpp"
            copy.write_text(mutant.mutated(), encoding="utf-8")
            objects[name] = self._compiled(copy, stem, (ROOT / mutant.file).parent)
        target = self.place / stem / "_C.so"
        target.parent.mkdir(exist_ok=True)
        # Threads are those of the OpenMP that torch has loaded, as CMakeLists.txt says.
        command = ["g++", "-shared", *map(str, objects.values()), "-o", str(target)]
        subprocess.run(command, check=True)
        return target


def package(mutant: Mutant, place: Path) -> Path:
    """A folder to import the package from, whose Triton kernels have this bug."""
    folder = place / f"package_{MUTANTS.index(mutant)}"
    shutil.copytree(ROOT / "specens_kernels", folder / "specens_kernels")
    (folder / mutant.file).write_text(mutant.mutated(), encoding="utf-8")
    return folder
