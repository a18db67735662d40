# SPDX-License-Identifier: Apache-2.0
"""Drafts made of other models are the models they claim to be, and the text keeps its law.

`layer_skip` is compared with models built small from the start, `Translated` with the model whose
ids it translates. A new kind of draft belongs in `test_the_text_keeps_its_law` and gets a test of
what it shares with the model it was made of.
"""

import sys
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from cases import HONEST, VOCAB_SIZE, WRONG, Case, p_values
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from toys import logits_after, noisy, prompts, toy
from transformers import PreTrainedTokenizerFast
from zoo import CONFIGS, build

from specens import SpeculativeDecoder, member, probe
from specens.loop import run as run_module
from specens.members.drafts import layer_skip, quantised
from specens.members.translated import Translated
from specens.members.vocabulary import shared_tokens
from specens.schedules import Companion, Hierarchy, Speculative
from specens_kernels import Refusal

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


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "qwen2_sliding", "mistral_sliding", "gemma3_text"]
)
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
    draft = layer_skip(model, sorted({model.config.num_hidden_layers // 2, 1}))
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
    assert kept([2, 3]) == [2, 3]
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
    """A target of three layers, the middle one of which says less."""
    model = toy(0, VOCAB_SIZE, num_hidden_layers=3)
    layer = model.model.layers[1]
    for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        matrix.mul_(0.6)
    return model


def test_a_model_drafts_for_itself(deep):
    settings = {"schedule": Speculative(tokens=3)}
    inputs = prompts([4, 2, 5], VOCAB_SIZE)
    plain = SpeculativeDecoder([deep], schedule="plain")
    options = {"max_new_tokens": 30, "do_sample": False}
    expected = plain.generate(**inputs, **options)
    rates = []
    for keep in (3, [0, 2], 1):
        decoder = SpeculativeDecoder([deep], draft=layer_skip(deep, keep), **settings)
        assert torch.equal(decoder.generate(**inputs, **options), expected)
        rates.append(decoder.statistics.acceptance_rate)
    assert rates[0] == 1 > max(rates[1:])
    assert min(rates) > 0
    assert decoder.statistics.members == ["LlamaForCausalLM", "LlamaForCausalLM-1-of-3-layers"]


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
        ("mixture", {"schedule": Speculative(tokens=2)}),
        ("warped", {"schedule": Speculative(tokens=3)}),
        ("mixture", {"schedule": Hierarchy(tokens=2)}),
        ("mixture", {"schedule": Companion(token_cost=0.4)}),
    ],
    ids=lambda value: value.get("schedule") if isinstance(value, dict) else value,
)
def test_another_vocabulary_keeps_the_law(law, options):
    model = toy(0, VOCAB_SIZE)
    size = 2 if isinstance(options["schedule"], Companion) else 1
    options = {**options, **shared(OTHER, size)}
    case = Case(law, 1, options.pop("schedule"), options, drafts=size)
    models = [model, *(renumbered(noisy(model, 1.0, seed), OTHER) for seed in range(size))]
    found = p_values(case.texts(models), case.joint(models))
    assert min(found.values()) > HONEST, found


@pytest.mark.slow
def test_mass_that_cannot_be_proposed_must_not_count(monkeypatch):
    """A draft verified by a law that has mass where it proposes nothing is found out."""
    right = run_module.verify

    def wrong(*arguments: Any, **options: Any) -> Any:
        if "draft_logits" in options:  # at the end nothing is proposed
            impossible = options["draft_logits"] == -torch.inf
            assert impossible.any()
            options["draft_logits"] = options["draft_logits"].masked_fill(impossible, 1.0)
        return right(*arguments, **options)

    model = toy(0, VOCAB_SIZE)
    case = Case("mixture", 1, Speculative(tokens=2), shared(OTHER), drafts=1)
    models = [model, renumbered(noisy(model, 1.0), OTHER)]
    monkeypatch.setattr(run_module, "verify", wrong)
    found = p_values(case.texts(models), case.joint(models))
    assert found[0, 1] < WRONG, found


@pytest.mark.slow
@pytest.mark.parametrize("law", ["mixture", "warped"])
def test_a_model_without_layers_keeps_the_law(law, deep):
    case = Case(law, 1, Speculative(tokens=2), drafts=1)
    models = [deep, layer_skip(deep, [0, 2])]
    found = p_values(case.texts(models), case.joint(models))
    assert min(found.values()) > HONEST, found


@pytest.mark.parametrize("sample", [True, False])
def test_a_renumbered_target_is_always_right(sample):
    """Its words are all there, and what else it could say is not proposed."""
    model = toy(0, VOCAB_SIZE)
    draft = renumbered(model, ALL)
    decoder = SpeculativeDecoder([model], draft=draft, schedule="speculative", **shared(ALL))
    inputs = prompts([4, 2, 5], VOCAB_SIZE)
    decoder.generate(**inputs, max_new_tokens=40, do_sample=sample, top_k=0, seed=0)
    counts = decoder.statistics
    assert counts.acceptance_rate == 1
    assert sum(counts.tested) > 80
    # With the ids taken at their word, it is not.
    same = SpeculativeDecoder(
        [model], draft=draft, schedule="speculative", tokenizers=[words(WORDS), words(WORDS)]
    )
    same.generate(**inputs, max_new_tokens=40, do_sample=sample, top_k=0, seed=0)
    assert same.statistics.acceptance_rate < 0.9


def test_what_the_draft_lacks_is_not_proposed():
    """Acceptance is the target's own mass of the words that both have."""
    model = toy(0, VOCAB_SIZE)
    model.lm_head.weight[3] = -1e3 * model.lm_head.weight.mean(0)  # w3 is all or nothing
    draft = renumbered(model, OTHER)
    decoder = SpeculativeDecoder([model], draft=draft, schedule="speculative", **shared(OTHER))
    one = decoder.members[1]
    one.start(1, 16)
    logits = one.forward(torch.tensor([[1, 2, 0, 4]]), [4])
    assert (logits[0, :, 3] == -torch.inf).all()
    assert logits[0, :, [0, 1, 2, 4]].isfinite().all()
    assert one.vocab_size == logits.shape[-1] == VOCAB_SIZE


class Spelling:
    """A tokenizer of letters: a string is spelled out, as far as its letters are known."""

    unk_token_id, eos_token_id, bos_token_id = 5, 7, None

    def __init__(self, words: dict[str, int]) -> None:
        self.words = words
        self.strings = {i: word for word, i in words.items()}

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def decode(self, ids: list[int]) -> str:
        return "".join(self.strings[i] for i in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [self.words[letter] for letter in text if letter in self.words]


TARGET = Spelling({"a": 0, "b": 1, "abc": 2, "\u0120c": 3, "x": 4, "abcabc": 5, "<end>": 6})
TARGET.eos_token_id = 6
DRAFT = Spelling({"c": 0, "b": 1, "a": 2, "\u2581c": 3, "cc": 4, "<unk>": 5, "d": 6, "</s>": 7})
# What the draft is fed for each of the target's tokens, uncut.
FED = {0: [2], 1: [1], 2: [2, 1, 0], 3: [3], 4: [5], 5: [2, 1, 0, 2, 1, 0], 6: [7]}


def test_tokens_are_shared_by_their_strings():
    """SentencePiece and byte-level BPE write a space each in its own way."""
    assert shared_tokens(TARGET, DRAFT, 7, 8) == {0: 2, 1: 1, 3: 3}
    assert shared_tokens(TARGET, DRAFT, 1, 8) == {0: 2}
    assert shared_tokens(TARGET, DRAFT, 7, 2) == {1: 1}


def translated(kind: str = "llama") -> tuple[Any, Translated]:
    model = toy(3, 8, kind=kind)
    return model, Translated(member(model), TARGET, DRAFT, 7)


def expected(model: Any, fed: list[list[int]]) -> Tensor:
    """(n, 7): the laws after each of a row's tokens, which were fed as these."""
    rows = []
    for n in range(1, len(fed) + 1):
        logits = logits_after(model, torch.tensor([[*chain.from_iterable(fed[:n])]]))[0]
        row = torch.full((7,), -torch.inf, dtype=torch.float64)
        row[[0, 1, 3]] = logits[[2, 1, 3]]
        rows.append(row)
    return torch.stack(rows)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_rows_have_two_lengths(kind):
    """Prompts, tokens, rollbacks and selections are those of the draft fed anew."""
    model, one = translated(kind)
    texts = [[0, 3, 2, 1, 4, 0, 0], [1, 1, 0, 5, 6]]
    fed = [[FED[token] for token in text] for text in texts]
    # Four tokens may be eight of the draft's, and three are spent.
    fed[1][3] = fed[1][3][-5:]
    laws = [expected(model, mine) for mine in fed]

    def feed(parts: list[list[int]], rows: list[int] | None = None, **more: Any) -> Tensor:
        width = max(map(len, parts))
        tokens = torch.tensor([part + [-1] * (width - len(part)) for part in parts])
        return one.forward(tokens, [len(part) for part in parts], rows, **more)

    one.start(2, 10)
    found = feed([texts[0][:3], texts[1][:2]], keep_last=1)
    assert_near(found[:, 0], torch.stack([laws[0][2], laws[1][1]]))
    found = feed([texts[0][3:4], texts[1][2:4]])
    assert_near(found[0, :1], laws[0][3:4])
    assert_near(found[1], laws[1][2:4])
    assert one.lengths == [4, 4]
    one.rollback([2, 3])
    found = feed([texts[0][2:5], []])
    assert_near(found[0], laws[0][2:5])
    found = feed([texts[1][3:4]], [1])
    assert_near(found[0], laws[1][3:4])
    found = feed([texts[0][5:], texts[1][4:]], keep_last=2)
    assert_near(found[0], laws[0][5:7])
    assert_near(found[1, 1:], laws[1][4:])
    one.rollback([1, 3])
    one.select([1])
    assert_near(feed([texts[1][3:5]])[0], laws[1][3:5])
    assert one.calls == (6 if kind == "llama" else one.calls)
    one.release()
    assert one.lengths == []


def test_a_row_grows_no_longer_than_it_may():
    """Long spellings are cut, alike in any forwards, and a short context is not exceeded."""
    model, one = translated()
    model.config.max_position_embeddings = 14
    one.start(1, 12)
    text = [5, 5, 0, 5, 0, 0, 5, 5, 5, 5, 5, 5]
    # Of n tokens, 2 n of the draft's at most, and no more than 14 - (12 - n).
    spent, fed = 0, []
    for n, token in enumerate(text, start=1):
        fed.append(FED[token][-(min(2 * n, n + 2) - spent) :])
        spent += len(fed[-1])
    assert spent == 14
    laws = expected(model, fed)
    assert_near(one.forward(torch.tensor([text]), [12])[0], laws)
    one.rollback([0])
    found = [one.forward(torch.tensor([[token]]), [1])[0] for token in text]
    assert_near(torch.cat(found), laws)


def test_another_rows_padding_may_not_fit():
    model, one = translated()
    one.start(2, 8)  # sixteen of the draft's
    one.forward(torch.tensor([[5] * 5, [0] * 5]), [5, 1])
    found = one.forward(torch.tensor([[0, -1, -1], [5, 5, 5]]), [1, 3])
    assert_near(found[0, 0], expected(model, [[1, 0]] * 5 + [[2]])[5])
    assert_near(found[1], expected(model, [[2], [2, 1, 0], [1, 0], [1, 0]])[1:])
    one.rollback([5, 1])
    found = one.forward(torch.tensor([[0, -1, -1], [5, 5, 5]]), [1, 3], keep_last=1)
    assert_near(found[1], expected(model, [[2], [2, 1, 0], [1, 0], [1, 0]])[3:])


def test_vocabularies_that_cannot_be_shared_are_refused():
    model, draft = toy(0, VOCAB_SIZE), toy(1, 6)
    settings = {"schedule": "speculative", "draft": draft}
    both = [words(WORDS), words(OTHER)]

    def refused(expected: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=expected):
            SpeculativeDecoder([model], **{**settings, **options})

    refused(
        "decoder: draft_vocabulary: expected 'same' or 'shared', got 'own'", draft_vocabulary="own"
    )
    expected = "tokenizers: expected 2, one per model, for draft_vocabulary 'shared', got "
    refused(expected + "None", draft_vocabulary="shared")
    refused(expected + "1", draft_vocabulary="shared", tokenizers=both[:1])
    refused(
        "draft_vocabulary: expected 'same' without a draft, got 'shared'",
        draft_vocabulary="shared",
        tokenizers=both[:1],
        draft=None,
    )
    refused(
        "draft_vocabulary: expected tokens that both tokenizers have, got none",
        draft_vocabulary="shared",
        tokenizers=[words(WORDS), words({"own": 0, "more": 1})],
    )
    refused("tokenizers: expected the same token for every id", tokenizers=both)
    # Members share one vocabulary whatever the draft has.
    with pytest.raises(ValueError, match="expected the same token for every id, got 5 that differ"):
        SpeculativeDecoder(
            [model, draft], **settings, draft_vocabulary="shared", tokenizers=[*both, both[1]]
        )


def test_without_torchao_nothing_is_quantised(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(Refusal, match="quantised: torchao: expected it installed"):
        quantised(build("llama"))


@pytest.fixture
def torchao() -> Iterator[None]:
    """The package if it is there, with all that it warns of when imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao.quantization")
        yield


@pytest.mark.usefixtures("torchao")
def test_a_quantised_copy_drafts_for_its_model():
    model = toy(0, 64, hidden_size=64, intermediate_size=64)
    before = described(model)
    draft = quantised(model)
    assert_same(before, described(model))
    assert draft.model.embed_tokens.weight is model.model.embed_tokens.weight
    linear = draft.model.layers[0].mlp.up_proj
    assert linear.weight.shape == (64, 64)
    assert linear.weight is not model.model.layers[0].mlp.up_proj.weight
    found, exact = (one(torch.arange(8)[None]).logits for one in (draft, model))
    assert 0 < (found - exact).abs().max() < 0.5
    inputs = prompts([4, 2], 64)
    options = {"max_new_tokens": 30, "do_sample": False}
    plain = SpeculativeDecoder([model], schedule="plain").generate(**inputs, **options)
    decoder = SpeculativeDecoder([model], draft=draft, schedule="speculative")
    assert torch.equal(decoder.generate(**inputs, **options), plain)
    assert decoder.statistics.acceptance_rate > 0.8
    assert decoder.statistics.members[1] == "LlamaForCausalLM-int8"


@pytest.mark.usefixtures("torchao")
def test_layers_that_are_not_linear_are_not_quantised():
    with pytest.raises(ValueError, match=r"with torch\.nn\.Linear, got Conv1D, Layer"):
        quantised(build("gpt2"))
