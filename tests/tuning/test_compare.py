# SPDX-License-Identifier: Apache-2.0
"""Comparisons are fair: interleaved, within a round, and of text that no config shapes.

What transformers adds to a generation config is one more entry of tools/generation_options.py.
"""

import math
from typing import Any

import generation_options as options
import pytest
import torch
from toys import toy
from transformers import GenerationConfig

from specens import SpeculativeDecoder, Statistics
from specens.loop.generation_config import FIELDS, OBEYED, REFUSED
from specens.loop.statistics import RowStatistics
from specens.tuning.compare import compare, sampling, total

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(speed: float, log: list[str], name: str) -> Statistics:
    log.append(name)
    row = RowStatistics([0], [0], [0], [0], num_tokens=10)
    return Statistics(["a"], rows=[row], decode_seconds=10 / speed)


def test_compare_interleaves_and_takes_ratios_within_a_round() -> None:
    log: list[str] = []
    # The machine halves its speed from round to round; the first round warms up.
    slow = iter([1.0, 100.0, 50.0, 25.0])
    fast = iter([1.0, 200.0, 100.0, 50.0])
    first, second = compare(
        {
            "slow": lambda: counted(next(slow), log, "slow"),
            "fast": lambda: counted(next(fast), log, "fast"),
        },
        3,
    )
    assert log == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert (first.ratio, second.ratio, second.ratio_low, second.ratio_high) == (1, 2, 2, 2)
    assert (second.tokens_per_second, second.best, second.rounds) == (100, 200, 3)
    assert second.low == pytest.approx(60)
    assert math.isnan(second.acceptance_rate)
    assert second.as_dict()["acceptance_rate"] is None


def test_compare_stops_at_its_limit_after_one_measured_round() -> None:
    log: list[str] = []
    (row,) = compare({"one": lambda: counted(1.0, log, "one")}, 5, limit_s=0.0)
    assert (row.rounds, len(log)) == (1, 2)


# What `sampling` says of a generation config, and a value of each that the text shows; not those
# that come with the call, nor what acts on logits that are no numbers.
SHAPING = {
    name: {**options.OBEYED, **options.REFUSED}[name]
    for name in sampling(1)
    if name not in ("max_new_tokens", "do_sample", "remove_invalid_values")
}


def test_sampling_says_whatever_has_a_part_in_the_law() -> None:
    """What it does not say comes with the call, or is the first model's to say, or is idle."""
    assert {name for name, field in FIELDS.items() if field.verdict == REFUSED} <= {*SHAPING}
    left = {name for name, field in FIELDS.items() if field.verdict == OBEYED} - {*sampling(1)}
    assert left == {"max_length", "eos_token_id", "pad_token_id", "bos_token_id"}


@pytest.mark.parametrize("name", SHAPING)
def test_sampling_leaves_nothing_to_a_generation_config(name: str) -> None:
    """Of what changes the text, or is refused, where the call does not say `sampling`."""
    model = toy(1, 7, spread=1.0)
    model.generation_config.eos_token_id = 2
    decoder = SpeculativeDecoder([model, toy(2, 7, spread=1.0)], schedule="plain")

    def write(**arguments: Any) -> Any:
        prompt = torch.tensor([[4]])
        try:
            found = decoder.generate(prompt, attention_mask=torch.ones(1, 1).long(), **arguments)
        except (ValueError, NotImplementedError, AttributeError, TypeError) as refusal:
            return type(refusal)
        return found.tolist() if isinstance(found, torch.Tensor) else type(found)

    def texts() -> tuple[list[Any], list[Any]]:
        """As `sampling` says, and with no more said than that it is sampled, or greedy."""
        heats = [(0, 1.0), (1, 1.0), (0, 0.0)]
        said = [write(seed=seed, **sampling(24, temperature=heat)) for seed, heat in heats]
        bare = [write(seed=s, max_new_tokens=24, do_sample=heat > 0) for s, heat in heats]
        return said, bare

    (said, bare), own = texts(), model.generation_config
    assert all(isinstance(one, list) for one in said + bare)
    model.generation_config = GenerationConfig(eos_token_id=2, **SHAPING[name])
    now_said, now_bare = texts()
    assert now_bare != bare
    assert now_said == said
    assert own.eos_token_id == 2


def test_compare_refuses_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="decoders: expected at least one"):
        compare({}, 1)
    with pytest.raises(ValueError, match="repeats: expected a count >= 1, got 0"):
        compare({"one": lambda: Statistics(["a"])}, 0)


def test_total_adds_counts_and_refuses_other_members() -> None:
    first = RowStatistics([3, 0], [3, 0], [2, 0], [2, 0], [[3, 2]], num_tokens=4, status=1)
    second = RowStatistics([2, 1], [2, 0], [1, 0], [0, 0], [[1, 1], [1, 0]], status=2)
    one = Statistics(["a", "b"], [first], calls=[1, 2])
    two = Statistics(["a", "b"], [second], calls=[3, 4], turns=5)
    whole = total([one, two])
    assert (whole.calls, whole.by_position) == ([4, 6], [[4, 3], [1, 0]])
    assert (whole.num_tokens, whole.turns, whole.status) == (4, 5, 3)
    assert (whole.drafted, whole.accepted, whole.emitted) == ([5, 1], [3, 0], [2, 0])
    assert whole.rows == [first, second]
    with pytest.raises(ValueError, match="calls with the same members"):
        total([one, Statistics(["c"])])
