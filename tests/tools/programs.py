# SPDX-License-Identifier: Apache-2.0
"""Programs as models may write them: right ones, which pass, and some that leave processes.

Each has its tests after a line of dashes.
"""

TESTS = """---
assert f(1) == 2
"""
RIGHT = {
    "a number": """\
def f(x):
    return x + 1
"""
    + TESTS,
    "containers": """\
def f(x):
    return {'a': [x, (1, 2.5)], 'b': {3}, 'c': frozenset('d'), 1: b'e'}
---
assert f(None) == {'a': [None, (1, 2.5)], 'b': {3}, 'c': frozenset('d'), 1: b'e'}
""",
    "values of the library": """\
import collections, datetime, decimal, fractions
def f():
    return [collections.Counter('aab'), collections.deque([1]), fractions.Fraction(1, 3),
        decimal.Decimal('0.1'), datetime.date(2020, 2, 29), range(3), 2**99, 1j, ...,
        collections.OrderedDict(a=1), collections.defaultdict(int, b=2)]
---
import collections, datetime, decimal, fractions
assert f() == [collections.Counter('aab'), collections.deque([1]),
    fractions.Fraction(1, 3), decimal.Decimal('0.1'), datetime.date(2020, 2, 29),
    range(3), 2**99, 1j, ..., {'a': 1}, {'b': 2}]
assert f()[0].most_common(1) == [('a', 2)]
""",
    "a function of a class's objects": """\
class Node: pass
from typing import Optional
def f(x):
    node = Node()
    node.value, node.next = x, None
    return node
def g(node):
    return node.value
---
assert g(f(3)) == 3
""",
    "an iterator": """\
def f(x):
    return map(str, x)
---
assert list(f([1])) == ['1']
a, b = f((1, 2))
assert (a, b) == ('1', '2') and next(f([3])) == '3'
assert '2' in f([1, 2])
assert next(f([]), None) is None
""",
    "a named tuple": """\
from typing import NamedTuple
class P(NamedTuple):
    x: int
    y: int
---
assert P(1, 2) == (1, 2)
assert P(1, y=2).y == 2
""",
    "text of all kinds": r"""
def f(x):
    return x * 2
---
assert f('\ud800\xe9\0') == '\ud800\xe9\0' * 2
""",
    "a list in place": """\
def f(x):
    x.sort()
    x[0].append(9)
    return x
---
a = [[2], [1]]
b = a[1]
assert f(a) is a
assert a == [[1, 9], [2]]
assert b == [1, 9]
""",
    "a dict and a set in place": """\
def f(x, y):
    x.pop('a')
    y.add(x['b'])
---
a, b = {'a': 1, 'b': 2}, {3}
f(a, y=b)
assert (a, b) == ({'b': 2}, {2, 3})
""",
    "a class": """\
class Stack:
    size = 0
    def __init__(self):
        self.items = []
    def push(self, x):
        self.items.append(x)
        Stack.size += 1
    def pop(self):
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __contains__(self, x):
        return x in self.items
    def __getitem__(self, i):
        return self.items[i]
---
s = Stack()
s.push(3)
assert len(s) == s.size == Stack.size == 1 and 3 in s
assert 4 not in s
assert s[0] == s.pop() == 3
assert isinstance(s, Stack)
assert not isinstance(3, Stack)
assert not s
s.items = [5]
assert s.pop() == 5
try:
    s.pop()
except IndexError as e:
    assert 'empty' in str(e)
else:
    1 / 0
""",
    "operators of a class that was asked for": """\
class V:
    def __init__(self, x):
        self.x = x
    def __add__(self, o):
        return V(self.x + o.x)
    def __mul__(self, o):
        return V(self.x * o)
    __rmul__ = __mul__
    def __eq__(self, o):
        return self.x == o.x
    def __lt__(self, o):
        return self.x < o.x
    def __neg__(self):
        return V(-self.x)
    def __repr__(self):
        return f'V({self.x})'
---
assert V(1) + V(2) == V(3) and 2 * V(1) == V(1) * 2 == V(2)
assert V(1) != V(2)
assert V(1) < V(2)
assert sorted([V(2), V(1)]) == [V(1), V(2)]
assert (-V(1)).x == -1
assert repr(V(1)) == f'{V(1)}' == 'V(1)'
""",
    "generators, both ways": """\
def f(xs):
    for x in xs:
        yield x + 1
---
assert list(f(n for n in (1, 2))) == [2, 3]
assert sum(f({1: 2}.keys())) == 2
""",
    "functions, both ways": """\
def f(g, x):
    return lambda y: g(x) + y
---
import math
seen = []
def g(x):
    seen.append(x)
    return x
assert f(g, 1)(2) == 3
assert seen == [1]
assert f(int, '4')(1) == 5
assert f(math.sqrt, 4)(1) == 3
assert f.__name__ == 'f'
assert callable(f)
""",
    "objects of the tests": """\
def f(node):
    node.seen = True
    return node.value if node.next is None else f(node.next)
---
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
a = Node(1, Node(2))
assert f(a) == 2
assert a.seen and a.next.seen
""",
    "errors of its own": """\
class Empty(LookupError):
    pass
def f():
    raise Empty('nothing', 3)
---
try:
    f()
except Empty as e:
    assert e.args == ('nothing', 3)
try:
    f()
except LookupError:
    pass
""",
    "errors of the tests": """\
def f(g):
    try:
        g()
    except KeyError:
        return 2
---
def g():
    raise KeyError(1)
assert f(g) == 2
""",
    "what it has left in its names": """\
total = 0
def f(x):
    global total
    total += x
---
f(1)
assert total == 1
f(2)
assert total == 3
try:
    nothing
except NameError:
    pass
else:
    1 / 0
""",
    "a module": """\
import math as m
x = m.pi
---
assert m.isclose(x, m.pi)
""",
    "a name of Python's": """\
def sum(x):
    return 7
---
assert sum([1]) == 7
""",
    "a file": """\
def f(name):
    return len(open(name).read())
---
open('a.txt', 'w').write('abc')
assert f('a.txt') == 3
""",
    "errors that descend from one another": """\
class A(Exception):
    level = 1
class B(A):
    def __init__(self, code):
        super().__init__('no')
        self.code = code
    def __str__(self):
        return f'code {self.code}'
class E(KeyError, ValueError):
    pass
def f(x):
    try:
        raise x('a') if x == 'E' else B(x)
    except B as b:
        raise E(x) from b
def g(x):
    b = B([x])
    if hasattr(b, 'add_note'):
        b.add_note('n')
    raise b
---
try:
    g(3)
except A as e:
    assert type(e).__name__ == 'B' and e.code == [3] and e.level == 1
    assert str(e) == 'code [3]' and e.args == ('no',)
    assert getattr(e, '__notes__', ['n']) == ['n']
    assert issubclass(B, A) and isinstance(e, B)
for kind in (ValueError, KeyError, E):
    try:
        f(2)
    except kind as e:
        assert isinstance(e.__cause__, B) and e.__cause__.code == 2
""",
    "errors that Python and its library know": """\
import json
def f(x):
    return json.loads(x)
def g(x):
    return open(x)
---
import json
try:
    f('[1')
except json.JSONDecodeError as e:
    assert e.pos == 2 and 'delimiter' in str(e)
try:
    g('none')
except OSError as e:
    assert e.filename == 'none' and e.errno == 2 and "'none'" in str(e)
try:
    f(b'\\xff')
except UnicodeDecodeError as e:
    assert e.start == 0
""",
    "an error of the tests' own": """\
def f(g):
    try:
        g()
    finally:
        pass
---
class A(Exception):
    def __init__(self, code):
        super().__init__(code, 1)
        self.code = code
def g():
    raise A(5)
try:
    f(g)
except A as e:
    assert e.code == 5 and e.args == (5, 1)
else:
    1 / 0
""",
    "what objects have": """\
class Bag:
    def __init__(self):
        self.items = []
    def __len__(self):
        return len(self.items)
    def __eq__(self, other):
        return self.items == other.items
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.items.append(1)
---
from collections.abc import Hashable, Sized
b = Bag()
assert isinstance(b, Sized) and hasattr(b, '__enter__') and not isinstance(b, Hashable)
assert b == Bag() and not b
with b as same:
    assert same == b and same is b
assert len(b) == 1 and b and vars(b) == {'items': [1]}
""",
    "what objects have not": """\
class Stack:
    "A stack."
    def __init__(self):
        self.items = []
---
from collections.abc import Hashable, Sized
s = Stack()
assert Stack.__doc__ == s.__doc__ == 'A stack.'
assert not isinstance(s, Sized) and not hasattr(s, '__len__') and not callable(s)
assert hash(s) == hash(s) and s == s and s != Stack() and s and isinstance(s, Hashable)
assert type(s).__name__ == s.__class__.__name__ == 'Stack' and type(s) == type(Stack())
""",
    "what answers are": """\
def f(x):
    "Doc."
    yield x
def g(x):
    return lambda: x
class D(dict):
    pass
def h():
    return D(a=1)
---
import types
from collections.abc import Callable, Iterator
assert f.__doc__ == 'Doc.' and h.__doc__ is None
assert isinstance(f(1), Iterator) and isinstance(f(1), types.GeneratorType)
assert not isinstance(f(1), Callable) and callable(g(1)) and isinstance(g, types.FunctionType)
assert isinstance(h(), dict) and not hasattr(h(), 'b')
""",
    "what objects of the tests have and have not": """\
from collections.abc import Iterable
def f(x):
    return [g for y in x for g in f(y)] if isinstance(x, Iterable) else [x() if callable(x) else x]
def decorated(g):
    import functools
    @functools.wraps(g)
    def h(*a):
        return g(*a)
    return h
---
class A: pass
a = A()
assert f([a, (n for n in (1, 2)), lambda: 3]) == [a, 1, 2, 3]
assert decorated(lambda x: x + 1)(1) == 2
""",
    "empty arrays": """\
import numpy as np
def f(n):
    return np.zeros((0, n)), np.arange(6.0).reshape(1, 2, 3)
---
import numpy as np
a, b = f(3)
assert a.shape == (0, 3) and b.shape == (1, 2, 3) and b[0, 1, 2] == 5
assert np.array_equal(b, np.arange(6.0).reshape(1, 2, 3))
""",
    "threads": """\
import threading
def f(x):
    r = []
    t = threading.Thread(target=r.append, args=(x,))
    t.start()
    t.join()
    return r[0] + 1
"""
    + TESTS,
}
# They leave a process SECONDS long.
LEAVERS = {
    "a child": """
subprocess.Popen(["sleep", SECONDS])
""",
    "a session": """
subprocess.Popen(["sleep", SECONDS], start_new_session=True)
""",
    "a double fork": """
if not os.fork():
    os.setsid()
    if not os.fork():
        os.execvp("sleep", ["sleep", SECONDS])
    os._exit(0)
""",
    "a deaf one": """
subprocess.Popen(["sh", "-c", "trap '' 1 2 3 15; sleep " + SECONDS])
""",
    "one at its end": """
atexit.register(subprocess.Popen, ["sleep", SECONDS])
""",
    "many": """
for _ in range(9):
    subprocess.Popen(["sleep", SECONDS], start_new_session=True)
""",
}
