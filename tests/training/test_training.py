# SPDX-License-Identifier: Apache-2.0
"""Training: gradients against dense autograd, the law of rollouts, resumption, data and refusals.

A new way to misuse the commands is one more entry of `MISTAKES`; a new reward needs its cases.
"""

import builtins
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from toys import noisy, sequence_law, toy
from typer.testing import CliRunner

from specens import SpeculativeDecoder
from specens.cli import app, loading, train_draft
from specens.members.weight_head import WeightHead
from specens.schedules import Speculative
from specens.training import batches, distil, examples, front, loop, rewards
from specens.training.diversed import Pair, advantages, head_loss, train_head
from specens.training.examples import HELD_OUT_MODULES, Example
from specens.training.rollouts import Rollout, ensemble_terms, roll_out
from specens.training.settings import DraftSettings, HeadSettings, StepPlan

ENSEMBLES = ("mixture", "product")
ONE = StepPlan(1, 0.1)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- gradients of the head ------------------------------------------------------------------------


def dense_terms(
    weight: Tensor, draft: Tensor, target: Tensor, tokens: Tensor, ensemble: str
) -> tuple[Tensor, Tensor]:
    """log v(y) and 1 - TV(q, v), with tensors of the vocabulary's size that autograd follows."""
    weight = weight[:, None]
    q, p = draft.softmax(-1), target.softmax(-1)
    if ensemble == "mixture":
        law = weight * q + (1 - weight) * p
    else:
        law = (weight * draft + (1 - weight) * target).softmax(-1)
    return law.gather(1, tokens[:, None])[:, 0].log(), 1 - 0.5 * (q - law).abs().sum(-1)


def random_rows(rows: int = 12, width: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    draft, target = 2 * torch.randn(2, rows, width, dtype=torch.float64)
    return weight, draft, target, torch.randint(width, (rows,))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_the_closed_gradients_are_autograds(ensemble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specens.training.rollouts._CHUNK_NUMBERS", 35)  # five rows
    weight, draft, target, tokens = random_rows()
    terms = ensemble_terms(weight, draft, target, tokens, ensemble)
    dense = dense_terms(weight, draft, target, tokens, ensemble)
    for got, expected in zip(terms, dense, strict=False):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
        direction = torch.randn(12, dtype=torch.float64)
        (of_got,) = torch.autograd.grad((got * direction).sum(), weight, retain_graph=True)
        (of_expected,) = torch.autograd.grad(
            (expected * direction).sum(), weight, retain_graph=True
        )
        torch.testing.assert_close(of_got, of_expected, atol=1e-12, rtol=0)
    expected = target.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(terms.target_log_prob, expected)
    assert not terms.target_log_prob.requires_grad
    assert torch.autograd.gradcheck(
        lambda u: ensemble_terms(u, draft, target, tokens, ensemble)[:2], (weight,)
    )


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_constant_weights_and_tokens_without_mass_are_no_special_case(ensemble: str) -> None:
    _, draft, target, tokens = random_rows()
    padded = [torch.nn.functional.pad(z, (0, 2), value=-torch.inf) for z in (draft, target)]
    for weight, alone in ((0.0, target), (1.0, draft)):
        terms = ensemble_terms(torch.full((12,), weight).double(), *padded, tokens, ensemble)
        law = alone.softmax(-1)
        torch.testing.assert_close(terms.log_prob, law.gather(1, tokens[:, None])[:, 0].log())
        expected = torch.minimum(law, draft.softmax(-1)).sum(-1)
        torch.testing.assert_close(terms.acceptance, expected)


def rollout_of(weight: Tensor, draft: Tensor, target: Tensor, tokens: Tensor) -> Rollout:
    """Rows of random_rows as texts of three tokens."""
    terms = ensemble_terms(weight, draft, target, tokens, "mixture")
    columns = (tokens, torch.ones_like(weight), *terms, weight.detach())
    return Rollout(*(column.reshape(-1, 3) for column in columns))


def published_loss(rollout: Rollout, advantage: Tensor, acceptance_scale: float) -> Tensor:
    """The sign of the published code, whose scale is 0.05 |L_r| / L_a with L_a < 0."""
    return head_loss(rollout, advantage, -acceptance_scale)


def raises_acceptance(loss_of: Callable[[Rollout, Tensor, float], Tensor]) -> bool:
    weight, *rest = random_rows()
    before = rollout_of(weight, *rest)
    (slope,) = torch.autograd.grad(loss_of(before, torch.zeros(4), 0.5), weight)
    after = rollout_of((weight - 0.1 * slope).detach().clamp(0, 1), *rest)
    return bool((after.acceptance > before.acceptance).all())


def test_the_regulariser_raises_acceptance_and_the_published_sign_does_not() -> None:
    assert raises_acceptance(head_loss)
    assert not raises_acceptance(published_loss)


def test_the_loss_counts_what_is_before_the_stop() -> None:
    weight, *rest = random_rows()
    rollout = rollout_of(weight, *rest)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).double()
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    got = head_loss(replace(rollout, mask=mask), advantage, 0.25)
    expected = -(advantage[:, None] * rollout.log_prob * mask).sum() / 4
    expected = expected - 0.25 * (rollout.acceptance * mask).sum() / 4
    torch.testing.assert_close(got, expected)


def test_baselines_do_not_look_at_the_row_itself() -> None:
    rewards_ = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    got = advantages(rewards_, 3, "group", {})
    assert got.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]
    memory: dict[str, float] = {}
    assert advantages(rewards_, 3, "ema", memory).tolist() == [-1, 0, 4, -2, -2, 1]
    assert memory == {"baseline": 2.0}
    got = advantages(rewards_ + 10, 3, "ema", memory)
    assert got.tolist() == [9, 10, 14, 8, 8, 11]
    assert memory["baseline"] == pytest.approx(0.9 * 2 + 0.1 * 12)


