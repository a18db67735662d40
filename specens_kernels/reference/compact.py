# SPDX-License-Identifier: Apache-2.0
"""`compact`: the rows of an accepted path, moved to where the prefix ends."""

from torch import Tensor

from ..cache_checks import check_compact_slots
from ..call import Slabs


def compact(slabs: Slabs, lengths: Tensor, path: Tensor, block_table: Tensor | None) -> None:
    """Move keys and values in place; see `ops.compact`."""
    check_compact_slots(slabs, lengths, path, block_table)
    kept = (path >= 0).cumprod(1)  # -1 ends a path, whatever follows
    row, place = kept.nonzero(as_tuple=True)
    there = lengths[row] + 1 + place
    here = lengths[row] + path[row, place]
    for slab in slabs:
        if block_table is None:
            slab[:, row, :, there] = slab[:, row, :, here]
        else:
            page = slab.shape[3]
            to, source = (block_table[row, slot // page].long() for slot in (there, here))
            slab[:, to, :, there % page] = slab[:, source, :, here % page]
