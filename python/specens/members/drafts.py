# SPDX-License-Identifier: Apache-2.0
"""Drafts made of the models there are: without some layers, quantised, or of another vocabulary.

A draft decides how fast a text is written and never which law it has: everything here may be
approximate, but a draft must propose from the law that its logits say. `layer_skip` and `quantised`
return models, for `SpeculativeDecoder(draft=...)`; `Translated` is what the decoder wraps a draft
in where `draft_vocabulary="shared"`. To add a way to make a draft, add a function that returns a
causal LM and leaves the user's as it was.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from importlib import import_module
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from specens.members.member import Member, check_causal_lm, model_name, text_config, unwrapped
from specens.members.vocabulary import shared_tokens

# Draft tokens a translated text may have per token of its own, on average from its beginning.
STRETCH = 2


def layer_skip(model: Any, keep: Sequence[int] | int) -> Any:
    """The model without some of its layers, as a draft for itself.

    Every parameter and buffer is the model's own; what is new is the modules' objects and the
    configuration, so that keys and values of the layers that stay are numbered from 0.

    Args:
        model: a causal LM; it is not modified.
        keep: indices of the layers that stay, ascending; or how many: that many, spread evenly, the
            first and the last one among them.
    Returns:
        A causal LM of the same class.
    Raises:
        ValueError: not a causal LM, no list of its layers is found, or no such layers.

    Source: self-speculative decoding, arXiv:2309.08168; LayerSkip, arXiv:2404.16710.
    """
    check_causal_lm(model)
    draft = _shared_copy(unwrapped(model))
    owner, name, layers = _layers("layer_skip", draft)
    kept = _kept(keep, len(layers))
    setattr(owner, name, torch.nn.ModuleList(layers[i] for i in kept))
    config = text_config(draft)
    # Before the number of layers: a configuration compares their lengths with it.
    for entry, value in list(vars(config).items()):
        if "layer" in entry and isinstance(value, (list, tuple)) and len(value) == len(layers):
            setattr(config, entry, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)
    for i, layer in enumerate(getattr(owner, name)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i
    draft.config._name_or_path = f"{model_name(draft)}-{len(kept)}-of-{len(layers)}-layers"
    return draft


def quantised(model: Any) -> Any:
    """The model with the weights of its linear layers in int8, one scale a row, as a draft.

    Parameters of other modules are the model's own, the embedding's too.

    Args:
        model: a causal LM; it is not modified.
    Returns:
        A causal LM of the same class.
    Raises:
        ImportError: torchao is not installed.
        ValueError: not a causal LM, or its layers have no `torch.nn.Linear`.

    Source: weight-only quantisation by torchao; ML-SpecQD, arXiv:2503.13565, drafts in this way.
    """
    check_causal_lm(model)
    try:
        quantization = import_module("torchao.quantization")
    except ImportError as error:
        raise ImportError(
            "quantised: torchao: expected it installed (pip install torchao), got none"
        ) from error
    draft = _shared_copy(unwrapped(model))
    _, _, layers = _layers("quantised", draft)
    if not any(isinstance(module, torch.nn.Linear) for module in layers.modules()):
        kinds = sorted({type(m).__name__ for m in layers.modules() if hasattr(m, "weight")})
        raise ValueError(
            f"quantised: model: expected layers with torch.nn.Linear, got {', '.join(kinds)}"
        )
    # The inductor's settings are the user's.
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    quantization.quantize_(draft, config)
    draft.config._name_or_path = f"{model_name(draft)}-int8"
    return draft


def _shared_copy(model: Any) -> Any:
    """New modules and a new configuration around the same parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _layers(op: str, model: Any) -> tuple[Any, str, torch.nn.ModuleList]:
    """Where the decoder's layers are: the module that holds them, its name for them, and they."""
    count = text_config(model).num_hidden_layers
    # Outer modules come first: a layer's own lists, of experts say, come after the layers.
    for module in model.get_decoder().modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return module, name, child
    raise ValueError(
        f"{op}: model: expected a list of its {count} layers inside, got {type(model).__name__} "
        "without one"
    )


def _kept(keep: Any, count: int) -> list[int]:
    """Indices of the layers that stay."""
    found: list[Any] = list(keep) if isinstance(keep, Iterable) else []
    if isinstance(keep, int) and not isinstance(keep, bool) and keep <= count:
        found = [round(i * (count - 1) / max(keep - 1, 1)) for i in range(keep)]
    known = all(isinstance(i, Integral) for i in found) and set(found) <= set(range(count))
    if not found or not known or found != sorted(set(found)):
        raise ValueError(
            f"layer_skip: keep: expected 1 to {count}, or some of 0 to {count - 1} in ascending "
            f"order, got {keep!r}"
        )
    return [int(i) for i in found]


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
            theirs, ours = (getattr(one, special, None) for one in self._tokenizers)
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
            found = draft.encode(target.decode([token]), add_special_tokens=False)
            unknown = [draft.unk_token_id, draft.eos_token_id, 0]
            width = self._inner.vocab_size
            found = [one for one in found if one < width]
            self._spellings[token] = found or [next(one for one in unknown if one is not None)]
        return self._spellings[token]

    def _run(self, tokens: list[list[int]], rows: Sequence[int], keep_last: int | None) -> Tensor:
        """The draft's logits after its own tokens, as `Member.forward` returns them."""
        counts = [len(mine) for mine in tokens]
        width = max(counts)
        room = self._inner.capacity - max(self._inner.lengths[row] for row in rows)
        if (
            len(rows) > 1 and width > room
        ):  # where one row's tokens end, another's padding would not fit
            alone = [
                self._run([mine], [row], keep_last)
                for mine, row in zip(tokens, rows, strict=True)
                if mine
            ]
            shape = (len(rows), width if keep_last is None else keep_last, alone[0].shape[-1])
            logits = alone[0].new_zeros(shape)
            going = [k for k, mine in enumerate(tokens) if mine]
            for k, one in zip(going, alone, strict=True):
                logits[k, : one.shape[1]] = one[0]
            return logits
        padded = [mine + [0] * (width - len(mine)) for mine in tokens]
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
