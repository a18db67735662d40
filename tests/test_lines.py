# SPDX-License-Identifier: Apache-2.0
"""`make lines` measures what it says that it measures."""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return __import__("lines")


PYTHON = '''
class A:
    def f(self, a, *, b=1):
        """Two lines."""
        def inner(): ...

async def g(): return 1
'''
CPP = """
namespace specens {
struct S {
  int one() const { return 1; }
  int three() const {
    return 3;
  }
};

template <typename T>
int f(int a,
      int b) {
  if (a) {
    return b;
  }
  return 0;
}

const int table[] = {
    1,
};
}  // namespace specens
"""


def test_python_functions_are_measured(lines: ModuleType) -> None:
    measured = list(lines.python_functions(PYTHON))
    assert measured == [("A.f", 3, 2), ("A.f.inner", 1, 0), ("g", 1, 0)]


def test_cpp_functions_are_measured(lines: ModuleType) -> None:
    measured = {each.name: each.lines for each in lines.cpp_functions(CPP)}
    assert measured == {"f": 7, "three": 3}


@pytest.mark.slow
def test_the_house_is_printed(lines: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    lines.main()
    printed = capsys.readouterr().out
    assert "python/specens/loop/run.py" in printed
    assert printed.count("reading path") == 1
    assert lines.home("specens_kernels.verify").name == "__init__.py"
    with pytest.raises(ValueError, match="lines: name"):
        lines.home("transformers.generation")
