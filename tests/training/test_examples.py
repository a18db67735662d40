# SPDX-License-Identifier: Apache-2.0
"""Examples: what is held out, windows, batches and JSON lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specens.training import batches, examples
from specens.training.examples import HELD_OUT_MODULES, Example

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_modules_are_those_that_the_family_has_not_read() -> None:
    held_out = HELD_OUT_MODULES.pattern.split("|")
    assert sorted([*examples.HEAD_MODULES, *examples.EVALUATION_MODULES]) == sorted(held_out)
    texts = examples.held_out_texts()
    assert len(texts) == len(held_out)
    read = examples.read_texts(0, 300_000)
    assert sum(map(len, read)) >= 300_000
    assert not {*read} & {*texts}
    assert read == examples.read_texts(0, 300_000) != examples.read_texts(1, 300_000)


def test_windows_follow_each_other_without_overlap() -> None:
    found = examples.library_examples(["textwrap"], reference_characters=512)
    text = "".join(one.prompt + one.reference for one in found)
    assert len(found) > 10
    assert examples.held_out_texts()[-1].startswith(text)
    assert all(len(one.prompt) >= 256 and len(one.reference) >= 512 for one in found)


def test_every_example_comes_once_before_any_comes_again() -> None:
    order = [place for step in range(5) for place in batches.in_turn(10, 4, step, 7)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_examples_are_shuffled_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches._order.cache_clear()
    shuffled: list[int] = []
    real = torch.randperm

    def shuffle(count: int, **options: Any) -> Tensor:
        shuffled.append(count)
        return real(count, **options)

    monkeypatch.setattr(torch, "randperm", shuffle)
    order = [place for step in range(25) for place in batches.in_turn(17, 3, step, 11)]
    assert shuffled == [17] * 5  # 75 places
    dice = [torch.Generator().manual_seed(11 * 1_000_003 + epoch) for epoch in range(5)]
    epochs = [real(17, generator=one).tolist() for one in dice]
    assert order == [place for epoch in epochs for place in epoch][:75]
    # Whoever resumes there takes the same.
    batches._order.cache_clear()
    assert batches.in_turn(17, 3, 11, 11) == order[33:36]
    # More than one epoch in a step.
    assert sorted(batches.in_turn(2, 6, 0, 11)) == [0, 0, 0, 1, 1, 1]


def test_json_lines_are_read_and_split(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "c", "reference": "d", "tests": ["assert 1", "assert 2"]},
        *({"prompt": str(n)} for n in range(10)),
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = examples.read_examples(file)
    assert found[:2] == [Example("a", "b"), Example("c", "d", "assert 1\nassert 2")]
    kept, held_out = examples.split(found)
    assert [one.prompt for one in held_out] == ["2", "7"]
    assert len(kept) == 10
    assert not {*kept} & {*held_out}
    assert examples.split(found[:2]) == (found[:1], found[1:2])
