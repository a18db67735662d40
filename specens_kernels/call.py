# SPDX-License-Identifier: Apache-2.0
"""`VerifyCall`: what `verify` asks of a backend, as one value.

`ops.verify` has checked it. A new argument of `verify` is a field here, a keyword there, and for
whoever reads it; the op's schema follows from the annotations.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .law import LawTensors


class VerifyCall(NamedTuple):
    """The arguments of `ops.verify`, which says what they mean.

    parents, proposers: of B rows or of 1 for all. draft_temperature: (B or 1,)
        float32. memory: (B,) float64.
    acceptance, parameters: the rule's name, and its numbers in the registry's order.
    """

    logits: list[Tensor]
    draft_tokens: Tensor
    uniforms: Tensor
    law: LawTensors
    parents: Tensor | None = None
    proposers: Tensor | None = None
    draft_logits: Tensor | None = None
    draft_temperature: Tensor | None = None
    lse: Tensor | None = None
    draft_lse: Tensor | None = None
    acceptance: str = "rejection"
    parameters: Sequence[float] = ()
    memory: Tensor | None = None
    bonus: bool = True
