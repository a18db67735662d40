# SPDX-License-Identifier: Apache-2.0
"""The loop of training: its rates, what a run that was resumed is, and what ends a run."""

import builtins
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import LIKELIHOOD, TEXTS, TINY, Interrupted, interrupt_after

from specens.members.weight_head import WeightHead
from specens.training import loop
from specens.training.diversed import Pair, train_head
from specens.training.settings import HeadSettings, StepPlan

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = StepPlan(1, 0.1)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    plan = StepPlan(steps=14, rate=1.0, warmup_steps=4)
    rates = [plan.rate_at(step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)  # half of the cosine's ten steps
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.03
    assert plan.rate_at(14) == pytest.approx(0, abs=1e-12)


def test_a_head_that_was_resumed_is_the_same_to_the_bit(pair: Pair, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, rows = train_head(pair, TEXTS, LIKELIHOOD, TINY, folders[0])
    with pytest.raises(Interrupted):
        train_head(pair, TEXTS, LIKELIHOOD, TINY, folders[1], progress=interrupt_after(3))
    parts, resumed = train_head(pair, TEXTS, LIKELIHOOD, TINY, folders[1], resume=True)
    assert torch.equal(whole.delta, parts.delta)
    assert torch.equal(whole.bias, parts.bias)
    assert resumed == rows
    for name in ("curves.csv", "weight_head.safetensors", "checkpoint.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert whole.delta.abs().min() > 0
    loaded = WeightHead.load(folders[1])
    assert torch.equal(loaded.delta, whole.delta)
    assert loaded.metadata["temperature"] == 1.0
    # A head that forgot the baseline, the moments or the steps' number would differ.
    other, _ = train_head(
        pair, TEXTS, LIKELIHOOD, replace(TINY, seed=1), (tmp_path / "whole").parent
    )
    assert not torch.equal(other.delta, whole.delta)


def test_draft_and_target_are_frozen(pair: Pair, tmp_path: Path) -> None:
    before = [p.clone() for model in (pair.draft, pair.target) for p in model.parameters()]
    train_head(pair, TEXTS, LIKELIHOOD, TINY, tmp_path)
    after = [p for model in (pair.draft, pair.target) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def test_only_the_same_run_is_resumed(pair: Pair, tmp_path: Path) -> None:
    def train(settings: HeadSettings = TINY, resume: bool = False) -> None:
        train_head(pair, TEXTS, LIKELIHOOD, settings, tmp_path, resume=resume)

    with pytest.raises(ValueError, match="resume: expected a checkpoint in"):
        train(resume=True)
    train()
    with pytest.raises(ValueError, match=r"folder: expected a folder without checkpoint\.safetens"):
        train()
    with pytest.raises(ValueError, match=r"expected seed = 0, as in the checkpoint, got 3"):
        train(replace(TINY, seed=3), resume=True)
    plan = replace(TINY.plan, rate=0.5)
    with pytest.raises(ValueError, match=r"expected plan\.rate = 0\.05"):
        train(replace(TINY, plan=plan), resume=True)
    (tmp_path / loop.CHECKPOINT).write_text("text")
    with pytest.raises(ValueError, match="resume: expected a checkpoint in"):
        train(resume=True)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="train: loss: expected a number, got nan in step 0"):
        loop.optimise(
            {"weight": weight}, lambda *_: (weight.sum() * math.nan, {}), ONE, tmp_path, settings={}
        )
    assert weight.tolist() == [1, 1]


def test_curves_are_drawn_where_matplotlib_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"step": float(step), "loss": step**0.5} for step in range(4)]
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not loop.draw_curves(tmp_path / "curves.png", rows, ["loss"])
    assert "pip install 'specens-kernels[train]'" in caplog.text
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert loop.draw_curves(tmp_path / "curves.png", rows, ["loss"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
