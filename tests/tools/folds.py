# SPDX-License-Identifier: Apache-2.0
"""Ensembles with folds of one's own, as a user would write them.

`laws.COMBINATIONS` has their definitions, token by token, under the same names. To add one, add it
to both.
"""

from typing import Any

import torch
from torch import Tensor

from specens_kernels import Ensemble, Law


def _quadratic_mean(laws: Tensor, weights: Tensor) -> Tensor:
    return (weights * laws**2).sum(0).sqrt()


def _contrast(laws: Tensor, weights: Tensor) -> Tensor:
    """As contrastive methods write it: away from the last member, by its weight."""
    return laws[0] + weights[-1] * (laws[0] - laws[-1])


def _mixture(laws: Tensor, weights: Tensor) -> Tensor:
    """`mixture`, written out."""
    return (weights * laws).sum(0)


def _product(laws: Tensor, weights: Tensor) -> Tensor:
    """`product`, written out."""
    vetoed = ((weights != 0) & torch.isneginf(laws)).any(0)
    total = (weights * laws.masked_fill(torch.isneginf(laws), 0.0)).sum(0)
    return total.masked_fill(vetoed, -torch.inf)


FOLDS = {
    ensemble.name: ensemble
    for ensemble in (
        Ensemble("minimum", "probabilities", fold=lambda laws, weights: laws.amin(0)),
        Ensemble("maximum", "probabilities", fold=lambda laws, weights: laws.amax(0)),
        Ensemble("quadratic_mean", "probabilities", fold=_quadratic_mean),
        Ensemble("highest_logit", "logits", fold=lambda laws, weights: laws.amax(0)),
        Ensemble("contrast", "logits", fold=_contrast),
    )
}
# The entries of `ENSEMBLES`, said as folds.
TWINS = {
    "mixture": Ensemble("mixture", "probabilities", fold=_mixture),
    "product": Ensemble("product", "logits", fold=_product),
}


def law_of(weights: Any, ensemble: str = "mixture", **options: Any) -> Law:
    """A law whose ensemble is an entry of `ENSEMBLES`, or of `FOLDS`."""
    return Law(weights, FOLDS.get(ensemble, ensemble), **options)
