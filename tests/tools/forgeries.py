# SPDX-License-Identifier: Apache-2.0
"""Programs that are wrong and try to pass all the same, each with its tests after a line of dashes.

A new way is one more entry, and one more name in `AT_THE_WALLS` if namespaces have a part in it.
"""

from programs import TESTS

WRONG = """\
def f(x):
    return 0
"""
# Whatever it is asked, it says what a test may want to hear.
LIAR_CLASS = """\
class f:
    def __init__(self, *_):
        pass
for name in ("eq", "lt", "le", "gt", "ge", "contains", "bool"):
    setattr(f, f"__{name}__", lambda *_: True)
for name in ("sub", "rsub", "abs", "float", "round", "hash", "mod", "and", "xor"):
    setattr(f, f"__{name}__", lambda *_: 0)
setattr(f, "__ne__", lambda *_: False)
"""
LIAR = "def f(x):\n    return A()\n" + LIAR_CLASS.replace(" f:", " A:").replace("(f,", "(A,")
# Its object has every method, and every one says what a test may want to hear.
METHODS = """\
def f(x):
    return A()
class A:
    def __getattr__(self, name):
        return lambda *_: {"count": 1, "real": 2}.get(name, True)
    real = 2
    def __len__(self):
        return 0
    def __iter__(self):
        return iter(())
    def __str__(self):
        return "2"
    def __format__(self, form):
        return "2"
    def __hash__(self):
        return hash(2)
    def __getitem__(self, place):
        return 2
for name in ("xor", "rxor", "sub", "rsub", "and", "or", "mod"):
    setattr(A, f"__{name}__", lambda self, *_: self)
"""
HAVING_NOTHING = """\
class A:
    def __init__(self):
        self.items = []
def f(x):
    return object()
def g(x):
    return U()
class U:
    __hash__ = None
"""
# It looks among all objects for the other end, and speaks in its name.
IMPOSTOR = (
    WRONG
    + """
import gc, json, os, socket, struct, sys
def send(*messages):
    for each in gc.get_objects():
        if isinstance(each, socket.socket):
            for message in messages:
                data = message if isinstance(message, bytes) else json.dumps(message).encode()
                each.sendall(struct.pack("!Q", len(data)) + data)
"""
)
FORGERIES = {
    "no python": """\
def f(x):
    return x +
"""
    + TESTS,
    "wrong": WRONG + TESTS,
    "exit status 83": WRONG
    + """import os
os._exit(83)
"""
    + TESTS,
    "exit status 0": WRONG
    + """import os
os._exit(0)
"""
    + TESTS,
    "SystemExit": WRONG
    + """raise SystemExit(0)
"""
    + TESTS,
    "SystemExit in a call": """\
import sys
def f(x):
    sys.exit(0)
"""
    + TESTS,
    "exit in a call": """\
import os
def f(x):
    os._exit(0)
"""
    + TESTS,
    "atexit": WRONG
    + """import atexit, os
atexit.register(os._exit, 0)
"""
    + TESTS,
    "excepthook": WRONG
    + """import os, sys
sys.excepthook = lambda *_: os._exit(0)
"""
    + TESTS,
    "a thread": WRONG
    + """import os, threading
threading.Timer(0.05, os._exit, (0,)).start()
---
import time
time.sleep(0.3)
assert f(1) == 2
""",
    "a signal": WRONG
    + """import os, signal
signal.signal(14, lambda *_: os._exit(0))
signal.alarm(1)
"""
    + TESTS,
    "its word on every descriptor": WRONG
    + """import os
for n in range(256):
    try:
        os.write(n, b'passed')
    except OSError:
        pass
"""
    + TESTS,
    "its word on standard output": WRONG
    + """print('passed', flush=True)
"""
    + TESTS,
    "equals anything": LIAR + TESTS,
    "equals anything, reflected": LIAR
    + """---
assert 2 == f(1)
""",
    "differs from nothing": LIAR
    + """---
assert not f(1) != 2
""",
    "at no distance": LIAR
    + """---
assert abs(f(1) - 2) < 1e-6
""",
    "at no distance, reflected": LIAR
    + """---
assert not abs(2 - f(1)) > 1e-6
""",
    "in any order": LIAR
    + """---
assert 1 < f(1) < 3
""",
    "contains anything": LIAR
    + """---
assert 2 in f(1)
""",
    "equals in a list": LIAR
    + """---
assert [f(1)] == [2]
""",
    "equals in a set": LIAR
    + """---
assert f(1) in {2, 0}
""",
    "a class that equals anything": LIAR_CLASS + TESTS,
    "a class at no distance": LIAR_CLASS
    + """---
assert abs(f(1) - 2) < 1e-6
""",
    "a class at no distance, in steps": LIAR_CLASS.replace("*_: 0", "*_: f()")
    + """---
assert abs(f(1) - 2) < 1e-6
""",
    "a class that is false": LIAR_CLASS.replace("*_: 0", "*_: f()").replace("*_: True", "*_: False")
    + """---
assert not f(1) - 2
""",
    "an answer of an unknown kind": IMPOSTOR
    + """\
send(["return", None, []], ["return", {"type": "x"}, []])
---
try:
    f(1)
except: pass
""",
    **{
        f"an object's answer: {test}": f"{METHODS}---\nassert {test}\n"
        for test in (
            *("f(1).startswith('Hello')", "f(1).issubset({2})", "f(1).count(2) == 1"),
            *("len(f(1) ^ {2}) == 0", "list(f(1) - {2}) == []", "list({2} - f(1)) == []"),
            *("f(1).real == 2", "f'{f(1)}' == '2'", "str(f(1)) == '2'", "f(1)[0] == 2"),
            *("hash(f(1)) == hash(2)", "f(1).__eq__(2)", "not f(1).__ne__(2)", "f(1)", "f(1) != 3"),
            *("{2: 1}.get(f(1)) == 1", "not len(f(1))", "'%s' % f(1) == '2'"),
        )
    },
    **{
        f"what its object has not: {test}": f"{HAVING_NOTHING}---\nimport collections.abc as c\n"
        f"assert {test}\n"
        for test in (
            *("f.__doc__", "callable(f(1))", "isinstance(f(1), c.Iterator)", "A().__doc__"),
            *("isinstance(f(1), c.Iterable)", "isinstance(f(1), c.Callable)", "hash(g(1))"),
            *("hasattr(f(1), '__next__')", "isinstance(g(1), c.Hashable)", "hasattr(A(), 'x')"),
            *("hasattr(A(), '__enter__')", "isinstance(A(), c.Sized)", "hasattr(A(), '__len__')"),
            *("callable(A())", "A.__doc__", "hasattr(f(1), '_x')", "hasattr(f(1), '__slots__')"),
            *("hasattr(f(1), '__bool__')", "isinstance(A(), c.Container)", "f(1) == A()"),
            *("hasattr(A(), '__call__')", "hasattr(f(1), '__reversed__')", "A() in {A()}"),
        )
    },
    **{
        f"what its object has: {test}": f"{METHODS}A.__eq__ = lambda *_: True\n---\nassert {test}\n"
        for test in (
            *("not hasattr(f(1), 'x')", "not hasattr(f(1), '__len__')", "f(1) != f(2)"),
            *("str(f(1)) != '2'", "f'{f(1)}' != '2'", "hash(f(1)) != hash(2)", "f(1)"),
            *("not isinstance(f(1), __import__('collections').abc.Sized)", "len({f(1), f(2)}) > 1"),
        )
    },
    "a list of a class of its own": """\
def f(x):
    return A()
class A(list): pass
---
assert not isinstance(f(1), list)
""",
    "an error that is another": """\
class A(Exception): pass
class B(Exception): pass
def f():
    raise B
---
try:
    f()
except A: pass
""",
    "an error's field that is a function": """\
class A(Exception): pass
def f():
    a = A()
    a.same, a.startswith = (lambda *_: True), str
    raise a
---
try:
    f()
except A as a:
    assert a.same(2) or a.startswith('Hello')
""",
    "an error's class that is none": IMPOSTOR
    + """send(['return', None, []],
    ['raise', [{'type': 'int'}, {'tuple': [2]}, {'dict': []}, None], []])
---
try:
    f(1)
except: pass
""",
    "a method of no data's": """\
def f(x):
    return 'a'
---
assert f(1).__eq__(2)
""",
    "a class of the function's name": LIAR
    + """A.__name__ = A.__qualname__ = 'f'
---
assert 2 in f(1)
""",
    "the function is a class": "def f(x): pass\n"
    + LIAR_CLASS
    + """---
assert 2 in f(1)
""",
    "a class of a comment": """\
# The class A is what the function all returns.
"""
    + LIAR
    + """---
assert 2 in f(1)
""",
    "a function of a comment": """\
# The function all, and the class any: def sum
def f(x):
    return 0
all = any = lambda *_: True
sum = lambda *_: 2
---
assert all(f(x) == x + 1 for x in (1, 2)) and any([f(1) == 2]) and sum([f(1)]) == 2
""",
    "a function beside a class": """\
class A: pass
def f(x):
    return A()
A.startswith = A.__contains__ = lambda *_: True
---
assert A()
assert f(1).startswith('Hello') or 2 in f(1)
""",
    "the end of a loop": """\
def f(x):
    raise StopIteration
---
assert all(map(lambda x: f(x) == x + 1, (1, 2)))
""",
    "the end of a loop, of a class of its own": """\
def f(x):
    class End(StopIteration):
        pass
    raise End
---
for same in map(lambda x: f(x) == x + 1, (1, 2)):
    assert same
""",
    "a field that is a function": """\
def f(x):
    return collections.namedtuple('A', ['startswith', 'count'])(lambda *_: True, lambda *_: 1)
import collections
---
assert f(1).startswith('Hello') and f(1).count(2) == 1
""",
    "a field that is a type": """\
def f(x):
    return collections.namedtuple('A', ['startswith', 'count'])(str, bool)
import collections
---
assert f(1).startswith('Hello') and f(1).count(2) == 1
""",
    "a field that is an error": """\
def f(x):
    return collections.namedtuple('A', ['startswith'])(ValueError)
import collections
---
assert f(1).startswith('Hello')
""",
    "a field that is the tests' function": """\
def f(g):
    return collections.namedtuple('A', ['startswith'])(g)
import collections
---
assert f(lambda x: x).startswith('Hello')
""",
    "a method of the tests' class": """\
def f(a):
    a.same = lambda other: True
---
class A:
    value = 1
    def same(self, other):
        return self.value == other
a = A()
try:
    f(a)
except TypeError:
    pass
assert a.same(2)
""",
    "a type for a method of the tests' class": """\
def f(a):
    a.same = bool
---
class A:
    value = 1
    def same(self, other):
        return self.value == other
a = A()
try:
    f(a)
except TypeError:
    pass
assert a.same(2)
""",
    "a module of the judge's": IMPOSTOR
    + """send(['return', None, []], ['return', {'module': 'antigravity'}, []])
---
try:
    assert f(1)
except Exception: pass
""",
    "an error's text": """\
def f(x):
    raise ValueError(A())
class A:
    def __str__(self):
        return 'odd'
---
try:
    f(1)
except ValueError as error:
    assert str(error) == 'odd'
""",
    "an argument of the tests' function": """\
def f(g):
    g(A())
class A:
    startswith = lambda *_: True
---
words = []
f(words.append)
assert words[0].startswith('Hello')
""",
    "in a list that it was given": """\
def f(words):
    words.append(A())
class A:
    startswith = lambda *_: True
---
words = []
f(words)
assert words[0].startswith('Hello')
""",
    "what an iterator yields": """\
def f(x):
    yield A()
class A:
    startswith = lambda *_: True
---
assert all(word.startswith('Hello') for word in list(f(1)) + [next(f(1))])
""",
    "what a function returns": """\
def f(x):
    return A
class A:
    startswith = lambda *_: True
---
assert f(1)().startswith('Hello')
""",
    "an operator in steps": """\
class f:
    def __init__(self, *_): pass
    __sub__ = __add__ = __xor__ = lambda self, *_: f()
    __len__ = __hash__ = lambda self: 0
    __str__ = lambda self: '0'
---
assert len((f(1) ^ {2}) + f(1)) == 0 or str(f(1) - 2) == '0'
""",
    "an object that was kept": """\
class A: pass
def f(x):
    return kept[0]
kept = []
A.__init__ = lambda self: kept.append(self)
A.startswith = lambda *_: True
---
a = A()
assert f(1).startswith('Hello')
""",
    "a number that equals anything": """\
class A(int):
    def __eq__(self, o):
        return True
def f(x):
    return A(0)
"""
    + TESTS,
    "text that equals anything": """\
class A(str):
    def __eq__(self, o):
        return True
def f(x):
    return A(0)
---
assert f(1) == '2'
""",
    "Python's names": WRONG
    + """all = any = isinstance = len = lambda *_: True
abs = lambda *_: 0
---
assert all(f(x) == x + 1 for x in (1, 2))
""",
    "Python's functions": WRONG
    + """import builtins, math
builtins.abs = math.fabs = lambda x: 0
builtins.AssertionError = ValueError
---
import math
assert abs(f(1) - 2) < 1e-6 and math.fabs(f(1) - 2) < 1e-6
""",
    "a module": WRONG
    + """import math
math.isclose = lambda *_: True
---
import math
assert math.isclose(f(1), 2)
""",
    "a module's name": WRONG
    + """import types
m = types.ModuleType('m')
m.isclose = lambda *_: True
---
assert m.isclose(f(1), 2)
""",
    "a trace": WRONG
    + """import sys, threading
def t(*_):
    return t
sys.settrace(t)
sys.setprofile(t)
"""
    + TESTS,
    "an answer before the question": IMPOSTOR
    + """send(['return', None, []], ['return', 2, []], b'passed')
"""
    + TESTS,
    "an answer that is none": IMPOSTOR
    + """send(b'{' * 100_000)
---
try:
    f(1)
except: pass
""",
    "an answer without an end": IMPOSTOR
    + """send(['return', None, []], b'[' * (1 << 25))
---
try:
    f(1)
except: pass
""",
    "a pickle": IMPOSTOR
    + """send(['return', {'pickle': '80049500'}, []])
---
try:
    f(1)
except: pass
""",
    "a function of the judge's": IMPOSTOR
    + """send(['return', {'global': ['os', 'system']}, []])
---
try:
    f(1)
except: pass
""",
    "names of the judge's": IMPOSTOR
    + """send(['ask', 'name', None, ['TESTS'], {}])
"""
    + TESTS,
    "globals of a function of the tests": """\
def f(g):
    return g.__globals__
---
def g():
    pass
assert f(g)
""",
    "globals through getattr": """\
def f(g):
    return g._remote_peer.ask('getattr', g, '__globals__')
---
def g():
    pass
assert f(g)
""",
    "frames of a generator of the tests": """\
def f(g):
    return g._remote_peer.ask('getattr', g, 'gi_frame')
---
assert f(n for n in [1])
""",
    "the gate of the tests": """\
import os
def f(g):
    return g._remote_peer.ask('call', g, 'os')
---
import importlib
assert f(importlib)
""",
    "its argument is what was expected": """\
def f(a):
    a[0] = 0
    return [0]
---
a = [5]
assert f(a) == [5]
""",
    "the tests' file": WRONG
    + """import glob, os
found = ''
for n in range(3, 256):
    try:
        found += os.pread(n, 1000, 0).decode()
    except OSError:
        pass
if 'assert' in found:
    f = lambda x: 2
"""
    + TESTS,
    "the tests in memory": WRONG
    + """import gc
wanted = chr(61) * 2 + ' 79' + '19'[:]
def texts(o):
    yield from (o if isinstance(o, (list, tuple)) else ())
    yield from o.values() if isinstance(o, dict) else ()
if any(wanted in str(t) for o in gc.get_objects() for t in texts(o)
       if isinstance(t, (str, bytes)) and t is not wanted):
    f = lambda x: int('7919')
---
assert f(1) == 7919
""",
    "the judge's memory": WRONG
    + """import os
for p in os.listdir('/proc'):
    if p.isdigit() and int(p) != os.getpid():
        for name in ('mem', 'fd/3', 'fd/4', 'fd/5', 'fd/6', 'fd/7', 'fd/8', 'fd/9'):
            try:
                with open(f'/proc/{p}/{name}', 'r+b', 0) as x:
                    x.write(b'passed')
                    f = lambda x: 2
            except OSError:
                pass
"""
    + TESTS,
    "a second copy": WRONG
    + """import os
os.fork()
"""
    + TESTS,
    "no end": """\
def f(x):
    while True:
        pass
"""
    + TESTS,
    "too much memory": """\
b = bytearray(1 << 34)
def f(x):
    return x + 1
"""
    + TESTS,
    "a large file": """\
open('f', 'wb').write(bytes(1 << 22))
def f(x):
    return x + 1
"""
    + TESTS,
    "many files": """\
for n in range(99):
    open(str(n), 'wb').write(bytes(1 << 20))
    import time
    time.sleep(0.01)
def f(x):
    return x + 1
"""
    + TESTS,
    "folders in folders": """\
import os
def f(x):
    return x
for n in range(3000):
    os.mkdir("d")
    os.chdir("d")
open("f", "wb").write(bytes(1000))
import time
time.sleep(0.2)
"""
    + TESTS,
    "folders that cannot be read": """\
import os
def f(x):
    return x
os.mkdir("d")
open("d/f", "wb").write(bytes(1000))
os.chmod("d", 0)
os.chmod(".", 0)
"""
    + TESTS,
    "many processes": """\
import os, time
for n in range(200):
    if not os.fork():
        time.sleep(60)
def f(x):
    return x + 1
"""
    + TESTS,
    "lone surrogates": "def f(x):\n    return '\ud800'\n" + TESTS,
    "a null byte": "def f(x):\n    return 2\0\n" + TESTS,
}
# What walls, where there are any, have a part in.
AT_THE_WALLS = (
    *("its word on every descriptor", "the tests' file", "the judge's memory", "a large file"),
    *("many files", "many processes", "too much memory", "folders in folders"),
    "folders that cannot be read",
)
