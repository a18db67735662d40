# SPDX-License-Identifier: Apache-2.0
"""`PositionWeights`: weights of the members that change from position to position."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specens.loop.laws import MemberLaws
from specens.loop.rows import Row
from specens.members.weight_head import WeightHead
from specens_kernels import Law


class PositionWeights:
    """What the members weigh at each position, and what they weigh for bonus tokens."""

    def __init__(
        self, head: WeightHead | None, bonus: Sequence[float] | None, device: torch.device
    ) -> None:
        """Weights on the device of the text.

        Args:
            head: gives the weights of two members; None is those of the law.
            bonus: of the law of bonus tokens; None is those of the position.
        """
        self._bias = None if head is None else head.bias.to(device)
        self._bonus = None if bonus is None else torch.tensor(bonus, device=device)
        self._device = device

    def law(
        self,
        law: Law,
        scores: Sequence[MemberLaws],
        rows: Sequence[Row],
        num_drafts: Sequence[int],
        width: int,
    ) -> Law:
        """The law with these weights at `width` positions after each row's committed tokens.

        Args:
            law: the ensemble's.
            scores: per member, its last hidden states times its share of the head.
            rows: R rows. num_drafts: positions of each before its bonus token.
        """
        weights = self._shares(law, scores, rows, width)
        if self._bonus is not None:
            weights[torch.arange(len(rows)), torch.tensor(num_drafts)] = self._bonus
        return replace(law, weights=weights)

    def _shares(
        self, law: Law, scores: Sequence[MemberLaws], rows: Sequence[Row], width: int
    ) -> Tensor:
        """(R, width, M) float32."""
        if self._bias is None:
            weights = torch.tensor(law.weights, device=self._device)
            return weights.expand(len(rows), width, -1).clone()
        begins = [row.length for row in rows]
        draft, target = (scores[m].take(rows, begins, width)[..., 0] for m in (0, 1))
        draft_weight = torch.sigmoid(draft + target + self._bias)
        return torch.stack((draft_weight, 1 - draft_weight), -1)
