# SPDX-License-Identifier: Apache-2.0
"""`Law`: how the logits of M members become one distribution, as data.

A law is built once and used for many calls: its numbers are checked when it is built, and what it
knows by then (everything but the batch size) is not looked at again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, ranges
from .eager import is_eager_call
from .ensembles import Ensemble
from .refusal import Refusal, Unsupported, shown
from .storage import cast, is_readable, is_tensor, viewable

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
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
# What is expected of a filter that is a number, how it is read, and the largest.
_RANGES: dict[str, tuple[str, Callable[[object], float], float]] = {
    "top_k": ("a count in [0, 2^31)", arguments.count, 2**31 - 1),
    "top_p": ("a mass in [0, 1]", arguments.number, 1),
    "min_p": ("a ratio in [0, 1]", arguments.number, 1),
}


class LawTensors(NamedTuple):
    """A law's parameters as they cross the op boundary; see `Law` for what they mean.

    weights: (M,), (B, M) or (B, T, M) float. temperature: (B or 1, M or 1) float.
    top_k: (B or 1,) int32 or None. top_p, min_p: (B or 1,) float or None.
    space, fold: the ensemble's space, and the key of a fold of its own; "" is the weighted sum.
    flat: the rest as flat.py lists it, once it has; None where a tensor is the caller's, which may
        change.
    made: whether a `Law` has seen to dtypes, devices and names.
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
    made: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The rest, in the order of the ops' schemas."""
        return self[:-2]

    @property
    def filters(self) -> tuple[Tensor | None, ...]:
        """Top-k, top-p and min-p."""
        return self.top_k, self.top_p, self.min_p

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
    values are not checked, for that would need the host; a temperature beyond the range counts as
    the end of it, and one that is NaN or negative as 0. A weight that is not finite, or negative in
    a mixture, counts as 0: a mixture of such weights alone has an empty law.

    weights: M numbers, or (M,), (B, M) or (B, T, M) float tensor. Mixture: >= 0, summing to 1.
    ensemble: "mixture" or "product", an entry of `ENSEMBLES`; or an `Ensemble` with a fold of one's
        own, which the reference alone obeys.
    temperature: a number, M numbers, or a (), (B,), (1, M) or (B, M) float tensor. 0, or within
        [1e-30, 1e30]; rows where all are 0 are greedy. Scope "ensemble" takes one per row: a
        number, (), (B,) or (B, 1).
    top_k: a count or (B,) integer tensor. 0 is off.
    top_p: a mass in [0, 1] or (B,) float tensor. 1 is off, 0 keeps the most probable tokens.
    min_p: a ratio in [0, 1] or (B,) float tensor, of the largest probability. 0 is off.
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
        """Check every number that is known now, and keep it as what it was read as."""
        # Not fields: a copy of a law makes tensors of its own.
        object.__setattr__(self, "_tensors", {})
        object.__setattr__(self, "_numbers", {})
        ensemble = Ensemble.of(self.ensemble)
        arguments.name("law", "scope", self.scope, SCOPES)
        for name in _DTYPES:
            object.__setattr__(self, name, self._checked(name, ensemble))
        object.__setattr__(self, "plausibility", _plausibility(self.plausibility, ensemble))
        if self.vocab_size is not None:
            size = arguments.count(self.vocab_size)
            if not 1 <= size < 2**31:
                raise _out_of_range("vocab_size", "a count in [1, 2^31)", self.vocab_size)
            object.__setattr__(self, "vocab_size", size)
        given = [
            (i, name) for i, name in enumerate(_DTYPES) if isinstance(getattr(self, name), Tensor)
        ]
        object.__setattr__(self, "_given", given)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle take along: not the tensors, nor the addresses noted there."""
        return self.__dict__ | {"_tensors": {}, "_numbers": {}}

    def _checked(self, name: str, ensemble: Ensemble) -> Any:
        """A field that may be a tensor."""
        given = getattr(self, name)
        if isinstance(given, Tensor):
            return _checked_tensor(name, given)
        if name == "weights":
            return _checked_weights(given, ensemble)
        if name == "temperature":
            return self._checked_temperature(given)
        expected, read, most = _RANGES[name]
        value = read(given)
        if not 0 <= value <= most:
            raise _out_of_range(name, expected, given)
        return value

    def _checked_temperature(self, given: Any) -> float | tuple[float, ...]:
        number = arguments.number(given)
        values = (number,) if number == number else arguments.numbers(given)
        ranges.check_temperatures(values, given)
        if self.scope == "ensemble" and len(values) != 1:
            raise _out_of_range("temperature", "one number for scope 'ensemble'", given)
        return number if number == number else values

    def tensors(self, op: str, device: torch.device, vocab_size: int) -> LawTensors:
        """What the ops take. Made once for each device, where the law is made of numbers.

        Raises:
            Refusal: a tensor is not on `device`; the message names `op`.
        """
        known = self._template(device, vocab_size)
        given = self.__dict__["_given"]
        if not given:
            return known
        values: list[Any] = [*known]
        for place, name in given:
            values[place] = _as_kernels_read(op, name, values[place], device)
        return LawTensors._make(values)

    def _template(self, device: torch.device, vocab_size: int) -> LawTensors:
        """All but the fields that are the caller's tensors, in whose places these are."""
        templates: dict[tuple[torch.device, int], LawTensors] = self.__dict__["_tensors"]
        known = templates.get((device, vocab_size))
        if known is not None:
            return known
        numbers = self._number_tensors(device)
        ensemble = Ensemble.of(self.ensemble)
        fields: dict[str, Any] = {
            name: numbers[name] if name in numbers else getattr(self, name) for name in _DTYPES
        }
        known = LawTensors(
            **fields,
            space=ensemble.space,
            fold=ensemble.key,
            scope=self.scope,
            plausibility=self.plausibility,
            vocab_size=vocab_size,
            flat=None if self.__dict__["_given"] else [],
            made=True,
        )
        if is_eager_call([tensor for tensor in numbers.values() if tensor is not None]):
            templates[device, vocab_size] = known
        return known

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


