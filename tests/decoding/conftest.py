# SPDX-License-Identifier: Apache-2.0
"""What tests of the decoder share: its members and a tokenizer of their words."""

from typing import Any

import pytest
from decoders import VOCAB_SIZE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from toys import noisy, toy
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Four members that agree now and then, and a draft that does so more often."""
    first = toy(0, VOCAB_SIZE, spread=3, amplify=30, num_hidden_layers=2)
    return [first, *(noisy(first, noise, seed=seed) for seed, noise in enumerate((1, 1, 1, 0.5)))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token; token 0 pads, and one is the word that transformers asks about."""
    words = {"<pad>": 0, "abcdef": 1} | {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
