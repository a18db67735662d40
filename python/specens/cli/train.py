# SPDX-License-Identifier: Apache-2.0
"""What `specens train diversed` and `specens train draft` share: options, data, and results.

A command parses, loads, trains, measures on held-out text and writes one JSON file of what it
found. With no option both run on the family that ships with the package, offline, in minutes on a
CPU. To add an option of both, add it here, and to `training/settings.py`.
"""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from specens.cli import loading
from specens.training.examples import Example, read_examples, split
from specens.training.files import CHECKPOINT, replace_text, writing
from specens.training.settings import DraftSettings, HeadSettings
from specens.tuning.finite import finite
from specens_kernels import Refusal

RESULT = "evaluation.json"

Data = Annotated[
    Path | None,
    typer.Option(
        help='JSON lines with "prompt", and "reference" or "answer", and "tests" where the reward '
        "needs them. None is Python's standard library."
    ),
]
Evaluation = Annotated[
    Path | None,
    typer.Option(help="JSON lines to measure on, beside --data. None is every fifth line of it."),
]
Out = Annotated[Path, typer.Option(help="Folder for everything that is written.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint in --out, with all else equal.")
]
Steps = Annotated[int, typer.Option(min=1, max=2**31, help="Updates.")]
Rate = Annotated[float, typer.Option(help="AdamW's, after the warm-up.")]
WarmupSteps = Annotated[
    int, typer.Option(min=0, help="Steps of linear warm-up; then half a cosine.")
]
Clip = Annotated[float, typer.Option(help="The gradient's largest norm.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Dtype = Annotated[str, typer.Option(help="Of the frozen models: auto, float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31, help="Same seed, same result.")]


class Watch:
    """Seconds of the clock and of the processor since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def seconds(self, name: str) -> dict[str, float]:
        """By name, for JSON."""
        wall, processor = self._began
        return {
            f"{name}_seconds": time.perf_counter() - wall,
            f"{name}_cpu_seconds": time.process_time() - processor,
        }


def check_evaluation(data: Path | None, evaluation: Path | None) -> None:
    """Refuse --evaluation without --data."""
    if evaluation is not None and data is None:
        raise Refusal("train", "evaluation", "--data beside it", "none")


def check_out(out: Path, *, resume: bool) -> None:
    """Find out before the models are loaded that there is no place for the result."""
    if out.exists() and not out.is_dir():
        raise Refusal("train", "out", "a folder", f"{str(out)!r}, which is none")
    there = (out / CHECKPOINT).exists()
    if resume and not there:
        raise Refusal("train", "resume", f"a checkpoint in {str(out / CHECKPOINT)!r}", "none")
    if there and not resume:
        expected = f"a folder without {CHECKPOINT}, or --resume"
        raise Refusal("train", "out", expected, repr(str(out)))


def read_data(data: Path, evaluation: Path | None) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and held-out ones."""
    examples = read_examples(data)
    if evaluation is None:
        return split(examples)
    return examples, read_examples(evaluation, "evaluation")


def load_frozen(names: Sequence[str], how: loading.Loading) -> tuple[list[Any], list[Any]]:
    """Models without gradients, and their tokenizers."""
    models, tokenizers = loading.load(names, how)
    for model in models:
        model.requires_grad_(False)
    return models, tokenizers


def make_folder(out: Path) -> Path:
    """The folder, which is made if it is not there.

    Raises:
        Refusal: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{str(out)!r} ({error.strerror})"
        raise Refusal("train", "out", "a folder that can be written", got) from error
    return out


@contextmanager
def progress(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; what is yielded takes the number of steps done."""
    from specens.cli import output

    done = 0
    with output.progress(label, steps) as step:

        def advance(now: int) -> None:
            nonlocal done
            for _ in range(now - done):
                step()
            done = now

        yield advance


def facts_of(
    command: str,
    settings: HeadSettings | DraftSettings,
    models: list[str],
    data: Path | None,
    evaluation: Path | None,
) -> dict[str, Any]:
    """What was run, with what."""
    import torch

    import specens_kernels

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "models": models,
        "data": "standard library" if data is None else data.name,
        "evaluation": None if evaluation is None else evaluation.name,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "specens-kernels": specens_kernels.__version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    }


def mean_of_last(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each column's mean over the last tenth of the steps."""
    last = rows[-max(1, len(rows) // 10) :]
    return {name: sum(row[name] for row in last) / len(last) for name in last[0] if name != "step"}


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """As JSON, beside what was trained."""
    text = json.dumps(finite(result), indent=1, allow_nan=False) + "\n"
    with writing(folder):
        replace_text(folder / RESULT, text)


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """The result as JSON, or what matters of it."""
    from specens.cli import output, tables

    if as_json:
        output.write_json(result)
    elif "candidates" in result:
        console = output.console()
        console.print(tables.front_table(result))
        for note in tables.front_notes(result):
            console.print(note)
    else:
        for when in ("before", "after"):
            acceptance = result[f"acceptance_{when}"]
            mean, error = acceptance["mean"], acceptance["standard_error"]
            output.write_text(f"held-out acceptance {when}: {mean:.3f} ± {error:.3f}\n")
