# SPDX-License-Identifier: Apache-2.0
"""`Row`: one sequence of a batch while it is written, on the host.

What a schedule or a rule has to remember of a row is a field of its own here. Needs no torch.
"""

from dataclasses import dataclass, field

from specens.loop.occurrences import Occurrences
from specens.loop.statistics import RowStatistics
from specens.loop.survival import Survival


@dataclass(eq=False)
class Row:
    """One sequence of the batch while it is being written.

    index: which row of the user's batch. pad: columns of left padding before its text.
    length: committed tokens, the prompt included. tokens: these, on the host.
    statistics: what became of what was proposed to it.
    pending: proposer of each pending token; POINT_MASS if it was looked up.
    slot: place in the rotation of the member that scored last.
    ended: whether an end-of-sequence token is among the pending ones that were checked.
    memory: of an acceptance rule that remembers.
    judged: how often drafts of the row were verified.
    components: the member that each token after the prompt is drawn from, where that is known.
    survival: what a schedule has learned of the fate of the row's proposals.
    occurrences: of its tokens, where they are looked up.
    """

    index: int
    pad: int
    length: int
    tokens: list[int]
    statistics: RowStatistics
    pending: list[int] = field(default_factory=list)
    slot: int = 0
    ended: bool = False
    memory: float = 0.0
    judged: int = 0
    components: list[int] = field(default_factory=list)
    survival: Survival = field(default_factory=Survival)
    occurrences: Occurrences = field(default_factory=Occurrences)
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        """Note where the prompt ends."""
        self.prompt_length = self.length

    @property
    def end(self) -> int:
        """Tokens, pending ones included."""
        return self.length + len(self.pending)
