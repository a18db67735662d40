# SPDX-License-Identifier: Apache-2.0
"""The contract between the loop and its schedules: who proposes, how many tokens, who verifies.

A schedule is asked once a turn, with the run in hand (`run.Run`): it makes members propose and
score (`run.propose`, `run.feed`, `run.draw`), and returns what is to be verified. To add a
schedule, write a class in `specens/schedules/`; nothing here changes. Needs no torch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from specens.loop.named import Named
from specens_kernels import Ensemble, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from specens.loop.profile import Candidate, Profile
    from specens.loop.rows import Row
    from specens.loop.run import Run
    from specens_kernels import Law

_S = TypeVar("_S", bound="Schedule")


@dataclass(frozen=True)
class Models:
    """The models that a schedule is bound to: the ensemble's members, then the drafts.

    sizes: parameters of each. weights: of the members.
    acceptance: the name of the rule by which the ensemble judges.
    """

    sizes: Sequence[int]
    weights: Sequence[float]
    acceptance: str = "rejection"

    @property
    def num_members(self) -> int:
        """How many models make the ensemble."""
        return len(self.weights)

    @property
    def drafts(self) -> tuple[int, ...]:
        """The models after the members."""
        return tuple(range(self.num_members, len(self.sizes)))

    @property
    def cheapest_first(self) -> list[int]:
        """The members by their sizes."""
        return sorted(range(self.num_members), key=lambda m: self.sizes[m])

    def proposer(self, schedule: str, given: int | None) -> int:
        """Who drafts: the separate draft, the member given, or the cheapest member."""
        if given is None:
            return self.drafts[0] if self.drafts else self.cheapest_first[0]
        # A schedule that is bound already names the draft.
        if given not in (self.drafts[:1] or range(self.num_members)):
            expected = f"None with a draft, else 0 to {self.num_members - 1}"
            raise Refusal(schedule, "proposer", expected, given)
        return given


@dataclass(frozen=True)
class Verification:
    """Rows to verify together.

    rows: the rows.
    num_drafts: per row, how many tokens after the committed ones are verified.
    bonus: whether a row whose drafts are all kept emits one token more.
    members: whose laws make the verifying law; None is the whole ensemble.
    scored: of these, who has scored what is verified; the others have weight 0 there. None is all.
    law: of those members; None is the ensemble's, or with one member that member's own.
    proposal: arguments of `specens_kernels.verify` that say what the drafts were drawn from; None
        is what each pending token's owner has said.
    """

    rows: "Sequence[Row]"
    num_drafts: Sequence[int]
    bonus: bool
    members: Sequence[int] | None = None
    scored: Collection[int] | None = None
    law: "Law | None" = None
    proposal: "Mapping[str, Any] | None" = None

    @property
    def by_all(self) -> bool:
        """Whether the verifying law is the ensemble's, so that its log-probabilities are."""
        return self.members is None and self.scored is None


class DraftStop(Named):
    """When a proposer had better let the others speak.

    It is asked after a token has been drawn, and that token stays proposed: to take it back because
    of what it is would change the law of the text.
    """

    def asks(self, log_probs: "Tensor", logits: "Tensor") -> list[bool]:
        """Whether each row stops.

        Args:
            log_probs: (R, 1) float32. Of the tokens just drawn, under the draft's law.
            logits: (R, V). The draft's logits that they were drawn from, without temperature.
        """
        raise NotImplementedError


class Schedule(Named):
    """One way of taking turns: a frozen dataclass.

    Its fields are its arguments, made by `specens.loop.named.argument`; None is decided by the
    models.

    fewest_drafts, most_drafts: models outside the ensemble that it takes; drafts_in_words says it.
    verifies_drafts: whether its drafts verify one another, each by a rule of its own.
    sampled_mixture: whether it draws members, so that it needs a sampled mixture of scope "member".
    by_position: whether the members' weights may change from position to position.
    looks_up: whether tokens are proposed that no model has drawn.
    """

    fewest_drafts: ClassVar[int] = 0
    most_drafts: ClassVar[float] = 0
    drafts_in_words: ClassVar[str] = "None"
    verifies_drafts: ClassVar[bool] = False
    sampled_mixture: ClassVar[bool] = False
    by_position: ClassVar[bool] = False
    looks_up: ClassVar[bool] = False

    @property
    def no_filters(self) -> str:
        """Why filters of the law are refused; empty where they are not."""
        return ""

    @classmethod
    def suits(cls, law: "Law") -> bool:
        """Whether it can write from such a law."""
        ensemble = Ensemble.of(law.ensemble)
        averages = ensemble.space == "probabilities" and ensemble.fold is None
        sampled = averages and law.scope == "member" and not bool(law.temperature == 0)
        return sampled or not cls.sampled_mixture

    def bind(self: _S, models: Models) -> _S:
        """This schedule with every None decided.

        Raises:
            Refusal: an argument does not fit the models.
        """
        return self

    @property
    def most_pending(self) -> int:
        """Most tokens that can be pending at once."""
        return 0

    def turn(self, run: "Run") -> list[Verification]:
        """Propose and score; say what to verify."""
        raise NotImplementedError

    @classmethod
    def candidates(cls, profile: "Profile", most: int) -> "Iterator[Candidate]":
        """What `specens tune` tries: the best of each kind. None where its time is not predicted.

        Args:
            profile: what is known of the models.
            most: highest number of tokens that a model proposes at a time.
        """
        return iter(())


def one_each(numbers: int | tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of an argument that may be one or several."""
    return (numbers,) if isinstance(numbers, int) else numbers


def verify_pending(run: "Run", **arguments: Any) -> Verification:
    """All pending tokens of all rows, and a token more where all are kept."""
    return Verification(run.rows, [len(row.pending) for row in run.rows], bonus=True, **arguments)
