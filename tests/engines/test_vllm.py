# SPDX-License-Identifier: Apache-2.0
"""Ensembles in vLLM against transformers: greedy text token by token, sampled text by its law.

Both answers of the chi-square are far from chance: the right law may have a p-value of 1e-6 and no
less, a wrong one must have less.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from texts import Weights, chi_square, differing, member_logits, mixed
from vllm_engines import NGRAM, ROOT, Engines, draft_model, options

pytestmark = pytest.mark.slow

PROMPTS = [
    "def merge(a, b):\n",
    "import os\n",
    "And the king said",
    "class Foo(object):\n    def __init__(self",
]
THREE = {"draft": 0.2, "code": 0.3, "prose": 0.5}
TWO = {"code": 0.4, "prose": 0.6}
# Speculative configurations, and the members with each: with `TWO`, the draft only proposes.
DRAFTERS: dict[str, tuple[Weights, dict[str, Any] | None]] = {
    "none": (THREE, None),
    "member_1": (THREE, draft_model(1)),
    "member_3": (THREE, draft_model(3)),
    "member_5": (THREE, draft_model(5)),
    "proposes": (TWO, draft_model(3)),
    "ngram": (THREE, NGRAM),
}
CHANCE = 1e-6
TEXTS, DEPTH = 1536, 4


def greedy(length: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": length, "ignore_eos": True, **more}


def written(result: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The answers to each call."""
    assert "error" not in result, result["log"]
    return result["answers"]


@pytest.mark.parametrize(
    ("drafter", "ensemble"),
    [*((drafter, "mixture") for drafter in DRAFTERS), ("none", "product"), ("member_3", "product")],
)
def test_greedy_text_is_the_ensembles(
    drafter: str, ensemble: str, engines: Engines, members: dict[str, Any]
) -> None:
    weights, speculative = DRAFTERS[drafter]
    if ensemble == "product":
        weights = {"draft": -0.4, "code": 0.8, "prose": 0.6}
    one = (PROMPTS[:1], [greedy(40)])
    ragged = (PROMPTS, [greedy(length) for length in (40, 12, 33, 7)])
    result = engines(one, ragged, **options(weights, speculative, settings={"ensemble": ensemble}))
    for answers in written(result):
        for answer in answers:
            assert differing(answer, members, weights, ensemble) == 0
    lengths = [len(answer["tokens"]) for answer in result["answers"][1]]
    assert lengths == [40, 12, 33, 7]
    if speculative is not None:
        assert result["counts"]["spec_decode_num_accepted_tokens"] > 0
    # The comparison sees another law.
    wrong = {"code": 1.0}
    assert differing(result["answers"][0][0], members, wrong) > 0


SAMPLED: dict[str, tuple[Weights | None, dict[str, Any] | None, dict[str, float], Weights]] = {
    "none": (THREE, None, {"temperature": 0.7}, THREE),
    "member_3": (THREE, draft_model(3), {"temperature": 0.7}, THREE),
    "filtered": (THREE, draft_model(3), {"temperature": 0.9, "top_k": 8}, THREE),
    "proposes": (TWO, draft_model(3), {"temperature": 0.9, "top_k": 8}, TWO),
    "min_p": (THREE, None, {"temperature": 0.9, "min_p": 0.1}, THREE),
    "drafted_min_p": (THREE, draft_model(3), {"temperature": 0.9, "min_p": 0.1}, THREE),
    "target": (None, draft_model(3), {"temperature": 0.9, "top_k": 8}, {"code": 1.0}),
}


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_text_has_the_ensembles_law(
    case: str, engines: Engines, members: dict[str, Any]
) -> None:
    weights, speculative, warpers, law = SAMPLED[case]
    parameters = {"max_tokens": DEPTH, "ignore_eos": True, **warpers}
    call = (PROMPTS[:1] * TEXTS, [parameters] * TEXTS)
    result = engines(call, **options(weights, speculative, max_num_seqs=128))
    (answers,) = written(result)
    assert chi_square(answers, members, law, **warpers) > CHANCE
    for wrong in wrong_laws(law):
        assert chi_square(answers, members, wrong, **warpers) < CHANCE, wrong
    unfiltered = {"temperature": warpers["temperature"]}
    if unfiltered != warpers:
        assert chi_square(answers, members, law, **unfiltered) < CHANCE


