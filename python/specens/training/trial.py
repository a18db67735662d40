# SPDX-License-Identifier: Apache-2.0
"""Whether a program that a model wrote passes its tests; the program has no say in it.

Three processes: the program's runs what the model wrote, and the judge's runs the tests, whose
calls of the program go to the former and come back as data (`peers.py`). That the tests have come
to their end is said by the judge's process, which the program's cannot reach, to the third, which
has started both: it ends all that descends from them, and only then tells the caller. The tests
are in the judge's process alone. `containment.py` has what encloses them.
"""

import ast
import builtins
import json
import logging
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from specens.training import containment
from specens.training.peers import Peer

_PASSED = b"passed"
# What the third process may take to end the others.
_ENDING_S = 5.0
# How often the size of the program's folder is looked at, where nothing else limits it.
_LOOKING_S = 0.05
_logger = logging.getLogger("specens")


def passes(prompt: str, text: str, tests: str, timeout_s: float) -> bool:
    """Whether prompt and text run as one program to its end, and then the tests beside it.

    Args:
        prompt: the program's beginning. The objects of its classes may be asked anything, its
            functions may have the names of Python's own, and what it imports and the functions
            that it has whole are the tests' own.
        text: the rest.
        tests: Python code that uses what the program defines, by name.
        timeout_s: for everything, seconds.
    """
    program = f"{prompt}{text}\n".encode("utf-8", "surrogatepass")
    facts = json.dumps({"tests": tests, "prompt": prompt}).encode()
    ours, theirs = socket.socketpair()
    with ours, _folder() as folder:
        # What is closed here nobody finds among this process's files.
        with theirs, _file(program) as program_file, _file(facts) as facts_file:
            descriptors = program_file.fileno(), facts_file.fileno(), theirs.fileno()
            supervisor = _start(descriptors, _encloses(), timeout_s, folder)
        ours.settimeout(timeout_s + _ENDING_S)
        try:
            return ours.recv(len(_PASSED)) == _PASSED
        except TimeoutError:
            return False
        finally:
            # It ends by itself, and what it has started before it.
            _end(supervisor)


@contextmanager
def _folder() -> Iterator[str]:
    """A folder of the program's, which may leave anything there."""
    folder = Path(tempfile.mkdtemp(prefix="specens-"))
    try:
        yield str(folder)
    finally:
        with suppress(OSError):
            containment.remove(folder)


@contextmanager
def _file(content: bytes) -> Iterator[IO[bytes]]:
    """A file without a name, to be read from its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file


def _start(
    descriptors: tuple[int, int, int], encloses: bool, timeout_s: float, folder: str
) -> "subprocess.Popen[bytes]":
    """The third process."""
    root = str(Path(__file__).parents[2])
    program = (
        f"import sys; sys.path.insert(0, {root!r}); from specens.training.trial import supervise; "
        "sys.path.pop(0); supervise(*sys.argv[1:])"
    )
    arguments = [*descriptors, int(encloses), timeout_s, folder]
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=descriptors,
        env={},
        start_new_session=True,
    )


def _end(supervisor: "subprocess.Popen[bytes]") -> None:
    try:
        supervisor.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()


@lru_cache(maxsize=1)
def _encloses() -> bool:
    """Whether programs are shut off; a line in the log says if they are not."""
    given = containment.can_enclose()
    if not given:
        _logger.warning(
            "tests: this machine gives no namespaces to this user: what models write runs with "
            "limits, but is not shut off from disk, network and other processes"
        )
    return given


def supervise(
    program: str, facts: str, caller: str, encloses: str, timeout_s: str, folder: str
) -> None:
    """Run program and tests in processes of their own, and tell the caller that they have passed.

    Args:
        program, facts, caller: descriptors of two files and a socket.
        encloses: "1" or "0". timeout_s: seconds. folder: where the program is.
    """
    deadline = time.monotonic() + float(timeout_s)
    seconds = math.ceil(float(timeout_s))
    told = socket.socket(fileno=int(caller))
    containment.adopt_orphans()
    if encloses == "1":
        containment.enclose(Path(folder))
    elif os.geteuid() == 0:
        # For nobody, whom the program's process becomes.
        os.chmod(folder, 0o777)
    containment.hide()
    os.chdir(folder)
    judges_end, programs_end = socket.socketpair()
    heard, says = socket.socketpair()

    def judge() -> None:
        for each in (told, programs_end, heard):
            each.close()
        os.close(int(program))
        given = json.loads(_contents(int(facts)))
        containment.confine(seconds)
        if _tests_pass(judges_end, given["tests"], given["prompt"]):
            says.sendall(_PASSED)

    def run() -> None:
        for each in (told, judges_end, heard, says):
            each.close()
        os.close(int(facts))
        if encloses == "1":
            containment.see_own_processes()
        source = _contents(int(program))
        containment.confine(seconds)
        _run(programs_end, source)

    _in_child(judge)
    if encloses == "1":
        containment.leave_processes()
    _in_child(run)
    for each in (judges_end, programs_end, says):
        each.close()
    verdict = b""
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([heard, told], [], [], min(left, _LOOKING_S))
            if ready:
                # The caller says nothing, and is heard where it is no more.
                verdict = heard.recv(len(_PASSED)) if heard in ready else b""
                break
            if encloses == "0" and containment.bytes_in(Path(folder)) > containment.FOLDER_BYTES:
                break
    finally:
        containment.end_descendants()
    if verdict:
        told.sendall(verdict)


def _in_child(work: Callable[[], None]) -> None:
    """In a process that ends with the work, however that ends."""
    if os.fork() == 0:
        try:
            work()
        finally:
            os._exit(0)


def _contents(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def _run(end: socket.socket, source: bytes) -> None:
    """Run the program, and then what the tests ask of it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    code = compile(source.decode("utf-8", "surrogatepass"), "<program>", "exec")
    exec(code, module.__dict__)
    Peer(end, judges=False, names=module.__dict__).serve()


