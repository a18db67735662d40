# SPDX-License-Identifier: Apache-2.0
"""Every method runs on the family that ships; the exact ones write the text that they must.

That sampled text has its law is shown schedule by schedule in test_schedules.py, and rule by rule
in test_verify_law.py; here also for weights that differ at each position.
"""

import itertools

import pytest
import torch
from cases import HONEST, VOCAB_SIZE, WRONG, p_values
from laws import ensemble_law
from torch import Tensor
from toys import noisy, prompts, toy

from specens import SpeculativeDecoder, family
from specens.members.weight_head import WeightHead, last_hidden
from specens.methods import METHODS, Method, build, method_named
from specens.schedules import Speculative
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)


@pytest.fixture(scope="module")
def loaded() -> tuple[dict, object]:
    transformers = pytest.importorskip("transformers")
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(
            family.path(name), dtype=torch.float32
        ).eval()
        for name in family.FAMILY
    }
    return models, transformers.AutoTokenizer.from_pretrained(family.path("code"))


def made(method: Method, loaded: tuple[dict, object], **options: object) -> SpeculativeDecoder:
    models, tokenizer = loaded
    mine = [models[name] for name in method.models]
    drafts = [models[name] for name in method.drafts]
    return build(method, mine, drafts, [tokenizer] * (len(mine) + len(drafts)), **options)


def text(decoder: SpeculativeDecoder, loaded: tuple[dict, object], **options: object) -> list[int]:
    ids = loaded[1](family.PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 24, "do_sample": True, "top_k": 0, "seed": 3, **options}
    return decoder.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()


@EACH
def test_a_method_samples_and_repeats_itself(method: Method, loaded) -> None:
    decoder = made(method, loaded)
    first = text(decoder, loaded)
    assert decoder.statistics.num_tokens == 24
    assert text(decoder, loaded) == first
    assert text(decoder, loaded, seed=4) != first


@EACH
def test_an_exact_method_writes_the_plain_greedy_text(method: Method, loaded) -> None:
    decoder = made(method, loaded)
    if method.samples:
        with pytest.raises(ValueError, match="expected True for schedule"):
            text(decoder, loaded, do_sample=False)
        return
    written = text(decoder, loaded, do_sample=False)
    models = [loaded[0][name] for name in method.models]
    plain = text(SpeculativeDecoder(models, schedule="plain"), loaded, do_sample=False)
    assert written == plain or not method.lossless


@EACH
def test_a_draft_that_is_its_target_is_always_kept(method: Method, loaded) -> None:
    unlike = ("diversed", "easd", "consultant", "bild", "typical", "cascade_v1", "cascade_v2")
    if not method.drafts or method.name in (*unlike, "cascade_v3"):
        return  # the rule or the head does not look at agreement, or there is no draft
    models, tokenizer = loaded
    drafts = [models["code"]] * len(method.drafts)
    decoder = build(method, [models["code"]], drafts, [tokenizer] * (1 + len(drafts)))
    text(decoder, loaded)
    if method.name == "top_k":
        assert decoder.statistics.acceptance_rate > 0.5
    else:
        assert decoder.statistics.acceptance_rate == 1.0


@pytest.mark.parametrize("names", [("draft",), ("draft", "prose"), ("draft", "draft", "prose")])
def test_a_hierarchy_is_as_deep_as_it_has_drafts(names: tuple[str, ...], loaded) -> None:
    """That its sampled text has the target's law, at any depth, is shown in test_schedules.py."""
    models, tokenizer = loaded
    drafts = [models[name] for name in names]
    tokenizers = [tokenizer] * (1 + len(drafts))
    decoder = build(METHODS["hierarchy"], [models["code"]], drafts, tokenizers)
    assert decoder.schedule.tokens == (3, 5, 7)[: len(drafts)]
    assert [one.rule.name for one in decoder.acceptances] == ["rejection"] * len(drafts)
    plain = SpeculativeDecoder([models["code"]], schedule="plain")
    expected = text(plain, loaded, do_sample=False)
    assert text(decoder, loaded, do_sample=False) == expected
    assert all(decoder.statistics.calls)
    given = build(
        METHODS["hierarchy"], [models["code"]], drafts, tokenizers, schedule="hierarchy:tokens=2"
    )
    assert given.schedule.tokens == (2, 4, 6)[: len(drafts)]


