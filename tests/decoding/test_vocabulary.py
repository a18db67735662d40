# SPDX-License-Identifier: Apache-2.0
"""Members share a vocabulary, or are refused with the ids that differ; padding does not count."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from toys import logits_after, prompts, toy
from transformers import PreTrainedTokenizerFast

from specens import SpeculativeDecoder
from specens.members.vocabulary import shared_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer(size: int, **other: int) -> PreTrainedTokenizerFast:
    """`size` words; `other` gives words other ids."""
    words = {f"w{i}": i for i in range(size)}
    words = {word: i for word, i in words.items() if i not in other.values()} | other
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))


def test_equal_widths_need_no_tokenizer():
    models = [toy(0, 11), toy(1, 11)]
    assert shared_vocabulary(models, None) == 11
    assert SpeculativeDecoder(models).vocab_size == 11


def test_padding_is_cut_off_where_tokenizers_agree():
    """As Qwen2.5 does: one tokenizer of 140 words, logits of 152 and 144 columns."""
    models, words = [toy(0, 152), toy(1, 144)], tokenizer(140)
    assert shared_vocabulary(models, [words, words]) == 140
    assert shared_vocabulary(models[:1], [words]) == 140
    # A model that lacks the tokenizer's last ids cannot score them.
    assert shared_vocabulary([toy(0, 152), toy(1, 130)], [words, words]) == 130


@pytest.mark.parametrize("schedule", ["plain", "component", "speculative", "alternating"])
def test_padding_columns_are_never_written(schedule):
    models = [toy(0, 152), toy(1, 144)]
    for model in models:  # padding that would win everywhere, if it counted
        model.lm_head.weight[140:] *= 100
    decoder = SpeculativeDecoder(models, schedule=schedule, tokenizers=[tokenizer(140)] * 2, seed=0)
    inputs = prompts([4, 2, 5], 140)
    texts = decoder.generate(**inputs, max_new_tokens=20, do_sample=True, top_k=0)
    assert texts.shape == (3, 25)
    assert texts.max() < 140


def test_widths_that_differ_write_what_equal_widths_write():
    """Cut to the shared columns, the members are the same members."""
    wide, narrow, words = toy(0, 152), toy(1, 144), tokenizer(140)

    def cut(model, seed: int):
        small = toy(seed, 140)
        state = model.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:140]
        small.load_state_dict(state)
        return small

    inputs = prompts([4, 2, 5], 140)
    options = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "seed": 3}
    padded = SpeculativeDecoder([wide, narrow], schedule="plain", tokenizers=[words, words])
    exact = SpeculativeDecoder([cut(wide, 0), cut(narrow, 1)], schedule="plain")
    assert torch.equal(padded.generate(**inputs, **options), exact.generate(**inputs, **options))


def test_a_separate_draft_is_cut_too():
    draft, target, words = toy(0, 152), toy(1, 144), tokenizer(140)
    draft.lm_head.weight[140:] *= 100
    decoder = SpeculativeDecoder(
        [target], draft=draft, schedule="speculative", tokenizers=[words, words]
    )
    inputs = prompts([4], 140)
    text = decoder.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert decoder.statistics.status == 0
    row: Tensor = inputs["input_ids"]
    for _ in range(12):
        best = logits_after(target, row)[:, :140].argmax(-1)
        row = torch.cat([row, best[:, None]], 1)
    assert torch.equal(text, row)


def test_ids_that_disagree_are_named():
    models = [toy(0, 152), toy(1, 144), toy(2, 144)]
    exchanged = tokenizer(140, w7=9, w9=7)
    with pytest.raises(ValueError, match=r"decoder: tokenizers: expected the same token") as error:
        shared_vocabulary(models, [tokenizer(140), tokenizer(140), exchanged])
    assert "got 2 that differ between models 0 and 2 (7: 'w7' / 'w9', 9: 'w9' / 'w7')" in str(
        error.value
    )
    with pytest.raises(ValueError, match=r"got 1 that differ .* \(139: 'w139' / None\)"):
        SpeculativeDecoder(models[:2], tokenizers=[tokenizer(140), tokenizer(139)])
    with pytest.raises(ValueError, match=r"got 10 .*\(130: .*134: 'w134' / None\)$"):
        shared_vocabulary(models[:2], [tokenizer(140), tokenizer(130)])


def test_added_tokens_above_a_common_vocabulary_name_the_way_out():
    """Two fine-tunes of one model, each with a token of its own for its chats."""
    models = [toy(0, 144), toy(1, 144)]
    own = [tokenizer(140, user=140), tokenizer(140, person=140)]
    got = r"got 1 that differ between models 0 and 1 \(140: 'user' / 'person'\)$"
    added = r"add what each tokenizer has added to the other, too, or to none"
    with pytest.raises(ValueError, match=rf"^decoder: tokenizers: .* \({added}\), {got}"):
        SpeculativeDecoder(models, tokenizers=own)
    shared = r"or draft_vocabulary='shared' for a draft that has its own"
    options = {"draft": models[1], "schedule": "speculative", "tokenizers": own}
    with pytest.raises(ValueError, match=rf"^decoder: tokenizers: .* every id, {shared}, {got}"):
        SpeculativeDecoder(models[:1], **options)
    decoder = SpeculativeDecoder(models[:1], **options, draft_vocabulary="shared")
    text = decoder.generate(**prompts([4], 140), max_new_tokens=5, do_sample=False)
    assert torch.equal(text, models[0].generate(**prompts([4], 140), max_new_tokens=5))


def test_different_widths_without_tokenizers_are_refused():
    models = [toy(0, 152), toy(1, 144)]
    expected = (
        r"decoder: tokenizers: expected one per model, since their vocabulary sizes differ "
        r"\(152, 144\), got None"
    )
    with pytest.raises(ValueError, match=expected):
        SpeculativeDecoder(models)
    with pytest.raises(ValueError, match=expected):
        SpeculativeDecoder(models[:1], draft=models[1], schedule="speculative")


def test_a_tokenizer_for_every_model_the_drafts_too():
    words = tokenizer(140)
    models = [toy(0, 152), toy(1, 144)]
    with pytest.raises(ValueError, match=r"tokenizers: expected 2, one per model, got 1"):
        SpeculativeDecoder(models, tokenizers=[words])
    with pytest.raises(ValueError, match=r"tokenizers: expected 2, one per model, got 1"):
        SpeculativeDecoder(models[:1], draft=models[1], schedule="speculative", tokenizers=[words])
