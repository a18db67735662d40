# SPDX-License-Identifier: Apache-2.0
"""The report on GPU kernels: its arithmetic, its gate, and that its budget is of every kernel."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from gpu_report import BUDGET, Row, excesses, occupancy  # noqa: E402

ROW = Row("stats", "sm_90", 56, 128, 0, 0.5, 2)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 8, 1.0),
        (64, 0, 8, 0.5),
        (65, 0, 8, 0.375),  # 72 registers a thread, 28 warps that are 3 blocks
        (255, 0, 4, 0.125),
        (32, 100 * 1024, 8, 0.25),
        (16, 0, 1, 0.5),  # 32 blocks at most
    ],
)
def test_occupancy_is_that_of_the_calculator(
    registers: int, shared: int, warps: int, expected: float
) -> None:
    assert occupancy("sm_90", registers, shared, warps) == expected


def test_a_row_within_its_budget_passes() -> None:
    assert list(excesses(ROW, asdict(ROW))) == []
    assert list(excesses(replace(ROW, registers=40), asdict(ROW))) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 1}, "spills: expected 0, got 1"),
        ({"registers": 57}, "registers: expected <= 56, got 57"),
        ({"shared": 256}, "shared: expected <= 128, got 256"),
        ({"wide_loads": 0}, "expected 128-bit loads, got none"),
    ],
)
def test_a_row_beyond_its_budget_fails(change: dict[str, int], message: str) -> None:
    found = list(excesses(replace(ROW, **change), asdict(ROW)))
    assert found == [f"stats on sm_90: {message}"]


def test_a_kernel_without_a_budget_fails() -> None:
    assert list(excesses(ROW, None)) == [
        "stats on sm_90: expected an entry in gpu_budget.json, got none"
    ]


def test_no_kernel_of_the_budget_spills_but_two_of_eight_members() -> None:
    rows = json.loads(BUDGET.read_text()).values()
    spilling = [row["kernel"] for row in rows if row["spills"]]
    assert spilling == ["decide mixture M=8", "emit mixture M=8"]


@pytest.mark.slow
def test_the_budget_has_every_triton_kernel_of_the_report_and_no_other() -> None:
    """`make gpu-report` compiles them; it does not miss a kernel that is gone."""
    path = os.pathsep.join([str(BENCHMARKS), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    code = "import gpu_report\nfor launch in gpu_report.launches(): print(launch.name)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    kernels = {row["kernel"] for row in json.loads(BUDGET.read_text()).values()}
    assert set(process.stdout.splitlines()) == {k for k in kernels if not k.startswith("cuda ")}
