# SPDX-License-Identifier: Apache-2.0
"""Decoders that are wrong on purpose must fail the comparison that the right ones pass.

Each of them is a published mistake, or one that is near. To add a mistake, patch the loop with it.
"""

import dataclasses
from typing import Any

import pytest
import torch
from cases import HONEST, LENGTH, VOCAB_SIZE, WRONG, Case, disagreeing, p_values
from laws import chi_square
from torch import Tensor
from toys import logits_after, noisy, prompts, sequence_law, toy

from specens import SpeculativeDecoder
from specens.loop import run as run_module
from specens.loop.rows import Row
from specens.loop.run import Run
from specens.loop.schedule import Verification
from specens.loop.survival import Survival
from specens.schedules import (
    Alternating,
    Companion,
    Hierarchy,
    LookAhead,
    Speculative,
    companion,
    mixture,
)
from specens.schedules.mixture import KEPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return disagreeing()


def test_a_block_kept_whole_must_stay_in_the_context(models, monkeypatch):
    """Speculative Ensemble's published code proposes, after a block, without that block."""

    def stale(self: Alternating, run: Run, slot: int, rows: list[Row]) -> None:
        member, block = self.order[slot], self.tokens[(slot + 1) % len(self.order)]
        for _ in range(self.tokens[slot] - 1):
            active = [row for row in rows if run.room(row) > 0]
            if not active:
                return
            run.feed(member, active)
            chunk = run.laws[member].chunks[-1]
            for end in {row.end for row in active}:
                alike = [row for row in active if row.end == end]
                texts = [run.text.tokens[row.index, row.pad : row.pad + end] for row in alike]
                texts = [
                    torch.cat([text[: row.length - block], text[row.length :]])
                    for text, row in zip(texts, alike, strict=True)
                ]
                places = [chunk.places[row][0] for row in alike]
                chunk.logits[places, 0] = logits_after(models[member], torch.stack(texts)).float()
            run.draw(member, active)

    models = [models[0], noisy(models[0], 0.5)]  # most blocks are kept whole
    case = Case("mixture", 2, Alternating(tokens=(1, 2)))
    joint = case.joint(models)
    assert min(p_values(case.texts(models), joint).values()) > HONEST
    monkeypatch.setattr(Alternating, "_extend", stale)
    found = p_values(case.texts(models), joint)
    assert found[0, 1] > HONEST, found  # nothing is stale before the first block is kept
    assert found[0, 2] < WRONG, found


def test_a_bonus_token_must_come_from_the_ensemble(models, monkeypatch):
    """Transformers' assisted ensembles draw it from the target alone."""
    right = run_module.verify

    def wrong(logits: list[Tensor], *arguments: Any, **options: Any) -> Any:
        logits = [tensor.clone() for tensor in logits]
        for tensor in logits[1:]:
            tensor[:, -1] = logits[0][:, -1]
        return right(logits, *arguments, **options)

    case = Case("mixture", 2, Speculative(tokens=2, proposer=1))
    joint = case.joint(models)
    monkeypatch.setattr(run_module, "verify", wrong)
    found = p_values(case.texts(models, 1000), joint)
    assert found[0, 1] > HONEST, found  # drafted tokens are right
    assert found[1, 2] < WRONG, found


@pytest.mark.slow
def test_looking_ahead_may_learn_but_not_look(models, monkeypatch):
    """By what became of earlier tokens it may ask sooner, but not by a token that it has drawn."""
    # One refusal is enough to ask at once, for as long as these texts last.
    monkeypatch.setattr(mixture, "best_ahead", lambda *given: 3 * (given[4] >= KEPT))
    case = Case("mixture", 3, LookAhead(proposer=1))
    assert set(case.decoder(models).schedule.ahead) == {0, 3}
    joint = case.joint(models)
    found = p_values(case.texts(models), joint)
    assert min(found.values()) > HONEST, found
    right = LookAhead.turn

    def looking(self: LookAhead, run: Run) -> list[Verification]:
        (verification,) = right(self, run)
        counts = list(verification.num_drafts)
        for k, row in enumerate(verification.rows):
            owner = mixture.components(run, row, 1)[0]
            refusable = counts[k] > 0 and owner != self.proposer
            if refusable and run.text.tokens[row.index, row.pad + row.length] < 2:
                counts[k] = 0
                row.pending.clear()
        weights = verification.law.weights[:, : max(counts) + 1]
        law = dataclasses.replace(verification.law, weights=weights)
        return [dataclasses.replace(verification, num_drafts=counts, law=law)]

    monkeypatch.setattr(LookAhead, "turn", looking)
    found = p_values(case.texts(models), joint)
    assert min(found.values()) < WRONG, found


@pytest.mark.slow
def test_a_cut_must_not_look_at_the_token_it_takes_back(models, monkeypatch):
    """As Speculative Verification publishes it: by the token's own ratio, then the target's law."""

    def wrong(self: Survival, said: list[tuple[float, float]], token_cost: float) -> int:
        reached = expected = 1.0
        for at, (shared, ratio) in enumerate(said):
            gain = reached * self.chance(shared, ratio)
            if gain * (1 + token_cost * at) <= token_cost * expected:
                return at
            expected += gain
            reached = gain
        return len(said)

    models = [models[0], noisy(models[0], 0.5), models[1]]  # the companion knows the target well
    case = Case("mixture", 1, Companion(tokens=2, token_cost=0.4), drafts=2)
    joint = case.joint(models)
    assert min(p_values(case.texts(models), joint).values()) > HONEST
    monkeypatch.setattr(Survival, "cut", wrong)
    found = p_values(case.texts(models), joint)
    assert found[0, 1] < WRONG, found


