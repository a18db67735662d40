# SPDX-License-Identifier: Apache-2.0
"""The command `specens`: generate, tune, methods, demo, probe, bench, train and export.

A command parses, calls the library and shows what came back. What the library refuses becomes one
line on standard error and exit code 2, and so does what the machine refuses, such as room on a
disk, with exit code 1; anything unexpected keeps its traceback. Torch and rich are imported inside
the commands, so that help and mistakes are answered at once. To add a command, write its function
into a file of this folder and name it here.
"""

import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from specens.cli import (
    bench,
    export,
    generate,
    options,
    show,
    streams,
    train_draft,
    train_head,
    tune,
)
from specens_kernels import Refusal, __version__

# The class is public in click, but typer has a copy of click that does not export it.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Group(TyperGroup):
    """Says what is wrong with a command line in one line, and exits with 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; every way out is an exit code."""
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except _UsageError as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            streams.end(f"{getattr(error, 'format_message', error.__str__)()}{hint}", 2)
        except OSError as error:
            streams.leave_output()
            named = f": {error.filename!r}" if error.filename is not None else ""
            streams.end(f"{error.strerror or error}{named}", 1)
        sys.exit(code if isinstance(code, int) else 0)


class _Command(TyperCommand):
    """Says what the library refuses as its user has asked for it: by command and option."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a refusal is one line and exit code 2."""
        if sys.stdout is None:
            streams.end("expected an open standard output, got a closed one", 2)
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            streams.leave_output()
            rest = f"expected {refusal.expected}, got {refusal.got}"
            streams.end(_sentence(ctx, refusal.op, refusal.argument, rest), 2)


def _sentence(context: Any, op: str, argument: str, rest: str) -> str:
    """A refusal, the option that it is about in the place of the library's op and argument."""
    spelled = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    command = _command_of(context)
    if argument in spelled:
        return f"{command}: {spelled[argument]}: {rest}"
    where = command if op == command.split()[0] else f"{command}: {spelled.get(op, op)}"
    option = options.SPELLED.get(argument, "")
    name = next((name for name, words in spelled.items() if words == option.split(" ")[0]), "")
    said = context.params.get(name) is not None
    return f"{where}: {argument}: {rest}" + (f" (here: {option})" if option and said else "")


def _command_of(context: Any) -> str:
    """Its name, after that of the group it is in."""
    names = []
    while context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(reversed(names))


def _group(words: str, *commands: Callable[..., None]) -> typer.Typer:
    group = typer.Typer(
        cls=_Group,
        help=words,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for command in commands:
        group.command(command.__name__, cls=_Command)(command)
    return group


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"specens {__version__}\n")
        raise typer.Exit


app = _group(
    "Write one text with several language models, speculatively and exactly.",
    generate.generate,
    tune.tune,
    show.methods,
    bench.demo,
    show.probe,
    bench.bench,
)
app.add_typer(
    _group(
        "Train a head that weights draft and target, or a draft.",
        train_head.diversed,
        train_draft.draft,
    ),
    name="train",
)
app.add_typer(
    _group("Write a folder that another library loads.", export.custom_generate, export.kernels),
    name="export",
)


@app.callback()
def _specens(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show it, and end."),
    ] = False,
) -> None:
    """Write one text with several language models, speculatively and exactly."""


def main() -> None:
    """The entry point of `specens`."""
    # What they say at import, which transformers asks for, is of use to their authors alone.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
