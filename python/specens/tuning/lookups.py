# SPDX-License-Identifier: Apache-2.0
"""What looking up would have proposed in texts that were written, and what would have been kept.

The text tells how many proposals are kept: the ensemble's token is the same, or it is not. Of the
first proposal that the text does not tell, and of the last one that it does, the law tells the
chance.
"""

import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from specens.loop.occurrences import Occurrences
from specens.loop.profile import Found
from specens.schedules import Lookup


class LookUps:
    """What `schedules.Lookup` would have proposed at each place of one text.

    seconds: of each look-up.
    """

    def __init__(self, text: Sequence[int], begin: int, most: int) -> None:
        """`text`: prompt and what was written from `begin` on. `most`: proposals at a place."""
        self.seconds: list[float] = []
        self._tokens = text[begin:]
        self._occurrences = Occurrences()
        self._proposals = [self._look_up(text[:at], most) for at in range(begin, len(text))]
        self._longest = max(map(len, self._proposals), default=0)
        # Per place, the chances of as many proposals as are known to follow the text, and one more.
        self._chances: list[list[float]] = [[] for _ in self._proposals]

    def _look_up(self, text: Sequence[int], most: int) -> list[int]:
        began = time.perf_counter()
        proposals = self._occurrences.continuation(text, Lookup(most).longest, most)
        self.seconds.append(time.perf_counter() - began)
        return proposals

    def read(self, place: int, law: Tensor) -> None:
        """Note what the ensemble's law (V,) at a place says; place by place."""
        for start in range(max(place - self._longest + 1, 0), place + 1):
            proposals, depth = self._proposals[start], place - start
            if depth < len(proposals) and proposals[:depth] == self._tokens[start:place]:
                self._chances[start].append(float(law[proposals[depth]]))

    def turns(self, gamma: int) -> Iterator[tuple[int, float]]:
        """(drafts, how many of them are expected to be kept) of each turn of this very text."""
        place = 0
        while place < len(self._tokens):
            drafts = self._proposals[place][:gamma]
            if place + len(drafts) > len(self._tokens):
                return  # what the text does not tell
            yield len(drafts), sum(self._chances[place][:gamma])
            same = 0
            while same < len(drafts) and drafts[same] == self._tokens[place + same]:
                same += 1
            place += same + 1


def replayed(texts: Sequence[LookUps], gamma: int) -> Found:
    """What looking up at most gamma tokens would have found."""
    turns: dict[int, list[float]] = {}
    for text in texts:
        for drafts, kept in text.turns(gamma):
            turns.setdefault(drafts, []).append(kept)
    count = sum(map(len, turns.values()))
    return tuple((n, len(kept) / count, sum(kept) / len(kept)) for n, kept in sorted(turns.items()))