class _Declared:
    """What the prompt declares, by its syntax, as far as it is Python.

    whole: imports, and what `_is_whole` and something follows: not the program's to write.
    objects: names of classes, and of functions that by their annotation return their objects.
    """

    def __init__(self, prompt: str) -> None:
        body = _body(prompt)
        self.whole: list[ast.stmt] = [
            each
            for place, each in enumerate(body, 1)
            if isinstance(each, (ast.Import, ast.ImportFrom))
            or (place < len(body) and _is_whole(each))
        ]
        classes = {each.name for each in body if isinstance(each, ast.ClassDef)}
        functions = [each for each in body if isinstance(each, ast.FunctionDef)]
        self.objects = classes | {
            each.name for each in functions if each.returns and _names_in(each.returns) & classes
        }
        self.names = classes | {each.name for each in functions}


def _body(prompt: str) -> list[ast.stmt]:
    """Of the longest beginning of the prompt that is Python, with `pass` where it breaks off."""
    lines = prompt.splitlines()
    while lines:
        for end in ("", "\n" + " " * 99 + "pass", " pass"):
            with suppress(SyntaxError, ValueError):
                return ast.parse("\n".join(lines) + end).body
        lines.pop()
    return []


def _is_whole(part: ast.AST) -> bool:
    """A function, an import, a constant by its name, or an `if` or `try` of nothing else."""
    if isinstance(part, ast.Assign):
        return all(isinstance(each, ast.Name) and each.id.isupper() for each in part.targets)
    if isinstance(part, (ast.If, ast.Try, ast.ExceptHandler)):
        inner = (each for each in ast.iter_child_nodes(part) if not isinstance(each, ast.expr))
        return all(map(_is_whole, inner))
    return isinstance(part, (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.Pass))


def _names_in(annotation: ast.expr) -> set[str]:
    """Those of an annotation that may be text."""
    parts = list(ast.walk(annotation))
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            with suppress(SyntaxError, ValueError):
                parts.extend(ast.walk(ast.parse(part.value, mode="eval")))
    return {each.id for each in parts if isinstance(each, ast.Name)}


class _Names(dict[str, Any]):
    """The tests' global names: their own, Python's, and then the program's.

    A program's name hides one of Python's only where the prompt declares it.
    """

    def __init__(self, peer: Peer, declared: set[str]) -> None:
        super().__init__(__name__="__main__")
        self._peer, self._declared = peer, declared

    def __missing__(self, name: str) -> Any:
        hidden = hasattr(builtins, name) and name not in self._declared
        if hidden or name.startswith("__"):
            raise KeyError(name)
        return self._peer.ask("name", None, name)


def _tests_pass(end: socket.socket, tests: str, prompt: str) -> bool:
    """Whether the tests come to their end, after the program has."""
    # It is true, and says nothing.
    warnings.filterwarnings("error", "NotImplemented should not be used in a boolean")
    declared = _Declared(prompt)
    peer = Peer(end, judges=True, declared=declared.objects)
    peer.ask("name", None, "__name__")
    names = _Names(peer, declared.names)
    exec(compile(ast.Module(declared.whole, []), "<prompt>", "exec"), names)
    exec(compile(tests, "<tests>", "exec"), names)
    return not peer.broken
