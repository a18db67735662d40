# SPDX-License-Identifier: Apache-2.0
"""What is returned beside the text: statistics, log-probabilities, ordinary tensors."""

import copy
import itertools

import pytest
import torch
from decoders import RAGGED, SCHEDULES, VOCAB_SIZE, decoder, num_written, same
from toys import prompts

from specens import SpeculativeOutput, Statistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("schedule", ["plain", "component", *SCHEDULES])
@pytest.mark.parametrize("ends", [None, [2, 3, 4, 5]])
def test_statistics_add_up(schedule, ends, models):
    fast = decoder(models, 2, schedule, seed=0)
    assert fast.statistics is None
    settings = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    if ends is not None:
        settings["eos_token_id"] = ends
    output = fast.generate(**prompts(RAGGED, VOCAB_SIZE), **settings, return_dict_in_generate=True)
    counts = fast.statistics
    assert output.statistics is counts
    assert len(counts.members) == len(fast.members) == (3 if schedule == "draft" else 2)
    per_member = zip(counts.accepted, counts.tested, counts.drafted, strict=True)
    assert all(0 <= accepted <= tested <= drafted for accepted, tested, drafted in per_member)
    positions = list(zip(*counts.by_position, strict=True)) or [(0,), (0,)]
    assert sum(positions[0]) == sum(counts.tested)
    assert sum(positions[1]) == sum(counts.accepted)
    assert all(accepted <= tested for tested, accepted in counts.by_position)
    # The second draft is tested iff the first is kept and there is a second.
    pairs = itertools.pairwise(counts.by_position)
    assert all(after[0] <= before[1] for before, after in pairs)
    # All that was emitted was drafted and accepted, or drawn by `verify`; an end may cut it short.
    emitted = sum(counts.accepted) + counts.num_replaced
    assert emitted == counts.num_tokens if ends is None else emitted >= counts.num_tokens
    assert counts.num_tokens == (~output.log_probs.isnan()).sum() or schedule == "component"
    assert counts.num_tokens == num_written(output.sequences, max(RAGGED), ends or []).sum()
    assert counts.num_tokens < 100 if ends else counts.num_tokens == 100
    assert 0 < counts.turns <= counts.num_tokens
    assert counts.status == 0
    assert counts.prefill_seconds > 0 < counts.decode_seconds
    assert counts.tokens_per_second == counts.num_tokens / counts.decode_seconds
    assert counts.calls_per_token == sum(counts.calls) / counts.num_tokens
    ratios = {"acceptance_rate", "calls_per_token", "tokens_per_second"}
    assert set(counts.as_dict()) == {*vars(counts), *ratios}
    first = counts.as_dict()
    fast.generate(**prompts(RAGGED, VOCAB_SIZE), **settings)
    assert fast.statistics is not counts
    assert output.statistics.as_dict() == first or schedule in ("plain", "component")


def test_nothing_drafted_has_no_acceptance_rate():
    counts = Statistics(["a"])
    assert counts.acceptance_rate != counts.acceptance_rate
    assert counts.tokens_per_second != counts.tokens_per_second
    assert counts.calls_per_token == 0


@pytest.mark.parametrize("schedule", ["component", "alternating"])
def test_what_return_dict_holds(schedule, models):
    fast = decoder(models, 2, schedule, seed=1)
    settings = {**prompts((5, 2), VOCAB_SIZE), "max_new_tokens": 20, "do_sample": True, "top_k": 0}
    ends = [2, 3, 4, 5, 6]
    settings |= {"eos_token_id": ends, "pad_token_id": 0}
    output = fast.generate(**settings, return_dict_in_generate=True)
    assert isinstance(output, SpeculativeOutput)
    same(output.sequences, fast.generate(**settings))
    assert output.log_probs.shape == (2, output.sequences.shape[1] - 5)
    assert output.log_probs.dtype == torch.float32
    if schedule == "component":
        assert output.log_probs.isnan().all()  # no token is scored by all members
    else:
        lengths = num_written(output.sequences, 5, ends)
        assert lengths[0] != lengths[1]
        written = torch.arange(output.log_probs.shape[1]) < lengths[:, None]
        same(output.log_probs.isnan(), ~written)
        assert (output.log_probs.nan_to_num(0) <= 0).all()
    assert output.scores is None
    output.sequences[0, 0] = 7  # ordinary tensors, not those of inference mode
    assert not output.log_probs.is_inference()


@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_degenerate_logits_are_reported(schedule, models, caplog):
    """NaN logits count as no mass, set a status bit, and are named in the log."""
    broken = copy.deepcopy(models[0])
    fast = decoder([broken, models[1], broken], 2, schedule, seed=0)
    broken.lm_head.weight[4] = torch.nan  # a model that is broken from the start is refused
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 0}
    text = fast.generate(**prompts((3, 2), VOCAB_SIZE), **settings)
    assert text.shape == (2, 11)
    assert fast.statistics.status & 1
    assert "generate: degenerate logits: NAN_LOGITS\n" in caplog.text
