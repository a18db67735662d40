# SPDX-License-Identifier: Apache-2.0
"""What an ensemble writes, by transformers: most probable tokens, and the exact law of texts."""

from collections import Counter
from typing import Any

import torch
from scipy import stats
from torch import Tensor

Weights = dict[str, float]
LEAST_EXPECTED, LEAST_PREFIX = 5, 30


@torch.no_grad()
def member_logits(members: dict[str, Any], weights: Weights, ids: list[int]) -> list[Tensor]:
    """Of each member (T, V) float64."""
    return [members[name](torch.tensor([ids])).logits[0].double() for name in weights]


def mixed(logits: list[Tensor], weights: Weights, ensemble: str = "mixture") -> Tensor:
    """(..., V): the ensemble's log-probabilities."""
    if ensemble == "product":
        total = sum(w * each for w, each in zip(weights.values(), logits, strict=True))
        return torch.log_softmax(total, -1)
    parts = zip(weights.values(), logits, strict=True)
    return sum(w * each.softmax(-1) for w, each in parts).log()


def differing(
    answer: dict[str, Any],
    members: dict[str, Any],
    weights: Weights,
    ensemble: str = "mixture",
    presence_penalty: float = 0.0,
) -> int:
    """How many tokens of a greedy answer are not the ensemble's most probable."""
    prompt, tokens = answer["prompt"], answer["tokens"]
    logits = member_logits(members, weights, prompt + tokens)
    wrong = 0
    for place, token in enumerate(tokens):
        rows = [each[len(prompt) + place - 1].clone() for each in logits]
        for row in rows:
            row[list(set(tokens[:place]))] -= presence_penalty
        wrong += int(mixed(rows, weights, ensemble).argmax()) != token
    return wrong


def filtered(logits: Tensor, temperature: float, top_k: int, min_p: float) -> Tensor:
    """(V,) logits of a member's own warped law."""
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if min_p:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)
    return logits


def chi_square(
    answers: list[dict[str, Any]],
    members: dict[str, Any],
    weights: Weights,
    ensemble: str = "mixture",
    temperature: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> float:
    """The probability of so large a statistic: each token given those before, frequent prefixes.

    A token that the law excludes is certainly wrong: 0.
    """
    prompt = answers[0]["prompt"]
    texts = [tuple(answer["tokens"]) for answer in answers]
    statistic, freedom = 0.0, 0
    for depth in range(len(texts[0])):
        for prefix, number in Counter(text[:depth] for text in texts).items():
            if number < LEAST_PREFIX:
                continue
            logits = member_logits(members, weights, [*prompt, *prefix])
            rows = [filtered(each[-1], temperature, top_k, min_p) for each in logits]
            expected = mixed(rows, weights, ensemble).exp() * number
            seen = Counter(text[depth] for text in texts if text[:depth] == prefix)
            if any(expected[token] == 0 for token in seen):
                return 0.0
            often = (expected >= LEAST_EXPECTED).nonzero()[:, 0].tolist()
            cells = [(float(expected[token]), seen[token]) for token in often]
            rest = (
                number - sum(share for share, _ in cells),
                number - sum(count for _, count in cells),
            )
            if rest[0] >= LEAST_EXPECTED:
                cells.append(rest)
            elif cells:
                cells[-1] = (cells[-1][0] + rest[0], cells[-1][1] + rest[1])
            if len(cells) > 1:
                statistic += sum((count - share) ** 2 / share for share, count in cells)
                freedom += len(cells) - 1
    assert freedom > 0
    return float(stats.chi2.sf(statistic, freedom))
