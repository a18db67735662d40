# SPDX-License-Identifier: Apache-2.0
"""What transformers asks of each logit: processors.

Temperature, top-k, top-p and min-p become parameters of the law and run inside the kernels. Every
other processor runs here, on each member's logits, once per position, on the prefix that leads to
it: for a speculative position that is the committed text plus the pending tokens before it. A
processor that keeps a history of its own would see positions that are later taken back, so it is
refused: those of transformers and what is derived from them, by name; in others a history cannot be
seen. To fuse another warper, add it to `split`.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specens.loop.functions import check_arguments, name_of
from specens.loop.rows import Row
from specens.loop.text import Text
from specens_kernels import Refusal
from specens_kernels.refusal import shown

# Each call changes what the next one returns, or runs a model of its own.
STATEFUL = frozenset(
    {
        "AlternatingCodebooksLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    }
)
_FUSED = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


@dataclass(frozen=True)
class Warp:
    """The warpers that run inside the kernels, as parameters of a `Law`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def filters(self) -> list[str]:
        """The names of those that are on."""
        on = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return [name for name, is_on in on.items() if is_on]


def split(processors: Iterable[Any], *, do_sample: bool) -> tuple[Warp, list[Any]]:
    """Part transformers' processors into fused warpers and those that run per position.

    Warpers fuse only where nothing but warpers, in the order temperature, top-k, top-p, min-p,
    comes after them; otherwise all of them run per position, so that the order stays the user's.
    Where no token is sampled those that fuse are ignored: transformers itself makes none there.

    Raises:
        ValueError: a processor is stateful.
    """
    listed = list(processors)
    while listed and isinstance(listed[-1], LogitNormalization):
        listed.pop()  # every law is normalised anyway
    for processor in listed:
        check_arguments("logits_processor", processor)
        if any(base.__name__ in STATEFUL for base in type(processor).__mro__):
            expected = "processors without a history"
            raise Refusal("generate", "logits_processor", expected, type(processor).__name__)
    first = next((i for i, p in enumerate(listed) if isinstance(p, _FUSED)), len(listed))
    tail = listed[first:]
    order = [_FUSED.index(type(p)) if type(p) in _FUSED else -1 for p in tail]
    fusible = -1 not in order and order == sorted(set(order)) and all(map(_plain, tail))
    warp = Warp()
    if fusible:
        for processor in tail:
            warp = _fuse(warp, processor)
        listed = listed[:first]
    if not do_sample:
        warp = replace(warp, temperature=0.0)
    return warp, listed


def _plain(warper: Any) -> bool:
    """Whether a warper keeps the largest logit only because it must, and removes with -inf."""
    return getattr(warper, "min_tokens_to_keep", 1) == 1 and getattr(
        warper, "filter_value", -float("inf")
    ) == -float("inf")


def _fuse(warp: Warp, warper: Any) -> Warp:
    if isinstance(warper, TemperatureLogitsWarper):
        return replace(warp, temperature=float(warper.temperature))
    if isinstance(warper, TopKLogitsWarper):
        return replace(warp, top_k=int(warper.top_k))
    if isinstance(warper, TopPLogitsWarper):
        return replace(warp, top_p=float(warper.top_p))
    return replace(warp, min_p=float(warper.min_p))


def per_row(processors: list[Any], batch: int) -> list[LogitsProcessorList]:
    """A list of processors for each row of the batch, with the row's share of what is per row."""

    def share(processor: Any, row: int) -> Any:
        shares: dict[str, Any] = {
            name: value[row : row + 1]
            for name in ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams")
            if isinstance(value := getattr(processor, name, None), (Tensor, list))
            and len(value) == batch
        }
        if "generated_ngrams" in shares:
            shares["batch_size"] = 1
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            allowed = processor._prefix_allowed_tokens_fn
            # It would be told that every row is row 0.
            shares["_prefix_allowed_tokens_fn"] = lambda _, text: allowed(row, text)
        if not shares or batch == 1:
            return processor
        share_of_row = copy.copy(processor)
        for name, value in shares.items():
            setattr(share_of_row, name, value)
        return share_of_row

    return [LogitsProcessorList([share(p, row) for p in processors]) for row in range(batch)]


def processed(
    processors: Sequence[Sequence[Any]],
    text: Text,
    rows: Sequence[Row],
    starts: Sequence[int],
    counts: Sequence[int],
    logits: Tensor,
    narrowest: int,
) -> Tensor:
    """(R, q, V) float32: the logits of a forward, each processed on the prefix that leads to it.

    Args:
        processors: per row of the batch. text: of the batch.
        rows: R rows. starts, counts: where each row's tokens of the forward begin, and how many.
        logits: (R, q, V_m). narrowest: V. Some processors remember the width that they saw first,
            so all members show them one.
    """
    logits = logits[..., :narrowest].to(torch.float32, copy=True)
    for k, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        for j in range(max(0, row.length - start - 1), count):
            prefix = text.tokens[row.index : row.index + 1, : row.pad + start + 1 + j]
            scores = logits[k : k + 1, j]
            for processor in processors[row.index]:
                scores = processor(prefix, scores)
                _check_scores(scores, narrowest, processor)
            logits[k, j] = scores[0]
    return logits


def _check_scores(scores: Any, width: int, processor: Any) -> None:
    """Refuse what no processor may return."""
    if isinstance(scores, Tensor) and scores.shape == (1, width) and not scores.is_complex():
        return
    expected = f"scores (1, {width}) for the one row asked about"
    given = tuple(scores.shape) if isinstance(scores, Tensor) else shown(scores)
    raise Refusal("generate", "logits_processor", expected, f"{given} from {name_of(processor)}")
