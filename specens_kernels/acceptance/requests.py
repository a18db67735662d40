# SPDX-License-Identifier: Apache-2.0
"""A rule's parameters where some are tensors, or one number for each position: as one tensor.

Apart, because the registry needs no torch. What a range does to a tensor's values is here.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Acceptance, Parameter

_LEAST = 1e-300  # above a bound that is no value itself


def of_requests(acceptance: "Acceptance", device: torch.device) -> Tensor:
    """(B or 1, P) float64; nothing waits for the device."""
    columns = []
    for parameter, number in zip(acceptance.rule.parameters, acceptance.numbers, strict=True):
        several = acceptance.given.get(parameter.name)
        if isinstance(several, Tensor):
            values = several if several.dim() == 2 else several.reshape(-1, 1)
            columns.append(_within(values, parameter))
        else:
            columns.append(_filled(several or (number,), device))
    batch = max(map(len, columns))
    return torch.cat(
        [column.expand(batch, -1) if len(column) == 1 else column for column in columns], 1
    )


def _filled(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, P): without a copy from the host, which a GPU would wait for."""
    row = torch.empty(1, len(numbers), dtype=torch.float64, device=device)
    for place, number in enumerate(numbers):
        row[:, place] = number
    return row


def _within(values: Tensor, parameter: "Parameter") -> Tensor:
    """Of float64; beyond the range the end of it, and NaN the lower one."""
    low = _LEAST if parameter.open_low else parameter.low
    high = min(parameter.high, torch.finfo(torch.float64).max)
    values = values.double().nan_to_num(nan=low).clamp(low, high)
    return values.floor() if parameter.whole else values
