# SPDX-License-Identifier: Apache-2.0
"""What the library raises for arguments that it does not take: facts first, then a sentence.

The sentence has one form, `op: argument: expected …, got …`, and is made here only. Whoever words
it otherwise (the command line, which calls an argument by its option) asks for the facts. Needs no
torch, so that a wrong word on a command line is answered at once.
"""

from collections.abc import Iterable
from typing import TypeVar

_R = TypeVar("_R", bound="Refusal")
_LONGEST = 60
# Words about a value may be longer than the value.
_MOST = 500


def shown(value: object) -> str:
    """A value as a message shows it: in one short line, text with its end cut, or else its type."""
    if isinstance(value, str):
        return repr(_cut(value, _LONGEST))
    try:
        text = repr(value)
    except (ValueError, RuntimeError):  # an integer of too many digits; a tensor without numbers
        text = ""
    if text and len(text) <= _LONGEST and "\n" not in text:
        return text
    return f"a {type(value).__name__}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


class Refusal(ValueError):
    """An argument that an op does not take: `op: argument: expected …, got …`.

    op: the public function, class or command that was asked.
    argument: its argument's name.
    expected: what the argument may be.
    got: what it was.
    """

    def __init__(self, op: str, argument: str, expected: str, got: object) -> None:
        # All four are `args`, so that a refusal can be pickled.
        try:
            text = _cut(str(got), _MOST)
        except ValueError:  # as in `shown`
            text = shown(got)
        super().__init__(op, argument, expected, text)
        self.op = op
        self.argument = argument
        self.expected = expected
        self.got = text

    def __str__(self) -> str:
        return f"{self.op}: {self.argument}: expected {self.expected}, got {self.got}"

    @classmethod
    def unknown(cls: type[_R], op: str, argument: str, name: object, known: Iterable[str]) -> _R:
        """Of a name that a table does not have."""
        return cls(op, argument, f"one of {', '.join(known)}", shown(name))


class Unsupported(Refusal, NotImplementedError):
    """Valid arguments that one implementation does not take, though the reference does.

    op: the implementation, such as "native".
    """