def wrong_laws(law: Weights) -> list[Weights]:
    """The target alone, a member left out, weights changed about."""
    if law == THREE:
        return [{"code": 1.0}, {"draft": 0.4, "code": 0.6}, THREE | {"draft": 0.5, "prose": 0.2}]
    if law == TWO:
        return [{"code": 1.0}, {"code": 0.6, "prose": 0.4}]
    return [{"prose": 1.0}]


@pytest.mark.parametrize("case", ["filtered", "drafted_min_p", "target"])
def test_drafts_that_obey_no_filter_are_seen(
    case: str, engines: Engines, members: dict[str, Any]
) -> None:
    """vLLM's own drafts, told to be the filtered law's: all of vLLM's tests would pass."""
    weights, speculative, warpers, law = SAMPLED[case]
    parameters = {"max_tokens": DEPTH, "ignore_eos": True, **warpers}
    call = (PROMPTS[:1] * TEXTS, [parameters] * TEXTS)
    given = options(weights, speculative, max_num_seqs=128)
    (answers,) = written(engines(call, fault="unfiltered_drafts", **given))
    assert chi_square(answers, members, law, **warpers) < CHANCE


@pytest.mark.parametrize("drafter", ["none", "member_3", "ngram"])
def test_requests_of_one_batch_keep_their_own_law(
    drafter: str, engines: Engines, members: dict[str, Any]
) -> None:
    """Greedy, sampled, filtered, seeded, with penalties, log-probabilities and stop strings."""
    weights, speculative = DRAFTERS[drafter]
    own = {"draft": 0.1, "code": 0.1, "prose": 0.8}
    extra = {"specens": {"weights": list(own.values())}}
    seeded = {"temperature": 0.8, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    parameters = [
        greedy(40, logprobs=2),
        greedy(29, extra_args=extra),
        greedy(30, presence_penalty=1.5),
        greedy(24, presence_penalty=0.7, extra_args=extra),
        {"temperature": 0.9, "top_k": 20, "max_tokens": 31, "ignore_eos": True},
        {"temperature": 1.0, "top_p": 0.9, "max_tokens": 11, "min_tokens": 5},
        {"temperature": 0.7, "max_tokens": 40, "stop": ["e"], "extra_args": extra},
        seeded,
    ]
    calls = [(PROMPTS * 2, parameters), (PROMPTS[3:], [seeded])]
    result = engines(*calls, **options(weights, speculative))
    together, alone = written(result)
    for answer, law, penalty in zip(
        together, (weights, own, weights, own), (0, 0, 1.5, 0.7), strict=False
    ):
        assert differing(answer, members, law, presence_penalty=penalty) == 0
    assert differing(together[2], members, weights) > 0
    assert [len(answer["tokens"]) for answer in together[:5]] == [40, 29, 30, 24, 31]
    assert "e" not in together[6]["text"]
    if speculative is None:  # with drafts the number of draws is the batch's
        assert together[7]["tokens"] == alone[0]["tokens"]
    prompt, tokens = together[0]["prompt"], together[0]["tokens"]
    log_probs = mixed(member_logits(members, weights, prompt + tokens), weights)
    for place, (token, shown) in enumerate(zip(tokens, together[0]["log_probs"], strict=True)):
        row = log_probs[len(prompt) - 1 + place]
        assert str(token) in shown
        for other, value in shown.items():
            # float32 logits of size 30 have seven digits.
            assert value == pytest.approx(float(row[int(other)]), abs=1e-4)


@pytest.mark.parametrize("drafter", ["none", "member_3"])
def test_a_grammar_masks_every_member(drafter: str, engines: Engines) -> None:
    """The members' own most probable tokens are no digits; a request without a grammar is free."""
    weights, speculative = DRAFTERS[drafter]
    parameters = [greedy(8, regex="[0-9]{8}"), greedy(8)] * 2
    (answers,) = written(engines((PROMPTS, parameters), **options(weights, speculative)))
    for place, answer in enumerate(answers):
        assert bool(re.fullmatch("[0-9]{1,8}", answer["text"])) == (place % 2 == 0)


@pytest.mark.parametrize("drafter", ["none", "member_3"])
def test_preempted_requests_go_on_as_they_would(
    drafter: str, engines: Engines, members: dict[str, Any]
) -> None:
    weights, speculative = DRAFTERS[drafter]
    given = options(weights, speculative, num_gpu_blocks_override=5)
    result = engines((PROMPTS, [greedy(140)] * 4), **given)
    assert result["counts"]["num_preemptions"] > 0
    for answer in written(result)[0]:
        assert len(answer["tokens"]) == 140
        assert differing(answer, members, weights) == 0


def test_cached_prefixes_are_every_members(engines: Engines, members: dict[str, Any]) -> None:
    """Prompts of several blocks, read in chunks, written twice."""
    weights, speculative = DRAFTERS["member_3"]
    prompts = [
        "".join(f"x{place} = {place * factor}\n" for place in range(40)) + prompt
        for factor, prompt in enumerate(PROMPTS)
    ]
    call = (prompts, [greedy(24)] * 4)
    more = {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "max_model_len": 1024}
    result = engines(call, call, **options(weights, speculative, **more))
    assert result["counts"]["prefix_cache_hits"] > 0
    for answers in written(result):
        assert not any(differing(answer, members, weights) for answer in answers)


def test_the_rule_of_the_settings_judges(engines: Engines) -> None:
    share = {}
    for rule in ("rejection", "lenient:lenience=0.1"):
        parameters = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True}
        given = options(None, draft_model(3), settings={"acceptance": rule})
        counts = engines((PROMPTS * 8, [parameters] * 32), **given)["counts"]
        drafted = counts["spec_decode_num_draft_tokens"]
        share[rule] = counts["spec_decode_num_accepted_tokens"] / drafted
    assert share["rejection"] + 0.1 < share["lenient:lenience=0.1"]


