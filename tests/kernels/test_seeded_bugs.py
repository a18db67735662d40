# SPDX-License-Identifier: Apache-2.0
"""Whether the emulator and the sanitizers see what they are there for.

tests/native/seeded_bugs.cpp is built once for each bug that it can have; each build must fail, in
the way that is written here, and the one without a bug must pass under every sanitizer.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simt

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, whose sanitizers are needed"),
    pytest.mark.skipif(simt.what_is_missing() != "", reason=f"simt: {simt.what_is_missing()}"),
    pytest.mark.slow,
]

NO_BUG = 0
# Bug, sanitizer, and the words in which it is reported.
BUGS = {
    "a missing barrier": (1, "thread", "data race"),
    "an overrun": (2, "address", "heap-buffer-overflow"),
    "a missing fence": (3, "thread", "data race"),
    "a missing wait": (4, "address", "wrong result: NaN"),
    "a divergent barrier": (5, "address", "emulator: sum_doubled: divergent barrier"),
    "a launch that does not wait": (6, "address", "emulator: sum_doubled: early launch"),
    "a wait for the copy before": (7, "address", "wrong products"),
    "a copy over what is still read": (8, "thread", "data race"),
}


def run(bug: int, sanitizer: str, place: Path) -> tuple[int, str]:
    """Build and run with one bug; the exit status and all that was printed."""
    program = place / f"seeded_bugs_{bug}_{sanitizer}"
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-fno-strict-aliasing", f"-fsanitize={sanitizer}"]
    command += ["-DSPECENS_SIMT", f"-DSPECENS_SEED_BUG={bug}"]
    command += [f"-I{simt.ROOT / folder}" for folder in ("csrc", "tests")]
    command += ["-o", str(program), str(simt.ROOT / "tests/native/seeded_bugs.cpp")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    options = {
        "TSAN_OPTIONS": "suppress_equal_addresses=0:history_size=7",
        "ASAN_OPTIONS": "detect_leaks=0",  # the stack of a fiber that failed is not unwound
    }
    done = subprocess.run(
        [program], env=os.environ | options, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_kernel_without_a_bug_passes(sanitizer: str, tmp_path: Path) -> None:
    status, text = run(NO_BUG, sanitizer, tmp_path)
    assert status == 0, text


def test_every_bug_is_caught(tmp_path: Path) -> None:
    caught = []
    for name, (bug, sanitizer, words) in BUGS.items():
        status, text = run(bug, sanitizer, tmp_path)
        if status != 0 and words in text:
            caught.append(name)
    sys.stdout.write(f"{len(caught)} of {len(BUGS)} caught\n")
    assert caught == list(BUGS)
