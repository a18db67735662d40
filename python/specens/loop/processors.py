# SPDX-License-Identifier: Apache-2.0
"""What transformers asks of each logit and each token: processors and stopping criteria.

Temperature, top-k, top-p and min-p become parameters of the law and run inside the kernels. Every
other processor runs here, on each member's logits, once per position, on the prefix that leads to
it: for a speculative position that is the committed text plus the pending tokens before it. A
processor that keeps a history of its own would see positions that are later taken back, so it is
refused: those of transformers and what is derived from them, by name; in others a history cannot be
seen. To fuse another warper, add it to `split`.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

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

    Raises:
        ValueError: a processor is stateful.
    """
    listed = list(processors)
    while listed and isinstance(listed[-1], LogitNormalization):
        listed.pop()  # every law is normalised anyway
    for processor in listed:
        if any(base.__name__ in STATEFUL for base in type(processor).__mro__):
            raise ValueError(
                f"generate: logits_processor: expected processors without a history, got "
                f"{type(processor).__name__}"
            )
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
        mine = copy.copy(processor)
        for name, value in shares.items():
            setattr(mine, name, value)
        return mine

    return [LogitsProcessorList([share(p, row) for p in processors]) for row in range(batch)]


class Stopper:
    """Says after each token whether its row is finished; nothing ever runs past that token.

    End-of-sequence tokens and the maximum length are plain comparisons on the host. Any other
    criterion is asked token by token, with the row's text so far, left padding included.

    max_length: columns that a row has at most. A prompt that is longer gets one token, as in
        transformers, whose criteria are asked after each.
    """

    def __init__(self, criteria: StoppingCriteriaList, generation_config: Any, width: int) -> None:
        """`width`: columns of the prompts."""
        # The user's own criteria of these types replace those of the generation config.
        ends = [c.eos_token_id for c in criteria if type(c) is EosTokenCriteria]
        self.eos = frozenset(token for tensor in ends for token in tensor.view(-1).tolist())
        lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
        longest = int(min(lengths, default=generation_config.max_length))
        self.max_length = max(longest, width + 1)
        self.others = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]

    def cut(self, tokens: list[int], text: Tensor, length: int) -> tuple[int, bool]:
        """How many of the new `tokens` are kept, and whether the row is then finished.

        Args:
            tokens: what was emitted, in order.
            text: (S,) int64. The row, padding and new tokens included.
            length: columns of `text` before the new tokens.
        """
        for kept, token in enumerate(tokens, start=1):
            if token in self.eos or length + kept >= self.max_length:
                return kept, True
            if self.others and self._asks_to_stop(text[None, : length + kept]):
                return kept, True
        return len(tokens), False

    def _asks_to_stop(self, text: Tensor) -> bool:
        # A criterion may answer for the batch with one bool; each is asked about one row only.
        for criterion in self.others:
            answer = torch.as_tensor(criterion(text, None))
            if answer.numel() != 1:
                raise ValueError(
                    f"generate: stopping_criteria: expected one answer for the one row asked "
                    f"about, got {answer.numel()} from {type(criterion).__name__}"
                )
            if bool(answer):
                return True
        return False
