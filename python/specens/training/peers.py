# SPDX-License-Identifier: Apache-2.0
"""Two processes that use each other's objects, of which one believes the other nothing.

A program that a model wrote runs in one process, its tests in another (`trial.py`). `Peer` is one
end. Plain data cross by value (`wire.py`), and what a call has changed of the lists, dicts and sets
that it was given is changed for the caller. Any other object stays where it is, and the other end
has something in its place, which has the methods of Python that the object's type has, and asks.
The judging end (`judges=True`) answers no more than `_permits`. It has an `Answerer` for what is no
data: to be called and iterated; whatever else of it is asked for is refused, or is not there. Only
a class that the prompt declares, and what is asked of it, is a `Remote`. To let objects be asked
one thing more, add it to `_QUESTIONS`.
"""

import builtins
import collections
import json
import operator
import socket
import struct
import types
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from specens.training.wire import CONTAINERS, Passed, Wire, attributes_of, refill

_MOST_BYTES = 1 << 24
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("lshift", "rshift", "and", "or", "xor"),
)
# What an object is asked, after the methods of Python that ask it.
_QUESTIONS: Mapping[str, Callable[..., Any]] = {
    "call": lambda asked, *arguments, **named: asked(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "str": str,
    "repr": repr,
    "format": format,
    "hash": hash,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains,
    "instancecheck": lambda asked, value: isinstance(value, asked),
    "subclasscheck": lambda asked, kind: issubclass(kind, asked),
    "enter": lambda asked: asked.__enter__(),
    "exit": lambda asked, *error: asked.__exit__(*error),
    "abs": abs,
    "neg": operator.neg,
    "pos": operator.pos,
    "invert": operator.invert,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "round": round,
    "bool": bool,
    **{name: getattr(operator, f"__{name}__") for name in (*_COMPARISONS, *_ARITHMETIC)},
    **{
        f"r{name}": lambda asked, other, name=name: getattr(operator, f"__{name}__")(other, asked)
        for name in _ARITHMETIC
    },
}
_OPERATORS = frozenset({*_COMPARISONS, *_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC)})
# Of dunder attributes, those that are plain facts.
_FACTS = tuple(
    f"__{name}__" for name in ("name", "qualname", "annotations", "doc", "module", "dict", "slots")
)
# What an object may say that it is, by name, be it through a class of its own.
_KINDS: Mapping[str, type] = {
    kind.__name__: kind
    for module in (types, collections, collections.abc, builtins)
    for kind in vars(module).values()
    if isinstance(kind, type)
}
# What the judging end answers about its own generators, views and the like.
_READING = frozenset({"iter", "next", "len", "getitem", "contains", "str", "repr", "hash", "bool"})


class Broken(BaseException):
    """The other end has gone, or does not keep to what was agreed. No `except Exception` has it."""


class _Absent(Exception):
    """There is nothing of this name."""


class Answerer:
    """Stands for an object of the other end; may be called and iterated, and has no value."""

    __slots__ = ("_remote_peer", "_remote_place")

    def __init__(self, peer: "Peer", place: int) -> None:
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_place", place)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_remote_"):
            return object.__getattribute__(self, name)
        method = name.startswith("__") and name not in _FACTS
        own = method and name in attributes_of(type(self).__mro__)
        if own or (method and not self._remote_peer.judges):
            return object.__getattribute__(self, name)
        value = self._remote_peer.ask("getattr", self, name)
        if method or not (name in _FACTS or isinstance(self, Remote)):
            raise TypeError(f"{name}: asked of the program's object, which is no data")
        return value

    def __eq__(self, other: object) -> Any:
        if isinstance(other, Answerer):
            return self._remote_place == other._remote_place or NotImplemented
        if isinstance(self, Remote):
            return NotImplemented
        raise TypeError("the program's object is compared, and is no data")

    __hash__ = object.__hash__


