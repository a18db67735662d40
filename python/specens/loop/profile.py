# SPDX-License-Identifier: Apache-2.0
"""`Profile`: what is known of models before they write, and what schedules predict from it.

A schedule predicts its time per token from a profile (`seconds`, in the file of each schedule);
`specens tune` measures the profile and tries what `Schedule.candidates` proposes. Predictions hold
for one sequence and a text that does not end, and take it that whether a draft is kept, and whether
its proposer stops, depends on nothing but its place in its block. To know more of models, add a
field to `Profile`. Needs no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specens.loop.schedule import DraftStop, Schedule

# (count, seconds), the counts rising: straight lines between, and on beyond the last two.
Times = tuple[tuple[int, float], ...]
# Chances that the first 1, 2, ... drafts of a block are all kept; beyond, the last ratio goes on,
# so that a single number is the chance of each.
Kept = tuple[float, ...]
# Of a look-up: drafts, the share of turns that have so many, and how many of them are kept.
Found = tuple[tuple[int, float, float], ...]
# As many models whose orders, or whose numbers of tokens, are all tried.
FEW = 3


@dataclass(frozen=True)
class Stopped:
    """A proposer that stops by itself.

    model: who proposes. stop: when it stops.
    going: chances that a second, third, ... draft is proposed at all.
    kept: chances that the first 1, 2, ... drafts are proposed and kept.
    asking: seconds to ask it after a draft.
    """

    model: int
    stop: "DraftStop"
    going: Kept
    kept: Kept
    asking: float = 0.0


@dataclass(frozen=True)
class Relaxed:
    """A proposer whose drafts are judged by a lossy rule.

    model: who proposes. acceptance: the rule as it is written on a command line.
    law: of the text, in words. kept: kept[g - 1]: as in `Profile`, of this rule, in blocks of g.
    divergence: mean total variation between what stands at a draft's place and the law asked for.
    """

    model: int
    acceptance: str
    law: str
    kept: tuple[Kept, ...]
    divergence: float


@dataclass(frozen=True)
class Profile:
    """What predictions are made of. Models are counted: the ensemble's members, then the drafts.

    names: of the models.
    weights: of the ensemble's members.
    forwards: per model, seconds of one forward over 1, 2, ... tokens.
    draw: seconds to draw one token from a model's law.
    verify: seconds of a turn without forwards and draws, for 0, 1, ... drafts.
    kept: kept[m][v]: of model m's drafts, when model v verifies them; the last v is the ensemble.
    blocks: blocks[m][g - 1]: kept[m][-1] where all blocks have g drafts: the longer they are, the
        rarer they begin where drafts are kept. Empty: kept[m][-1] for all.
    found: what is looked up in the text, for at most 1, 2, ... drafts.
    look_up: seconds of a look-up.
    stopped: what is known of proposers that stop by themselves.
    relaxed: of lossy rules, those that were asked for.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    forwards: tuple[Times, ...]
    draw: float
    verify: Times
    kept: tuple[tuple[Kept, ...], ...]
    blocks: tuple[tuple[Kept, ...], ...] = ()
    found: tuple[Found, ...] = ()
    look_up: float = 0.0
    stopped: tuple[Stopped, ...] = ()
    relaxed: tuple[Relaxed, ...] = ()

    @property
    def members(self) -> range:
        """The ensemble's."""
        return range(len(self.weights))

    @property
    def drafts(self) -> range:
        """The models outside the ensemble, the smallest first."""
        return range(len(self.weights), len(self.forwards))

    def forward(self, model: int, tokens: float) -> float:
        """Seconds of one forward over so many tokens."""
        return interpolated(self.forwards[model], tokens)

    def proposal(self, model: int) -> float:
        """Seconds to propose one token."""
        return self.forward(model, 1) + self.draw

    def check(self, drafts: int) -> float:
        """Seconds to verify so many drafts, their forwards not counted."""
        return interpolated(self.verify, drafts)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: stops as text."""
        stopped = [{**stopped.__dict__, "stop": str(stopped.stop)} for stopped in self.stopped]
        relaxed = [dict(relaxed.__dict__) for relaxed in self.relaxed]
        return {**self.__dict__, "stopped": stopped, "relaxed": relaxed}

    def scored(self, proposer: int | None, drafts: int) -> float:
        """Seconds for the ensemble to read and verify so many drafts."""
        # A member that proposes has read all but its last draft.
        forwards = sum(self.forward(m, 1 if m == proposer else drafts + 1) for m in self.members)
        return forwards + self.check(drafts)


@dataclass(frozen=True)
class Candidate:
    """One way to decode, and what it is expected to take.

    name: for tables. schedule: for `SpeculativeDecoder`, with `acceptance`.
    drafts: which of the models outside the ensemble take part, counted from 0.
    seconds: predicted, per token.
    law: of the text: "target" where it is what was asked for, else what it is instead.
    divergence: from the law asked for, at the place of a draft; as in `Relaxed`.
    """

    name: str
    schedule: "Schedule"
    seconds: float
    drafts: tuple[int, ...] = ()
    acceptance: str = "rejection"
    law: str = "target"
    divergence: float = 0.0

    @property
    def lossless(self) -> bool:
        """Whether the text has exactly the law that was asked for."""
        return self.law == "target"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the schedule as text."""
        return {**self.__dict__, "schedule": str(self.schedule)}


def interpolated(times: Times, count: float) -> float:
    """The time of `count`, on the straight line through its neighbours."""
    if len(times) == 1 or count <= times[0][0]:
        return times[0][1]
    above = next((i for i, (n, _) in enumerate(times) if n >= count), len(times) - 1)
    (a, low), (b, high) = times[above - 1], times[above]
    return low + (high - low) * (count - a) / (b - a)


def survival(kept: Kept, count: int) -> float:
    """The chance that the first `count` drafts are all kept."""
    if count == 0:
        return 1.0
    if count <= len(kept):
        return kept[count - 1]
    before = kept[-2] if len(kept) > 1 else 1.0
    ratio = kept[-1] / before if before > 0 else 0.0
    return float(kept[-1] * ratio ** (count - len(kept)))


def expected_tokens(kept: Kept, count: int) -> float:
    """1 + how many of `count` drafts are kept on average."""
    return sum(survival(kept, i) for i in range(count + 1))


def of_size(sizes: Sequence[Kept], tokens: int) -> Kept | None:
    """The chances for blocks of so many drafts, or of the largest size there is."""
    return sizes[min(tokens, len(sizes)) - 1] if sizes else None


def steps(most: int) -> list[int]:
    """Some of the numbers of tokens up to `most`, where there are too many to try them all."""
    return [tokens for tokens in (1, 2, 3, 4, 6, 8, 12, 16) if tokens <= most]


def joined(numbers: Iterable[int]) -> str:
    """With commas between, for the name of a candidate."""
    return ",".join(map(str, numbers))
