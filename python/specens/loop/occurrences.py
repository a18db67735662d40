# SPDX-License-Identifier: Apache-2.0
"""`Occurrences`: where each token of a text has occurred, for what the text itself proposes.

Needs no torch.
"""

from collections.abc import Sequence


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
        longest_match, follows = 0, size
        for at in (places[i] for i in range(len(places) - 2, -1, -1)):
            length = 1
            while length < min(longest, at + 1) and tokens[at - length] == tokens[~length]:
                length += 1
            if length > longest_match:
                longest_match, follows = length, at + 1
            if longest_match == longest:
                break
        return list(tokens[follows : follows + max(count, 0)])
