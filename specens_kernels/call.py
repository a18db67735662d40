# SPDX-License-Identifier: Apache-2.0
"""`VerifyCall` and `AttentionCall`: what `verify` and `attention` ask of a backend, as one value.

The public function has checked it. A new argument of such an op is a field here, a keyword there,
and for whoever reads it; the op's schema follows from the annotations.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from torch import Tensor

from .law import LawTensors
from .refusal import Unsupported

# Whether siblings of one proposer were drawn with replacement.
DRAWS = ("with", "without")

# Tensors that an op writes to.
Slabs = Annotated[list[Tensor], "written"]


class Layout(NamedTuple):
    """What an engine's own buffers are like; `ops.verify` says what the fields mean.

    rows, draft_rows: where rows lie; the logits then have no dimension of the batch.
    draft_space: an entry of `SPACES`.
    request_parameters: (B or 1, P) float64. The rule's numbers, in place of the call's; of a rule
        by position, its rates. Beyond their ranges they count as the ends of them.
    out: what a backend may write the tokens to. It does not cross the dispatcher.
    """

    rows: Tensor | None = None
    draft_rows: Tensor | None = None
    num_drafts: Tensor | None = None
    draft_filtered: bool = True
    draft_space: str = "logits"
    request_parameters: Tensor | None = None
    out: Tensor | None = None

    def refuse(self, backend: str) -> None:
        """For backends that know padded rows alone: raise Unsupported for what else is asked."""
        for name in ("rows", "draft_rows", "num_drafts"):
            if getattr(self, name) is not None:
                raise Unsupported(backend, name, "None", "a tensor")
        if not self.draft_filtered:
            raise Unsupported(backend, "draft_filtered", "True", False)
        if self.draft_space != "logits":
            raise Unsupported(backend, "draft_space", "'logits'", repr(self.draft_space))
        if self.request_parameters is not None:
            raise Unsupported(backend, "acceptance", "one number a parameter", "several")


# Of most calls.
PADDED = Layout()


class VerifyCall(NamedTuple):
    """The arguments of `ops.verify`, which says what they mean.

    parents, proposers: of B rows or of 1 for all. draft_temperature: (B or 1,)
        float32. memory: (B,) float64.
    acceptance, parameters: the rule's name, and its numbers in the registry's order.
    draws: an entry of `DRAWS`.
    layout: what is not padded and plain.
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
    layout: Layout = PADDED


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
