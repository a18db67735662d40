# SPDX-License-Identifier: Apache-2.0
"""`Law`: how the logits of M members become one distribution, as data.

A law is built once and used for many calls: its numbers are checked when it is built, and what it
knows by then (everything but the batch size) is not looked at again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager import is_eager_call
from .ensembles import Ensemble
from .refusal import Refusal, Unsupported

SCOPES = ("member", "ensemble")
_FILTERS = ("top_k", "top_p", "min_p")
# The fields that may be tensors, as the kernels read them.
_DTYPES = {
    "weights": torch.float32,
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float32,
    "min_p": torch.float32,
}
# A filter that is off has no tensor.
_OFF = {"top_k": 0, "top_p": 1, "min_p": 0}


class LawTensors(NamedTuple):
    """A law's parameters as they cross the op boundary; see `Law` for what they mean.

    weights: (M,), (B, M) or (B, T, M) float. temperature: (B or 1, M or 1) float.
    top_k: (B or 1,) int32 or None. top_p, min_p: (B or 1,) float or None.
    space, fold: the ensemble's space, and the key of a fold of its own; "" is the weighted sum.
    flat: the rest as flat.py lists it, once it has; None where a tensor is the caller's, which may
        change.
    """

    weights: Tensor
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    space: str
    fold: str
    scope: str
    plausibility: float
    vocab_size: int
    flat: list[Any] | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The rest, in the order of the ops' schemas."""
        return self[:-1]

    @property
    def averages_members(self) -> bool:
        """Whether the law is the weighted mean of the members' own, warped laws."""
        return self.space == "probabilities" and not self.fold and self.scope == "member"

    def refuse_fold(self, backend: str) -> None:
        """For backends that know the weighted sums alone: raise Unsupported for another fold."""
        if self.fold:
            name = self.fold.rpartition("@")[0]
            raise Unsupported(backend, "ensemble", "fold=None", f"the fold of {name!r}")


