# SPDX-License-Identifier: Apache-2.0
"""Programs and their tests in processes of their own: what crosses, what cannot be forged, and what
is left. The programs are in tests/tools/programs.py and forgeries.py.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import environment
from forgeries import AT_THE_WALLS, FORGERIES
from programs import LEAVERS, RIGHT, TESTS

from specens.training import containment, trial


@pytest.fixture(params=["enclosed", "open"])
def walls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With namespaces, where this machine gives them, and without."""
    if request.param == "enclosed" and not containment.can_enclose():
        pytest.skip("no namespaces for this user")
    monkeypatch.setattr(trial, "_encloses", lambda: request.param == "enclosed")
    return str(request.param)


def passes(program: str, timeout_s: float = 20.0) -> bool:
    program, _, tests = program.partition("---\n")
    # The prompt is the first line.
    prompt, newline, text = program.lstrip("\n").partition("\n")
    return trial.passes(prompt + newline, text, tests, timeout_s)


@pytest.mark.parametrize("program", RIGHT)
def test_a_right_program_passes(program: str) -> None:
    assert passes(RIGHT[program])


@pytest.mark.parametrize("program", [name for name in FORGERIES if name not in AT_THE_WALLS])
def test_a_wrong_program_does_not_pass(program: str) -> None:
    assert not passes(FORGERIES[program], timeout_s=2.0)


@pytest.mark.parametrize(
    ("prompt", "text", "tests", "expected"),
    [
        # The prompt's whole functions are not the program's to write again.
        ("def p(x):\n    return x - 2\ndef f():\n", "    return 2", "assert p(f()) == 0", True),
        (
            "def p(x):\n    return x - 2\ndef f():\n",
            "    return 3\ndef p(x): return 0",
            "assert p(f()) == 0",
            False,
        ),
        # A function returns objects where the prompt says so.
        (
            "class N:\n    def __init__(self, x):\n        self.x = x\ndef f() -> 'N | None':\n",
            "    return N(2)",
            "assert f().x == 2 and isinstance(f(), N)",
            True,
        ),
        # What breaks off, and what is text.
        (
            "import math as m\ndef sum(x):\n    if x:\n",
            "        return m.pi",
            "assert sum(1) == m.pi",
            True,
        ),
        # Not the program's, either.
        (
            "try:\n    from math import pi as p\nexcept ImportError:\n    pass\n"
            "if 1:\n    import math\nMOD = 7\ntotal = 0\ndef f(x):\n",
            "    global total\n    total = 2\np = MOD = 0\nmath = None",
            "f(1)\nassert (MOD, total) == (7, 2) and math.pi == p",
            True,
        ),
        ('def f(x):\n    """class A, def all"""\n', "    0\nall = None", "assert all([1])", True),
    ],
)
def test_the_prompt_declares(prompt: str, text: str, tests: str, expected: bool) -> None:
    assert trial.passes(prompt, text, tests, 20.0) == expected


@pytest.mark.parametrize("program", AT_THE_WALLS)
def test_walls_hold(program: str, walls: str) -> None:
    assert not passes(FORGERIES[program], timeout_s=2.0)


def running(*words: str) -> bool:
    """Whether there is a process of this command line."""
    wanted = b"".join(word.encode() + b"\0" for word in words)
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes() == wanted:
                return True
        except OSError:  # it has just ended
            continue
    return False


@pytest.mark.slow
@pytest.mark.parametrize("leaver", LEAVERS)
def test_nothing_is_alive_after_the_verdict(leaver: str, walls: str) -> None:
    seconds = f"{600 + os.getpid() / 1e7:.7f}"
    program = f"import atexit, os, subprocess, time\nSECONDS = {seconds!r}\n{LEAVERS[leaver]}"
    program += "def f(x):\n    time.sleep(0.1)\n    return x + 1\n"
    for tests, expected in (
        (TESTS, True),
        ("---\nassert f(1) == 3", False),
        ("---\nf(1)\nwhile True:\n    pass", False),
    ):
        assert passes(program + tests, 20.0 if expected else 1.0) == expected
        assert not running("sleep", seconds)


def test_the_process_that_is_looked_for_would_be_seen() -> None:
    with open("/proc/self/cmdline", "rb") as file:
        assert running(*(word.decode() for word in file.read().split(b"\0")[:-1]))


def test_an_enclosed_program_has_its_folder_alone(tmp_path: Path) -> None:
    if not containment.can_enclose():
        pytest.skip("no namespaces for this user")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"""
import os, socket
def tried(work, *given):
    try:
        work(*given)
    except OSError:
        return False
    return True
def f():
    writes = [tried(open, os.path.join(place, "of-a-test"), "w") for place in (
        {str(tmp_path)!r}, {str(Path.cwd())!r}, "/tmp", "/dev/shm", "/var/tmp", "/run", "/proc")]
    reaches = tried(socket.create_connection, ("127.0.0.1", {port}), 1)
    return writes, reaches, tried(open, "x", "w"), len(os.listdir("/proc/1/task"))
def processes():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
---
assert f() == ([False] * 7, False, True, 1)
assert processes() == [1]
"""
        assert passes(program)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_deleted_however_deep(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("stays")
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        for depth in range(2500):
            os.mkdir("d")
            os.symlink(outside, "link")
            os.symlink(tmp_path, "folder-link")
            if depth % 100 == 0:
                Path("closed").mkdir(mode=0)
                Path("file").write_text("goes")
            os.chdir("d")
    finally:
        os.fchdir(here)
        os.close(here)
    assert containment.bytes_in(folder) > 0
    containment.remove(folder)
    assert {*tmp_path.iterdir()} == {outside}


def wait_for(true: Callable[[], bool]) -> None:
    """Until it is true, or for a minute."""
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_a_caller_that_dies_takes_all_along(walls: str) -> None:
    seconds = f"{700 + os.getpid() / 1e7:.7f}"
    program = f"import subprocess\nsubprocess.Popen(['sleep', {seconds!r}])\n"
    caller = f"""
from specens.training import trial
trial._encloses = lambda: {walls == "enclosed"}
trial.passes({program!r}, "", "while True: pass", 600)
"""
    process = subprocess.Popen([sys.executable, "-c", caller], env=environment())
    wait_for(lambda: running("sleep", seconds))
    process.kill()
    process.wait()
    wait_for(lambda: not running("sleep", seconds))
