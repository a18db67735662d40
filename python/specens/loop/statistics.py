# SPDX-License-Identifier: Apache-2.0
"""What one call of `generate` did: counts per row and member, acceptance, and time.

Counts are noted per row; those of the call are their sums. To count something else of a row, add a
field to `RowStatistics`, its sum to `Statistics` and, where tokens are committed, its step.
"""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

# Properties of a call that JSON is told, too.
_DERIVED = (
    "drafted",
    "tested",
    "accepted",
    "emitted",
    "by_position",
    "num_tokens",
    "num_replaced",
    "status",
    "acceptance_rate",
    "calls_per_token",
    "tokens_per_second",
)


@dataclass
class RowStatistics:
    """Counts of one row of a batch; the lists have a number for each of the call's members.

    drafted: tokens that each member proposed, verified or not.
    tested: drafted tokens that verification reached.
    accepted: tested tokens that it kept.
    emitted: accepted tokens that are in the text; those beyond its end are not. A token that
        several drafts have kept counts for the one that handed it to the ensemble.
    by_position: (tested, accepted) of the first, second, ... draft token of a verification.
    num_tokens: tokens of the text.
    num_replaced: of these, drawn from a residual or as a bonus token; the rest are emitted drafts.
    turns: turns that the row took part in.
    status: `Status` bits that any turn set.
    """

    drafted: list[int]
    tested: list[int]
    accepted: list[int]
    emitted: list[int]
    by_position: list[list[int]] = field(default_factory=list)
    num_tokens: int = 0
    num_replaced: int = 0
    turns: int = 0
    status: int = 0

    @classmethod
    def of(cls, num_members: int) -> "RowStatistics":
        """Nothing yet, of so many members."""
        drafted, tested, accepted, emitted = ([0] * num_members for _ in range(4))
        return cls(drafted, tested, accepted, emitted)

    def test(self, proposers: Sequence[int], num_accepted: int) -> None:
        """Count one verification: its drafts' proposers and how many it kept."""
        for position, proposer in enumerate(proposers[: num_accepted + 1]):
            kept = position < num_accepted
            self.tested[proposer] += 1
            self.accepted[proposer] += kept
            if position == len(self.by_position):
                self.by_position.append([0, 0])
            self.by_position[position][0] += 1
            self.by_position[position][1] += kept

    def emit(self, proposers: Sequence[int], num_tokens: int, status: int) -> None:
        """Count a turn's tokens: drafts of these proposers, and what was drawn after them."""
        for proposer in proposers:
            self.emitted[proposer] += 1
        self.num_tokens += num_tokens
        self.num_replaced += num_tokens - len(proposers)
        self.turns += 1
        self.status |= status

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested draft tokens; NaN if nothing was tested."""
        return _ratio(sum(self.accepted), sum(self.tested))


@dataclass
class Statistics:
    """Counts and times of one call.

    Its other counts, `drafted` to `num_replaced` and `status`, are sums over its rows.

    members: names, the separate draft last if there is one; lists of counts follow this order.
    rows: of each row of the batch.
    calls: forwards of each member, the prefill not counted; a forward may serve several rows.
    turns: propose-score-verify-commit rounds.
    prefill_seconds, decode_seconds: wall time before and after the first turn began.
    """

    members: list[str]
    rows: list[RowStatistics] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    turns: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Start every per-member count at zero."""
        self.calls = self.calls or [0] * len(self.members)

    @property
    def drafted(self) -> list[int]:
        """Tokens that each member proposed, verified or not."""
        return self._sums("drafted")

    @property
    def tested(self) -> list[int]:
        """Drafted tokens that verification reached, per member."""
        return self._sums("tested")

    @property
    def accepted(self) -> list[int]:
        """Tested tokens that it kept, per member."""
        return self._sums("accepted")

    @property
    def emitted(self) -> list[int]:
        """Accepted tokens that are in the texts, per member."""
        return self._sums("emitted")

    @property
    def by_position(self) -> list[list[int]]:
        """(tested, accepted) of the first, second, ... draft token of a verification."""
        by_row = [row.by_position for row in self.rows]
        at_places = itertools.zip_longest(*by_row, fillvalue=(0, 0))
        return [[sum(counts) for counts in zip(*pairs, strict=True)] for pairs in at_places]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_replaced(self) -> int:
        """Of these, drawn from a residual or as a bonus token; the others are emitted drafts."""
        return sum(row.num_replaced for row in self.rows)

    @property
    def status(self) -> int:
        """`Status` bits that any row of any turn set."""
        return reduce(operator.or_, (row.status for row in self.rows), 0)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested draft tokens; NaN if nothing was tested."""
        return _ratio(sum(self.accepted), sum(self.tested))

    @property
    def calls_per_token(self) -> float:
        """Forwards of all members per token of the texts."""
        return sum(self.calls) / max(self.num_tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the texts per second of decoding, the prefill not counted."""
        return _ratio(self.num_tokens, self.decode_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Everything, sums and ratios too, for JSON."""
        return asdict(self) | {name: getattr(self, name) for name in _DERIVED}

    def _sums(self, name: str) -> list[int]:
        per_row = [getattr(row, name) for row in self.rows]
        return [sum(counts) for counts in zip([0] * len(self.members), *per_row, strict=True)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
