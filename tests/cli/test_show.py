# SPDX-License-Identifier: Apache-2.0
"""What the command line shows: help, `probe`, `bench` and `demo`."""

import dataclasses
import json

import pytest
from commands import run

from specens.methods import METHODS
from specens.schedules import SCHEDULES
from specens_kernels import ENSEMBLES

pytestmark = pytest.mark.usefixtures("quick")


def test_help_names_every_schedule() -> None:
    shown = " ".join(run("generate", "--help").output.split())
    for name, schedule in SCHEDULES.items():
        names = ", ".join(field.name for field in dataclasses.fields(schedule))
        assert f"{name} ({names}): {schedule.summary}." in shown or not names
        assert f"{schedule.summary}." in shown
    assert all(f" {name}" in shown for name in (*ENSEMBLES, *METHODS))


def test_probe_says_what_it_found() -> None:
    found = json.loads(run("probe", "family:draft", "--json").stdout)
    assert (found["mode"], found["tree"]) == ("slot", True)
    table = run("probe", "family:draft")
    assert table.exit_code == 0
    assert "slot: all rows of a batch" in table.stdout


@pytest.mark.slow
def test_bench_compares_every_schedule() -> None:
    short = ("bench", "def f(x):", "--max-new-tokens", "6", "--repeats", "1", "--gamma", "1,2")
    rows = json.loads(run(*short, "--json").stdout)["rows"]
    names = ["plain", "component", "speculative 1", "alternating 1", "speculative 2"]
    assert [row["name"] for row in rows] == [*names, "alternating 2"]
    assert rows[0]["ratio"] == 1
    assert rows[0]["acceptance_rate"] is None
    assert rows[1]["calls_per_token"] == 1
    greedy = run(*short, "--temperature", "0", "--draft", "family:draft")
    assert greedy.exit_code == 0
    assert "component" not in greedy.stdout


@pytest.mark.slow
def test_demo_shows_text_and_speed() -> None:
    short = ("demo", "--max-new-tokens", "6", "--repeats", "1")
    found = json.loads(run(*short, "--json").stdout)
    assert found["same_greedy_text"] == len(found["texts"]) == 3
    assert all(one["text"] for one in found["texts"])
    assert [len(rows) for rows in found["tables"].values()] == [2, 2]
    shown = run(*short)
    assert shown.exit_code == 0
    assert "vs plain" in shown.stdout
