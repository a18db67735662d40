# SPDX-License-Identifier: Apache-2.0
"""Draft stops: when a proposer ends before its number of tokens.

To add one, add a class and list it in `STOPS`: the shell then knows it, and `specens tune` tries it
if it is listed in `tuning/agreement.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from specens.loop.named import Kind, argument, number, numbers, read_named
from specens.loop.schedule import DraftStop
from specens_kernels import Refusal

if TYPE_CHECKING:
    from torch import Tensor

_SHARE = number(0, 1)


@dataclass(frozen=True)
class ConfidenceStop(DraftStop):
    """Stops after a token that the draft itself found less likely than `least`.

    Source: transformers' `assistant_confidence_threshold`.
    """

    name: ClassVar[str] = "confidence"
    summary: ClassVar[str] = "the draft found the token unlikely"
    least: float = argument(0.4, _SHARE, "Probability below which it stops.")

    def asks(self, log_probs: "Tensor", logits: "Tensor") -> list[bool]:
        """See `DraftStop`."""
        return [chance < self.least for chance in log_probs[:, 0].exp().tolist()]


@dataclass(frozen=True)
class EntropyStop(DraftStop):
    """Stops where 1 - sqrt(scale H) < least, a bound of acceptance by the draft's entropy H.

    Source: AdaEDL, arXiv:2410.18351.
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "the draft is not sure, whatever it drew"
    least: float = argument(0.2, number(-1e9, 1), "Bound of acceptance below which it stops.")
    scale: float = argument(0.2, number(0), "Of the entropy, per nat.")

    def asks(self, log_probs: "Tensor", logits: "Tensor") -> list[bool]:
        """See `DraftStop`."""
        bounds = 1 - (self.scale * _entropy(logits)).clamp(min=0).sqrt()
        return [bound < self.least for bound in bounds.tolist()]


@dataclass(frozen=True)
class LearnedStop(DraftStop):
    """Stops where a logistic regression expects the token just drawn to be refused.

    Source: DISCO, arXiv:2405.04304, with one linear layer.
    """

    name: ClassVar[str] = "learned"
    summary: ClassVar[str] = "a regression expects the token to be refused"
    coefficients: tuple[float, float, float, float] = argument(
        (0.0, 0.0, 0.0, 0.0),
        numbers(4),
        "Of 1, the token's log-probability, the largest one and the entropy, in nats; found by "
        "`specens tune`.",
    )
    least: float = argument(0.5, _SHARE, "Chance of acceptance below which it stops.")

    def __post_init__(self) -> None:
        """Refuse a stop of which nothing has been learned: it would never stop."""
        super().__post_init__()
        if not any(self.coefficients):
            raise Refusal(self.name, "coefficients", "4 numbers, not all 0", "none")

    def asks(self, log_probs: "Tensor", logits: "Tensor") -> list[bool]:
        """See `DraftStop`."""
        features = stop_features(log_probs, logits)
        chances = (features @ features.new_tensor(self.coefficients)).sigmoid()
        return [chance < self.least for chance in chances.tolist()]


def stop_features(log_probs: "Tensor", logits: "Tensor") -> "Tensor":
    """(R, 4) float32 on the host: what `LearnedStop` looks at."""
    best = logits.float().log_softmax(-1).amax(-1)
    features = best.new_empty(len(best), 4)
    features[:, 0] = 1
    features[:, 1] = log_probs[:, 0].clamp(min=-30)
    features[:, 2] = best
    features[:, 3] = _entropy(logits)
    return features.cpu()


def _entropy(logits: "Tensor") -> "Tensor":
    """(R,) nats."""
    logs = logits.float().log_softmax(-1)
    chances = logs.exp()
    return -chances.xlogy(chances).sum(-1)


STOPS: Mapping[str, type[DraftStop]] = MappingProxyType(
    {stop.name: stop for stop in (ConfidenceStop, EntropyStop, LearnedStop)}
)


def _accept(value: Any) -> Any:
    if isinstance(value, type) or not callable(getattr(value, "asks", None)):
        raise TypeError
    return value


STOP = Kind("a DraftStop", _accept, lambda text: read_named("draft_stop", text, STOPS))
