# SPDX-License-Identifier: Apache-2.0
"""What one call of `generate` did: counts per member, acceptance, and time."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counts and times of one call, summed over the rows of the batch.

    members: names, the separate draft last if there is one; the lists below follow this order.
    calls: forwards of each member, the prefill not counted.
    drafted: tokens that each member proposed, verified or not.
    tested: drafted tokens that verification reached.
    accepted: tested tokens that it kept.
    by_position: (tested, accepted) of the first, second, ... draft token of a verification.
    num_tokens: tokens emitted.
    num_replaced: of these, drawn from a residual or as a bonus token.
    turns: propose-score-verify-commit rounds.
    status: `Status` bits that any row of any turn set.
    prefill_seconds, decode_seconds: wall time before and after the first turn began.
    """

    members: list[str]
    calls: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    tested: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    by_position: list[list[int]] = field(default_factory=list)
    num_tokens: int = 0
    num_replaced: int = 0
    turns: int = 0
    status: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Start every per-member count at zero."""
        for name in ("calls", "drafted", "tested", "accepted"):
            setattr(self, name, getattr(self, name) or [0] * len(self.members))

    def test(self, proposers: list[int], num_accepted: int) -> None:
        """Count one verification of a row: its drafts' proposers and how many it kept."""
        for position, proposer in enumerate(proposers[: num_accepted + 1]):
            kept = position < num_accepted
            self.tested[proposer] += 1
            self.accepted[proposer] += kept
            if position == len(self.by_position):
                self.by_position.append([0, 0])
            self.by_position[position][0] += 1
            self.by_position[position][1] += kept

    def emit(self, num_tokens: int, replaced: bool, status: int) -> None:
        """Count what one verification of a row emitted, and whether its last token was drawn."""
        self.num_tokens += num_tokens
        self.num_replaced += replaced
        self.status |= status

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested draft tokens; NaN if nothing was drafted."""
        return sum(self.accepted) / sum(self.tested) if sum(self.tested) else float("nan")

    @property
    def calls_per_token(self) -> float:
        """Forwards of all members per emitted token."""
        return sum(self.calls) / max(self.num_tokens, 1)

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second of decoding, the prefill not counted."""
        return self.num_tokens / self.decode_seconds if self.decode_seconds else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Everything, the ratios too, for JSON."""
        return {
            **asdict(self),
            "acceptance_rate": self.acceptance_rate,
            "calls_per_token": self.calls_per_token,
            "tokens_per_second": self.tokens_per_second,
        }