def test_an_engine_of_several_processes(engines: Engines, members: dict[str, Any]) -> None:
    weights, speculative = DRAFTERS["member_3"]
    call = (PROMPTS, [greedy(20)] * 4)
    (answers,) = written(engines(call, processes=True, **options(weights, speculative)))
    assert not any(differing(answer, members, weights) for answer in answers)


def test_a_target_alone_writes_what_vllm_writes(engines: Engines, members: dict[str, Any]) -> None:
    call = (PROMPTS, [greedy(40)] * 4)
    for speculative in (None, draft_model(3), NGRAM):
        (answers,) = written(engines(call, **options(None, speculative)))
        assert not any(differing(answer, members, {"code": 1.0}) for answer in answers)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("additional_config", options(settings={"weights": [1.0]})),
        ("members", options({"code": 0.5, "prose": 0.6})),
        ("acceptance", options(settings={"acceptance": "typcal"})),
        ("logprobs_mode", options(TWO, logprobs_mode="raw_logits")),
        ("members", options(settings={"members": [["target", 0.5], ["draft", 0.5]]})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_setting_stops_the_engine(key: str, given: dict[str, Any], engines: Engines) -> None:
    error = engines((PROMPTS, [greedy(1)] * 4), **given)["error"]
    assert error.startswith(f"Refusal: specens: {key}: expected ")


@pytest.mark.parametrize("processes", [False, True], ids=["one process", "several"])
def test_what_a_request_cannot_have_is_refused_by_itself(
    processes: bool, engines: Engines, members: dict[str, Any]
) -> None:
    """The next request of the same engine is answered."""
    wrong = {
        "extra_args.weights": {"extra_args": {"specens": {"weights": [0.5, 0.6]}}},
        "extra_args.acceptance": {"extra_args": {"specens": {"acceptance": "typcal"}}},
        "extra_args": {"extra_args": {"specens": {"weight": [0.5, 0.5]}}},
        "prompt_logprobs": {"prompt_logprobs": 1},
    }
    calls = [(PROMPTS[:1], [greedy(4, **more)]) for more in wrong.values()]
    right = (PROMPTS[:1], [greedy(20)])
    result = engines(*calls, right, processes=processes, keep=True, **options(TWO))
    *refused, answers = result["answers"]
    for key, error in zip(wrong, refused, strict=True):
        assert f"specens: {key}: expected " in error
    assert differing(answers[0], members, TWO) == 0


def test_requests_of_other_rules_share_a_batch(engines: Engines, members: dict[str, Any]) -> None:
    """One keeps nearly all drafts, one keeps only those of the law; greedy ones keep their text."""
    warm = {"temperature": 0.5, "max_tokens": DEPTH, "ignore_eos": True}
    relaxed = {"extra_args": {"specens": {"acceptance": "tv:threshold=1"}}}
    weights, speculative = DRAFTERS["member_3"]
    parameters = [warm, {**warm, **relaxed}, greedy(DEPTH), greedy(DEPTH, **relaxed)]
    call = (PROMPTS[:1] * 4 * TEXTS, parameters * TEXTS)
    (answers,) = written(engines(call, **options(weights, speculative, max_num_seqs=128)))
    assert chi_square(answers[::4], members, weights, temperature=0.5) > CHANCE
    assert chi_square(answers[1::4], members, weights, temperature=0.5) < CHANCE
    assert not any(differing(answer, members, weights) for answer in answers[2:40:4])


def test_the_bonus_token_may_be_the_targets(engines: Engines, members: dict[str, Any]) -> None:
    """Without drafts each token is one: those of n-gram drafts that never come."""
    never = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 9}
    never["prompt_lookup_max"] = 9
    given = options(THREE, never, settings={"bonus": "target"})
    (answers,) = written(engines((PROMPTS, [greedy(12)] * 4), **given))
    assert not any(differing(answer, members, {"code": 1.0}) for answer in answers)
    weights, speculative = DRAFTERS["member_3"]
    given = options(weights, speculative, settings={"bonus": "target"})
    (answers,) = written(engines((PROMPTS, [greedy(40)] * 4), **given))
    assert any(differing(answer, members, weights) for answer in answers)
    assert any(differing(answer, members, {"code": 1.0}) for answer in answers)


