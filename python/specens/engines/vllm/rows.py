# SPDX-License-Identifier: Apache-2.0
"""vLLM's batch as the ops take it: packed rows, sampling parameters, random numbers.

Needs no vLLM. A further sampling parameter is read in `law_of`, which drafts are drawn by, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specens_kernels import PADDING, Law


class Rows:
    """B requests of n_b drafts each, packed request by request, as (B, N) and (B, N + 1)."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.batch, self.drafts = len(counts), max(counts)
        self._even = min(counts) == self.drafts
        number = torch.tensor(counts, device=device)[:, None]
        within = torch.arange(self.drafts + 1, device=device)
        self._is_row = within <= number
        # (B, N + 1): the row after a request's last draft, and what is behind it.
        self.is_bonus = within >= number
        start = number.cumsum(0) - number
        # Where there is no draft, any row will do.
        self._draft_rows = (start + within[:-1]).clamp(max=max(sum(counts) - 1, 0))
        # After a request's last row come repetitions of it.
        request = torch.arange(self.batch, device=device)[:, None]
        self._rows = start + request + torch.minimum(within, number)

    def drafted(self, packed: Tensor) -> Tensor:
        """(sum n_b, ...) as (B, N, ...): a view where every request has as many."""
        if self._even:
            return packed.view(self.batch, self.drafts, *packed.shape[1:])
        return packed[self._draft_rows]

    def padded(self, packed: Tensor) -> Tensor:
        """(sum (n_b + 1), ...) as (B, N + 1, ...): a view where every request has as many."""
        if self._even:
            return packed.view(self.batch, self.drafts + 1, *packed.shape[1:])
        return packed[self._rows]

    def packed(self, padded: Tensor) -> Tensor:
        """(B, N + 1, ...) as (sum (n_b + 1), ...)."""
        return padded[self._is_row]

    def tokens(self, packed: Tensor) -> Tensor:
        """(B, N) draft tokens; -1 where there is none."""
        return torch.where(self._is_row[:, 1:], self.drafted(packed), PADDING)


def law_of(
    metadata: Any,
    batch: int,
    weights: Any = (1.0,),
    ensemble: str = "mixture",
    min_p: Tensor | None = None,
    of: Any = slice(None),
) -> Law:
    """The sampling parameters of B requests, a `SamplingMetadata`, as a law.

    Args:
        weights: of the members, and of each request or row of it where they are a tensor.
        min_p: (B,). vLLM has none for a drafter's requests.
        of: the requests that are meant, of the B.
    """
    if isinstance(weights, Tensor):
        weights = weights[of]
    if metadata.all_greedy:
        return Law(weights, ensemble, 0.0)
    filters = {"top_k": metadata.top_k, "top_p": metadata.top_p, "min_p": min_p}
    given = {name: value[:batch][of] for name, value in filters.items() if value is not None}
    return Law(weights, ensemble, metadata.temperature[:batch][of], **given)


def min_p_of(parameters: Sequence[Any], device: torch.device) -> Tensor | None:
    """(B,), or None where no request has one."""
    values = [each.min_p for each in parameters]
    return torch.tensor(values, device=device) if any(values) else None


def random_numbers(metadata: Any, batch: int, rows: int, device: torch.device) -> Tensor:
    """(B, rows, 4) float32; a request that has a seed draws from its own generator."""
    numbers = torch.rand(batch, rows, 4, device=device)
    for row, generator in metadata.generators.items():
        if row < batch:
            numbers[row] = torch.rand(rows, 4, device=device, generator=generator)
    return numbers


def changes_logits(metadata: Any) -> bool:
    """Whether a request of the batch has penalties, a bias, or tokens that are not allowed."""
    holder, processors = metadata.thinking_budget_state_holder, metadata.logitsprocs
    return bool(
        not metadata.no_penalties
        or metadata.bad_words_token_ids
        or metadata.allowed_token_ids_mask is not None
        or (holder is not None and holder.has_tracked_requests())
        # A processor that is neither of vLLM's own counts as one that changes something.
        or any(
            getattr(processor, "min_toks", getattr(processor, "biases", True))
            for processor in processors.non_argmax_invariant
        )
    )