def test_what_build_refuses(loaded) -> None:
    models, tokenizer = loaded
    code, tokenizers = models["code"], [tokenizer] * 2
    with pytest.raises(ValueError, match="method: drafts: expected 1 for 'fsd', got 0"):
        build(METHODS["fsd"], [code], [], [tokenizer])
    with pytest.raises(ValueError, match="drafts: expected one or more for 'hierarchy', got 0"):
        build(METHODS["hierarchy"], [code], [], [tokenizer])
    for count in (1, 3):
        match = f"method: drafts: expected 2 for 'pyramid_fuzzy', got {count}"
        with pytest.raises(ValueError, match=match):
            build(METHODS["pyramid_fuzzy"], [code], [code] * count, [tokenizer] * (1 + count))
    with pytest.raises(ValueError, match="method: drafts: expected 0 for 'plain', got 1"):
        build(METHODS["plain"], [code], [code], tokenizers)
    with pytest.raises(ValueError, match="method: models: expected one target for 'static', got 2"):
        build(METHODS["static"], [code, code], [code], [tokenizer] * 3)
    with pytest.raises(ValueError, match=r"draft_weight: expected a number in \[0, 1\], got 2"):
        build(METHODS["static"], [code], [code], tokenizers, draft_weight=2)
    with pytest.raises(
        ValueError, match="method: weights: expected None and draft_weight= for 'static'"
    ):
        build(METHODS["static"], [code], [code], tokenizers, weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="method: ensemble: expected 'mixture', which the head"):
        build(METHODS["diversed"], [code], [models["draft"]], tokenizers, ensemble="product")
    with pytest.raises(ValueError, match=r"acceptance: expected a rule or a list of them, got \{"):
        build(METHODS["fsd"], [code], [code], tokenizers, acceptance={"js": 0.7})
    with pytest.raises(
        ValueError, match="stop: name: expected one of confidence, entropy, learned, got"
    ):
        build(METHODS["fsd"], [code], [code], tokenizers, schedule="speculative:stop=never")
    head = WeightHead(torch.zeros(320), torch.tensor(0.0), "mixture", 192, 128)
    with pytest.raises(ValueError, match=r"weights: expected a head for 128 \+ 192, got"):
        build(METHODS["diversed"], [code], [models["draft"]], tokenizers, head=head)
    with pytest.raises(ValueError, match=r"method: expected one of plain, .*, got 'fast'"):
        method_named("fast")


def head_law(models: list, head: WeightHead, prompt: Tensor, length: int) -> Tensor:
    """(V,) * length: the joint law of the next tokens, every prefix read anew."""
    joint = torch.ones((), dtype=torch.float64)
    for step in range(length):
        tails = torch.tensor(list(itertools.product(range(VOCAB_SIZE), repeat=step)))
        tails = tails.long().reshape(VOCAB_SIZE**step, step)
        texts = torch.cat([prompt.expand(len(tails), -1), tails], 1)
        logits, hidden = [], []
        for model in models:
            with torch.no_grad(), last_hidden(model) as collected:
                logits.append(model(texts, use_cache=False).logits[:, -1].double())
            hidden.append(collected[-1][:, -1:])
        draft_weight = head.draft_weight(*hidden)[:, 0]
        rows = [
            ensemble_law([a, b], (u, 1 - u), head.ensemble)
            for a, b, u in zip(*logits, draft_weight.tolist(), strict=True)
        ]
        joint = joint[..., None] * torch.stack(rows).reshape((VOCAB_SIZE,) * (step + 1))
    return joint


