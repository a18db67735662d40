# SPDX-License-Identifier: Apache-2.0
"""The specification: every op in plain torch, computed in float64, written to be read.

Other backends return the same tokens for the same uniforms. What an op means is what stands here;
speed is somebody else's business, but nothing here depends on a device. To add an op, write its
file here first, then its public function in `ops.py`. Three ideas carry everything:

* `laws.py`: `target_law` turns M members' logits into one law: clean, warp, combine, normalise.
* `draw.py`: `draw` walks a hierarchical inverse CDF: tile, sub-tile, token, one uniform each. The
  geometry is part of the definition, so that every backend walks to the same token.
* `verify.py`: from the root, a child is kept iff `coin * draft < kept`; otherwise what the rule
  leaves is the next child's target, and in the end the law of the emitted token.
"""

from .attention import attention
from .compact import compact
from .draw import PADDING, SUB_TILE, TILE
from .laws import EMPTY_LAW, INFINITE_LOGITS, NAN_LOGITS
from .mix import mix
from .sample import sample
from .uniforms import uniforms
from .verify import EMPTY_RESIDUAL, INVALID_DRAFT, verify

__all__ = [
    "EMPTY_LAW",
    "EMPTY_RESIDUAL",
    "INFINITE_LOGITS",
    "INVALID_DRAFT",
    "NAN_LOGITS",
    "PADDING",
    "SUB_TILE",
    "TILE",
    "attention",
    "compact",
    "mix",
    "sample",
    "uniforms",
    "verify",
]