# --- rollouts -------------------------------------------------------------------------------------

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


def pair_of_toys(vocab_size: int = 11, kind: str = "llama") -> tuple[Any, Any, WeightHead]:
    """Two models of different sizes and a head that is nowhere near a constant."""
    width = {"llama": "hidden_size", "gpt2": "n_embd"}[kind]
    draft = toy(1, vocab_size, kind=kind)
    target = toy(2, vocab_size, kind=kind, **{width: 32})
    head = WeightHead(torch.randn(48) / 3, torch.tensor(0.2))
    return draft, target, head


def exact_laws(
    draft: Any, target: Any, head: WeightHead, text: Tensor, ensemble: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Weight and law after each token of one unpadded text (S,), read at once without a cache."""
    rows = [model(text[None], output_hidden_states=True) for model in (draft, target)]
    weight = head.draft_weight(*(row.hidden_states[-1] for row in rows))[0]
    q, p = (row.logits[0] / temperature for row in rows)
    share = weight[:, None]
    if ensemble == "mixture":
        return weight, share * q.softmax(-1) + (1 - share) * p.softmax(-1)
    return weight, (share * q + (1 - share) * p).softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # relative and absolute positions
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_rollouts_say_what_the_models_say_without_cache_and_padding(
    ensemble: str, kind: str
) -> None:
    draft, target, head = pair_of_toys(kind=kind)
    head.ensemble = ensemble
    seeds = torch.tensor([5, 6, 7])
    with torch.no_grad():
        got = roll_out(
            draft,
            target,
            head,
            PROMPTS,
            new_tokens=6,
            seeds=seeds,
            vocab_size=11,
            temperature=0.7,
        )
        for row, prompt in enumerate(PROMPTS):
            text = torch.cat([torch.tensor(prompt), got.tokens[row]])
            weight, law = exact_laws(draft, target, head, text, ensemble, 0.7)
            place = slice(len(prompt) - 1, -1)
            said = law[place].gather(1, got.tokens[row, :, None])[:, 0].log()
            # float32 models that see the same text in another order of sums.
            torch.testing.assert_close(got.log_prob[row], said, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.draft_weight[row], weight[place], atol=1e-5, rtol=0)
            alone = roll_out(
                draft,
                target,
                head,
                [prompt],
                new_tokens=6,
                seeds=seeds[row : row + 1],
                vocab_size=11,
                temperature=0.7,
            )
            assert alone.tokens[0].tolist() == got.tokens[row].tolist()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_rollouts_are_samples_of_the_ensemble(ensemble: str) -> None:
    draft, target, head = pair_of_toys(5)
    head = WeightHead.constant(16, 32, 0.3, ensemble=ensemble)
    number = 4000
    with torch.no_grad():
        got = roll_out(
            draft,
            target,
            head,
            [[1, 2]] * number,
            new_tokens=2,
            seeds=batches.row_seeds(0, 0, number),
            vocab_size=5,
        )
    law = sequence_law(
        [draft, target], torch.tensor([[1, 2]]), 2, weights=(0.3, 0.7), ensemble=ensemble
    )
    seen = torch.bincount(got.tokens[:, 0] * 5 + got.tokens[:, 1], minlength=25)
    assert chisquare(seen.numpy(), number * law.flatten().numpy()).pvalue > 1e-4
    wrong = sequence_law(
        [draft, target], torch.tensor([[1, 2]]), 2, weights=(0.7, 0.3), ensemble=ensemble
    )
    assert chisquare(seen.numpy(), number * wrong.flatten().numpy()).pvalue < 1e-9


def test_the_gradient_of_reinforce_is_the_rewards() -> None:
    """Against the gradient of the expected reward, all texts of two tokens enumerated."""
    draft, target, head = pair_of_toys(4)
    head.delta.requires_grad_()
    worth = torch.randn(4, 4)
    prompt = torch.tensor([1, 2])
    expected_reward = torch.zeros(())
    for first in range(4):
        text = torch.tensor([1, 2, first])
        with torch.no_grad():
            states = [model(text[None], output_hidden_states=True) for model in (draft, target)]
        weight = head.draft_weight(*(row.hidden_states[-1] for row in states))[0, 1:, None]
        q, p = (row.logits[0, 1:].softmax(-1) for row in states)
        law = weight * q + (1 - weight) * p
        expected_reward = expected_reward + (law[0, first] * law[1] * worth[first]).sum()
    (exact,) = torch.autograd.grad(expected_reward, head.delta)

    def estimates(loss_of: Callable[[Rollout, Tensor], Tensor]) -> Tensor:
        """(batches, H) of the gradient of minus the loss."""
        found = []
        for batch in range(40):
            rollout = roll_out(
                draft,
                target,
                head,
                [prompt.tolist()] * 128,
                new_tokens=2,
                seeds=batches.row_seeds(1, batch, 128),
                vocab_size=4,
            )
            reward = worth[rollout.tokens[:, 0], rollout.tokens[:, 1]]
            loss = loss_of(rollout, advantages(reward, 8, "group", {}))
            found.append(-torch.autograd.grad(loss, head.delta)[0])
        return torch.stack(found)

    def largest_z(found: Tensor) -> float:
        return float(((found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)).abs().max())

    # 48 correlated coordinates, each a t of 39 degrees: beyond 5 once in 2,000.
    assert largest_z(estimates(lambda rollout, a: head_loss(rollout, a, 0.0))) < 5
    # Credit for the last token alone is wrong, and is seen to be.
    last = torch.tensor([0.0, 1.0])
    wrong = estimates(
        lambda rollout, a: head_loss(replace(rollout, mask=rollout.mask * last), a, 0.0)
    )
    assert largest_z(wrong) > 7


def test_a_text_ends_with_its_stop_token() -> None:
    draft, target, head = pair_of_toys()
    with torch.no_grad():
        got = roll_out(
            draft,
            target,
            head,
            PROMPTS * 20,
            new_tokens=8,
            seeds=torch.arange(60),
            vocab_size=11,
            stop_tokens=[2, 7],
        )
    stopped = 0
    for tokens, mask in zip(got.tokens.tolist(), got.mask.tolist(), strict=True):
        stops = [place for place, token in enumerate(tokens) if token in (2, 7)]
        counted = stops[0] + 1 if stops else len(tokens)
        stopped += bool(stops)
        assert mask == [1.0] * counted + [0.0] * (len(tokens) - counted)
    assert 0 < stopped < 60


# --- schedule and resumption ----------------------------------------------------------------------


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    plan = StepPlan(steps=14, rate=1.0, warmup_steps=4)
    rates = [plan.rate_at(step) for step in range(14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)  # half of the cosine's ten steps
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.03
    assert plan.rate_at(14) == pytest.approx(0, abs=1e-12)


class Interrupted(Exception):
    """Raised by a progress bar."""


def interrupt_after(steps: int) -> Callable[[int], None]:
    def advance(done: int) -> None:
        if done == steps:
            raise Interrupted

    return advance


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any, Any]:
    """Draft, target and tokenizer of the shipped family."""
    (draft, target), (tokenizer, _) = loading.load(["family:draft", "family:code"])
    return draft.requires_grad_(False), target.requires_grad_(False), tokenizer


@pytest.fixture
def pair(shipped: tuple[Any, Any, Any]) -> Pair:
    return Pair(*shipped, vocab_size=4096, stop_tokens=(0,))


TEXTS = [Example("def f(x):\n", "    return x\n"), Example("class A:\n", "    pass\n")]
TINY = HeadSettings(
    prompts_per_step=2,
    samples_per_prompt=2,
    new_tokens=4,
    baseline="ema",
    plan=StepPlan(5, 0.05, warmup_steps=2, save_every=2),
)
LIKELIHOOD = rewards.REWARDS["likelihood"]


def test_a_head_that_was_resumed_is_the_same_to_the_bit(pair: Pair, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, rows = train_head(pair, TEXTS, LIKELIHOOD, TINY, folders[0])
    with pytest.raises(Interrupted):
        train_head(pair, TEXTS, LIKELIHOOD, TINY, folders[1], progress=interrupt_after(3))
    parts, resumed = train_head(pair, TEXTS, LIKELIHOOD, TINY, folders[1], resume=True)
    assert torch.equal(whole.delta, parts.delta)
    assert torch.equal(whole.bias, parts.bias)
    assert resumed == rows
    for name in ("curves.csv", "weight_head.safetensors", "checkpoint.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert whole.delta.abs().min() > 0
    loaded = WeightHead.load(folders[1])
    assert torch.equal(loaded.delta, whole.delta)
    assert loaded.metadata["temperature"] == 1.0
    # A head that forgot the baseline, the moments or the steps' number would differ.
    other, _ = train_head(
        pair, TEXTS, LIKELIHOOD, replace(TINY, seed=1), (tmp_path / "whole").parent
    )
    assert not torch.equal(other.delta, whole.delta)


def test_draft_and_target_are_frozen(pair: Pair, tmp_path: Path) -> None:
    before = [p.clone() for model in (pair.draft, pair.target) for p in model.parameters()]
    train_head(pair, TEXTS, LIKELIHOOD, TINY, tmp_path)
    after = [p for model in (pair.draft, pair.target) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def test_only_the_same_run_is_resumed(pair: Pair, tmp_path: Path) -> None:
    def train(settings: HeadSettings = TINY, resume: bool = False) -> None:
        train_head(pair, TEXTS, LIKELIHOOD, settings, tmp_path, resume=resume)

    with pytest.raises(ValueError, match="resume: expected a checkpoint in"):
        train(resume=True)
    train()
    with pytest.raises(ValueError, match=r"folder: expected a folder without checkpoint\.safetens"):
        train()
    with pytest.raises(ValueError, match=r"expected seed = 0, as in the checkpoint, got 3"):
        train(replace(TINY, seed=3), resume=True)
    plan = replace(TINY.plan, rate=0.5)
    with pytest.raises(ValueError, match=r"expected plan\.rate = 0\.05"):
        train(replace(TINY, plan=plan), resume=True)
    (tmp_path / loop.CHECKPOINT).write_text("text")
    with pytest.raises(ValueError, match="resume: expected a checkpoint in"):
        train(resume=True)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="train: loss: expected a number, got nan in step 0"):
        loop.optimise(
            {"weight": weight}, lambda *_: (weight.sum() * math.nan, {}), ONE, tmp_path, settings={}
        )
    assert weight.tolist() == [1, 1]


def test_curves_are_drawn_where_matplotlib_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"step": float(step), "loss": step**0.5} for step in range(4)]
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert not loop.draw_curves(tmp_path / "curves.png", rows, ["loss"])
    assert "pip install 'specens-kernels[train]'" in caplog.text
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert loop.draw_curves(tmp_path / "curves.png", rows, ["loss"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_modules_are_those_that_the_family_has_not_read() -> None:
    held_out = HELD_OUT_MODULES.pattern.split("|")
    assert sorted([*examples.HEAD_MODULES, *examples.EVALUATION_MODULES]) == sorted(held_out)
    texts = examples.held_out_texts()
    assert len(texts) == len(held_out)
    read = examples.read_texts(0, 300_000)
    assert sum(map(len, read)) >= 300_000
    assert not {*read} & {*texts}
    assert read == examples.read_texts(0, 300_000) != examples.read_texts(1, 300_000)


def test_windows_follow_each_other_without_overlap() -> None:
    found = examples.library_examples(["textwrap"], reference_characters=512)
    text = "".join(one.prompt + one.reference for one in found)
    assert len(found) > 10
    assert examples.held_out_texts()[-1].startswith(text)
    assert all(len(one.prompt) >= 256 and len(one.reference) >= 512 for one in found)


def test_every_example_comes_once_before_any_comes_again() -> None:
    order = [place for step in range(5) for place in batches.in_turn(10, 4, step, 7)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_examples_are_shuffled_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches._order.cache_clear()
    shuffled: list[int] = []
    real = torch.randperm

    def shuffle(count: int, **options: Any) -> Tensor:
        shuffled.append(count)
        return real(count, **options)

    monkeypatch.setattr(torch, "randperm", shuffle)
    order = [place for step in range(25) for place in batches.in_turn(17, 3, step, 11)]
    assert shuffled == [17] * 5  # 75 places
    dice = [torch.Generator().manual_seed(11 * 1_000_003 + epoch) for epoch in range(5)]
    epochs = [real(17, generator=one).tolist() for one in dice]
    assert order == [place for epoch in epochs for place in epoch][:75]
    # Whoever resumes there takes the same.
    batches._order.cache_clear()
    assert batches.in_turn(17, 3, 11, 11) == order[33:36]
    # More than one epoch in a step.
    assert sorted(batches.in_turn(2, 6, 0, 11)) == [0, 0, 0, 1, 1, 1]


def test_json_lines_are_read_and_split(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "answer": "b"},
        {"prompt": "c", "reference": "d", "tests": ["assert 1", "assert 2"]},
        *({"prompt": str(n)} for n in range(10)),
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = examples.read_examples(file)
    assert found[:2] == [Example("a", "b"), Example("c", "d", "assert 1\nassert 2")]
    kept, held_out = examples.split(found)
    assert [one.prompt for one in held_out] == ["2", "7"]
    assert len(kept) == 10
    assert not {*kept} & {*held_out}
    assert examples.split(found[:2]) == (found[:1], found[1:2])


# --- rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("She has 3 * 4 = 12.\n#### 12", "so it is 12", 1),
        ("#### 1,234", "that is $1,234.00.", 1),
        ("#### 12", "#### 12\nQuestion: what of 7?", 1),
        ("#### 12", "12 and then 13", 0),
        ("-3", "it is -3", 1),
        ("-3", "it is 3", 0),
        ("#### 12", "no idea", 0),
        ("no number", "no number", 0),
    ],
)
def test_exact_match_compares_numbers(reference: str, text: str, expected: int) -> None:
    assert rewards.exact_match(Example("q", reference), text, 0.0) == expected


def test_rouge_is_the_f1_of_what_is_in_common() -> None:
    reference, text = "the cat sat on the mat", "the cat lay on a mat"
    assert rewards.rouge_n(reference, text, 1) == pytest.approx(4 / 6)
    assert rewards.rouge_n(reference, text, 2) == pytest.approx(1 / 5)
    assert rewards.rouge_l(reference, text) == pytest.approx(4 / 6)
    assert rewards.rouge_l("a b c d", "d c b a") == pytest.approx(1 / 4)
    assert rewards.rouge_n("the the the", "the", 1) == pytest.approx(2 / 4)  # counts are clipped
    assert rewards.rouge_l("It IS, so!", "it is so") == 1
    for score in (lambda a, b: rewards.rouge_n(a, b, 1), rewards.rouge_l):
        assert score("a", "") == score("", "a") == 0


PROGRAMS = {
    "right": ("    return x + 1\n", 1),
    "wrong": ("    return x\n", 0),
    "no python": ("    return x +\n", 0),
    "leaves before the tests": ("    return 0\nimport os\nos._exit(0)\n", 0),
    "exits before the tests": ("    return 0\nraise SystemExit\n", 0),
    "takes all memory": ("    return x + 1\nb = bytearray(1 << 34)\n", 0),
    "writes a large file": ("    return x + 1\nopen('f', 'wb').write(bytes(1 << 22))\n", 0),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_run_against_their_tests(program: str) -> None:
    text, expected = PROGRAMS[program]
    example = Example("def f(x):\n", tests="assert f(1) == 2")
    assert rewards.passes_tests(example, text, 0.0) == expected


def test_a_program_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "TEST_TIMEOUT_S", 0.3)
    example = Example("import time\n", tests="")
    assert rewards.passes_tests(example, "time.sleep(60)", 0.0) == 0


def test_a_reward_needs_its_field_and_leave_to_run_code() -> None:
    found = [Example("a", "1"), Example("b")]
    with pytest.raises(ValueError, match=r'expected "reference" in every example for .* example 2'):
        rewards.reward_for("exact_match", found, allow_code_execution=False)
    with pytest.raises(ValueError, match="allow_code_execution: expected leave for 'tests'"):
        rewards.reward_for("tests", [Example("a", tests="b")], allow_code_execution=False)
    reward = rewards.reward_for("tests", [Example("a", tests="b")], allow_code_execution=True)
    assert reward.runs_code
    assert sum(one.runs_code for one in rewards.REWARDS.values()) == 1


# --- the static front -----------------------------------------------------------------------------


def test_a_constant_head_is_on_the_front_and_a_better_one_above(pair: Pair) -> None:
    settings = replace(TINY, new_tokens=3)
    head = WeightHead.constant(128, 192, 0.4)
    found = front.compare_with_static(pair, head, TEXTS, LIKELIHOOD, settings, samples=2)
    for gain in found["above_front"].values():
        assert abs(gain["gain"]) < 1e-6
        assert gain["standard_error"] < 1e-6
    same = found["candidates"]["static 0.4"]
    assert found["candidates"]["learned"] == same
    assert same["target_log_likelihood"] == same["reward"]
    whole = found["candidates"]["static 0.0"]["closeness_to_target"]
    assert whole["mean"] == pytest.approx(0, abs=1e-5)  # the target alone
    acceptances = [
        found["candidates"][name]["text_acceptance"]["mean"]
        for name in ("static 0.0", "static 0.5", "static 1.0")
    ]
    assert acceptances[1] == pytest.approx((acceptances[0] + 1) / 2, abs=1e-5)  # linear, mixture
    assert acceptances[2] == pytest.approx(1, abs=1e-5)

    xs = [torch.tensor([0.0, 0.2]).double(), torch.tensor([0.8, 1.0]).double()]
    ys = [torch.tensor([1.0, 1.2]).double(), torch.tensor([0.0, 0.2]).double()]
    middle = torch.tensor([0.4, 0.6]).double()
    gain = front._above_front(xs, ys, middle, torch.tensor([1.0, 1.2]).double())
    assert gain["gain"] == pytest.approx(0.5)
    assert gain["static_at_same_acceptance"] == pytest.approx(0.6)


def test_interpolation_is_linear_between_neighbours() -> None:
    xs, ys = [0.5, 0.1, 0.9], [1.0, 3.0, 0.0]
    points = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    assert [front.interpolate(x, xs, ys) for x in points] == pytest.approx([3, 3, 2, 1, 0.5, 0, 0])


def test_examples_without_references_have_no_quality_of_text(pair: Pair) -> None:
    head = WeightHead.constant(128, 192)
    bare = [replace(one, reference="") for one in TEXTS]
    found = front.compare_with_static(pair, head, bare, LIKELIHOOD, TINY, samples=1)
    assert sorted(found["above_front"]) == [
        "closeness_to_target",
        "reward",
        "target_log_likelihood",
    ]
    assert "text_acceptance" not in found["candidates"]["learned"]


# --- drafts ---------------------------------------------------------------------------------------


def learn(tmp_path: Path, draft: Any, targets: list[Any], **changes: Any) -> list[dict[str, float]]:
    """Some steps on random windows of 11 tokens; the draft is trained in place."""
    shares = (1 / len(targets),) * len(targets)
    settings = DraftSettings(
        weights=changes.pop("weights", shares),
        windows_per_step=8,
        prompt_tokens=changes.pop("prompt_tokens", 2),
        new_tokens=6,
        plan=StepPlan(changes.pop("steps", 30), changes.pop("rate", 0.02), 3, save_every=2),
        **{name: value for name, value in changes.items() if name not in ("options",)},
    )
    windows = torch.randint(11, (32, 12), generator=torch.Generator().manual_seed(0))
    law = distil.Targets(targets, settings, 11)
    tmp_path.mkdir(exist_ok=True)
    return distil.train_draft(draft, law, windows, settings, tmp_path, **changes.get("options", {}))


def trainable(seed: int = 3) -> Any:
    draft = toy(seed)
    return draft.requires_grad_(True)


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js", "tv"])
def test_every_divergence_teaches_the_draft(kind: str, tmp_path: Path) -> None:
    rows = learn(tmp_path, trainable(), [toy(4)], divergence=kind)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["acceptance"] > rows[0]["acceptance"] + 0.05


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_an_ensemble_of_targets_teaches_its_own_law(ensemble: str, tmp_path: Path) -> None:
    draft, targets = trainable(), [toy(4), toy(5)]
    settings = DraftSettings(weights=(0.3, 0.7), ensemble=ensemble)
    tokens = torch.randint(11, (2, 6))
    law = distil.Targets(targets, settings, 11).logits(tokens).softmax(-1)
    with torch.no_grad():
        each = [model(tokens).logits for model in targets]
    if ensemble == "mixture":
        expected = 0.3 * each[0].softmax(-1) + 0.7 * each[1].softmax(-1)
    else:
        expected = (0.3 * each[0] + 0.7 * each[1]).softmax(-1)
    torch.testing.assert_close(law, expected)
    rows = learn(tmp_path, draft, targets, ensemble=ensemble)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_the_tokens_with_the_most_left_to_learn_are_selected() -> None:
    settings = DraftSettings(select=0.4)
    draft, target, reference = torch.randn(3, 2, 5, 7)
    losses, chosen = distil.token_losses(draft, target, settings, reference)
    known, _ = distil.token_losses(reference, target, replace(settings, select=1.0))
    excess = (losses - known).flatten()
    assert int(chosen.sum()) == 4
    assert excess[chosen.flatten()].min() > excess[~chosen.flatten()].max()
    counts = torch.zeros(2, 5, dtype=torch.bool)
    counts[0, :3] = True
    _, chosen = distil.token_losses(draft, target, settings, reference, counts)
    assert int(chosen.sum()) == 1
    assert bool(counts[chosen].all())


def test_positions_are_rejected_as_often_as_the_laws_differ() -> None:
    draft, target = (1.5 * torch.randn(2, 1, 6, 9)).repeat(1, 2000, 1, 1)
    seen = distil.rejected(draft, target, batches.row_seeds(0, 0, 2000)).double()
    expected = 0.5 * (draft[0].softmax(-1) - target[0].softmax(-1)).abs().sum(-1).double()
    error = (expected * (1 - expected) / 2000).sqrt()
    z = (seen.mean(0) - expected) / error
    assert z.abs().max() < 4.5  # six numbers: once in 25,000
    # One coin for two positions would make them depend on each other.
    assert abs(torch.corrcoef(seen.T).fill_diagonal_(0)).max() < 4.5 / 2000**0.5
    assert not distil.rejected(draft, draft, batches.row_seeds(0, 0, 2000)).any()


def test_online_learns_where_the_draft_was_rejected_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = toy(4)
    same = trainable(4)
    before = [p.clone() for p in same.parameters()]
    rows = learn(tmp_path / "same", same, [target], online=True, steps=2)
    assert [row["trained_tokens"] for row in rows] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, same.parameters(), strict=True))
    close = noisy(target, 0.5).requires_grad_(True)
    law = distil.Targets([target], DraftSettings(), 11)
    windows = torch.randint(11, (20, 12))
    earlier = distil.held_out_acceptance(close, law, windows)["mean"]
    rows = learn(tmp_path / "close", close, [target], online=True, steps=40, rate=0.003)
    for row in rows[:3]:  # 8 texts of 6 tokens
        assert 0 < row["trained_tokens"] < 48
    assert distil.held_out_acceptance(close, law, windows)["mean"] > earlier + 0.02

    def everywhere(draft_logits: Tensor, *_: Tensor) -> Tensor:
        return torch.ones(draft_logits.shape[:2], dtype=torch.bool)

    monkeypatch.setattr(distil, "rejected", everywhere)
    (row,) = learn(tmp_path / "all", close, [target], online=True, steps=1)
    assert row["trained_tokens"] == 48  # what was written, and not the prompts
    (row,) = learn(tmp_path / "short", close, [target], online=True, steps=1, prompt_tokens=64)
    assert row["trained_tokens"] == 48  # all of it, also after windows that are shorter


class Words:
    """A tokenizer of 11 words, which is less than some models' logits have columns."""

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(11)}


