# SPDX-License-Identifier: Apache-2.0
"""Rewards, by cases, and programs that misbehave. A new reward needs its cases."""

import pytest

from specens.training import rewards
from specens.training.examples import Example

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(("text", "expected"), [("    return x + 1\n", 1), ("    return x\n", 0)])
def test_programs_are_run_against_their_tests(text: str, expected: int) -> None:
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
