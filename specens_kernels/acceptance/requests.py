# SPDX-License-Identifier: Apache-2.0
"""A rule's parameters where some are tensors, or one number for each position: as one tensor.

Apart, because the registry needs no torch. What a range does to a tensor's values is here: nobody
looks at them on the host.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from . import Acceptance, AcceptanceRule

_LEAST = 1e-300  # above a bound that is no value itself


def of_requests(acceptance: "Acceptance", device: torch.device) -> Tensor:
    """(B or 1, P) float64; nothing waits for the device."""
    columns = []
    for parameter, number in zip(acceptance.rule.parameters, acceptance.numbers, strict=True):
        several = acceptance.given.get(parameter.name)
        if isinstance(several, Tensor):
            values = several if several.dim() == 2 else several.reshape(-1, 1)
            columns.append(values.double())
        else:
            columns.append(_filled(several or (number,), device))
    batch = max(map(len, columns))
    return torch.cat([each.expand(batch, -1) if len(each) == 1 else each for each in columns], 1)


def within_ranges(rule: "AcceptanceRule", values: Tensor) -> Tensor:
    """(B or 1, P) as they count: beyond a range the end of it, and NaN the lower one."""
    columns = []
    for place, column in enumerate(values.unbind(1)):
        parameter = rule.parameters[0 if rule.by_position else place]
        low = _LEAST if parameter.open_low else parameter.low
        high = min(parameter.high, torch.finfo(torch.float64).max)
        column = torch.where(column.isnan(), low, column).clamp(low, high)
        columns.append(column.floor() if parameter.whole else column)
    return torch.stack(columns, 1)


def _filled(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, P): without a copy from the host, which a GPU would wait for."""
    row = torch.empty(1, len(numbers), dtype=torch.float64, device=device)
    for place, number in enumerate(numbers):
        row[:, place] = number
    return row