def test_online_takes_models_that_are_padded_to_other_widths(tmp_path: Path) -> None:
    options = {"tokenizers": [Words(), Words()]}
    wide = toy(4, 13)
    rows = learn(tmp_path, trainable(), [wide], online=True, steps=2, options=options)
    assert all(row["trained_tokens"] > 0 for row in rows)
    with pytest.raises(ValueError, match="tokenizers: expected one per model"):
        learn(tmp_path / "none", trainable(), [wide], online=True, steps=1)


@pytest.mark.parametrize("way", ["text", "online", "selected"])
def test_a_draft_that_was_resumed_is_the_same_to_the_bit(way: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reference": toy(8)} if way == "selected" else {}
    changes = {
        "steps": 5,
        "online": way == "online",
        "select": 0.4 if way == "selected" else 1.0,
    }

    def run(folder: str, **more: Any) -> Any:
        draft = trainable()
        learn(tmp_path / folder, draft, [toy(4)], options=options | more, **changes)
        return draft

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("parts", progress=interrupt_after(3))
    parts = run("parts", resume=True)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    name = loop.CHECKPOINT
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


# --- the commands ---------------------------------------------------------------------------------


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no command": ((), "Missing command"),
    "reward": (
        ("diversed", "--reward", "fun"),
        "--reward: expected one of likelihood, exact_match",
    ),
    "code": (
        ("diversed", "--reward", "tests"),
        "--allow-code-execution: expected leave for 'tests'",
    ),
    "no tests": (
        ("diversed", "--reward", "tests", "--allow-code-execution"),
        'expected "tests" in every example',
    ),
    "ensemble": (("diversed", "--ensemble", "sum"), "--ensemble: expected one of mixture, product"),
    "baseline": (
        ("diversed", "--baseline", "none"),
        "--baseline: expected one of ema, group, got 'none'",
    ),
    "one sample": (("diversed", "--samples", "1"), "got 1 (here: --samples)"),
    "greedy": (("diversed", "--temperature", "0"), "--temperature: expected > 0, got 0"),
    "scale": (("diversed", "--acceptance-scale", "-1"), "--acceptance-scale: expected >= 0"),
    "rate": (("diversed", "--rate", "0"), "--rate: expected > 0, got 0"),
    "steps": (("diversed", "--steps", "0"), "--steps"),
    "no file": (("diversed", "--data", "/no/such.jsonl"), "No such file"),
    "evaluation alone": (
        ("diversed", "--evaluation", "x.jsonl", "--target", "/no/such"),
        "train diversed: --evaluation: expected --data beside it, got none",
    ),
    "evaluation of a draft alone": (
        ("draft", "--evaluation", "x.jsonl", "--target", "/no/such"),
        "train draft: --evaluation: expected --data beside it, got none",
    ),
    "no model": (("diversed", "--target", "/no/such"), "expected a folder or a hub name"),
    "no member": (("diversed", "--draft", "family:poet"), "got 'family:poet'"),
    "divergence": (("draft", "--divergence", "js_fsd"), "--divergence: expected one of"),
    "select": (("draft", "--select", "0"), "select: expected a fraction in (0, 1]"),
    "no reference": (("draft", "--select", "0.4"), "--reference: expected a draft beside --select"),
    "reference": (("draft", "--reference", "family:draft"), "--reference: expected a draft beside"),
    "weights": (("draft", "--weights", "a"), "--weights: expected numbers with commas"),
    "two weights": (("draft", "--weights", "0.5,0.5"), "--weights: expected 1 numbers, one per"),
    "sum": (("draft", "--weights", "0.5"), "sum to 1"),
    "dtype": (("draft", "--dtype", "float8"), "--dtype: expected one of auto"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_draft, "read_texts", lambda *_: ["a " * 500])
    arguments, words = MISTAKES[mistake]
    result = run(*arguments)
    assert result.exit_code == 2, (result.exception, result.output)
    (line,) = result.stderr.splitlines()
    assert line.startswith("specens: error: ")
    assert words in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("text\ntext", "expected a JSON object in line 1 of data.jsonl, got 'text'"),
        ('{"prompt": "a"}', "expected at least 2 examples, got 1"),
        ('{"prompt": "a"}\n{"prompt": 3}', 'expected text as "prompt" in line 2'),
        ('{"prompt": "a"}\n{"prompt": " "}', 'expected text as "prompt" in line 2'),
        ('{"prompt": "a", "tests": [1]}\n{"prompt": "b"}', 'expected text as "tests" in line 1'),
    ],
)
def test_data_that_is_none_is_refused(lines: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(lines)
    result = run("diversed", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.slow
def test_train_diversed_writes_head_curves_and_result(
    tmp_path: Path, shipped: tuple[Any, Any, Any]
) -> None:
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"x = {n}\n", "answer": f"y = {n}"} for n in range(6)]
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    tiny = ("--steps", "2", "--prompts", "2", "--samples", "2", "--new-tokens", "3")
    result = run(
        "diversed", "--data", data, "--out", out, *tiny, "--evaluation-samples", "1",
        "--reward", "exact_match", "--ensemble", "product", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "evaluation.json").read_text())
    assert found["examples"] == 1
    assert found["training_examples"] == 5
    assert len(found["candidates"]) == 12
    head = WeightHead.load(out)
    assert (head.ensemble, head.draft_size, head.target_size) == ("product", 128, 192)
    assert head.metadata["task"] == "exact_match"
    decoder = SpeculativeDecoder(
        shipped[:2], schedule=Speculative(proposer=0), weights=head, ensemble="product"
    )
    prompt = torch.tensor([[5, 6, 7]])
    written = decoder.generate(prompt, do_sample=True, max_new_tokens=8, eos_token_id=-1, seed=0)
    assert written.shape == (1, 11)
    assert len((out / "curves.csv").read_text().splitlines()) == 3
    again = run("diversed", "--data", data, "--out", out, *tiny, "--reward", "exact_match")
    assert again.exit_code == 2
    assert "expected a folder without checkpoint.safetensors, or resume" in again.stderr


