# SPDX-License-Identifier: Apache-2.0
"""The ranges of a law's numbers, in the single precision in which kernels compute.

A function takes numbers as `arguments.py` has read them, and what was given, for the message. Needs
no torch, so that the command line refuses the same numbers at once. To check another, add its
function, and a call in `Law` and in the command line's `AskedLaw`.
"""

import math
from collections.abc import Sequence

from . import arguments
from .ensembles import Ensemble
from .refusal import Refusal, shown

# Beyond these, single precision holds no reciprocal with which logits could be multiplied.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-30, 1e30


def check_temperatures(values: Sequence[float], given: object) -> None:
    """Refuse what is neither 0 nor within the bounds."""
    if not values or not all(
        value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE for value in values
    ):
        expected = f"0 or numbers in [{LEAST_TEMPERATURE:g}, {MOST_TEMPERATURE:g}]"
        raise _out_of_range("temperature", expected, given)


def check_weights(weights: Sequence[float], ensemble: Ensemble, given: object) -> None:
    """Refuse what are no weights of such an ensemble."""
    rounded = [arguments.single(weight) for weight in weights]
    if not weights or not all(map(math.isfinite, rounded)):
        raise _out_of_range("weights", "M >= 1 finite numbers of float32", given)
    vanished = any(kept == 0 != weight for weight, kept in zip(weights, rounded, strict=True))
    if vanished and ensemble.space == "logits":  # a member that vetoes would be absent
        raise _out_of_range("weights", "0 or numbers that float32 does not round to 0", given)
    is_mean = ensemble.space == "probabilities" and ensemble.fold is None
    if is_mean and (min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
        expected = f"numbers >= 0 that sum to 1 for {ensemble.name!r}"
        raise _out_of_range("weights", expected, list(weights))


def _out_of_range(argument: str, expected: str, got: object) -> Refusal:
    return Refusal("law", argument, expected, shown(got))
