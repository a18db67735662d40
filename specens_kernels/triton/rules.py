# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules and folds as device functions, under the names of the registries' entries.

To add one: its entry in `acceptance.py` or `ensembles.py`, then the same arithmetic here.
"""

import triton
import triton.language as tl


@triton.jit
def rejection(target, draft, lenience):
    return tl.minimum(target, draft)


@triton.jit
def lenient(target, draft, lenience):
    return tl.minimum(target / lenience, draft)


@triton.jit
def greedy(target, draft, lenience):
    return target


@triton.jit
def weighted_sum(folded, value, weight):
    return folded + weight * value


KEPT = {"rejection": rejection, "lenient": lenient, "greedy": greedy}
FOLDS = {"mixture": weighted_sum, "product": weighted_sum}
