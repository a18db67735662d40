# SPDX-License-Identifier: Apache-2.0
"""What comes out of a command: text as it is written, JSON, files, and a bar while one waits.

Text goes to standard output; progress, statistics and errors go to standard error, so that a pipe
gets nothing but text.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specens_kernels import Refusal

# Tokens before the new ones that are decoded with them.
_CONTEXT_TOKENS = 8


def console() -> Console:
    """Standard output, for tables."""
    return Console(highlight=False)


def errors() -> Console:
    """Standard error, as it is now: tests and pipes replace it."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress(label: str, count: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; yields what to call after each step."""
    stream = errors()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=stream,
        transient=True,
        disable=not stream.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=count)
        yield lambda: bar.advance(task)


class TextStream:
    """A streamer that writes text as soon as its tokens are whole characters.

    A few tokens before the new ones are decoded with them, so that the spaces and characters that
    depend on their neighbours come out as in the whole text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object] | None = None) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] | None = None
        self._begin = self._read = 0

    def put(self, value: Any) -> None:
        """Take tokens: first the prompt's, then those written, of any shape."""
        tokens = value.flatten().tolist()
        if self._tokens is None:
            self._tokens = tokens[-_CONTEXT_TOKENS:]
            self._read = len(self._tokens)
            return
        self._tokens.extend(tokens)
        self._flush(final=False)

    def end(self) -> None:
        """Write what is left, whole or not."""
        self._flush(final=True)

    def _flush(self, *, final: bool) -> None:
        tokens = self._tokens or []
        old = self._decode(tokens[self._begin : self._read])
        new = self._decode(tokens[self._begin :])[len(old) :]
        if not new or (new.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return
        self._begin, self._read = self._read, len(tokens)
        self.text += new
        if self._write is not None:
            self._write(new)

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def write_text(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One line of JSON on standard output."""
    write_text(_json(value))


def write_file(argument: str, path: Path, value: Any) -> None:
    """One line of JSON in a file.

    Raises:
        Refusal: the file, which was given as `argument`, cannot be written.
    """
    try:
        path.write_text(_json(value), encoding="utf-8")
    except OSError as error:
        got = f"{str(path)!r} ({error.strerror})"
        raise Refusal("output", argument, "a file that can be written", got) from error


def _json(value: Any) -> str:
    from specens.tuning.compare import finite

    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False) + "\n"