@pytest.mark.slow
@pytest.mark.parametrize("ensemble", ["mixture", "product"])
@pytest.mark.parametrize("gamma", [1, 3])
def test_weights_of_a_head_give_its_law_at_every_position(ensemble: str, gamma: int) -> None:
    target = toy(0, VOCAB_SIZE)
    models = [noisy(target, 2.0), target]
    dice = torch.Generator().manual_seed(1)
    delta = 3 * torch.randn(32, generator=dice) / 32**0.5
    head = WeightHead(delta, torch.tensor(0.3), ensemble)
    prompt = prompts([3], VOCAB_SIZE)["input_ids"]
    joint = head_law(models, head, prompt, 4)

    def found(**options: object) -> dict:
        decoder = SpeculativeDecoder(
            models,
            schedule=Speculative(proposer=0, tokens=gamma),
            weights=options.pop("weights", head),
            ensemble=ensemble,
            **options,
        )
        texts = [
            decoder.generate(
                prompt.expand(1000, -1),
                attention_mask=torch.ones(1000, 3, dtype=torch.int64),
                max_new_tokens=6,
                do_sample=True,
                top_k=0,
                seed=seed,
            )
            for seed in (0, 1000, 2000)
        ]
        return p_values(torch.cat(texts)[:, 3:7], joint)

    assert min(found().values()) > HONEST
    # The bonus token as it was published, and one weight for all positions, are found out.
    assert min(found(bonus="last").values()) < WRONG
    mean = 0.5 + float(torch.tensor(0.3)) / 10
    assert min(found(weights=(mean, 1 - mean)).values()) < WRONG


def test_wrong_types_are_refused_before_anything_is_built() -> None:
    target, draft = toy(0, VOCAB_SIZE), toy(1, VOCAB_SIZE)
    a_list = "expected a list of models, got"
    faults = [
        (("speculative", [target], None), {}, "drafts: expected 1 for 'speculative', got 0"),
        (("speculative", target, [draft]), {}, f"models: {a_list} LlamaForCausalLM"),
        (("speculative", [target], draft), {}, f"drafts: {a_list} LlamaForCausalLM"),
        (("speculative", "gpt2", [draft]), {}, f"models: {a_list} 'gpt2'"),
        (("speculative", None, [draft]), {}, f"models: {a_list} NoneType"),
        (("layer_skip", [3], []), {}, r"models\[0\]: expected a causal LM, got int"),
        (("speculativ", [target], [draft]), {}, "method: expected one of plain, .*, got 'specul"),
        ((3, [target], [draft]), {}, "method: expected a Method or its name, got 3"),
        ((None, [target], [draft]), {}, "method: expected a Method or its name, got None"),
        (("layer_skip", [target], [], []), {}, "tokenizers: expected 1, one per model, got 0"),
        *(
            (
                ("static", [target], [draft]),
                {"draft_weight": wrong},
                r"draft_weight: expected a number in \[0, 1\], got ",
            )
            for wrong in ("x", True, [0.5], float("nan"), 1.5)
        ),
        *(
            (("diversed", [target], [draft]), {"head": wrong}, "head: expected a WeightHead, its ")
            for wrong in (3, ["a"])
        ),
        *(
            (("speculative", [target], [draft]), ignored, f"{message} for 'speculative', got ")
            for ignored, message in (
                ({"draft": [draft]}, "draft: expected drafts="),
                ({"head": "a"}, "head: expected None"),
                ({"draft_weight": 0.5}, "draft_weight: expected None"),
            )
        ),
        (
            ("diversed", [target], [draft]),
            {"draft_weight": 0.5},
            "draft_weight: expected None for 'diversed', got 0.5",
        ),
    ]
    for arguments, options, message in faults:
        with pytest.raises(Refusal, match=f"^method: {message}"):
            build(*arguments, **options)


def test_a_method_may_be_its_name() -> None:
    models = [toy(0, VOCAB_SIZE)], [toy(1, VOCAB_SIZE)]
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 6, "do_sample": False}
    expected = build(METHODS["speculative"], *models).generate(**settings)
    assert torch.equal(build("speculative", *models).generate(**settings), expected)
    assert build("lookup", models[0], None).generate(**settings).shape == expected.shape
