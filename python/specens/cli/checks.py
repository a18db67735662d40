# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a command line is found before torch is imported, which takes seconds.

The library checks all of this again, and more; here are the mistakes that show without a model. To
find one more, add it where its argument is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from specens.loop.schedule import Models, Schedule
from specens.schedules import SCHEDULES
from specens_kernels import Acceptance, Ensemble, Refusal, ranges

if TYPE_CHECKING:
    from specens_kernels import Law

SCOPES = ("member", "ensemble")
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True)
class AskedLaw:
    """The numbers of a law, as they were asked for.

    Raises:
        Refusal: a number is out of any range, or the weights are not as many as the models.
    """

    models: Sequence[str]
    weights: Sequence[float] | None = None
    ensemble: str = "mixture"
    scope: str = "member"
    plausibility: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Check every number and name."""
        ensemble = Ensemble.of(self.ensemble)
        if self.scope not in SCOPES:
            raise Refusal.unknown("law", "scope", self.scope, SCOPES)
        if not 0 <= self.plausibility <= 1:
            raise Refusal("law", "plausibility", "a number in [0, 1]", self.plausibility)
        if self.plausibility > 0 and ensemble.space != "logits":
            raise Refusal("law", "plausibility", f"0 for {ensemble.name!r}", self.plausibility)
        ranges.check_temperatures([self.temperature], self.temperature)
        if not 0 <= self.top_p <= 1:
            raise Refusal("law", "top_p", "a mass in [0, 1]", self.top_p)
        if not 0 <= self.min_p <= 1:
            raise Refusal("law", "min_p", "a ratio in [0, 1]", self.min_p)
        if self.weights is not None:
            check_weights(self.weights, self.models, ensemble)

    @property
    def shares(self) -> Sequence[float]:
        """The weights, or equal ones."""
        return self.weights or [1 / len(self.models)] * len(self.models)


def check_weights(weights: Sequence[float], models: Sequence[str], ensemble: Ensemble) -> None:
    """Refuse weights that are not one per model, or no weights of such an ensemble."""
    if len(weights) != len(models):
        expected = f"{len(models)} numbers, one for each of {', '.join(models)}"
        raise Refusal("law", "weights", expected, len(weights))
    ranges.check_weights(weights, ensemble, list(weights))


def check_drafts(schedule: Schedule, drafts: Sequence[str]) -> None:
    """Refuse drafts that the schedule does not take, and name those that do."""
    count = len(drafts)
    if _takes(type(schedule), count):
        return
    expected = f"{schedule.drafts_in_words} for schedule {schedule.name!r}"
    if count > 0:
        takers = [name for name, kind in SCHEDULES.items() if _takes(kind, count)]
        expected += f", or --schedule {' or '.join(takers)}, or --auto"
    raise Refusal("decoder", "drafts", expected, ", ".join(drafts) or "none")


def _takes(kind: type[Schedule], drafts: int) -> bool:
    return kind.fewest_drafts <= drafts <= kind.most_drafts


def check_schedule(
    schedule: Schedule, law: AskedLaw, num_drafts: int, acceptances: Sequence[Acceptance]
) -> None:
    """Refuse what the schedule cannot do with such a law, and so many models."""
    # These fields are all that it looks at.
    if not schedule.suits(cast("Law", _Plain(law.ensemble, law.scope))):
        expected = f"a mixture of scope 'member' for {schedule.name!r}"
        got = f"a {law.ensemble} of scope {law.scope!r}"
        raise Refusal("decoder", "schedule", expected, got)
    if not schedule.suits(cast("Law", _Plain(law.ensemble, law.scope, law.temperature))):
        raise Refusal("generate", "do_sample", f"True for schedule {schedule.name!r}", "False")
    filters = [name for name, off in _OFF.items() if getattr(law, name) != off]
    if schedule.no_filters and filters:
        raise Refusal("generate", filters[0], f"none for {schedule.no_filters}", "one")
    levels = num_drafts if schedule.verifies_drafts else 1
    if len(acceptances) not in (1, levels):
        expected = f"one rule or a list of {levels}"
        raise Refusal("decoder", "acceptance", expected, len(acceptances))
    # How large the models are decides nothing that is refused.
    sizes = [1] * (len(law.models) + num_drafts)
    schedule.bind(Models(sizes, law.shares, acceptances[-1].rule.name))


@dataclass(frozen=True)
class _Plain:
    """Of a law, what decides whether it suits a schedule."""

    ensemble: str
    scope: str
    temperature: float = 1.0


def check_head(path: str) -> None:
    """Refuse what is no folder."""
    if not Path(path).expanduser().is_dir():
        raise Refusal("head", "path", "a folder with weight_head.safetensors", repr(path))


def law_of(given: Mapping[str, Any], models: Sequence[str], warp: Mapping[str, Any]) -> AskedLaw:
    """The law that a decoder's options say."""
    names = ("weights", "ensemble", "scope", "plausibility")
    return AskedLaw(models, **{n: given[n] for n in names if n in given}, **warp)
