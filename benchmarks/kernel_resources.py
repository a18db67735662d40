# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels: registers, spills and shared memory, as JSON.

Compiles every csrc/cuda/*.cu for each architecture; needs nvcc and no GPU. The exit status is 1 if
a kernel spills or keeps a stack frame.

    python benchmarks/kernel_resources.py [--arch sm_90a] > resources.json
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "--Werror=all-warnings", "-Xptxas", "-v")

_KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def find_nvcc() -> str | None:
    """The path of nvcc, where it is."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def kernel_name(symbol: str) -> str:
    """The kernel's name in a mangled symbol, with the number of its variant if it is a template."""
    found = re.search(r"\d([a-z]+(?:_[a-z]+)+|thresholds)(?:ILNS\w*?E(\d)E)?E", symbol)
    if found is None:
        return symbol
    return found[1] + (f"<{found[2]}>" if found[2] else "")


def resources(source: Path, architecture: str, nvcc: str) -> list[dict[str, Any]]:
    """One entry for each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-arch={architecture}", "-cubin", str(source)]
        command += ["-o", str(Path(folder, "kernels.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} for {architecture}:\n{done.stderr}")
    entries: list[dict[str, Any]] = []
    for line in done.stderr.splitlines():
        if found := _KERNEL.search(line):
            name = kernel_name(found[1])
            entries.append({"file": source.name, "kernel": name, "architecture": architecture})
        elif found := _SPILLS.search(line):
            entries[-1]["stack_bytes"] = int(found[1])
            entries[-1]["spill_bytes"] = int(found[2]) + int(found[3])
        elif found := _USED.search(line):
            entries[-1]["registers"] = int(found[1])
            entries[-1]["static_shared_bytes"] = int(found[2] or 0)
    return entries


def main() -> None:
    """Print the list; fail where a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="instead of the usual three")
    architectures = parser.parse_args().arch or ARCHITECTURES
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc")
    entries = [
        entry
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        for architecture in architectures
        for entry in resources(source, architecture, nvcc)
    ]
    print(json.dumps(entries, indent=2))
    if any(entry["spill_bytes"] or entry["stack_bytes"] for entry in entries):
        sys.exit(1)


if __name__ == "__main__":
    main()
