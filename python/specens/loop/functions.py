# SPDX-License-Identifier: Apache-2.0
"""Functions of the user that the loop calls: what they are called, and whether they can be.

To call another kind of them, ask `check_arguments` once at the start of the call: what a function
raises later is its own and goes through.
"""

import inspect
from typing import Any

from specens_kernels import Refusal


def name_of(function: Any) -> str:
    """What a message calls it: its own name, or that of its type."""
    return str(getattr(function, "__name__", type(function).__name__))


def check_arguments(argument: str, function: Any) -> None:
    """Refuse, of the list that is `argument`, a function that cannot take ids and scores."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin has none
        return
    try:
        signature.bind(None, None)
    except TypeError:
        got = f"{name_of(function)}{signature}"
        raise Refusal("generate", argument, "functions of (input_ids, scores)", got) from None
