# SPDX-License-Identifier: Apache-2.0
"""Values as JSON, between two processes of which one believes the other nothing.

Plain data are written with their kinds and read as copies. Any other object stays where it is: its
place in a list is written, and the reader makes something that stands for it. The judging end reads
nothing that could run: no pickle, no name of a module or a function. To let one more type cross by
value, add it to `_VALUES`.
"""

import builtins
import datetime
import importlib
import pickle
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

_PLAIN_TYPES = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, object)
CONTAINERS = (list, dict, set, bytearray)
# Numbers and text of a class of their own cross as what they are besides.
_BASES: Mapping[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
}
_NEW: Mapping[str, type] = {kind.__name__: kind for kind in CONTAINERS}


def _bounds(value: Any) -> list[Any]:
    return [value.start, value.stop, value.step]


# Values by their type's name: the type, taken apart into text or a list, and put together again.
_VALUES: Mapping[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    kind.__name__: (kind, apart, together)
    for kind, apart, together in (
        (float, float.hex, float.fromhex),
        (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
        (bytes, bytes.hex, bytes.fromhex),
        (tuple, list, tuple),
        (frozenset, list, frozenset),
        (range, _bounds, lambda bounds: range(*bounds)),
        (slice, _bounds, lambda bounds: slice(*bounds)),
        (type(...), lambda value: [], lambda nothing: ...),
        (Fraction, str, Fraction),
        (Decimal, str, Decimal),
        (deque, list, deque),
        (Counter, lambda value: list(value.items()), lambda items: Counter(dict(items))),
        (OrderedDict, lambda value: list(value.items()), OrderedDict),
        (defaultdict, lambda value: list(value.items()), lambda items: defaultdict(None, items)),
        (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
        (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
        (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
        (
            datetime.timedelta,
            lambda value: [value.days, value.seconds, value.microseconds],
            lambda parts: datetime.timedelta(*parts),
        ),
    )
}


class Passed:
    """The lists, dicts and sets of one call, in the order in which they were met."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._places: dict[int, int] = {}

    def add(self, item: Any) -> None:
        """Of one that was not met before."""
        self._places[id(item)] = len(self.items)
        self.items.append(item)

    def place(self, item: Any) -> int | None:
        """Where it is; None where it was not met."""
        return self._places.get(id(item))


class Wire:
    """One end's writing and reading.

    judges: whether what is read may lie.
    stand_in: the class of what stands for objects of the other end.
    stands_for: the other end's place of its object that a value stands for; None for one's own.
    kind_of: what the other end is told of the type of an object that stays here, as JSON.
    made: what stands for the other end's object, of its place and what `kind_of` says there.
    """

    stand_in: type
    stands_for: Callable[[Any], int | None]
    kind_of: Callable[[Any], Any]
    made: Callable[[int, Any], Any]

    def __init__(self, *, judges: bool) -> None:
        self.judges = judges
        self._objects: list[Any] = []
        self._places: dict[int, int] = {}
        self._remotes: dict[Any, Any] = {}
        # Classes of errors that were made for the other end's, and where those are.
        self._errors: dict[Any, int] = {}

    def written(self, value: Any, passed: Passed, *, grows: bool = False) -> Any:
        """Plain data as they are, anything else with its kind; `grows`: containers are passed."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if abs(value) < 1 << 62 else {"int": hex(value)}
        if kind in CONTAINERS:
            place = passed.place(value)
            if place is not None:
                return {"passed": place}
            if grows:
                passed.add(value)
            return {kind.__name__: self.content_of(value, passed, grows=grows)}
        if kind is _VALUES.get(kind.__name__, (None,))[0]:
            apart = _VALUES[kind.__name__][1](value)
            if isinstance(apart, list):
                apart = [self.written(each, passed, grows=grows) for each in apart]
            return {kind.__name__: apart}
        remote = self.stands_for(value)
        if remote is not None:
            return {"yours": remote}
        return self._written_otherwise(value, passed, grows)

    def content_of(self, container: Any, passed: Passed, *, grows: bool = False) -> Any:
        """What is in a list, dict, set or bytearray, without its kind."""
        if isinstance(container, bytearray):
            return container.hex()
        items = container.items() if isinstance(container, dict) else container
        return [self.written(each, passed, grows=grows) for each in items]

    def _written_otherwise(self, value: Any, passed: Passed, grows: bool) -> Any:
        """Of a kind of plain data's, an array, a type, a module; else a reference."""
        for base, plain in _BASES.items():
            if isinstance(value, base):
                return self.written(plain(value), passed)
        if isinstance(value, tuple):
            names = [type(value).__name__, *getattr(value, "_fields", ())]
            parts = [self.written(each, passed, grows=grows) for each in value]
            return {"namedtuple": [names, parts]} if len(names) > 1 else {"tuple": parts}
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            parts = self.written(value.ravel().tolist(), Passed())
            flat = [value.dtype.str, parts, list(value.shape)]
            return {"array": flat} if value.ndim else self.written(value.tolist(), Passed())
        if isinstance(value, type) and value in _PLAIN_TYPES:
            return {"type": value.__name__}
        if isinstance(value, type) and issubclass(value, BaseException):
            if value in self._errors:
                return {"yours": self._errors[value]}
            above = () if _builtin_base(value) is value else value.__bases__
            bases = self.content_of([e for e in above if issubclass(e, BaseException)], passed)
            return {"exception": [self._place(value), [value.__module__, value.__name__], bases]}
        if self.judges:
            known = _as_known(value)
            if known is not None:
                return known
        return {"mine": [self._place(value), self.kind_of(value)]}

    def _place(self, value: Any) -> int:
        """Where the object is kept for the other end, for good."""
        place = self._places.setdefault(id(value), len(self._objects))
        if place == len(self._objects):
            self._objects.append(value)
        return place

    def own(self, place: Any) -> Any:
        """The object that was kept there."""
        if type(place) is not int or place < 0:
            raise ValueError(place)
        return self._objects[place]

    def read(self, data: Any, passed: Passed, *, grows: bool = False) -> Any:
        """What `written` has written; raises as it likes where it was not."""
        if not isinstance(data, dict):
            if isinstance(data, (list, float)):
                raise TypeError("data without their kind")
            return data
        ((kind, content),) = data.items()
        if kind in ("list", "dict", "set", "bytearray"):
            container: Any = _NEW[kind]()
            if grows:
                passed.add(container)
            refill(container, self.read_content(content, passed, grows=grows))
            return container
        if kind in _VALUES:
            if isinstance(content, list):
                content = self._parts(kind, content, passed, grows)
            return _VALUES[kind][2](content)
        return self._read_otherwise(kind, content, passed, grows)

    def read_content(self, content: Any, passed: Passed, *, grows: bool = False) -> Any:
        """What `content_of` has written, for `refill`."""
        if isinstance(content, str):
            return bytes.fromhex(content)
        return [self.read(each, passed, grows=grows) for each in content]

    def _read_otherwise(self, kind: str, content: Any, passed: Passed, grows: bool) -> Any:
        if kind == "int":
            return int(content, 16)
        if kind == "passed":
            return passed.items[content]
        if kind == "yours":
            return self.own(content)
        if kind == "mine":
            place, told = content
            return self._remote((self.stand_in, place), lambda: self.made(int(place), told))
        if kind == "exception":
            place, names, bases = content
            bases = self.read_content(bases, passed)
            return self._remote((kind, place), lambda: self._error_class(place, names, bases))
        if kind == "namedtuple":
            names, parts = content
            values = self._parts(kind, parts, passed, grows)
            return namedtuple(names[0], names[1:])(*values)
        if kind == "array" and isinstance(content[0], str):
            numpy = importlib.import_module("numpy")
            flat = numpy.array(self.read(content[1], Passed()), dtype=numpy.dtype(content[0]))
            return flat.reshape(content[2])
        if kind == "type":
            return next(each for each in _PLAIN_TYPES if each.__name__ == content)
        if not self.judges:
            return _from_known(kind, content)
        raise ValueError(kind)

    def _parts(self, kind: str, content: Any, passed: Passed, grows: bool) -> list[Any]:
        """Of a value: what can be called would be a method that the other end has given it."""
        parts = [self.read(each, passed, grows=grows) for each in content]
        if self.judges and kind != "tuple" and any(map(callable, parts)):
            raise TypeError(kind)
        return parts

    def _remote(self, place: Any, make: Callable[[], Any]) -> Any:
        """The one object here that stands for the other end's."""
        if place not in self._remotes:
            self._remotes[place] = make()
        return self._remotes[place]

    def error_content(self, error: BaseException, passed: Passed) -> list[Any]:
        """An error taken apart: its class, arguments, attributes and cause."""
        kind, base = type(error), _builtin_base(type(error))
        arguments, *more = base.__reduce__(error)[1:]
        names = attributes_of([each for each in kind.__mro__ if _builtin_base(each) is not each])
        attributes = {name: getattr(error, name, None) for name in names if name[:2] != "__"}
        attributes.update(*more)
        if kind.__str__ is not base.__str__:
            attributes["_own_text"] = str(error)
        data = {name: value for name, value in attributes.items() if not callable(value)}
        parts = self.content_of([kind, arguments, data], passed)
        cause = error.__cause__
        return [*parts, None if cause is None else self.error_content(cause, passed)]

    def read_error(self, content: Any, passed: Passed) -> BaseException:
        """An error put together again."""
        *parts, cause = content
        kind, arguments, attributes = self.read_content(parts, passed)
        if not issubclass(type(kind), type) or not issubclass(kind, BaseException):
            raise TypeError(kind)
        error: BaseException = kind.__new__(kind, *arguments)
        with suppress(TypeError):
            _builtin_base(kind).__init__(error, *arguments)
        for name, value in attributes.items():
            # What can be called would be a method that the other end has given it.
            if (name[:2] != "__" or name == "__notes__") and not callable(value):
                with suppress(AttributeError):
                    setattr(error, name, value)
        if cause is not None:
            error.__cause__ = self.read_error(cause, passed)
        return error

    def _error_class(self, place: int, names: Any, bases: list[Any]) -> Any:
        """Python's own, or a library's that this end has imported; else one of that name."""
        module, name = names
        known = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if module != "__main__" and isinstance(known, type) and issubclass(known, BaseException):
            return known
        made = type(name, tuple(bases), {"__str__": _text_of, "__module__": "__main__"})
        if not issubclass(made, BaseException):
            raise TypeError(bases)
        self._errors[made] = place
        return made


def refill(container: Any, content: Any) -> None:
    """Give a container this content, in place."""
    container.clear()
    if isinstance(container, (list, bytearray)):
        container.extend(content)
    else:
        container.update(content)


def attributes_of(classes: Sequence[type]) -> dict[str, Any]:
    """Of classes, the first before the others."""
    return {name: value for each in reversed(classes) for name, value in vars(each).items()}


def _builtin_base(kind: type) -> Any:
    return next(each for each in kind.__mro__ if vars(builtins).get(each.__name__) is each)


def _text_of(error: BaseException) -> Any:
    """What the other end's error says, where its class has its own way to say it."""
    text = vars(error).get("_own_text")
    return _builtin_base(type(error)).__str__(error) if text is None else text


def _as_known(value: Any) -> Any:
    """How the judging end names what the other has too, or can copy; None for the tests' own."""
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(module, str) and isinstance(name, str):
        at = getattr(sys.modules.get(module), name, None)
        return {"global": [module, name]} if at is value else None
    if type(value).__module__ == "__main__":
        return None
    try:
        return {"pickle": pickle.dumps(value).hex()}
    # Whatever cannot be pickled raises as it likes.
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError):
        return None


def _from_known(kind: str, content: Any) -> Any:
    if kind == "module":
        return importlib.import_module(content)
    if kind == "global":
        return getattr(importlib.import_module(content[0]), content[1])
    if kind == "pickle":
        return pickle.loads(bytes.fromhex(content))
    raise ValueError(kind)
