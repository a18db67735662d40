# SPDX-License-Identifier: Apache-2.0
"""What a text that the ensemble wrote is worth: a registry of rewards.

A reward sees the example, the text, and the target's mean log-probability of its tokens, and says a
number; more is better. To add a reward, add an entry to `REWARDS`.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from specens.training.examples import Example
from specens.training.trial import passes
from specens_kernels import Refusal

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
TEST_TIMEOUT_S = 10


@dataclass(frozen=True)
class Reward:
    """One way to judge a text.

    name: what users call it.
    needs: the field of `Example` that must not be empty, or "".
    score: (example, text, mean log-probability under the target) -> number.
    runs_code: it executes what a model wrote.
    """

    name: str
    needs: str
    score: Callable[[Example, str, float], float]
    runs_code: bool = False


def _answer(text: str) -> Decimal | None:
    """The number after `####`, as GSM8K marks answers, else the last number."""
    _, mark, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail if mark else text)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def exact_match(example: Example, text: str, log_likelihood: float) -> float:
    """1 if the text's number equals the reference's, as numbers; else 0."""
    expected, got = _answer(example.reference), _answer(text)
    return float(expected is not None and expected == got)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f1(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if common else 0.0


def rouge_n(reference: str, text: str, n: int) -> float:
    """F1 of the n-grams of words in common (Lin 2004), without stemming: [0, 1]."""
    grams = []
    for words in (_words(reference), _words(text)):
        grams.append(Counter(zip(*(words[i:] for i in range(n)), strict=False)))
    common = sum((grams[0] & grams[1]).values())
    return _f1(common, sum(grams[0].values()), sum(grams[1].values()))


def rouge_l(reference: str, text: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), without stemming: [0, 1]."""
    first, second = _words(reference), _words(text)
    return _f1(_longest_common(first, second), len(first), len(second))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def passes_tests(example: Example, text: str, log_likelihood: float) -> float:
    """1 if prompt and text run to their end as one Python program, and the tests beside it; else 0.

    `trial.py` says what the tests see of the program, and the program of them.
    """
    return float(passes(example.prompt, text, example.tests, TEST_TIMEOUT_S))


REWARDS = {
    reward.name: reward
    for reward in (
        Reward("likelihood", "", lambda example, text, log_likelihood: log_likelihood),
        Reward("exact_match", "reference", exact_match),
        Reward("rouge_1", "reference", lambda e, text, _: rouge_n(e.reference, text, 1)),
        Reward("rouge_2", "reference", lambda e, text, _: rouge_n(e.reference, text, 2)),
        Reward("rouge_l", "reference", lambda e, text, _: rouge_l(e.reference, text)),
        Reward("tests", "tests", passes_tests, runs_code=True),
    )
}


def reward_for(name: str, examples: Sequence[Example], *, allow_code_execution: bool) -> Reward:
    """The reward of that name, if these examples have what it needs.

    Raises:
        Refusal: an unknown name, an example without the field, or code that may not be run.
    """
    if name not in REWARDS:
        raise Refusal.unknown("train", "reward", name, REWARDS)
    reward = REWARDS[name]
    if reward.runs_code and not allow_code_execution:
        expected = f"leave for {name!r}, which runs what the models write"
        raise Refusal("train", "allow_code_execution", expected, "none")
    for number, example in enumerate(examples, start=1):
        if reward.needs and not getattr(example, reward.needs).strip():
            expected = f'"{reward.needs}" in every example for {name!r}'
            raise Refusal("train", "data", expected, f"none in example {number}")
    return reward
