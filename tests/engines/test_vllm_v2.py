# SPDX-License-Identifier: Apache-2.0
"""Ensembles by vLLM's model runner V2, whose Triton kernels run in Triton's interpreter here.

Each engine is a process of its own, and slow: few texts. The law of drafted tokens is tested with
V1, which verifies by the same call.
"""

from typing import Any

import pytest
from texts import Weights, chi_square, differing
from vllm_engines import NGRAM, Engines, draft_model, options

pytestmark = pytest.mark.slow

PROMPTS = ["def merge(a, b):\n", "And the king said"]
THREE = {"draft": 0.2, "code": 0.3, "prose": 0.5}
TWO = {"code": 0.4, "prose": 0.6}
DRAFTERS: dict[str, tuple[Weights, dict[str, Any] | None]] = {
    "none": (THREE, None),
    "member": (THREE, draft_model(3)),
    "proposes": (TWO, draft_model(3)),
    "ngram": (THREE, NGRAM),
}
CHANCE = 1e-6


def greedy(length: int, **more: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": length, "ignore_eos": True, **more}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_text_is_the_ensembles(
    drafter: str, engines: Engines, members: dict[str, Any]
) -> None:
    """And what V2 cannot be asked for yet is refused by itself."""
    weights, speculative = DRAFTERS[drafter]
    refused = (PROMPTS[:1], [greedy(4, presence_penalty=1.0)])
    ragged = (PROMPTS, [greedy(24), greedy(9)])
    result = engines(refused, ragged, v2=True, keep=True, **options(weights, speculative))
    assert "error" not in result, result["log"]
    error, answers = result["answers"]
    assert "specens: presence_penalty: expected 0 under model runner V2" in error
    assert [len(answer["tokens"]) for answer in answers] == [24, 9]
    assert not any(differing(answer, members, weights) for answer in answers)
    assert any(differing(answer, members, {"code": 1.0}) for answer in answers)
    if drafter in ("member", "proposes"):
        assert result["counts"]["spec_decode_num_accepted_tokens"] > 0


@pytest.mark.parametrize("warpers", [{"temperature": 0.7}, {"temperature": 0.9, "top_k": 8}])
def test_sampled_text_has_the_ensembles_law(
    warpers: dict[str, float], engines: Engines, members: dict[str, Any]
) -> None:
    texts = 384
    parameters = {"max_tokens": 3, "ignore_eos": True, **warpers}
    call = (PROMPTS[:1] * texts, [parameters] * texts)
    result = engines(call, v2=True, **options(THREE, max_num_seqs=128))
    assert "error" not in result, result["log"]
    (answers,) = result["answers"]
    assert chi_square(answers, members, THREE, **warpers) > CHANCE
    assert chi_square(answers, members, {"code": 1.0}, **warpers) < CHANCE


def test_a_target_alone_keeps_vllms_own_sampler(engines: Engines, members: dict[str, Any]) -> None:
    result = engines((PROMPTS, [greedy(8)] * 2), v2=True, **options())
    assert "error" not in result, result["log"]
    assert "vLLM's own sampler decides; not known are model runner V2" in result["log"]
    assert not any(differing(answer, members, {"code": 1.0}) for answer in result["answers"][0])
