# SPDX-License-Identifier: Apache-2.0
"""`Row`: one sequence of a batch while it is written, on the host.

What a schedule or a rule has to remember of a row is a field of its own here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from specens.schedules import Survival


class Occurrences:
    """Where each token of a text that grows has occurred."""

    def __init__(self) -> None:
        self._places: dict[int, list[int]] = {}
        self._known = 0

    def continuation(self, tokens: Sequence[int], longest: int, count: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest possible end of `tokens`.

        Args:
            tokens: the text; longer than the last time, or the same.
            longest: tokens of the end that are looked for at most, >= 1.
            count: tokens to return at most.
        """
        size = len(tokens)
        for at in range(self._known, size):
            self._places.setdefault(tokens[at], []).append(at)
        self._known = size
        places = self._places[tokens[-1]]
        best, follows = 0, size
        for at in (places[i] for i in range(len(places) - 2, -1, -1)):
            length = 1
            while length < min(longest, at + 1) and tokens[at - length] == tokens[~length]:
                length += 1
            if length > best:
                best, follows = length, at + 1
            if best == longest:
                break
        return list(tokens[follows : follows + max(count, 0)])


@dataclass(eq=False)
class Row:
    """One sequence of the batch while it is being written.

    index: which row of the user's batch. pad: columns of left padding before its text.
    length: committed tokens, the prompt included. tokens: these, on the host.
    pending: proposer of each pending token; POINT_MASS if it was looked up.
    slot: place in the rotation of the member that scored last.
    ended: whether an end-of-sequence token is among the pending ones that were checked.
    memory: of an acceptance rule that remembers.
    judged: how often drafts of the row were verified.
    survival: what a schedule has learned of the fate of the row's proposals.
    occurrences: of its tokens, where they are looked up.
    """

    index: int
    pad: int
    length: int
    tokens: list[int]
    pending: list[int] = field(default_factory=list)
    slot: int = 0
    ended: bool = False
    memory: float = 0.0
    judged: int = 0
    survival: Survival = field(default_factory=Survival)
    occurrences: Occurrences = field(default_factory=Occurrences)

    @property
    def end(self) -> int:
        """Tokens, pending ones included."""
        return self.length + len(self.pending)
