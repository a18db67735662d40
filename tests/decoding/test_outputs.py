# SPDX-License-Identifier: Apache-2.0
"""What is returned beside the text: statistics, log-probabilities, ordinary tensors."""

import copy
import itertools
import json

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
    assert sum(counts.emitted) + counts.num_replaced == counts.num_tokens
    assert counts.emitted == counts.accepted if ends is None else counts.emitted <= counts.accepted
    assert counts.num_tokens == (~output.log_probs.isnan()).sum() or schedule == "component"
    assert counts.num_tokens == num_written(output.sequences, max(RAGGED), ends or []).sum()
    assert counts.num_tokens < 100 if ends else counts.num_tokens == 100
    assert 0 < counts.turns <= counts.num_tokens
    assert counts.status == 0
    assert counts.prefill_seconds > 0 < counts.decode_seconds
    assert counts.tokens_per_second == counts.num_tokens / counts.decode_seconds
    assert counts.calls_per_token == sum(counts.calls) / counts.num_tokens
    sums = {"drafted", "tested", "accepted", "emitted", "by_position", "status"}
    sums |= {"num_tokens", "num_replaced"}
    ratios = {"acceptance_rate", "calls_per_token", "tokens_per_second"}
    assert set(counts.as_dict()) == {*vars(counts), *sums, *ratios}
    json.dumps(counts.as_dict())
    first = counts.as_dict()
    fast.generate(**prompts(RAGGED, VOCAB_SIZE), **settings)
    assert fast.statistics is not counts
    assert output.statistics.as_dict() == first or schedule in ("plain", "component")


@pytest.mark.parametrize("schedule", ["plain", "component", "lookup", *SCHEDULES])
def test_statistics_of_a_row_are_those_of_its_call_alone(schedule, models):
    """What became of a row's drafts does not depend on the rows beside it."""
    fast = decoder(models, 2, schedule)
    settings = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    settings["eos_token_id"] = [2, 3, 4, 5]
    inputs = prompts(RAGGED, VOCAB_SIZE)
    texts = fast.generate(**inputs, **settings, seed=3)
    together = fast.statistics
    assert len(together.rows) == len(RAGGED)
    written = num_written(texts, max(RAGGED), settings["eos_token_id"])
    assert [row.num_tokens for row in together.rows] == written.tolist()
    for row, length in enumerate(RAGGED):
        prompt = inputs["input_ids"][row : row + 1, -length:]
        mask = torch.ones_like(prompt)
        fast.generate(prompt, attention_mask=mask, **settings, seed=3 + row)
        assert fast.statistics.rows == [together.rows[row]]
        assert fast.statistics.num_tokens == together.rows[row].num_tokens
        assert fast.statistics.turns == together.rows[row].turns
    assert together.turns == max(row.turns for row in together.rows)


@pytest.mark.parametrize("ends", [True, False])
def test_a_draft_accepted_beyond_a_stop_is_not_emitted(ends, models):
    """A draft that is its target, whose every token is kept: the text ends inside a block."""
    target, prompt = models[0], prompts((5,), VOCAB_SIZE)
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
    text = target.generate(**prompt, **settings)[0, 5:].tolist()
    size = next(n for n in range(3, 8) if text[n - 1] not in text[: n - 1])
    settings |= {"eos_token_id": text[size - 1]} if ends else {"max_new_tokens": 3}
    fast = decoder([target, target], 1, "draft", 8)
    fast.generate(**prompt, **settings)
    row = fast.statistics.rows[0]
    if ends:
        assert row.num_tokens == size
        assert (row.drafted, row.accepted, row.emitted) == ([0, 8], [0, 8], [0, size])
        assert row.num_replaced == 0
    else:  # the last token is never drafted
        assert row.num_tokens == 3
        assert (row.drafted, row.accepted, row.emitted) == ([0, 2], [0, 2], [0, 2])
        assert row.num_replaced == 1
    assert row.acceptance_rate == fast.statistics.acceptance_rate == 1
    assert (row.turns, row.status) == (1, 0)


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