def test_what_the_page_shows_runs(
    engines: Engines, members: dict[str, Any], tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    command = [engines.python, str(tmp_path / "page.py")]
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(
        command, env=engines.environment | more, capture_output=True, check=True, text=True
    ).stdout
    (answers,) = written(engines((["import os\n"], [greedy(16)]), **options(TWO)))
    assert differing(answers[0], members, TWO) == 0
    assert answers[0]["text"].strip() in shown


def test_the_runner_of_a_gpu_is_known(engines: Engines) -> None:
    """Its functions take what ours hand on, though no card runs them here."""
    program = (
        "from vllm.v1.worker.gpu_model_runner import GPUModelRunner\n"
        "from specens.engines.vllm.reliance import relied_upon\n"
        "from specens.engines.vllm.settings import differences\n"
        "print(differences(relied_upon(GPUModelRunner)))"
    )
    command = [engines.python, "-c", program]
    more = {"VLLM_LOGGING_LEVEL": "ERROR"}
    shown = subprocess.run(
        command, env=engines.environment | more, capture_output=True, check=True, text=True
    ).stdout
    assert shown.splitlines()[-1] == "[]"


def test_an_unknown_vllm_is_left_alone_or_refused(
    engines: Engines, members: dict[str, Any]
) -> None:
    call = (PROMPTS, [greedy(20)] * 4)
    result = engines(call, fault="unknown_vllm", **options())
    assert result["log"].count("specens: vLLM's own sampler decides") == 1
    assert "Sampler.apply_logits_processors(" in result["log"]
    assert not any(differing(answer, members, {"code": 1.0}) for answer in written(result)[0])
    error = engines(call, fault="unknown_vllm", **options(TWO))["error"]
    assert error.startswith("Refusal: specens: members: expected a vLLM that is known, got ")
