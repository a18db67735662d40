# SPDX-License-Identifier: Apache-2.0
"""What comes out of a command: text as it is written, JSON, files, and a bar while one waits.

Text goes to standard output; progress, statistics and errors go to standard error, so that a pipe
gets nothing but text. What models have written, or what their files say, sends a terminal nothing
but characters: `printable` has what is left of it.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from specens.cli.streams import printable
from specens.training.files import replace_text
from specens.tuning.finite import finite
from specens_kernels import Refusal

# Tokens before the new ones that are decoded with them.
_CONTEXT_TOKENS = 8


# Where no terminal says how wide it is, lines are as long as they are.
_PIPE_COLUMNS = 10_000


class _Console(Console):
    """Writes text as it is: no markup, no colours for numbers, no control characters."""

    def __init__(self, stream: IO[str], **options: Any) -> None:
        width = None if stream.isatty() else _PIPE_COLUMNS
        super().__init__(
            file=stream, width=width, highlight=False, markup=False, emoji=False, **options
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """See rich."""
        return super().render_str(printable(text), **options)


class _StandardOutput:
    """Standard output as it is now: tests and pipes replace it."""

    def write(self, text: str) -> int:
        """Raises Refusal where its encoding has no such characters, or it is closed."""
        if sys.stdout is None:
            raise Refusal("output", "stdout", "an open standard output", "a closed one")
        try:
            return sys.stdout.write(text)
        except UnicodeEncodeError as error:
            character = error.object[error.start]
            expected = f"an encoding with {character!a} (PYTHONIOENCODING=utf-8 is one)"
            raise Refusal("output", "stdout", expected, error.encoding) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def console() -> Console:
    """Standard output, for tables."""
    return _Console(cast(IO[str], _StandardOutput()))


def errors() -> Console:
    """Standard error, as it is now: tests and pipes replace it."""
    return _Console(sys.stderr) if sys.stderr is not None else Console(quiet=True)


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
    stream = _StandardOutput()
    stream.write(text)
    stream.flush()


def writer(*, raw: bool) -> Callable[[str], None]:
    """What writes a model's text: to a terminal without control characters, unless it is `raw`."""
    if raw or not sys.stdout.isatty():
        return write_text
    return lambda text: write_text(printable(text))


def write_json(value: Any) -> None:
    """One line of JSON on standard output, in escapes where its encoding is not Unicode's."""
    encoding = str(getattr(sys.stdout, "encoding", None) or "utf-8")
    write_text(_json(value, in_escapes=not encoding.lower().startswith("utf")))


def write_file(argument: str, path: Path, value: Any) -> None:
    """One line of JSON in a file, whole or not at all.

    Raises:
        Refusal: the file, which was given as `argument`, cannot be written.
    """
    try:
        replace_text(path, _json(value))
    except OSError as error:
        got = f"{str(path)!r} ({error.strerror})"
        raise Refusal("output", argument, "a file that can be written", got) from error


# JSON escapes the others by itself.
_CONTROLS = re.compile("[\x7f-\x9f\ud800-\udfff]")


def _json(value: Any, *, in_escapes: bool = False) -> str:
    text = json.dumps(finite(value), allow_nan=False, ensure_ascii=in_escapes)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"
