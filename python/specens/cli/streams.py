# SPDX-License-Identifier: Apache-2.0
"""What may be sent to a terminal, and how a command ends whose output nobody takes.

It is imported with the command line: no torch, no rich.
"""

import os
import re
import sys
from contextlib import suppress

# All control characters but tab and newline.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without what a terminal takes for commands: of control characters tab and newline stay."""
    return _CONTROLS.sub("", text)


def end(message: str, code: int) -> None:
    """One line on standard error, if there is one, and the exit code."""
    line = printable(" ".join(message.split()))
    with suppress(OSError, AttributeError):  # a full disk, or no standard error
        sys.stderr.write(f"specens: error: {line}\n")
        sys.stderr.flush()
    sys.exit(code)


def leave_output() -> None:
    """What standard output still holds is dropped: Python would try to write it at exit."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError, ValueError):
            try:
                stream.flush()
            except OSError:
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)
