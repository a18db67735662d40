# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything is loaded, and vLLM's rows as the ops take them: without vLLM."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specens.engines import vllm as door
from specens.engines.vllm.rows import Rows, changes_logits, law_of, min_p_of, random_numbers
from specens.engines.vllm.settings import _UNREAD, Settings, differences
from specens_kernels import Acceptance, Refusal

PAIR = [["target", 0.3], ["other", 0.7]]


def test_the_door_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^specens.engines.vllm: vllm: expected .* got"):
        _ = door.Worker
    with pytest.raises(AttributeError, match="Werker"):
        _ = door.Werker


def test_without_settings_the_law_is_the_targets() -> None:
    settings = Settings.parse({})
    assert settings.alone
    assert settings.acceptance.rule.name == "rejection"


def test_settings_are_what_was_said() -> None:
    given = {"members": PAIR, "ensemble": "product", "acceptance": "js:threshold=0.3"}
    settings = Settings.parse(given)
    assert (settings.members, settings.weights) == (("target", "other"), (0.3, 0.7))
    assert settings.ensemble == "product"
    assert settings.acceptance.parameters == Acceptance("js", threshold=0.3).parameters
    assert not settings.alone


BAD_SETTINGS = {
    "additional_config": (None, "members", {"member": PAIR}),
    "bonus": ({"bonus": "draft"}, {"bonus": None}),
    "members": (
        {"members": given}
        for given in (
            [],
            3,
            "target",
            [["target"]],
            [["target", 0.5, 1]],
            [[1, 1.0]],
            ["ab"],
            [["other", 1.0]],
            [["target", 0.5], ["target", 0.5]],
            [["target", 0.2], ["draft", 0.4], ["draft", 0.4]],
            [["target", 0.5], ["other", 0.6]],
            [["target", -0.5], ["other", 1.5]],
            [["target", "0.5"], ["other", 0.5]],
            [["target", float("nan")], ["other", 0.5]],
        )
    ),
    "ensemble": ({"ensemble": "mean"}, {"ensemble": 1}),
    "acceptance": (
        {"acceptance": given} for given in ("typcal", 1, None, "lenient:lenience=7", "js:t=1")
    ),
}


@pytest.mark.parametrize(
    ("key", "given"),
    [(key, given) for key, values in BAD_SETTINGS.items() for given in values],
    ids=str,
)
def test_a_bad_setting_is_refused_by_its_key(key: str, given: Any) -> None:
    with pytest.raises(Refusal, match=rf"^specens: {key}: expected .+, got .+"):
        Settings.parse(given)


def test_a_requests_weights() -> None:
    settings = Settings.parse({"members": PAIR})
    for none in (None, {}, {"other": 1}):
        assert settings.of_request(none).weights == (0.3, 0.7)
    for given in ({"weights": [1, 0]}, [1, 0], '{"weights": [1, 0]}', "[1, 0]"):
        assert settings.of_request({"specens": given}).weights == (1.0, 0.0)


def test_a_requests_rule() -> None:
    settings = Settings.parse({"members": PAIR, "acceptance": "typical"})
    asked = settings.of_request({"specens": {"acceptance": "js:threshold=0.25"}})
    assert (asked.acceptance.rule.name, asked.acceptance.numbers[0]) == ("js", 0.25)
    assert asked.weights == settings.weights
    assert settings.of_request({"specens": {}}).acceptance is settings.acceptance


@pytest.mark.parametrize(
    "given",
    [
        3,
        None,
        "ab",
        [],
        [0.5, 0.6],
        "[1, 0",
        {"weight": [1, 0]},
        {"weights": [1, 0], "acceptance": "jss"},
        {"acceptance": 3},
        {"weights": [1]},
        {"weights": [0.5, 0.6]},
        {"weights": "ab"},
        {"weights": None},
    ],
    ids=str,
)
def test_bad_settings_of_a_request_are_refused(given: Any) -> None:
    settings = Settings.parse({"members": PAIR})
    with pytest.raises(Refusal, match=r"^specens: extra_args(\.\w+)?: expected .+, got .+"):
        settings.of_request({"specens": given})


