# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and curves: what an end at any moment leaves, and files that are no checkpoints."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from trainings import Interrupted

from specens.training import files, loop
from specens.training.settings import StepPlan
from specens_kernels import Refusal

PLAN = StepPlan(4, 0.1, warmup_steps=1, save_every=2)


def optimise(folder: Path, *, resume: bool = False) -> tuple[Tensor, list[dict[str, float]]]:
    """Bring two numbers, of which the second has no gradient, towards 1."""
    weights = [torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)]
    rows = loop.optimise(
        {"moved": weights[0], "rests": weights[1]},
        lambda step, memory: ((weights[0] - 1).square().sum(), {"fact": float(step)}),
        PLAN,
        folder,
        settings={"name": "test"},
        resume=resume,
    )
    return weights[0], rows


def curves(folder: Path) -> list[str]:
    return (folder / loop.CURVES).read_text().splitlines()


@pytest.mark.parametrize("number", [1, 2])
def test_curves_are_whole_after_an_end_between_checkpoint_and_curves(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("whole", "ended")]
    for folder in folders:
        folder.mkdir()
    whole, rows = optimise(folders[0])
    written: list[Path] = []
    write = loop.write_csv

    def ends(file: Path, rows: Any) -> None:
        written.append(file)
        if len(written) == number:
            raise Interrupted
        write(file, rows)

    monkeypatch.setattr(loop, "write_csv", ends)
    with pytest.raises(Interrupted):
        optimise(folders[1])
    monkeypatch.undo()
    weight, resumed = optimise(folders[1], resume=True)
    assert torch.equal(weight, whole)
    assert resumed == rows
    assert curves(folders[1]) == curves(folders[0])
    assert len(curves(folders[0])) == 5
    names = {file.name for file in folders[1].iterdir()}
    assert names == {loop.CHECKPOINT, loop.CURVES}


@contextmanager
def no_larger_files_than(size: int) -> Iterator[None]:
    """For this process; Python takes the signal for an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_the_last_checkpoint_stays(tmp_path: Path) -> None:
    optimise(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with (
        no_larger_files_than(100),
        pytest.raises(Refusal, match="train: folder: expected a folder with room"),
    ):
        optimise(tmp_path, resume=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / loop.CHECKPOINT).unlink()
    with no_larger_files_than(100), pytest.raises(Refusal, match="File too large"):
        optimise(tmp_path)
    assert {*tmp_path.iterdir()} == {tmp_path / loop.CURVES}


def edited(change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            run = json.loads(opened.metadata()["run"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        change(run, tensors)
        save_file(tensors, file, metadata={"run": json.dumps(run)})

    return edit


def with_run(text: str) -> Callable[[Path], None]:
    return lambda file: save_file({"a": torch.zeros(1)}, file, metadata={"run": text})


HOSTILE: dict[str, Callable[[Path], None]] = {
    "no JSON": with_run("{"),
    "deep JSON": with_run("[" * 100_000),
    "a list": with_run("[1, 2, 3]"),
    "nothing": with_run("{}"),
    "other fields": with_run('{"settings": {}, "rows": [], "memory": {}, "more": 1}'),
    "settings of another type": edited(lambda run, _: run.update(settings=[1])),
    "no rows": edited(lambda run, _: run.update(rows=[])),
    "too many rows": edited(lambda run, _: run["rows"].append(dict(run["rows"][0], step=4))),
    "rows of another type": edited(lambda run, _: run.update(rows={"step": 0})),
    "a row of text": edited(lambda run, _: run["rows"][1].update(loss="0.1")),
    "a row of flags": edited(lambda run, _: run["rows"][1].update(loss=True)),
    "a row without its step": edited(lambda run, _: run["rows"][1].update(step=3)),
    "a row without a column": edited(lambda run, _: run["rows"][1].pop("fact")),
    "memory of another type": edited(lambda run, _: run.update(memory=[])),
    "memory of text": edited(lambda run, _: run.update(memory={"baseline": "x"})),
    "no parameter": edited(lambda _, tensors: tensors.pop("parameter/moved")),
    "another parameter": edited(lambda _, tensors: tensors.update(more=torch.zeros(3))),
    "moments of another": edited(
        lambda _, tensors: tensors.update({"optimiser/x/step": torch.zeros(())})
    ),
    "no second moment": edited(lambda _, tensors: tensors.pop("optimiser/moved/exp_avg_sq")),
    "a shape that broadcasts": edited(
        lambda _, tensors: tensors.update({"parameter/moved": torch.zeros(1)})
    ),
    "moments of another shape": edited(
        lambda _, tensors: tensors.update({"optimiser/moved/exp_avg": torch.zeros(1)})
    ),
    "another type of number": edited(
        lambda _, tensors: tensors.update({"parameter/moved": torch.zeros(3, dtype=torch.int64)})
    ),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:50]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    optimise(tmp_path)
    HOSTILE[kind](tmp_path / loop.CHECKPOINT)
    with pytest.raises(Refusal, match="train: resume: expected a checkpoint in") as refused:
        optimise(tmp_path, resume=True)
    assert len(str(refused.value).splitlines()) == 1


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    files.replace_text(link, "text")
    assert link.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "file")
    files.replace_text(link, "text")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "text"