class Remote(Answerer):
    """Stands for an object of the other end, and is asked whatever Python asks of it."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_peer.ask("setattr", self, name, value)


def _asking(question: str) -> Callable[..., Any]:
    def method(self: Answerer, *arguments: Any, **named: Any) -> Any:
        peer: Peer = self._remote_peer
        if isinstance(self, Remote) and peer.judges:
            return peer.ask_warily(question, self, *arguments, **named)
        if isinstance(self, Remote) or question in ("call", "iter", "next"):
            return peer.ask(question, self, *arguments, **named)
        if question == "contains":
            return operator.contains(iter(self), *arguments)
        raise TypeError(f"{question}: asked of the program's object, which is no data")

    return method


def _class_of(base: type, name: str, known: str, methods: Mapping[str, bool]) -> type:
    """A class of what stands for objects whose type has these methods; one that is not is None."""
    kind = _KINDS[known] if name == known else type(name, (_KINDS[known],), {})
    body: dict[str, Any] = {"__slots__": (), "__hash__": object.__hash__}
    for question, given in methods.items():
        if question in _QUESTIONS and question not in ("getattr", "setattr"):
            body[f"__{question}__"] = _asking(question) if given else None
    if known != "object":
        body["__class__"] = property(lambda self: kind)
    return type(name, (base,), body)


class Peer(Wire):
    """One end of a connection.

    judges: whether the other end may lie.
    names: what the other end may ask for by name; None is nothing.
    declared: names of the other end's whose objects this end may ask anything.
    broken: whether the connection has failed, however that was taken.
    """

    def __init__(
        self,
        end: socket.socket,
        *,
        judges: bool,
        names: Mapping[str, Any] | None = None,
        declared: Collection[str] = (),
    ) -> None:
        super().__init__(judges=judges)
        self.stand_in = Answerer if judges else Remote
        self.names, self.declared = names, declared
        self.broken = False
        self._end, self._incoming = end, end.makefile("rb")
        self._kinds: dict[type, int] = {}
        # Objects that were made with data of this end's in hand.
        self._informed: set[int] = set()

    def stands_for(self, value: Any) -> int | None:
        """See `Wire`."""
        own = isinstance(value, Answerer) and value._remote_peer is self
        return int(value._remote_place) if own else None

    def kind_of(self, value: Any) -> Any:
        """See `Wire`."""
        kind = type(value)
        own = attributes_of(kind.__mro__[:-1])
        known = next(each for each in kind.__mro__ if _KINDS.get(each.__name__) is each)
        methods = {
            question: own[method] is not None
            for question in _QUESTIONS
            if (method := f"__{question}__") in own
        }
        place = self._kinds.setdefault(kind, len(self._kinds))
        return [place, kind.__name__, known.__name__, methods]

    def made(self, place: int, kind: Any) -> Any:
        """See `Wire`."""
        at, *told = kind
        base = self.stand_in
        return self._remote((base, "class", at), lambda: _class_of(base, *told))(self, place)

    def ask(self, question: str, asked: Answerer | None, *arguments: Any, **named: Any) -> Any:
        """What the other end answers; raises what was raised there."""
        passed = Passed()
        place = None if asked is None else asked._remote_place
        written = [self.written(each, passed, grows=True) for each in arguments]
        by_name = {name: self.written(each, passed, grows=True) for name, each in named.items()}
        self._send(["ask", question, place, written, by_name])
        # Also of what the other end asks meanwhile.
        before, self.stand_in = self.stand_in, self._stand_in_of(question, asked, arguments)
        try:
            while (message := self._receive())[0] == "ask":
                self._serve(message)
            outcome, value, changes = self._understood(self._answer, message, passed)
        finally:
            self.stand_in = before
        for item, content in changes:
            refill(item, content)
        if outcome == "raise":
            # It would end a loop of this end's.
            if self.judges and isinstance(value, StopIteration) and question != "next":
                raise self._broke()
            raise value
        if outcome == "absent":
            raise KeyError(*arguments)
        return value

    def _stand_in_of(
        self, question: str, asked: Answerer | None, arguments: tuple[Any, ...]
    ) -> type[Answerer]:
        """What stands for an answer that is no data."""
        if not self.judges or isinstance(asked, Remote):
            return Remote
        return Remote if asked is None and arguments[0] in self.declared else Answerer

    def ask_warily(self, question: str, asked: Remote, *arguments: Any, **named: Any) -> Any:
        """The same, unless the answer would be a comparison with what this end alone should know.

        An object of the program's that says it equals anything must not pass for a right answer: it
        equals other objects of the program's only, and has no order beside data. What comes of an
        operator and data is an object again, which has attributes and operators, and nothing else.
        """
        own = [each for each in arguments if not isinstance(each, Remote)]
        if question in ("instancecheck", "subclasscheck") and own:
            return False
        if question in _COMPARISONS:
            return NotImplemented if own else self.ask(question, asked, *arguments)
        informed = any(
            each._remote_place in self._informed
            for each in (asked, *arguments)
            if isinstance(each, Remote)
        )
        if question not in _OPERATORS:
            if asked._remote_place in self._informed:
                raise TypeError(f"{question}: the program's object has seen the test's data")
            return self.ask(question, asked, *arguments, **named)
        result = self.ask(question, asked, *arguments)
        if own or informed:
            if not isinstance(result, Remote):
                raise TypeError(f"{question}: the program's object yields data")
            self._informed.add(result._remote_place)
        return result

    def serve(self) -> None:
        """Answer for as long as the other end is there."""
        while True:
            self._serve(self._receive())

    def _serve(self, message: Any) -> None:
        received = Passed()
        question, target, arguments, named = self._understood(self._question, message, received)
        before = [self.content_of(item, received) for item in received.items]
        try:
            outcome, value = "return", self._replied(question, target, arguments, named)
            written = self.written(value, received)
        except Broken:
            raise
        except _Absent:
            outcome, written = "absent", None
        # Whatever the program raises, its caller gets.
        except BaseException as error:
            outcome, written = "raise", self.error_content(error, received)
        after = [self.content_of(item, received) for item in received.items]
        changes = [
            [i, new] for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new
        ]
        self._send([outcome, written, changes])

    def _replied(self, question: str, target: Any, arguments: list[Any], named: Any) -> Any:
        if question == "name" and self.names is not None:
            if arguments[0] not in self.names:
                raise _Absent
            return self.names[arguments[0]]
        if self.judges and not _permits(question, target, arguments):
            error = AttributeError if question == "getattr" else TypeError
            raise error(f"{question}: not of an object of the tests")
        return _QUESTIONS[question](target, *arguments, **named)

    # What goes over the wire.

    def _send(self, message: Any) -> None:
        if self.broken:
            raise Broken
        data = json.dumps(message).encode("ascii")
        try:
            self._end.sendall(struct.pack("!Q", len(data)) + data)
        except OSError as error:
            raise self._broke() from error

    def _receive(self) -> Any:
        if self.broken:
            raise Broken
        size = struct.unpack("!Q", self._bytes(8))[0]
        if self.judges and size > _MOST_BYTES:
            raise self._broke()
        return self._understood(json.loads, self._bytes(size))

    def _bytes(self, count: int) -> bytes:
        try:
            data = self._incoming.read(count)
        except OSError:
            data = b""
        if len(data) < count:
            raise self._broke()
        return data

    def _broke(self) -> Broken:
        self.broken = True
        return Broken()

    def _understood(self, read: Callable[..., Any], *data: Any) -> Any:
        """Read what the other end has written; it may have written anything."""
        try:
            return read(*data)
        except Exception as error:
            raise self._broke() from error

    def _question(self, message: Any, received: Passed) -> tuple[Any, ...]:
        kind, question, place, arguments, named = message
        if kind != "ask" or not isinstance(question, str):
            raise ValueError(kind)
        target = None if place is None else self.own(place)
        values = [self.read(each, received, grows=True) for each in arguments]
        by_name = {name: self.read(each, received, grows=True) for name, each in named.items()}
        return question, target, values, by_name

    def _answer(self, message: Any, passed: Passed) -> tuple[Any, ...]:
        outcome, value, changes = message
        if outcome not in ("return", "raise", "absent"):
            raise ValueError(outcome)
        read = [
            (passed.items[place], self.read_content(content, passed)) for place, content in changes
        ]
        if outcome == "raise":
            return outcome, self.read_error(value, passed), read
        return outcome, self.read(value, passed), read


def _permits(question: str, asked: Any, arguments: list[Any]) -> bool:
    """Whether the program may ask this of an object of the tests.

    A function leads to its globals, a frame to all frames: attributes are those of instances of the
    tests' own classes alone, and what is called are the tests' functions.
    """
    own = type(asked).__module__ == "__main__"
    if question in ("getattr", "setattr"):
        public = isinstance(arguments[0], str) and not arguments[0].startswith("_")
        # What can be called could hide a method of the tests' class.
        return own and public and not any(map(callable, arguments[1:]))
    if question == "call":
        if isinstance(asked, types.BuiltinMethodType):
            return type(asked.__self__) in CONTAINERS
        if isinstance(asked, type):
            return asked.__module__ == "__main__"
        return own or isinstance(asked, (types.FunctionType, types.MethodType, partial))
    callables = (type, types.FunctionType, types.MethodType, types.ModuleType)
    return question in _READING and not isinstance(asked, callables)