def engine(**changes: Any) -> SimpleNamespace:
    """vLLM's configuration as `check_engine` reads it; a change is "part__name"."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            logprobs_mode="raw_logprobs",
            return_sampling_mask=False,
            is_multimodal_model=False,
            enable_prompt_embeds=False,
        ),
        "speculative_config": SimpleNamespace(
            method="draft_model", rejection_sample_method="standard"
        ),
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        "lora_config": None,
        "use_v2_model_runner": False,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[part], field, value)
        else:
            parts[part] = value
    return SimpleNamespace(**parts)


def test_v2_has_one_law_for_every_row() -> None:
    settings = Settings.parse({"members": PAIR, "bonus": "target"})
    settings.check_engine(engine())
    with pytest.raises(Refusal, match=r"^specens: bonus: expected ensemble, got 'target'"):
        settings.check_engine(engine(use_v2_model_runner=True))


def request(**changes: Any) -> SimpleNamespace:
    """What of vLLM's `SamplingParams` is looked at when a request comes."""
    plain: dict[str, Any] = dict.fromkeys(_UNREAD | {"extra_args": None})
    plain |= {"presence_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0}
    return SimpleNamespace(**plain | {"prompt_logprobs": None, "logprob_token_ids": None} | changes)


@pytest.mark.parametrize("name", _UNREAD)
def test_v2_refuses_what_it_does_not_read(name: str) -> None:
    settings = Settings.parse({"members": PAIR})
    settings.check_request(request(), is_v2=True)
    asked = request(**{name: 2})
    settings.check_request(asked)
    with pytest.raises(
        Refusal, match=rf"^specens: {name}: expected .+ under model runner V2, got 2"
    ):
        settings.check_request(asked, is_v2=True)


def test_a_request_of_the_prompts_log_probabilities_is_refused() -> None:
    settings = Settings.parse({"members": PAIR})
    for name in ("prompt_logprobs", "logprob_token_ids"):
        with pytest.raises(
            Refusal, match=rf"^specens: {name}: expected None of an ensemble, got 2"
        ):
            settings.check_request(request(**{name: 2}))
        Settings().check_request(request(**{name: 2}))


ALWAYS = {
    "logprobs_mode": {"model_config__logprobs_mode": "raw_logits"},
    "return_sampling_mask": {"model_config__return_sampling_mask": True},
    "rejection_sample_method": {"speculative_config__rejection_sample_method": "synthetic"},
    "async_scheduling": {"scheduler_config__async_scheduling": True},
}
SEVERAL = {
    "speculative_config.method": {"speculative_config__method": "eagle"},
    "tensor_parallel_size": {"parallel_config__tensor_parallel_size": 2},
    "pipeline_parallel_size": {"parallel_config__pipeline_parallel_size": 2},
    "enable_lora": {"lora_config": object()},
    "is_multimodal_model": {"model_config__is_multimodal_model": True},
    "enable_prompt_embeds": {"model_config__enable_prompt_embeds": True},
}


@pytest.mark.parametrize(("key", "change"), [*ALWAYS.items(), *SEVERAL.items()])
def test_an_engine_that_would_emit_another_law_is_refused(key: str, change: Any) -> None:
    alone, several = Settings.parse({}), Settings.parse({"members": PAIR})
    several.check_engine(engine())
    alone.check_engine(engine())
    with pytest.raises(Refusal, match=rf"^specens: {key}: expected .+, got .+"):
        several.check_engine(engine(**change))
    if key in ALWAYS:
        with pytest.raises(Refusal, match=rf"^specens: {key}: "):
            alone.check_engine(engine(**change))
    else:
        alone.check_engine(engine(**change))


@pytest.mark.parametrize("drafter", [None, SimpleNamespace(method="ngram")])
def test_a_draft_member_needs_a_draft_model(drafter: Any) -> None:
    if drafter is not None:
        drafter.rejection_sample_method = "standard"
    settings = Settings.parse({"members": [["target", 0.5], ["draft", 0.5]]})
    settings.check_engine(engine())
    with pytest.raises(Refusal, match=r"^specens: members: expected speculative_config"):
        settings.check_engine(engine(speculative_config=drafter))


def test_a_function_that_takes_something_else_is_named() -> None:
    class Known:
        @staticmethod
        def draw(logits: Any, metadata: Any) -> None: ...

        def judge(self, logits: Any, *, bonus: bool = True) -> None: ...

    same = [
        (Known, "draw", "logits metadata"),
        (Known, "judge", "self logits bonus"),
        (Known, "judge", "... bonus self"),
    ]
    assert differences(same) == []
    other = [
        (Known, "draw", "logits"),
        (Known, "draw", "metadata logits"),
        (Known, "judge", "... penalty"),
        (Known, "gone", "self"),
    ]
    assert differences(other) == [
        "Known.draw(logits, metadata)",
        "Known.draw(logits, metadata)",
        "Known.judge(self, logits, bonus)",
        "Known.gone()",
    ]


@pytest.mark.parametrize("counts", [[2, 2], [3, 0, 1], [0, 0, 0], [1]], ids=str)
def test_rows_are_each_requests_own(counts: list[int]) -> None:
    rows = Rows(counts, torch.device("cpu"))
    drafts = [(request, place) for request, count in enumerate(counts) for place in range(count)]
    every = [(request, place) for request, count in enumerate(counts) for place in range(count + 1)]
    packed, padded = torch.tensor(every), rows.padded(torch.tensor(every))
    assert torch.equal(rows.packed(padded), packed)
    for request, count in enumerate(counts):
        expected = [[request, min(place, count)] for place in range(max(counts) + 1)]
        assert padded[request].tolist() == expected
    if not drafts:
        return
    tokens = rows.tokens(torch.arange(len(drafts)))
    drafted = rows.drafted(torch.tensor(drafts))
    for request, place in drafts:
        assert drafts[int(tokens[request, place])] == (request, place)
        assert drafted[request, place].tolist() == [request, place]
    assert int((tokens == -1).sum()) == len(counts) * max(counts) - len(drafts)


def test_what_is_even_is_not_copied() -> None:
    packed = torch.zeros(6, 5)
    rows = Rows([2, 2], torch.device("cpu"))
    assert rows.padded(packed).data_ptr() == packed.data_ptr()
    assert rows.drafted(packed[:4]).data_ptr() == packed.data_ptr()


def metadata(**changes: Any) -> SimpleNamespace:
    """What `rows.py` reads of vLLM's `SamplingMetadata`."""
    fields: dict[str, Any] = {
        "temperature": torch.tensor([0.5, 0.0, 9.0]),
        "all_greedy": False,
        "top_k": None,
        "top_p": None,
        "generators": {},
        "no_penalties": True,
        "bad_words_token_ids": {},
        "allowed_token_ids_mask": None,
        "thinking_budget_state_holder": None,
        "logitsprocs": SimpleNamespace(argmax_invariant=[], non_argmax_invariant=[]),
    }
    return SimpleNamespace(**fields | changes)


def test_the_law_has_the_requests_parameters() -> None:
    requests = [SimpleNamespace(min_p=0.1), SimpleNamespace(min_p=0.0)]
    min_p = min_p_of(requests, torch.device("cpu"))
    given = metadata(
        top_k=torch.tensor([4, 9, 9], dtype=torch.int32),
        top_p=torch.tensor([0.9, 1.0, 1.0]),
    )
    law = law_of(given, 2, (0.5, 0.5), "product", min_p)
    assert law.temperature.tolist() == [0.5, 0.0]
    assert law.top_k.tolist() == [4, 9]
    assert law.top_p.tolist() == pytest.approx([0.9, 1.0])
    assert law.min_p.tolist() == pytest.approx([0.1, 0.0])
    assert law.weights == (0.5, 0.5)
    assert law_of(given, 2).min_p == 0
    assert min_p_of(requests[1:], torch.device("cpu")) is None
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    second = law_of(given, 2, weights, "mixture", min_p, [1])
    assert second.weights.tolist() == [[1.0, 0.0]]
    assert (second.temperature.tolist(), second.top_k.tolist()) == ([0.0], [9])
    assert second.min_p.tolist() == [0.0]
    assert law_of(metadata(all_greedy=True, temperature=None), 2).temperature == 0


def test_a_seed_is_a_requests_own() -> None:
    def numbers(batch: int, row: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        given = metadata(generators={row: generator, batch: generator})
        return random_numbers(given, batch, 2, torch.device("cpu"))[row]

    assert torch.equal(numbers(1, 0), numbers(3, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"no_penalties": False},
        {"bad_words_token_ids": {0: [[1]]}},
        {"allowed_token_ids_mask": torch.ones(1)},
        {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
        *(
            {"logitsprocs": SimpleNamespace(non_argmax_invariant=[processor])}
            for processor in (
                SimpleNamespace(min_toks={0: 1}),
                SimpleNamespace(biases={0: 1}),
                object(),
            )
        ),
    ],
)
def test_what_changes_logits_is_seen(change: dict[str, Any]) -> None:
    idle = [SimpleNamespace(min_toks={}), SimpleNamespace(biases={})]
    assert not changes_logits(
        metadata(logitsprocs=SimpleNamespace(argmax_invariant=[], non_argmax_invariant=idle))
    )
    assert changes_logits(metadata(**change))


def test_vllm_is_imported_late() -> None:
    """The door, its settings and its rows are imported here, whether vLLM is installed or not."""
    assert importlib.util.find_spec("specens.engines.vllm.worker") is not None
