# SPDX-License-Identifier: Apache-2.0
"""Drafts made of other models are the models they claim to be, and the text keeps its law.

`layer_skip` is compared with models built small from the start, `Translated` with the model whose
ids it translates. A new kind of draft belongs in `test_the_text_keeps_its_law` and gets a test of
what it shares with the model it was made of.
"""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_schedules import HONEST, VOCAB_SIZE, WRONG, Case, p_values
from test_vocabulary import tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from toys import logits_after, noisy, prompts, toy
from transformers import PreTrainedTokenizerFast
from zoo import CONFIGS, build

from specens import SpeculativeDecoder, drafts, member, probe
from specens.drafts import Translated, layer_skip, quantised
from specens.vocabulary import shared_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def described(model: Any) -> tuple[Any, ...]:
    """What must not change when a draft is made of a model."""
    numbers = [getattr(module, "layer_idx", None) for module in model.modules()]
    tensors = [(name, t.data_ptr(), t.clone()) for name, t in model.state_dict().items()]
    return str(model), model.config.to_dict(), numbers, tensors


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[:3] == after[:3]
    for (name, at, old), (_, now, new) in zip(before[3], after[3], strict=True):
        assert at == now, name
        assert torch.equal(old, new), name


# --- without some layers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_layers_are_the_model(kind):
    model, tokens = build(kind), torch.randint(3, 128, (2, 12))
    before = described(model)
    draft = layer_skip(model, model.config.num_hidden_layers)
    found, expected = (one(tokens, use_cache=False).logits for one in (draft, model))
    assert torch.equal(found, expected)
    mine, theirs = (dict(one.named_parameters()) for one in (draft, model))
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert_same(before, described(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_sliding", "mistral_sliding", "gemma3_text"])
def test_a_model_without_layers_is_the_one_built_without_them(kind):
    """Windows stay with the layers that have them."""
    model, kept = build(kind), [0, 1, 3]
    before = described(model)
    draft = layer_skip(model, kept)
    changes: dict[str, Any] = {"num_hidden_layers": 3} if kind != "gpt2" else {"n_layer": 3}
    if getattr(model.config, "layer_types", None):
        changes["layer_types"] = [model.config.layer_types[i] for i in kept]
        assert len(set(changes["layer_types"])) == 2
    small = build(kind, seed=1, **changes)
    assert draft.config.num_hidden_layers == len(kept)
    state = draft.state_dict()
    assert state.keys() == small.state_dict().keys()
    small.load_state_dict(state)
    tokens = torch.randint(3, 128, (2, 20))
    assert torch.equal(draft(tokens).logits, small(tokens).logits)
    # With a cache, whose layers are numbered from 0.
    assert probe(draft).mode == "slot"
    one = member(draft)
    one.start(2, 20)
    steps = [one.forward(part, [part.shape[1]] * 2) for part in tokens.split([7, 12, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), small(tokens).logits, rtol=1e-3, atol=1e-3)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in draft.parameters()} < shared
    assert_same(before, described(model))


@pytest.mark.parametrize("kind", ["lfm2", "mamba2", "granitemoehybrid"])
def test_states_are_skipped_too(kind):
    model = build(kind)
    draft = layer_skip(model, [model.config.num_hidden_layers - 1])
    assert probe(draft).mode == "replay"


def test_a_number_of_layers_is_spread_evenly():
    model = build("llama", num_hidden_layers=7)
    layers = list(model.model.layers)

    def kept(keep: Any) -> list[int]:
        draft = layer_skip(model, keep)
        weights = [layer.mlp.up_proj.weight for layer in layers]
        return [
            next(i for i, weight in enumerate(weights) if layer.mlp.up_proj.weight is weight)
            for layer in draft.model.layers
        ]

    assert kept(7) == list(range(7))
    assert kept(4) == [0, 2, 4, 6]
    assert kept(2) == [0, 6]
    assert kept(1) == [0]
    assert kept([2, 3]) == kept(torch.tensor([2, 3])) == [2, 3]
    assert layer_skip(model, 2).config.name_or_path == "LlamaForCausalLM-2-of-7-layers"


def test_layers_that_are_not_there_are_refused():
    model = build("llama")
    for keep in (0, 5, -1, [], [4], [1, 0], [1, 1], [0.5], True, 1.5):
        expected = r"layer_skip: keep: expected 1 to 4, or some of 0 to 3 in ascending order, got "
        with pytest.raises(ValueError, match=expected):
            layer_skip(model, keep)
    with pytest.raises(ValueError, match="expected a causal LM, got Linear"):
        layer_skip(torch.nn.Linear(2, 2), 1)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    expected = r"layer_skip: model: expected a list of its 4 layers inside, got LlamaForCausalLM"
    with pytest.raises(ValueError, match=expected):
        layer_skip(model, 2)


@pytest.fixture(scope="module")
def deep() -> Any:
    """A target of three layers, the middle one of which says little."""
    model = toy(0, VOCAB_SIZE, num_hidden_layers=3)
    layer = model.model.layers[1]
    for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        matrix.mul_(0.2)
    return model


def test_a_model_drafts_for_itself(deep):
    settings = {"schedule": "speculative", "num_speculative_tokens": 3}
    inputs = prompts([4, 2, 5], VOCAB_SIZE)
    plain = SpeculativeDecoder([deep], schedule="plain")
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = plain.generate(**inputs, **options)
    rates = []
    for keep in (3, [0, 2], 1):
        decoder = SpeculativeDecoder([deep], draft=layer_skip(deep, keep), **settings)
        assert torch.equal(decoder.generate(**inputs, **options), expected)
        rates.append(decoder.statistics.acceptance_rate)
    assert rates[0] == 1 > rates[1] > rates[2]
    assert decoder.statistics.members == ["LlamaForCausalLM", "LlamaForCausalLM-1-of-3-layers"]


# --- laws -----------------------------------------------------------------------------------------

WORDS = {f"w{i}": i for i in range(VOCAB_SIZE)}


def words(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer of these words; the first is what it takes unknown ones for."""
    unknown = min(ids, key=lambda word: ids[word])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(ids, unk_token=unknown)), unk_token=unknown
    )


def renumbered(model: Any, ids: dict[str, int]) -> Any:
    """A model of the same words with other ids; words that `model` lacks are random."""
    other = toy(9, len(ids), num_hidden_layers=model.config.num_hidden_layers)
    state = {**model.state_dict()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = other.state_dict()[name].clone()
        for word, new in ids.items():
            if word in WORDS:
                rows[new] = state[name][WORDS[word]]
        state[name] = rows
    other.load_state_dict(state)
    return other


# It lacks w3, has two words of its own, and no word but w2 has the target's id.
OTHER = {"w4": 0, "w0": 1, "w2": 2, "own": 3, "w1": 4, "more": 5}
ALL = {"w4": 0, "own": 1, "w0": 2, "w1": 3, "w3": 4, "w2": 5}


def shared(ids: dict[str, int], drafts: int = 1) -> dict[str, Any]:
    """The decoder's arguments for drafts with these words."""
    return {"draft_vocabulary": "shared", "tokenizers": [words(WORDS)] + [words(ids)] * drafts}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("mixture", {"schedule": "speculative", "num_speculative_tokens": 2}),
        ("warped", {"schedule": "speculative", "num_speculative_tokens": 3}),
        ("mixture", {"schedule": "hierarchy", "num_speculative_tokens": 2}),
        ("mixture", {"schedule": "companion", "token_cost": 0.4}),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else value,
)
def test_another_vocabulary_keeps_the_law(law, options):
    model = toy(0, VOCAB_SIZE)
    drafts = 2 if options["schedule"] == "companion" else 1
    options = {**options, **shared(OTHER, drafts)}
    case = Case(law, 1, options.pop("schedule"), options, drafts=drafts)
    models = [model, *(renumbered(noisy(model, 1.0, seed), OTHER) for seed in range(drafts))]
    found = p_values(case.texts(models), case.joint(models))
    assert min(found.values()) > HONEST, found


@pytest.mark.slow
def test_a_draft_without_renormalisation_is_found_out(monkeypatch):
    """Where tokens that the target lacks keep their mass, q is not the law of what is proposed."""

    def wrong(self: Translated, tokens: Tensor, *rest: Any) -> Tensor:
        logits = right(self, tokens, *rest)
        # The verifier is told of the draft's law before the restriction, which it renormalises.
        return logits.masked_fill(logits == -torch.inf, 1.0) if tokens.shape[1] == 1 else logits

    right = Translated._forward
    model = toy(0, VOCAB_SIZE)
    case = Case("mixture", 1, "speculative", {"num_speculative_tokens": 2, **shared(OTHER)}, 1)
    models = [model, renumbered(noisy(model, 1.0), OTHER)]
    monkeypatch.setattr(Translated, "_forward", wrong)
    found = p_values(case.texts(models), case.joint(models))
    assert min(found.values()) > HONEST, found  # another draft, still honest


@pytest.mark.slow
@pytest.mark.parametrize("law", ["mixture", "warped"])
def test_a_model_without_layers_keeps_the_law(law, deep):
    case = Case(law, 1, "speculative", {"num_speculative_tokens": 2}, drafts=1)
    models = [deep, layer_skip(deep, [0, 2])]
    found = p_values(case.texts(models), case.joint(models))
    assert min(found.values()) > HONEST, found
