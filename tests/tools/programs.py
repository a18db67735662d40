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
