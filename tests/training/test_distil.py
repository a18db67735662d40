# SPDX-License-Identifier: Apache-2.0
"""Drafts: what they learn from, where, and that a run that was resumed is the same to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import noisy, toy
from trainings import ENSEMBLES, Interrupted, interrupt_after

from specens.training import batches, distil, loop
from specens.training.settings import DraftSettings, StepPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def learn(tmp_path: Path, draft: Any, targets: list[Any], **changes: Any) -> list[dict[str, float]]:
    """Some steps on random windows of 11 tokens; the draft is trained in place."""
    shares = (1 / len(targets),) * len(targets)
    settings = DraftSettings(
        weights=changes.pop("weights", shares),
        windows_per_step=8,
        prompt_tokens=changes.pop("prompt_tokens", 2),
        new_tokens=6,
        plan=StepPlan(changes.pop("steps", 30), changes.pop("rate", 0.02), 3, save_every=2),
        **{name: value for name, value in changes.items() if name not in ("options",)},
    )
    windows = torch.randint(11, (32, 12), generator=torch.Generator().manual_seed(0))
    law = distil.Targets(targets, settings, 11)
    tmp_path.mkdir(exist_ok=True)
    return distil.train_draft(draft, law, windows, settings, tmp_path, **changes.get("options", {}))


def trainable(seed: int = 3) -> Any:
    draft = toy(seed)
    return draft.requires_grad_(True)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "tv"])
def test_every_divergence_teaches_the_draft(kind: str, tmp_path: Path) -> None:
    rows = learn(tmp_path, trainable(), [toy(4)], divergence=kind)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["acceptance"] > rows[0]["acceptance"] + 0.05


def test_what_is_read_of_models_in_training_mode_is_what_they_say_in_evaluation() -> None:
    dropout = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    draft, target = (toy(seed, kind="gpt2", **dropout) for seed in (3, 4))
    windows = torch.randint(11, (4, 8))
    targets = distil.Targets([target], DraftSettings(), 11)
    expected = targets.logits(windows), distil.held_out_acceptance(draft, targets, windows)
    draft.train()
    target.train()
    assert torch.equal(targets.logits(windows), expected[0])
    assert distil.held_out_acceptance(draft, targets, windows) == expected[1]


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_an_ensemble_of_targets_teaches_its_own_law(ensemble: str, tmp_path: Path) -> None:
    draft, targets = trainable(), [toy(4), toy(5)]
    settings = DraftSettings(weights=(0.3, 0.7), ensemble=ensemble)
    tokens = torch.randint(11, (2, 6))
    law = distil.Targets(targets, settings, 11).logits(tokens).softmax(-1)
    with torch.no_grad():
        each = [model(tokens).logits for model in targets]
    if ensemble == "mixture":
        expected = 0.3 * each[0].softmax(-1) + 0.7 * each[1].softmax(-1)
    else:
        expected = (0.3 * each[0] + 0.7 * each[1]).softmax(-1)
    torch.testing.assert_close(law, expected)
    rows = learn(tmp_path, draft, targets, ensemble=ensemble)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_the_tokens_with_the_most_left_to_learn_are_selected() -> None:
    settings = DraftSettings(select=0.4)
    draft, target, reference = torch.randn(3, 2, 5, 7)
    losses, chosen = distil.token_losses(draft, target, settings, reference)
    known, _ = distil.token_losses(reference, target, replace(settings, select=1.0))
    excess = (losses - known).flatten()
    assert int(chosen.sum()) == 4
    assert excess[chosen.flatten()].min() > excess[~chosen.flatten()].max()
    counts = torch.zeros(2, 5, dtype=torch.bool)
    counts[0, :3] = True
    _, chosen = distil.token_losses(draft, target, settings, reference, counts)
    assert int(chosen.sum()) == 1
    assert bool(counts[chosen].all())


def test_positions_are_rejected_as_often_as_the_laws_differ() -> None:
    draft, target = (1.5 * torch.randn(2, 1, 6, 9)).repeat(1, 2000, 1, 1)
    seen = distil.rejected(draft, target, batches.row_seeds(0, 0, 2000)).double()
    expected = 0.5 * (draft[0].softmax(-1) - target[0].softmax(-1)).abs().sum(-1).double()
    error = (expected * (1 - expected) / 2000).sqrt()
    z = (seen.mean(0) - expected) / error
    assert z.abs().max() < 4.5  # six numbers: once in 25,000
    # One coin for two positions would make them depend on each other.
    assert abs(torch.corrcoef(seen.T).fill_diagonal_(0)).max() < 4.5 / 2000**0.5
    assert not distil.rejected(draft, draft, batches.row_seeds(0, 0, 2000)).any()


def test_online_learns_where_the_draft_was_rejected_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = toy(4)
    same = trainable(4)
    before = [p.clone() for p in same.parameters()]
    rows = learn(tmp_path / "same", same, [target], online=True, steps=2)
    assert [row["trained_tokens"] for row in rows] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, same.parameters(), strict=True))
    close = noisy(target, 0.5).requires_grad_(True)
    law = distil.Targets([target], DraftSettings(), 11)
    windows = torch.randint(11, (20, 12))
    earlier = distil.held_out_acceptance(close, law, windows)["mean"]
    rows = learn(tmp_path / "close", close, [target], online=True, steps=40, rate=0.003)
    for row in rows[:3]:  # 8 texts of 6 tokens
        assert 0 < row["trained_tokens"] < 48
    assert distil.held_out_acceptance(close, law, windows)["mean"] > earlier + 0.02

    def everywhere(draft_logits: Tensor, *_: Tensor) -> Tensor:
        return torch.ones(draft_logits.shape[:2], dtype=torch.bool)

    monkeypatch.setattr(distil, "rejected", everywhere)
    (row,) = learn(tmp_path / "all", close, [target], online=True, steps=1)
    assert row["trained_tokens"] == 48  # what was written, and not the prompts
    (row,) = learn(tmp_path / "short", close, [target], online=True, steps=1, prompt_tokens=64)
    assert row["trained_tokens"] == 48  # all of it, also after windows that are shorter


class Words:
    """A tokenizer of 11 words, which is less than some models' logits have columns."""

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(11)}


def test_online_takes_models_that_are_padded_to_other_widths(tmp_path: Path) -> None:
    options = {"tokenizers": [Words(), Words()]}
    wide = toy(4, 13)
    rows = learn(tmp_path, trainable(), [wide], online=True, steps=2, options=options)
    assert all(row["trained_tokens"] > 0 for row in rows)
    with pytest.raises(ValueError, match="tokenizers: expected one per model"):
        learn(tmp_path / "none", trainable(), [wide], online=True, steps=1)


@pytest.mark.parametrize("way", ["text", "online", "selected"])
def test_a_draft_that_was_resumed_is_the_same_to_the_bit(way: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reference": toy(8)} if way == "selected" else {}
    changes = {
        "steps": 5,
        "online": way == "online",
        "select": 0.4 if way == "selected" else 1.0,
    }

    def run(folder: str, **more: Any) -> Any:
        draft = trainable()
        learn(tmp_path / folder, draft, [toy(4)], options=options | more, **changes)
        return draft

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("parts", progress=interrupt_after(3))
    parts = run("parts", resume=True)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    name = loop.CHECKPOINT
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