@dataclass(frozen=True, eq=False)
class Law:
    """How the logits of M members become one distribution.

    Scope "member" warps each member by its temperature and the filters and then folds (what
    Speculative Ensemble does); scope "ensemble" folds first and warps once. A proposal is warped
    the same way. Filters apply in the order top-k, top-p, min-p, and keep or drop tied tokens
    together.

    Numbers become tensors at the first call on a device, which copies them there; a CUDA graph is
    captured after it. Tensors lie on the device of the logits and are read at every call. Their
    values are not checked, for that would need the host.

    weights: M numbers, or (M,), (B, M) or (B, T, M) float tensor. Mixture: >= 0, summing to 1.
    ensemble: "mixture" or "product", an entry of `ENSEMBLES`; or an `Ensemble` with a fold of one's
        own, which the reference alone obeys.
    temperature: a number, M numbers, or a (), (B,), (1, M) or (B, M) float tensor. >= 0; rows where
        all are 0 are greedy. Scope "ensemble" takes one per row: a number, (), (B,) or (B, 1).
    top_k: a count or (B,) integer tensor. 0 is off.
    top_p: a mass in (0, 1] or (B,) float tensor. 1 is off.
    min_p: a ratio in [0, 1) or (B,) float tensor, of the largest probability. 0 is off.
    scope: "member" or "ensemble".
    plausibility: [0, 1]. Drops tokens that the first member (the expert) finds less than this times
        its most probable token; 0 is off. For space "logits".
    vocab_size: columns that count; None is the narrowest member's width.
    """

    weights: Sequence[float] | Tensor = (1.0,)
    ensemble: Ensemble | str = "mixture"
    temperature: float | Sequence[float] | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0
    scope: str = "member"
    plausibility: float = 0.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        """Check every number that is known now."""
        # Not fields: a copy of a law makes tensors of its own.
        object.__setattr__(self, "_tensors", {})
        object.__setattr__(self, "_numbers", {})
        ensemble = Ensemble.of(self.ensemble)
        if self.scope not in SCOPES:
            raise Refusal.unknown("law", "scope", self.scope, SCOPES)
        if not 0.0 <= self.plausibility <= 1.0:
            raise _out_of_range("plausibility", "a number in [0, 1]", self.plausibility)
        if self.plausibility > 0 and ensemble.space != "logits":
            raise _out_of_range("plausibility", f"0 for {ensemble.name!r}", self.plausibility)
        if not isinstance(self.weights, Tensor):
            _check_weights([float(weight) for weight in self.weights], ensemble)
        self._check_temperature()
        top_k: Any = self.top_k
        if not isinstance(top_k, (Tensor, Integral)) or (
            isinstance(top_k, Integral) and not 0 <= int(top_k) < 2**31
        ):
            raise _out_of_range("top_k", "a count in [0, 2^31)", top_k)
        if not isinstance(self.top_p, Tensor) and not 0.0 < self.top_p <= 1.0:
            raise _out_of_range("top_p", "a mass in (0, 1]", self.top_p)
        if not isinstance(self.min_p, Tensor) and not 0.0 <= self.min_p < 1.0:
            raise _out_of_range("min_p", "a ratio in [0, 1)", self.min_p)
        if self.vocab_size is not None and self.vocab_size < 1:
            raise _out_of_range("vocab_size", "a count >= 1", self.vocab_size)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle take along: not the tensors, nor the addresses noted there."""
        return self.__dict__ | {"_tensors": {}, "_numbers": {}}

    def _check_temperature(self) -> None:
        if isinstance(self.temperature, Tensor):
            return
        given: Any = self.temperature
        values = [float(given)] if isinstance(given, Real) else list(given)
        if any(not 0.0 <= value < float("inf") for value in values):
            raise _out_of_range("temperature", "finite numbers >= 0", self.temperature)
        if self.scope == "ensemble" and len(values) != 1:
            expected = "one number for scope 'ensemble'"
            raise _out_of_range("temperature", expected, self.temperature)

    def tensors(
        self, op: str, batch: int, rows: int, members: int, device: torch.device, vocab_size: int
    ) -> LawTensors:
        """What the ops take. Made once for each device, where the law is made of numbers.

        Raises:
            Refusal: a shape does not fit B, T and M, or a tensor is not on `device`; the message
                names `op`.
        """
        tensors: dict[tuple[torch.device, int], LawTensors] = self.__dict__["_tensors"]
        known = tensors.get((device, vocab_size))
        if known is None:
            known = self._make_tensors(op, device, vocab_size)
            if known.flat is not None and is_eager_call([known.weights, known.temperature]):
                tensors[device, vocab_size] = known
        shape = known.weights.shape
        if (
            shape[-1] != members
            or len(shape) > 3
            or (len(shape) > 1 and shape[0] != batch)
            or (len(shape) == 3 and shape[1] != rows)
        ):
            expected = f"(M={members},), (B={batch}, M) or (B, T={rows}, M)"
            raise Refusal(op, "weights", expected, tuple(shape))
        shape = known.temperature.shape
        most = members if self.scope == "member" else 1
        if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] not in (1, most):
            expected = f"(), (B={batch},) or (B or 1, {most})"
            raise Refusal(op, "temperature", expected, tuple(shape))
        for name, value in zip(_FILTERS, known[2:5], strict=True):
            if value is not None and (value.dim() != 1 or value.shape[0] not in (1, batch)):
                raise Refusal(op, name, f"(B={batch},)", tuple(value.shape))
        return known

    def _make_tensors(self, op: str, device: torch.device, vocab_size: int) -> LawTensors:
        numbers = self._number_tensors(device)
        fields: dict[str, Any] = dict(numbers)
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                continue
            if value.device != device:
                raise Refusal(op, name, f"a tensor on {device}", f"one on {value.device}")
            value = value.to(dtype)
            if name == "temperature" and value.dim() < 2:
                value = value.reshape(-1, 1)
            fields[name] = value.reshape(-1) if name in _FILTERS else value
        ensemble = Ensemble.of(self.ensemble)
        return LawTensors(
            **fields,
            space=ensemble.space,
            fold=ensemble.key,
            scope=self.scope,
            plausibility=self.plausibility,
            vocab_size=vocab_size,
            flat=[] if len(numbers) == len(_DTYPES) else None,
        )

    def _number_tensors(self, device: torch.device) -> dict[str, Tensor | None]:
        """Of the fields that are numbers; made once for each device."""
        known: dict[torch.device, dict[str, Tensor | None]] = self.__dict__["_numbers"]
        if device in known:
            return known[device]
        tensors: dict[str, Tensor | None] = {}
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                continue
            if name in _FILTERS and value == _OFF[name]:
                tensors[name] = None
                continue
            tensor = torch.as_tensor(value, dtype=dtype, device=device)
            tensors[name] = tensor.reshape(1, -1) if name == "temperature" else tensor.reshape(-1)
        if is_eager_call([tensor for tensor in tensors.values() if tensor is not None]):
            known[device] = tensors
        return tensors


def _check_weights(weights: list[float], ensemble: Ensemble) -> None:
    if not weights or any(not math.isfinite(weight) for weight in weights):
        raise _out_of_range("weights", "M >= 1 finite numbers", weights)
    is_mean = ensemble.space == "probabilities" and ensemble.fold is None
    if is_mean and (min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
        expected = f"numbers >= 0 that sum to 1 for {ensemble.name!r}"
        raise _out_of_range("weights", expected, weights)


def _out_of_range(argument: str, expected: str, got: object) -> Refusal:
    return Refusal("law", argument, expected, got)