def _as_kernels_read(op: str, name: str, value: Tensor, device: torch.device) -> Tensor:
    """A field that is a tensor, in the shape and dtype of `LawTensors`."""
    if value.device != device:
        raise Refusal(op, name, f"a tensor on {device}", f"one on {value.device}")
    if value.dtype != _DTYPES[name]:
        if value.dtype == torch.int64 and is_readable(value):
            value = value.clamp(0, 2**31 - 1)  # a count that int32 does not hold is still a count
        value = cast(op, name, value, _DTYPES[name])
    if name == "weights":
        return value
    if name == "temperature":
        return value if value.dim() > 1 else viewable(op, name, value).reshape(-1, 1)
    return value if value.dim() > 0 else viewable(op, name, value).reshape(1)


def _plausibility(given: object, ensemble: Ensemble) -> float:
    value = arguments.number(given)
    if not 0 <= value <= 1:
        raise _out_of_range("plausibility", "a number in [0, 1]", given)
    if value > 0 and ensemble.space != "logits":
        raise _out_of_range("plausibility", f"0 for {ensemble.name!r}", given)
    return value


def _checked_tensor(name: str, value: Tensor) -> Tensor:
    if not is_tensor(value) or value.dtype not in (INTEGERS if name == "top_k" else FLOATS):
        expected = "integers" if name == "top_k" else "floats"
        got = f"{'a nested' if value.is_nested else 'a'} tensor of {value.dtype}"
        raise Refusal("law", name, f"a number or a tensor of {expected}", got)
    return value


def _checked_weights(given: object, ensemble: Ensemble) -> tuple[float, ...]:
    weights = arguments.numbers(given)
    ranges.check_weights(weights, ensemble, given)
    return weights


def _out_of_range(argument: str, expected: str, got: object) -> Refusal:
    return Refusal("law", argument, expected, shown(got))
