# SPDX-License-Identifier: Apache-2.0
"""The optimiser's steps, in the same way for heads and drafts: rate, clipping, checkpoint, curves.

A step depends on its number, the seed and the state that a checkpoint holds, and on nothing else:
a run that was interrupted and resumed ends with the same bits as one that was not. A checkpoint is
one safetensors file that takes the place of the last one at once; no pickle. It holds the curves,
too, and the CSV file is written from it.
"""

import csv
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specens.training.files import CHECKPOINT, replace, writing
from specens.training.settings import StepPlan
from specens_kernels import Refusal

CURVES = "curves.csv"
# What AdamW keeps of each parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_logger = logging.getLogger("specens")


# One step: its number, and what is remembered between steps (numbers by name, which it may change)
# -> the loss, and what the curves should show.
Step = Callable[[int, dict[str, float]], tuple[Tensor, dict[str, float]]]


def optimise(
    parameters: Mapping[str, Tensor],
    step_of: Step,
    plan: StepPlan,
    folder: Path,
    *,
    settings: Mapping[str, Any],
    resume: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> list[dict[str, float]]:
    """Minimise; write checkpoints and curves.

    Args:
        parameters: leaves that require gradients; changed in place.
        step_of: computes one step's loss.
        plan: how many steps, and their rate.
        folder: where `checkpoint.safetensors` and `curves.csv` go; it exists.
        settings: JSON of all that shapes the run. A resumed run must have the same.
        resume: go on from the folder's checkpoint; else there must be none.
        progress: called with the number of steps done, after each.
    Returns:
        One row for each step: step, loss, rate, gradient_norm, and what `step_of` adds.
    Raises:
        Refusal: there is a checkpoint and no `resume`, or the other way round, or it is of
            another run.
    """
    optimiser = torch.optim.AdamW(
        list(parameters.values()), lr=plan.rate, weight_decay=plan.weight_decay
    )
    settings = json.loads(json.dumps({**settings, "plan": asdict(plan)}))
    file = folder / CHECKPOINT
    rows: list[dict[str, float]] = []
    memory: dict[str, float] = {}
    if resume:
        rows, memory = _restore(file, parameters, optimiser, settings)
        # Who was ended between the two has a new checkpoint and old curves.
        _write(folder / CURVES, lambda new: write_csv(new, rows))
        progress(len(rows))
    elif file.exists():
        expected = f"a folder without {CHECKPOINT}, or resume"
        raise Refusal("train", "folder", expected, repr(str(folder)))
    for step in range(len(rows), plan.steps):
        for group in optimiser.param_groups:
            group["lr"] = plan.rate_at(step)
        loss, facts = step_of(step, memory)
        if not math.isfinite(loss.item()):
            raise Refusal("train", "loss", "a number", f"{loss.item()} in step {step}")
        optimiser.zero_grad()
        if loss.requires_grad:
            torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), plan.clip)
        if loss.requires_grad:
            optimiser.step()
        row = {"step": step, "loss": loss.item(), **facts}
        rows.append(row | {"rate": plan.rate_at(step), "gradient_norm": norm.item()})
        if len(rows) % plan.save_every == 0 or len(rows) == plan.steps:
            _save(file, parameters, optimiser, settings, rows, memory)
            _write(folder / CURVES, lambda new: write_csv(new, rows))
        progress(len(rows))
    return rows


def _save(
    file: Path,
    parameters: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    memory: Mapping[str, float],
) -> None:
    tensors = {f"parameter/{name}": tensor.detach() for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        for key, value in optimiser.state[tensor].items():
            tensors[f"optimiser/{name}/{key}"] = value
    facts = {"settings": dict(settings), "rows": list(rows), "memory": dict(memory)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _write(file, lambda new: save_file(tensors, new, metadata={"run": json.dumps(facts)}))


def _write(file: Path, write: Callable[[Path], object]) -> None:
    with writing(file.parent):
        replace(file, write)


@dataclass(frozen=True)
class _Run:
    """What a checkpoint knows beside its tensors, as JSON says it."""

    settings: dict[str, Any]
    rows: list[dict[str, float]]
    memory: dict[str, float]

    def check(self, steps: int) -> None:
        """Raise ValueError or TypeError where it is not what `_save` writes."""
        if not isinstance(self.settings, dict) or not _numbers(self.memory):
            raise TypeError("settings or memory of another type")
        if not isinstance(self.rows, list) or not 1 <= len(self.rows) <= steps:
            raise ValueError("another number of steps")
        for step, row in enumerate(self.rows):
            if not _numbers(row) or row.get("step") != step or {*row} != {*self.rows[0]}:
                raise ValueError(f"step {step} is not what it was")


def _numbers(value: Any) -> bool:
    """Whether it is numbers by name."""
    return isinstance(value, dict) and all(
        isinstance(each, (int, float)) and not isinstance(each, bool) for each in value.values()
    )


def _restore(
    file: Path,
    parameters: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any],
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The rows and what was remembered; parameters and optimiser are as they were."""
    try:
        with safe_open(file, "pt") as opened:
            run = _Run(**json.loads((opened.metadata() or {})["run"]))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if isinstance(run.settings, dict):
            _check_same("", run.settings, settings)
        run.check(settings["plan"]["steps"])
        state = _state(parameters, tensors)
    except Refusal:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        expected = f"a checkpoint in {str(file)!r}"
        raise Refusal("train", "resume", expected, _short(error)) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    return run.rows, run.memory


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def _state(
    parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's, by its places of the parameters; ValueError if tensors are of other ones."""
    state: dict[int, dict[str, Tensor]] = {}
    wanted: dict[str, Any] = {}
    for place, (name, parameter) in enumerate(parameters.items()):
        kind = parameter.shape, parameter.dtype
        wanted[f"parameter/{name}"] = kind
        keys = {key: f"optimiser/{name}/{key}" for key in _MOMENTS}
        # A parameter that has never had a gradient has no moments.
        if any(each in tensors for each in keys.values()):
            wanted |= dict.fromkeys(keys.values(), kind)
            wanted[keys["step"]] = torch.Size([]), torch.float32
            state[place] = {key: tensors[each] for key, each in keys.items() if each in tensors}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name} is {found.get(name)} and not {wanted.get(name)}")
    return state


def _check_same(where: str, saved: Any, given: Any) -> None:
    """Refuse to resume what would be another run, and name the first difference."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in sorted({*saved, *given}):
            _check_same(f"{where}.{name}".lstrip("."), saved.get(name), given.get(name))
    elif saved != given:
        expected = f"{where} = {saved}, as in the checkpoint"
        raise Refusal("train", "resume", expected, given)


def write_csv(file: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """One line per row; the first row's names are the columns."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(file: Path, rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> bool:
    """One panel per name over the steps, as PNG. False, and a line in the log, without matplotlib.

    Each panel shows every step faintly and a running mean.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _logger.warning(
            "%s is not drawn: it needs matplotlib (pip install 'specens-kernels[train]')", file.name
        )
        return False
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    steps = [row["step"] for row in rows]
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [row[name] for row in rows]
        panel.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=1)
        panel.plot(steps, _running_mean(values), color="tab:blue")
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=7)
    figure.savefig(file, dpi=110)
    return True


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential, about ten steps long, without the first steps' bias."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = 0.9 * total + 0.1 * value, 0.9 * mass + 0.1
        means.append(total / mass)
    return means
