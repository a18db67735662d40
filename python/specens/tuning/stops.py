# SPDX-License-Identifier: Apache-2.0
"""When a draft had better stop: drafts as stops see them, and the regression of `LearnedStop`.

Stops are asked about drafts drawn from a model's law at every position of a text, beside the chance
that the ensemble keeps them. To have `tune` try a kind of stop of which nothing is fitted, add it
to `READY`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specens.loop.schedule import DraftStop
from specens.schedules.stops import ConfidenceStop, EntropyStop, LearnedStop, stop_features

# Those that are asked as they are; the learned one is fitted first.
READY: dict[str, DraftStop] = {stop.name: stop for stop in (ConfidenceStop(), EntropyStop())}

# Drafts drawn at each position for the regression of `LearnedStop`.
_DRAWS = 4
_RIDGE = 1e-2


@dataclass(frozen=True)
class Drawn:
    """Drafts drawn from a model's law at each position of a text.

    features: (T, D, 4), as in `stop_features`. chances: (T, D). That the ensemble keeps them.
    stops: kind -> (T, D) bool. Whether a stop that is ready asks for an end after them.
    """

    features: Tensor
    chances: Tensor
    stops: dict[str, Tensor]

    @staticmethod
    def joined(parts: "Sequence[Drawn]") -> "Drawn":
        """The parts of one text, one after the other."""
        return Drawn(
            torch.cat([part.features for part in parts]),
            torch.cat([part.chances for part in parts]),
            {kind: torch.cat([part.stops[kind] for part in parts]) for kind in parts[0].stops},
        )

    def asked(self, kind: str, stop: Any) -> Tensor:
        """(T, D) bool: whether the stop asks for an end."""
        if kind in self.stops:
            return self.stops[kind]
        expected = self.features @ torch.tensor(stop.coefficients, dtype=torch.float64)
        asks: Tensor = torch.sigmoid(expected) < stop.least
        return asks


def draw(logits: Tensor, law: Tensor, target: Tensor, greedy: bool) -> Drawn:
    """Drafts from a law, as stops see them, and the chances that they are kept.

    Args:
        logits: (T, V) of the model, bare. law: (T, V) of the model. target: (T, V) of the ensemble.
        greedy: whether stops are told of the bare law, as the loop does at temperature 0.
    """
    dice = torch.Generator(law.device).manual_seed(0)
    tokens = torch.multinomial(law, _DRAWS, replacement=True, generator=dice)  # (T, D)
    proposed, wanted = (masses.gather(-1, tokens) for masses in (law, target))
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens) if greedy else proposed.log()
    columns = [column[:, None] for column in log_probs.unbind(-1)]
    features = torch.stack([stop_features(column, logits) for column in columns], 1)
    stops = {
        kind: torch.tensor([stop.asks(column, logits) for column in columns]).T
        for kind, stop in READY.items()
    }
    return Drawn(features.double(), (wanted / proposed).clamp(max=1).double().cpu(), stops)


def asking_times(logits: Tensor) -> dict[str, float]:
    """Kind of stop -> seconds to ask it about one draft, from the logits (1, V) it came from."""
    log_probs = logits.new_zeros(1, 1).float()
    stops: dict[str, DraftStop] = {**READY, LearnedStop.name: LearnedStop((1.0, 0.0, 0.0, 0.0))}
    seconds = {}
    for kind, stop in stops.items():
        began = time.perf_counter()
        stop.asks(log_probs, logits)
        seconds[kind] = time.perf_counter() - began
    return seconds


def fit_stop(features: Tensor, chances: Tensor) -> tuple[float, float, float, float]:
    """The coefficients of `LearnedStop`, by Newton's method.

    Args:
        features: (N, 4) of drafts. chances: (N,) in [0, 1]. That they are kept.
    """
    features, chances = features.double(), chances.double()
    coefficients = features.new_zeros(features.shape[1])

    def loss(tried: Tensor) -> Tensor:
        logits = features @ tried
        errors = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, chances, reduction="sum"
        )
        # Features that always tell, or two that say the same, have no one best answer.
        return errors + _RIDGE / 2 * tried @ tried

    for _ in range(30):
        expected = torch.sigmoid(features @ coefficients)
        slope = features.T @ (expected - chances) + _RIDGE * coefficients
        curvature = (features.T * (expected * (1 - expected))) @ features
        curvature += _RIDGE * torch.eye(len(coefficients), dtype=torch.float64)
        step = torch.linalg.solve(curvature, slope)
        while loss(coefficients - step) > loss(coefficients) and float(step.norm()) > 1e-9:
            step = step / 2
        coefficients = coefficients - step
        if float(step.norm()) < 1e-8:
            break
    constant, log_prob, best, entropy = coefficients.tolist()
    return constant, log_prob, best, entropy