@pytest.mark.slow
def test_train_draft_writes_a_draft_that_loads(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    text = Path(distil.__file__).read_text()
    data.write_text("\n".join(json.dumps({"prompt": text}) for _ in range(2)))
    result = run("draft", "--data", data, "--out", out, "--steps", "2", "--window-tokens", "32")
    assert result.exit_code == 0, result.output
    assert "held-out acceptance after: 0." in result.stdout
    (draft,), _ = loading.load([str(out)])
    (before,), _ = loading.load(["family:draft"])
    assert draft.dtype == torch.float32
    moved = draft.model.layers[0].mlp.up_proj.weight - before.model.layers[0].mlp.up_proj.weight
    assert 0 < moved.abs().max() < 0.01
    again = run(
        "draft", "--data", data, "--out", out, "--steps", "2", "--window-tokens", "32", "--resume"
    )
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_train_draft_online_with_models_of_other_widths(tmp_path: Path) -> None:
    (wide,), (tokenizer,) = loading.load(["family:draft"])
    wide.resize_token_embeddings(4096 + 64, mean_resizing=False)
    for one in (wide, tokenizer):
        one.save_pretrained(tmp_path / "wide")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    text = Path(distil.__file__).read_text()
    data.write_text("\n".join(json.dumps({"prompt": text}) for _ in range(2)))
    result = run(
        "draft", "--draft", tmp_path / "wide", "--online", "--data", data, "--out", out,
        "--steps", "1", "--batch", "2", "--window-tokens", "16", "--new-tokens", "8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert found["last_steps"]["trained_tokens"] > 0
