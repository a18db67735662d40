# SPDX-License-Identifier: Apache-2.0
"""When rows end: end-of-sequence tokens, the maximum length, and any criterion of transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specens.loop.functions import check_arguments, name_of
from specens_kernels import Refusal
from specens_kernels.arguments import count
from specens_kernels.refusal import shown


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
        for length in lengths:
            if count(length) < 0:
                got = f"MaxLengthCriteria({shown(length)})"
                raise Refusal("generate", "stopping_criteria", "lengths that are counts", got)
        longest = min(lengths, default=generation_config.max_length)
        self.max_length = max(longest, width + 1)
        self.others = [c for c in criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)]
        for criterion in self.others:
            check_arguments("stopping_criteria", criterion)

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
            answer = criterion(text, None)
            try:
                answers = torch.as_tensor(answer)
            except (TypeError, ValueError, RuntimeError):  # text, None, lists of different lengths
                got = shown(answer)
            else:
                if answers.numel() == 1 and not answers.is_floating_point():
                    if bool(answers):
                        return True
                    continue
                got = shown(answer) if answers.numel() == 1 else str(answers.numel())
            expected = "one answer for the one row asked about"
            got = f"{got} from {name_of(criterion)}"
            raise Refusal("generate", "stopping_criteria", expected, got)
        return False
