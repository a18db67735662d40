# SPDX-License-Identifier: Apache-2.0
"""`mix`: the law itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..law import LawTensors
from .laws import target_law


def mix(logits: Sequence[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """(B, T, V) log-probabilities and (B, T) status; see `ops.mix`."""
    target = target_law(logits, law)
    wide = any(tensor.dtype == torch.float64 for tensor in logits)
    return target.log_probs.to(torch.float64 if wide else torch.float32), target.status
