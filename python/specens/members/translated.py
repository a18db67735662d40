# SPDX-License-Identifier: Apache-2.0
"""`Translated`: a draft that has another tokenizer, in the target's ids.

The decoder wraps a draft in it where `draft_vocabulary="shared"`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specens.members.facts import text_config
from specens.members.member import Member
from specens.members.vocabulary import shared_tokens

# Draft tokens a translated text may have per token of its own, on average from its beginning.
STRETCH = 2


class Translated(Member):
    """A draft of another tokenizer: tokens that both have, by their strings, in the target's ids.

    Its logits are the draft's at shared tokens and -inf elsewhere, so that it proposes from the
    draft's law restricted to them and renormalised, and says so: verification stays exact. What the
    draft is fed may be approximate: a token that it lacks is fed as its own spelling of the text,
    cut to its last tokens where the row would become more than STRETCH times as long.

    Rows have two lengths, in tokens of the target, as the decoder counts, and of the draft. Where
    tokens of the two begin and end has to be known on the host: every forward waits for its tokens.

    Source: TLI, arXiv:2502.05202.
    """

    def __init__(
        self, inner: Member, target_tokenizer: Any, draft_tokenizer: Any, vocab_size: int
    ) -> None:
        """`inner`: the draft with its own ids. `vocab_size`: the target's ids that count."""
        super().__init__(inner.model)
        self.vocab_size = vocab_size
        self._inner = inner
        self._tokenizers = target_tokenizer, draft_tokenizer
        pairs = shared_tokens(target_tokenizer, draft_tokenizer, vocab_size, inner.vocab_size)
        self._spellings = {theirs: [ours] for theirs, ours in pairs.items()}
        for special in ("bos_token_id", "eos_token_id"):
            theirs, ours = (getattr(tokenizer, special, None) for tokenizer in self._tokenizers)
            if theirs is not None and ours is not None:
                self._spellings.setdefault(theirs, [ours])
        self._columns = torch.tensor([pairs.get(i, 0) for i in range(vocab_size)])
        self._lacking = torch.tensor([i not in pairs for i in range(vocab_size)])
        self._ends: list[list[int]] = []

    def _start(self) -> None:
        most = getattr(text_config(self.model), "max_position_embeddings", None)
        longest = STRETCH * self.capacity
        longest = max(self.capacity, longest if most is None else min(longest, most))
        self._inner.start(len(self.lengths), longest)
        self._columns = self._columns.to(self.device)
        self._lacking = self._lacking.to(self.device)
        self._ends = [[] for _ in self.lengths]

    def _allocate(self) -> None:
        self._inner.release()
        self._ends = []

    def _forward(
        self,
        tokens: Tensor,
        counts: Sequence[int],
        rows: Sequence[int],
        starts: Sequence[int],
        keep_last: int | None,
    ) -> Tensor:
        texts = tokens.tolist()
        theirs = [
            self._feed(self._ends[row], text[:count])
            for row, text, count in zip(rows, texts, counts, strict=True)
        ]
        # The draft's last token of a row is the last one of its last token's.
        logits = self._run(theirs, rows, 1 if keep_last == 1 else None)
        self.calls, self.tokens = self._inner.calls, self._inner.tokens
        single = keep_last is None and all(
            len(mine) == count for mine, count in zip(theirs, counts, strict=True)
        )
        if keep_last != 1 and not (single and logits.shape[1] == tokens.shape[1]):
            places = self._places(theirs, counts, rows, tokens.shape[1], keep_last)
            logits = torch.take_along_dim(logits, places.to(logits.device)[:, :, None], dim=1)
        logits = logits.index_select(-1, self._columns)
        return logits.masked_fill_(self._lacking, -torch.inf)

    def _feed(self, ends: list[int], tokens: Sequence[int]) -> list[int]:
        """The draft's tokens for more of a row's; notes where each one of the row's ends."""
        fed: list[int] = []
        start = ends[-1] if ends else 0
        spare = self._inner.capacity - self.capacity
        for token in tokens:
            # At least one is left, since what came before was cut alike; and the cut is the same
            # whatever forwards a row comes in.
            size = len(ends) + 1
            room = min(STRETCH * size, spare + size) - start - len(fed)
            fed += self._spelling(token)[-room:]
            ends.append(start + len(fed))
        return fed

    def _spelling(self, token: int) -> list[int]:
        """The draft's tokens for one of the target's."""
        if token not in self._spellings:
            target, draft = self._tokenizers
            encoded = draft.encode(target.decode([token]), add_special_tokens=False)
            spelling = [i for i in encoded if i < self._inner.vocab_size]
            unknown = [draft.unk_token_id, draft.eos_token_id, 0]
            self._spellings[token] = spelling or [next(i for i in unknown if i is not None)]
        return self._spellings[token]

    def _run(self, tokens: list[list[int]], rows: Sequence[int], keep_last: int | None) -> Tensor:
        """The draft's logits after its own tokens, as `Member.forward` returns them."""
        counts = [len(of_row) for of_row in tokens]
        width = max(counts)
        room = self._inner.capacity - max(self._inner.lengths[row] for row in rows)
        if len(rows) > 1 and width > room:
            # Where one row's tokens end, another's padding would not fit.
            alone = [
                self._run([of_row], [row], keep_last)
                for of_row, row in zip(tokens, rows, strict=True)
                if of_row
            ]
            shape = (len(rows), width if keep_last is None else keep_last, alone[0].shape[-1])
            logits = alone[0].new_zeros(shape)
            going = [k for k, of_row in enumerate(tokens) if of_row]
            for k, row_logits in zip(going, alone, strict=True):
                logits[k, : row_logits.shape[1]] = row_logits[0]
            return logits
        padded = [of_row + [0] * (width - len(of_row)) for of_row in tokens]
        subset = None if len(rows) == len(self._inner.lengths) else rows
        return self._inner.forward(torch.tensor(padded), counts, subset, keep_last=keep_last)

    def _places(
        self,
        fed: Sequence[Sequence[int]],
        counts: Sequence[int],
        rows: Sequence[int],
        width: int,
        keep_last: int | None,
    ) -> Tensor:
        """(R, width or keep_last) int64: where in the forward just run the target's tokens end."""
        places = torch.zeros(len(rows), width if keep_last is None else keep_last).long()
        for mine, row, text, count in zip(places, rows, fed, counts, strict=True):
            kept = count if keep_last is None else min(count, keep_last)
            begin = 0 if keep_last is None else keep_last - kept
            ends = self._ends[row]
            first = self._inner.lengths[row] - len(text)
            mine[begin : begin + kept] = torch.tensor(ends[len(ends) - kept :]) - first - 1
        return places

    def _rollback(self, lengths: Sequence[int]) -> None:
        for ends, length in zip(self._ends, lengths, strict=True):
            del ends[length:]
        self._inner.rollback([ends[-1] if ends else 0 for ends in self._ends])

    def _select(self, rows: Sequence[int]) -> None:
        self._inner.select(rows)
        self._ends = [self._ends[row] for row in rows]
