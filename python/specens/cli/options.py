# SPDX-License-Identifier: Apache-2.0
"""The options that several commands have, and how numbers are written in them.

To add an option of more than one command, add it here, so that it means the same in all of them. An
option that has the library's name for what it sets is found by that name when it is refused; name
any other in `SPELLED`.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from specens.loop.named import Named
from specens.schedules import SCHEDULES
from specens_kernels import ENSEMBLES, Refusal

# Arguments of the library, and what says them on a command line.
SPELLED = {
    "tokens": "--gamma",
    "do_sample": "--temperature above 0",
    "draft": "--draft",
    "folder": "--out",
    "prompts_per_step": "--prompts",
    "samples_per_prompt": "--samples",
    "windows_per_step": "--batch",
}
# Beyond these, memory would end the process, and nothing is said.
MAX_TOKENS, MAX_TEXTS = 2**20, 2**16
MAX_SEED = 2**62
# Many more, and the library that starts them ends the process.
MAX_THREADS = 1024


def _described(named: Mapping[str, type[Named]]) -> str:
    """What there is to choose, in one paragraph."""
    return " ".join(
        f"{name} ({', '.join(field.name for field in fields(kind))}): {kind.summary}."  # type: ignore[arg-type]
        if fields(kind)  # type: ignore[arg-type]
        else f"{name}: {kind.summary}."
        for name, kind in named.items()
    )


Prompt = Annotated[str | None, typer.Argument(help="Text to continue; else built in.")]
File = Annotated[Path | None, typer.Option(help="Read the prompt from a file; - is a pipe.")]
Lines = Annotated[
    bool, typer.Option("--lines", help='Each line is a prompt, or JSON with a "prompt".')
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Folder, hub name, or family:code, family:prose, family:draft. Repeat it for an "
        "ensemble. None is the family that ships with specens.",
    ),
]
Drafts = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        help="A model outside the ensemble that drafts. Repeat it for more, the smallest first.",
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="One number per model, such as 0.5,0.5. None is equal shares.")
]
EnsembleName = Annotated[str, typer.Option("--ensemble", help=f"{' or '.join(ENSEMBLES)}.")]
ScheduleText = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        help="Who proposes and who verifies, and its arguments, such as speculative:tokens=4. None "
        f"is alternating. {_described(SCHEDULES)}",
    ),
]
AcceptanceTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--acceptance",
        help="A rule and its parameters, such as js:threshold=0.3; for 'hierarchy' one per draft. "
        "None is rejection, which is exact; the rules are listed in docs/rules.md.",
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        help="What temperature and filters warp: member (each, before they are mixed) or ensemble."
    ),
]
Plausibility = Annotated[
    float,
    typer.Option(
        help="'product': drop tokens that the first model finds less probable than this times its "
        "best; 0 is off."
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, max=MAX_TOKENS, help="Most tokens to write per prompt.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[
    int, typer.Option(min=0, max=2**31 - 1, help="Only the k most probable tokens; 0 is off.")
]
TopP = Annotated[
    float, typer.Option(help="Only the most probable tokens that hold this mass; 1 is off.")
]
MinP = Annotated[
    float, typer.Option(help="Only tokens this times as probable as the best; 0 is off.")
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random numbers.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own; float32 for the family), float32, bfloat16 or float16."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="auto (a GPU if torch has one, else the CPU), or as torch has it: cuda:1."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_THREADS,
        help="CPU threads. None is 1 if all models are family:..., else torch's choice.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option(help="Run code that comes with a model. Off unless asked.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def numbers(argument: str, text: str) -> list[float]:
    """Of a list with commas.

    Raises:
        Refusal: a part of it, which was given as `argument`, is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        expected = "numbers with commas between"
        raise Refusal("options", argument, expected, repr(text)) from error


def integers(argument: str, text: str) -> list[int]:
    """Of a list with commas.

    Raises:
        Refusal: a part of it, which was given as `argument`, is no integer.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        expected = "integers with commas between"
        raise Refusal("options", argument, expected, repr(text)) from error


def check_folder(argument: str, path: Path) -> None:
    """Find out before the work, not after it, that there is no place for its result.

    Raises:
        Refusal: the file, which was given as `argument`, is a folder, or is in none.
    """
    if path.is_dir() or not path.parent.is_dir():
        expected = "a file in a folder that exists"
        raise Refusal("options", argument, expected, repr(str(path)))
