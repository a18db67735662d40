# SPDX-License-Identifier: Apache-2.0
"""`Named`: a value with a name and checked arguments, which can be written as text and read again.

Schedules and draft stops are such values: `Speculative(tokens=4)` is "speculative:tokens=4" in a
shell and in a file. An argument is a field made by `argument`, and its `Kind` says which values it
takes. To add a kind of argument, add a `Kind` here. Needs no torch.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

from specens_kernels.refusal import Refusal, shown

_T = TypeVar("_T", bound="Named")
# The largest count. As many tokens at a time have laws of gigabytes.
MOST = 4096


@dataclass(frozen=True)
class Kind:
    """The values that an argument takes.

    range: in words.
    accept: (value) -> the value to keep; raises ValueError or TypeError where it is none.
    read: (text) -> a value, which `accept` then looks at.
    """

    range: str
    accept: Callable[[Any], Any]
    read: Callable[[str], Any]


def argument(default: Any, kind: Kind, description: str) -> Any:
    """A field of a `Named`: its default, which is not checked, its kind and what it means."""
    return field(default=default, metadata={"kind": kind, "description": description})


def count(least: int) -> Kind:
    """An integer that is not below `least`, and within reason."""

    def accept(value: Any) -> int:
        if not is_integer(value) or not least <= value <= MOST:
            raise ValueError
        return int(value)

    return Kind(f"an integer from {least} to {MOST}", accept, int)


def counts(least: int) -> Kind:
    """One integer that is not below `least`, or several; each within reason."""
    single = count(least)

    def accept(value: Any) -> int | tuple[int, ...]:
        if not isinstance(value, Iterable):
            accepted: int = single.accept(value)
            return accepted
        several = tuple(map(single.accept, integers(value) or ()))
        if not several:
            raise ValueError
        return several

    def read(text: str) -> list[int] | int:
        # As in Python, a comma after a single number makes a list of it.
        several = [int(part) for part in text.removesuffix(",").split(",")]
        return several if "," in text else several[0]

    return Kind(f"integers from {least} to {MOST}", accept, read)


def number(least: float, most: float = math.inf) -> Kind:
    """A finite number between `least` and `most`, both included."""

    def accept(value: Any) -> float:
        if not is_number(value) or not least <= float(value) <= most:
            raise ValueError
        if not math.isfinite(value):
            raise ValueError
        return float(value)

    infinite = math.isinf(most)
    return Kind(f"a number >= {least:g}" if infinite else f"[{least:g}, {most:g}]", accept, float)


def numbers(size: int) -> Kind:
    """So many finite numbers."""

    def accept(values: Any) -> tuple[float, ...]:
        given = tuple(values)
        if not all(map(is_number, given)):
            raise TypeError
        listed = tuple(map(float, given))
        if len(listed) != size or not all(map(math.isfinite, listed)):
            raise ValueError
        return listed

    return Kind(f"{size} numbers", accept, lambda text: [float(part) for part in text.split(",")])


def word(*known: str) -> Kind:
    """One of some words."""

    def accept(value: Any) -> str:
        if value not in known:
            raise ValueError
        return str(value)

    return Kind(" or ".join(map(repr, known)), accept, str)


class Named:
    """A dataclass with a name, whose fields are its arguments.

    name: what it is called in text. summary: what it does, in one line.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every argument that is not its default."""
        for each in _arguments(self):
            value, kind = getattr(self, each.name), each.metadata["kind"]
            if value is each.default:
                continue
            try:
                value = kind.accept(value)
            except (ValueError, TypeError, OverflowError):
                raise Refusal(self.name, each.name, kind.range, shown(value)) from None
            object.__setattr__(self, each.name, value)

    def __str__(self) -> str:
        """As it is written in a shell: the name, and the arguments that are not the default."""
        written = self._written()
        return f"{self.name}:{written}" if written else self.name

    def _written(self) -> str:
        given = {each.name: getattr(self, each.name) for each in _arguments(self)}
        defaults = {each.name: each.default for each in _arguments(self)}
        return ",".join(
            f"{name}={_written(value)}" for name, value in given.items() if value != defaults[name]
        )


def _arguments(named: Any) -> "list[Field[Any]]":
    return [each for each in fields(named) if "kind" in each.metadata]


def _written(value: Any) -> str:
    if isinstance(value, Named):
        arguments = value._written()
        return f"{value.name}({arguments})" if arguments else value.name
    if isinstance(value, tuple):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)


def read_named(op: str, text: str, known: Mapping[str, type[_T]]) -> _T:
    """The value that a text such as "name", "name:a=1,b=2,3" or "name(a=1)" stands for.

    Args:
        op: who asks, for the messages. text: what was written. known: the classes by their names.
    Raises:
        Refusal: there is no such name or argument, or its value is none that it takes.
    """
    text = text.strip()
    head = re.match(r"[^:(]*", text)
    assert head is not None, "any text begins so"
    name, opening, rest = head[0], text[head.end() : head.end() + 1], text[head.end() + 1 :]
    if opening == "(" and not rest.endswith(")"):
        raise Refusal(op, "arguments", "brackets in pairs", shown(text))
    if opening == "(":
        rest = rest[:-1]
    kind = known.get(name.strip())
    if kind is None:
        raise Refusal.unknown(op, "name", name.strip(), known)
    kinds = {each.name: each.metadata["kind"] for each in _arguments(kind)}
    arguments: dict[str, Any] = {}
    for key, value in _parts(kind.name, rest).items():
        if key not in kinds:
            expected = ", ".join(kinds) or "no arguments"
            raise Refusal(kind.name, "arguments", expected, shown(key))
        try:
            arguments[key] = kinds[key].read(value)
        except Refusal:
            raise
        except ValueError:
            raise Refusal(kind.name, key, kinds[key].range, shown(value)) from None
    return kind(**arguments)


def _parts(name: str, text: str) -> dict[str, str]:
    """The arguments of a text; a part without "=" goes on with the list before it."""
    pieces: list[str] = []
    depth = 0
    for part in text.split(",") if text else []:
        if pieces and (depth > 0 or "=" not in part):
            pieces[-1] += f",{part}"
        else:
            pieces.append(part)
        for bracket in re.findall(r"[()]", part):
            depth += 1 if bracket == "(" else -1
            if depth < 0:
                raise Refusal(name, "arguments", "brackets in pairs", shown(text))
    if depth > 0:
        raise Refusal(name, "arguments", "brackets in pairs", shown(text))
    parts: dict[str, str] = {}
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals or key.strip() in parts:
            raise Refusal(name, "arguments", "name=value, each name once", shown(piece))
        parts[key.strip()] = value.strip()
    return parts


def is_integer(value: object) -> bool:
    """Of any library; a bool counts nothing."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A real one of any library; a bool measures nothing."""
    return isinstance(value, Real) and not isinstance(value, bool)


def untensored(given: Any) -> Any:
    """Tensors and arrays as lists and numbers; all else, and what holds none to read, as it is."""
    if not hasattr(given, "tolist"):
        return given
    if hasattr(given, "untyped_storage"):
        from specens_kernels.storage import holds_numbers

        if not holds_numbers(given):
            return given
    return given.tolist()


def integers(values: Any) -> list[int] | None:
    """Of one integer or several in order; None if something else is among them."""
    if isinstance(values, Mapping | Set):
        return None
    values = untensored(values)
    if isinstance(values, str | bytes | bytearray) or hasattr(values, "tolist"):
        return None
    listed = list(values) if isinstance(values, Iterable) else [values]
    return [int(value) for value in listed] if all(map(is_integer, listed)) else None
