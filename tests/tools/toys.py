# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that disagree, ragged prompts for them, and the exact law of what they write.

`toy` makes one of any architecture in `zoo.CONFIGS`; its logits are spread out, so that its laws
depend on every token of the context and a decoder that looks at the wrong one is found out.
`sequence_law` enumerates every continuation, without a cache and without the decoding layer.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from laws import ensemble_law
from torch import Tensor
from zoo import build

SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}


def toy(
    seed: int,
    vocab_size: int = 11,
    *,
    kind: str = "llama",
    spread: float = 1.5,
    amplify: float = 6.0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A model in evaluation mode without an end-of-sequence token, its logits' spread as asked.

    Args:
        seed: of the weights.
        vocab_size: columns of its logits.
        kind: an entry of `zoo.CONFIGS`.
        spread: standard deviation of the logits over the vocabulary, in nats.
        amplify: as for `zoo.build`; from 20 on, greedy text hardly ever repeats itself.
        dtype: of the weights. The native kernels take no float64; the reference does.
        changes: configuration entries to replace.
    """
    settings = {"eos_token_id": None, **SMALL.get(kind, {}), **changes}
    model = build(kind, seed=seed, dtype=dtype, vocab_size=vocab_size, amplify=amplify, **settings)
    dice = torch.Generator().manual_seed(seed)
    text = torch.randint(vocab_size, (8, 8), generator=dice)
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:  # tied: the input would grow too
        head.mul_(4)
    else:
        with torch.no_grad():
            found = model(text).logits.std(-1).mean()
        head.mul_((spread / found).to(dtype))
    return model


def noisy(model: Any, noise: float, seed: int = 0) -> Any:
    """A copy whose head is `noise` times its own spread away: a draft that is often right."""
    other = copy.deepcopy(model)
    dice = torch.Generator().manual_seed(seed)
    head = other.get_output_embeddings().weight
    error = torch.randn(head.shape, generator=dice, dtype=torch.float64).to(head.dtype)
    head.add_(error * head.std() * noise)
    return other


def prompts(lengths: Sequence[int], vocab_size: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded `input_ids` and `attention_mask`; token 0 pads and does not occur otherwise."""
    dice = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in zip(input_ids, lengths, strict=True):
        row[width - length :] = torch.randint(1, vocab_size, (length,), generator=dice)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long()}


def logits_after(model: Any, tokens: Tensor) -> Tensor:
    """(B, V) float64. What the model says after each row, seen for the first time, unpadded."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[:, -1].double()


def sequence_law(models: Sequence[Any], prompt: Tensor, length: int, **law: Any) -> Tensor:
    """(V,) * length: the joint law of the next tokens; `law` goes to `ensemble_law`."""
    vocab_size = models[0].config.vocab_size
    joint = torch.ones((), dtype=torch.float64)
    for step in range(length):
        tails = list(itertools.product(range(vocab_size), repeat=step))
        tails = torch.tensor(tails, dtype=torch.int64).reshape(len(tails), step)
        texts = torch.cat([prompt.expand(len(tails), -1), tails], 1)
        logits = [logits_after(model, texts) for model in models]
        rows = [ensemble_law(list(row), **law) for row in zip(*logits, strict=True)]
        shape = (vocab_size,) * (step + 1)
        joint = joint[..., None] * torch.stack(rows).reshape(shape)
    return joint


def first_difference(text: Tensor, other: Tensor) -> str:
    """Where two batches of texts part, for the message of a failed comparison."""
    if text.shape != other.shape:
        return f"shapes {tuple(text.shape)} and {tuple(other.shape)}"
    at = (text != other).nonzero()
    return "equal" if len(at) == 0 else f"row, column {at[0].tolist()}: {text} and {other}"
