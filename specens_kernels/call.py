# SPDX-License-Identifier: Apache-2.0
"""`VerifyCall` and `AttentionCall`: what `verify` and `attention` ask of a backend, as one value.

The public function has checked it. A new argument of such an op is a field here, a keyword there,
and for whoever reads it; the op's schema follows from the annotations.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from torch import Tensor

from .law import LawTensors

# Whether siblings of one proposer were drawn with replacement.
DRAWS = ("with", "without")

# Tensors that an op writes to.
Slabs = Annotated[list[Tensor], "written"]


class VerifyCall(NamedTuple):
    """The arguments of `ops.verify`, which says what they mean.

    parents, proposers: of B rows or of 1 for all. draft_temperature: (B or 1,)
        float32. memory: (B,) float64.
    acceptance, parameters: the rule's name, and its numbers in the registry's order.
    draws: an entry of `DRAWS`.
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
    draws: str = "with"


class AttentionCall(NamedTuple):
    """The arguments of `ops.attention`, which says what they mean.

    visible, depths: of B rows or of 1 for all. depths: None without a window.
    scale: what scores are multiplied by. softcap, window: 0 is none.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    visible: Tensor
    depths: Tensor | None
    sinks: Tensor | None
    block_table: Tensor | None
    scale: float
    softcap: float
    window: int
