# SPDX-License-Identifier: Apache-2.0
"""The engine that docs/your-own-engine.md shows: its texts have the mixture's law.

The page itself is run with the others; here its classes are used once more. Seeds are fixed.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from specens_kernels import Law, mix

PAGE = Path(__file__).parents[2] / "docs" / "your-own-engine.md"
TEXTS, LENGTH = 20_000, 5


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code[1], "page", "exec"), names)
    return names


def p_value(pairs: Counter[tuple[int, int]], law: Law, members: list[Any]) -> float:
    """Of a chi-square test of tokens, given the ones before, where 400 or more were written."""
    statistic, freedom = 0.0, 0
    befores = Counter(before for before, _ in pairs.elements())
    for before, total in befores.items():
        if total < 400:
            continue
        logits = [member(torch.tensor([[before]])) for member in members]
        expected = total * mix(logits, law)[0].exp()[0, 0].double()
        seen = torch.tensor([pairs[before, after] for after in range(100)], dtype=torch.float64)
        often = expected >= 5
        cells = torch.stack((seen, expected))
        rest = cells[:, ~often].sum(1, keepdim=True)
        seen, expected = torch.cat((cells[:, often], rest), 1)[:, : 100 if rest[1] > 0 else -1]
        statistic += float(((seen - expected) ** 2 / expected).sum())
        freedom += len(seen) - 1
    assert freedom > 20
    return float(chi2.sf(statistic, freedom))


def test_texts_have_the_mixtures_law(page: dict[str, Any]) -> None:
    law, members = Law((0.3, 0.7), temperature=0.8), page["members"]
    requests = [page["Request"]([i % 2], seed=i, max_new_tokens=LENGTH) for i in range(TEXTS)]
    engine = page["Engine"](members, law, num_drafts=3, room=TEXTS // 2)
    engine.waiting = list(requests)
    while engine.waiting or engine.running:
        engine.step()
    assert {len(request.text) for request in requests} == {1 + LENGTH}
    pairs = Counter(
        (request.text[i], request.text[i + 1]) for request in requests for i in range(LENGTH)
    )
    assert p_value(pairs, law, members) > 0.01
    for weights in ((0.5, 0.5), (0, 1)):
        assert p_value(pairs, Law(weights, temperature=0.8), members) < 1e-6
