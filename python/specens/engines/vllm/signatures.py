# SPDX-License-Identifier: Apache-2.0
"""Which functions of vLLM are called or replaced here, by the names of their arguments.

A vLLM of which one differs is not known: it is never plugged into. To rely on a further function,
add it to `relied_upon` in worker.py.
"""

import inspect
from collections.abc import Iterable
from typing import Any

Function = tuple[Any, str, str]


def differences(functions: Iterable[Function]) -> list[str]:
    """What is not as it is expected to be; empty where all is.

    functions: (owner, name, arguments): the names of its arguments in order, between spaces. Names
        after "..." may stand anywhere, among others: the fields of a class.
    """
    found = []
    for owner, name, arguments in functions:
        function = getattr(owner, name, None)
        if function is None:
            found.append(f"{owner.__name__} has no {name}")
            continue
        there = [argument for argument in inspect.signature(function).parameters]
        expected = arguments.split()
        same = set(expected[1:]) <= set(there) if expected[:1] == ["..."] else there == expected
        if not same:
            found.append(f"{owner.__name__}.{name} takes ({', '.join(there)})")
    return found