def test_a_token_taken_back_for_what_it_is_leaves_a_smaller_law(models, monkeypatch):
    models = [models[0], noisy(models[0], 0.5), models[1]]
    case = Case("mixture", 1, Companion(tokens=2, token_cost=0.4, cut="token"), drafts=2)
    joint = case.joint(models)
    assert min(p_values(case.texts(models, 6000), joint).values()) > HONEST
    monkeypatch.setattr(companion, "staying_laws", lambda *given: {})
    found = p_values(case.texts(models, 6000), joint)
    assert min(found.values()) < WRONG, found


def test_a_token_taken_back_must_count_as_less_likely():
    """What would allow a cut by the token itself: q'(x) = q(x) k(x) in the ratio and the residual.

    Of one token: x ~ q, kept with chance k(x) and then verified; else it is replaced.
    """
    dice = torch.Generator().manual_seed(0)
    laws = torch.rand(3, 4, generator=dice, dtype=torch.float64).pow(3)
    p, q, companion = laws / laws.sum(-1, keepdim=True)
    keep = ((companion / q).clamp(max=1) > 0.5).double()
    assert 0 < (q * keep).sum() < 1

    def emitted(proposal: Tensor, when_taken_back: Tensor) -> Tensor:
        accepted = q * keep * (p / proposal).nan_to_num(posinf=1.0).clamp(max=1)
        residual = (p - proposal).clamp(min=0)
        refused = (q * keep).sum() - accepted.sum()
        dropped = (q * (1 - keep)).sum()
        return accepted + refused * residual / residual.sum() + dropped * when_taken_back

    less = (p - q * keep).clamp(min=0)
    torch.testing.assert_close(emitted(q * keep, less / less.sum()), p, atol=1e-15, rtol=0)
    assert (emitted(q, p) - p).abs().max() > 0.05


@pytest.mark.parametrize("schedule", [Speculative(tokens=2), Alternating(tokens=2)], ids=str)
def test_a_draft_must_have_the_law_it_is_said_to_have(schedule, models, monkeypatch):
    """Transformers warps the draft's logits twice."""
    right = run_module.sample

    def wrong(logits: list[Tensor], numbers: Tensor, law: Any) -> Any:
        return right(logits, numbers, dataclasses.replace(law, temperature=law.temperature**2))

    case = Case("warped", 2, schedule)
    joint = case.joint(models)
    monkeypatch.setattr(run_module, "sample", wrong)
    found = p_values(case.texts(models, 1000), joint)
    assert found[0, 1] < WRONG, found


def test_a_level_must_be_verified_against_the_level_below_it(models, monkeypatch):
    """Not against the first draft, from whose law most tokens were drawn."""
    target, middle, smallest = models[0], models[2], models[-1]
    right = Run.proposal

    def wrong(self: Run, rows: list[Row], counts: Any, begins: Any, among: Any) -> Any:
        proposal = right(self, rows, counts, begins, among)
        if rows[0].pending[:1] == [2]:  # the ensemble's turn: all of them are the middle one's
            texts = self.text.tokens[[row.index for row in rows]]
            laws = smallest(texts, use_cache=False).logits
            at = torch.tensor(begins)[:, None] - 1 + torch.arange(max(counts))
            proposal["draft_logits"] = torch.take_along_dim(laws, at[..., None], 1)
        return proposal

    def text() -> Tensor:
        decoder = SpeculativeDecoder(
            [target], schedule=Hierarchy(tokens=(2, 3)), draft=[smallest, middle]
        )
        prompt = prompts([3], VOCAB_SIZE)["input_ids"].expand(1000, -1)
        mask = torch.ones(1000, 3, dtype=torch.int64)
        options = {"max_new_tokens": LENGTH + 2, "do_sample": True, "top_k": 0, "seed": 0}
        return decoder.generate(prompt, attention_mask=mask, **options)[:, 3 : 3 + LENGTH]

    joint = sequence_law([target], prompts([3], VOCAB_SIZE)["input_ids"], LENGTH, weights=[1.0])
    assert min(p_values(text(), joint).values()) > HONEST
    monkeypatch.setattr(Run, "proposal", wrong)
    assert min(p_values(text(), joint).values()) < WRONG


def flat(law: list[float]) -> Any:
    """A model that gives every next token this law, whatever the text."""
    model = toy(1, len(law))
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding[1:2].expand_as(embedding))
        seen: list[Tensor] = []
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1]))
        model(torch.tensor([[1, 2]]))
        hook.remove()
        head.weight.copy_(torch.tensor(law).log()[:, None] * seen[0] / seen[0].dot(seen[0]))
    return model


@pytest.mark.slow
def test_an_end_that_a_level_has_refused_ends_nothing():
    """Whether a level goes on must not hang on numbers of tokens that come after a refused one."""
    small, large = flat([0.5, 0.4, 0.1]), flat([0.5, 0.1, 0.4])
    decoder = SpeculativeDecoder(
        [large], schedule=Hierarchy(tokens=(3, 3, 4)), draft=[small, small, large]
    )
    ids = torch.ones(8000, 1, dtype=torch.int64)
    texts = decoder.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        eos_token_id=0,
        pad_token_id=0,
        seed=0,
    )
    for first in (1, 2):
        second = texts[texts[:, 1] == first][:, 2]
        counts = torch.bincount(second, minlength=3)
        assert chi_square(counts, torch.tensor([0.5, 0.1, 0.4])).p_value > HONEST
