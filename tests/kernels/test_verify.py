# SPDX-License-Identifier: Apache-2.0
"""`verify`: the walk, its edges and its degenerate inputs. Its law is in test_verify_law.py."""

import math
from typing import Any

import laws
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specens_kernels import (
    PADDING,
    POINT_MASS,
    Acceptance,
    Law,
    Status,
    Stream,
    Verdict,
    mix,
    reference,
    sample,
    uniforms,
    verify,
)
from specens_kernels.call import VerifyCall

INF, NAN = math.inf, math.nan
TOP = 1 - 2.0**-24  # the largest number in [0, 1) that `uniforms` returns

HALVES = (0.5, 0.5)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def coins(batch: int, nodes: int, coin: float) -> Tensor:
    """Random numbers to draw with, and one coin for every node."""
    numbers = torch.rand(batch, nodes + 1, 4)
    numbers[..., 0] = coin
    return numbers


def assert_same(one: Verdict, other: Verdict, rows: Tensor | slice = slice(None)) -> None:
    for name, value, expected in zip(Verdict._fields, one, other, strict=True):
        assert torch.equal(value[rows], expected), name


def test_without_a_draft_it_samples_the_target(backend: str) -> None:
    logits = [torch.randn(3, 1, 40) for _ in range(2)]
    numbers = torch.rand(3, 1, 4)
    draft = torch.empty(3, 0, dtype=torch.int64)
    law = Law(HALVES, temperature=0.8, top_k=20)
    verdict = verify(logits, draft, numbers, law)
    drawn = sample(logits, numbers, law)
    assert torch.equal(verdict.tokens, drawn.tokens)
    torch.testing.assert_close(verdict.log_probs, drawn.log_probs)
    assert verdict.num_accepted.tolist() == [0, 0, 0]
    assert verdict.path.shape == (3, 0)


def test_without_a_draft_and_a_bonus_it_emits_nothing(backend: str) -> None:
    draft = torch.empty(3, 0, dtype=torch.int64)
    verdict = verify([torch.randn(3, 0, 5)], draft, torch.rand(3, 1, 4), Law(), bonus=False)
    assert verdict.tokens.tolist() == [[PADDING]] * 3
    assert not verdict.num_accepted.any()
    assert not verdict.status.any()


def test_all_accepted(backend: str) -> None:
    logits = torch.randn(2, 5, 30)
    draft = torch.randint(0, 30, (2, 4))
    numbers = coins(2, 4, 0.0)
    verdict = verify([logits], draft, numbers, Law())
    assert torch.equal(verdict.tokens[:, :4], draft)
    assert torch.equal(verdict.tokens[:, 4:], sample([logits], numbers, Law()).tokens[:, 4:])
    assert verdict.num_accepted.tolist() == [4, 4]
    assert verdict.path.tolist() == [[1, 2, 3, 4]] * 2
    without = verify([logits[:, :4]], draft, numbers, Law(), bonus=False)
    assert torch.equal(without.tokens[:, :4], draft)
    assert without.tokens[:, 4].tolist() == [PADDING] * 2
    assert without.log_probs[:, 4].tolist() == [0.0, 0.0]
    assert without.num_accepted.tolist() == [4, 4]


def test_none_accepted(backend: str) -> None:
    logits = torch.randn(2, 5, 30)
    logits[..., 7] = -INF
    verdict = verify([logits], torch.full((2, 4), 7), coins(2, 4, 0.0), Law())
    assert verdict.num_accepted.tolist() == [0, 0]
    assert verdict.path.tolist() == [[PADDING] * 4] * 2
    assert verdict.tokens[:, 1:].tolist() == [[PADDING] * 4] * 2
    assert not (verdict.tokens[:, 0] == 7).any()
    assert torch.equal(verdict.log_probs[:, 1:], torch.zeros(2, 4))


def test_rows_end_where_they_must(backend: str) -> None:
    """Row b accepts b nodes; outputs have their types and are padded behind."""
    logits = torch.randn(4, 4, 12)
    draft = torch.randint(0, 12, (4, 3))
    for b in range(3):
        logits[b, b, draft[b, b]] = -INF
    verdict = verify([logits], draft, coins(4, 3, 0.0), Law())
    assert verdict.num_accepted.tolist() == [0, 1, 2, 3]
    for b in range(4):
        assert (verdict.tokens[b, : b + 1] >= 0).all()
        assert verdict.tokens[b, b + 1 :].tolist() == [PADDING] * (3 - b)
        assert verdict.path[b].tolist() == [*range(1, b + 1)] + [PADDING] * (3 - b)
    types = [value.dtype for value in verdict]
    assert types == [torch.int64, torch.float32, torch.int32, torch.int32, torch.int32]


@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}], ids=str)
@pytest.mark.parametrize("coin", [None, TOP])
def test_a_draft_from_the_target_is_always_accepted(
    backend: str, scope: str, temperature: float, filters: dict[str, Any], coin: float | None
) -> None:
    """From `sample` to `verify` with one seed, as a decoder does it."""
    batch, nodes = (2 if backend == "triton" else 6), 3  # its interpreter is slow
    logits = [3 * torch.randn(batch, nodes + 1, 1100)]
    law = Law(temperature=temperature, scope=scope, **filters)
    seeds, positions = torch.arange(batch), torch.arange(nodes + 1)[None]
    numbers = uniforms(seeds, positions[:, :nodes], Stream.DRAFT)
    draft = sample([logits[0][:, :nodes]], numbers, law, member=0).tokens
    numbers = uniforms(seeds, positions, Stream.VERIFY)
    if coin is not None:
        numbers[..., 0] = coin
    by_member = {"proposers": torch.zeros(nodes, dtype=torch.int32)}
    separate = {"draft_logits": logits[0].clone()}
    for proposal in (by_member, separate):
        verdict = verify(logits, draft, numbers, law, **proposal)
        assert verdict.num_accepted.tolist() == [nodes] * batch
        assert not verdict.status.any()


def test_a_coin_of_0_keeps_any_mass_and_only_mass(backend: str) -> None:
    logits = torch.tensor([0.0, -80.0, -INF]).expand(3, 2, 3)
    verdict = verify([logits], torch.tensor([[0], [1], [2]]), coins(3, 1, 0.0), Law())
    assert verdict.num_accepted.tolist() == [1, 1, 0]


def test_the_largest_coin_rejects_all_but_certainty(backend: str) -> None:
    logits = torch.tensor([[9.0, 0.0], [200.0, 0.0]])[:, None].expand(2, 2, 2)
    verdict = verify([logits], torch.zeros(2, 1, dtype=torch.int64), coins(2, 1, TOP), Law())
    assert verdict.num_accepted.tolist() == [0, 1]
    assert verdict.tokens[0, 0] == 1


def test_the_comparison_is_strict(backend: str) -> None:
    """A token of mass 1/2 is not kept by a coin of 1/2, but by the one below."""
    for coin, accepted in ((0.5, 0), (0.5 - 2**-24, 1)):
        verdict = verify(
            [torch.zeros(1, 2, 2)], torch.ones(1, 1, dtype=torch.int64), coins(1, 1, coin), Law()
        )
        assert verdict.num_accepted.item() == accepted


def test_numbers_of_rows_that_are_not_reached_do_not_matter(backend: str) -> None:
    logits = [torch.randn(8, 4, 20) for _ in range(2)]
    draft = sample([member[:, :3] for member in logits], torch.rand(8, 3, 4), Law(HALVES), member=1)
    proposers = ints(1, 1, 1)
    numbers = torch.rand(8, 4, 4)
    verdict = verify(logits, draft.tokens, numbers, Law(HALVES), proposers=proposers)
    other = torch.rand(8, 4, 4)
    for b, accepted in enumerate(verdict.num_accepted.tolist()):
        other[b, accepted, 1:] = numbers[b, accepted, 1:]
        other[b, 1 : accepted + 2, 0] = numbers[b, 1 : accepted + 2, 0]
    assert_same(verify(logits, draft.tokens, other, Law(HALVES), proposers=proposers), verdict)
    assert verdict.num_accepted.max() > verdict.num_accepted.min()


@pytest.mark.parametrize("vocab_size", [30, 1025, 8193, 20_000])
def test_what_is_drawn_is_what_sample_draws_from_the_residual(
    backend: str, vocab_size: int
) -> None:
    """Through the same tiles and sub-tiles, for a point mass and for a member's law."""
    logits = [2 * torch.randn(6, 2, vocab_size) for _ in range(2)]
    numbers = coins(6, 1, TOP)
    law = Law(HALVES)
    target = sum(member[:, :1].double().softmax(-1) / 2 for member in logits)
    draft = target.argmin(-1)
    point = target.scatter(-1, draft[..., None], 0.0).log()
    own = (target - logits[1][:, :1].double().softmax(-1)).clamp(min=0).log()
    for proposers, residual in ((None, point), (ints(1), own)):
        token = residual.argmin(-1)  # one that has none of it
        verdict = verify(logits, token, numbers, law, proposers=proposers)
        expected = sample([residual.float()], numbers[:, :1], Law())
        assert not verdict.num_accepted.any()
        assert torch.equal(verdict.tokens[:, :1], expected.tokens)


def test_log_probs_are_those_of_the_target(backend: str) -> None:
    """Of every emitted token, accepted or drawn, and before a greedy row collapses."""
    logits = [2 * torch.randn(8, 4, 20) for _ in range(2)]
    draft = torch.randint(0, 20, (8, 3))
    temperature = torch.tensor([0.7, 0.0] * 4)
    law = Law(HALVES, temperature=temperature)
    verdict = verify(logits, draft, coins(8, 3, 0.05), law, proposers=ints(0, 1, POINT_MASS))
    log_probs = mix(logits, law)[0]
    emitted = verdict.tokens >= 0
    expected = log_probs.gather(-1, verdict.tokens.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(
        verdict.log_probs, torch.where(emitted, expected, 0.0), atol=1e-5, rtol=1e-5
    )
    assert emitted.sum() > 8


BUSHY = (-1, 0, 0, 1, 1, 2, 5)


def test_a_chain_is_a_tree(backend: str) -> None:
    logits = [torch.randn(5, 4, 20) for _ in range(2)]
    draft = torch.randint(0, 20, (5, 3))
    numbers = coins(5, 3, 0.1)
    expected = verify(logits, draft, numbers, Law(HALVES))
    chain = ints(-1, 0, 1, 2)
    for parents in (chain, chain.long(), chain[None], chain.expand(5, 4), chain.repeat(5, 1)):
        assert_same(verify(logits, draft, numbers, Law(HALVES), parents=parents), expected)
    assert_same(verify(logits, draft.int(), numbers, Law(HALVES)), expected)


def test_siblings_are_tried_in_order_and_the_path_goes_down(backend: str) -> None:
    """The first child is impossible, the second has a child, which has one."""
    logits = torch.zeros(1, 7, 10)
    draft = torch.tensor([[3, 4, 5, 6, 7, 8]])
    logits[0, 0, 3] = -INF
    verdict = verify([logits], draft, coins(1, 6, 0.0), Law(), parents=ints(*BUSHY))
    assert verdict.tokens[0, :3].tolist() == [4, 7, 8]
    assert verdict.path[0].tolist() == [2, 5, 6, PADDING, PADDING, PADDING]
    assert verdict.num_accepted.item() == 3
    assert verdict.tokens[0, 3] >= 0
    assert verdict.tokens[0, 4:].tolist() == [PADDING] * 3


def test_each_row_may_have_its_own_tree_and_proposers(backend: str) -> None:
    batch, nodes = 4, 6
    logits = [2 * torch.randn(batch, nodes + 1, 25) for _ in range(2)]
    draft = torch.randint(0, 25, (batch, nodes))
    numbers = coins(batch, nodes, 0.2)
    trees = [BUSHY, (-1, 0, 1, 2, 3, 4, 5), (-1, 0, 0, 0, 0, 0, 0), (-1, 0, 1, 0, 3, 0, 5)]
    parents = torch.tensor(trees)
    proposers = torch.randint(-1, 2, (batch, nodes), dtype=torch.int32)
    together = verify(logits, draft, numbers, Law(HALVES), parents=parents, proposers=proposers)
    for b in range(batch):
        row = slice(b, b + 1)
        alone = verify(
            [member[row] for member in logits],
            draft[row],
            numbers[row],
            Law(HALVES),
            parents=parents[b],
            proposers=proposers[b],
        )
        assert_same(together, alone, row)


def test_a_rejected_point_leaves_the_others_their_share(backend: str) -> None:
    """Masses 1/2, 1/4, 1/4: once the first is rejected the second is kept by a coin below 1/2."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, 3, 3)
    for coin, accepted in ((0.49, 1), (0.51, 0)):
        numbers = coins(1, 2, TOP)
        numbers[0, 2, 0] = coin
        verdict = verify([logits], torch.tensor([[0, 1]]), numbers, Law(), parents=ints(-1, 0, 0))
        assert verdict.num_accepted.item() == accepted
        assert verdict.tokens[0, 0] == (1 if accepted else 2)


def test_a_point_that_was_rejected_is_not_kept_the_second_time(backend: str) -> None:
    numbers = coins(1, 2, TOP)
    numbers[0, 2, 0] = 0.0
    parents = ints(-1, 0, 0)
    verdict = verify(
        [torch.zeros(1, 3, 4)], torch.tensor([[2, 2]]), numbers, Law(), parents=parents
    )
    assert verdict.num_accepted.item() == 0
    assert verdict.tokens[0, 0] != 2
    assert verdict.status.item() == 0


def test_nodes_that_hang_nowhere_are_not_visited(backend: str) -> None:
    """A parent that is no earlier node is never reached, whatever its number; the root has none."""
    logits = [torch.randn(3, 5, 20)]
    draft = torch.randint(0, 20, (3, 4))
    numbers = coins(3, 4, 0.0)
    lost = draft.clone()
    lost[:, 0] = lost[:, 2] = PADDING
    expected = verify(logits, lost, numbers, Law(), parents=ints(-1, 0, 0, 0, 2))
    assert expected.path[:, :2].tolist() == [[2, 4]] * 3
    expected = expected._replace(status=expected.status | Status.INVALID_DRAFT)
    for nowhere in (-1, -7, 99, 2**31 - 1, -(2**31)):
        parents = ints(0, nowhere, 0, nowhere, 2)
        assert_same(verify(logits, draft, numbers, Law(), parents=parents), expected)


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_reference_asks_for_the_temperature_once_a_call() -> None:
    """On a GPU the walk asks the device about every row; not also whether that is greedy."""
    law = Law(temperature=0.0).tensors("verify", torch.device("cpu"), 20)

    def waits(nodes: int) -> int:
        tokens = torch.zeros(1, nodes, dtype=torch.int64)
        logits = torch.zeros(1, nodes + 1, 20)
        with Waits() as mode:
            verdict = reference.verify(VerifyCall([logits], tokens, coins(1, nodes, 0.0), law))
        assert verdict[2].item() == nodes
        return mode.count

    # Its status, what of it is unread, the coin, whether there is a law and whether it is the best.
    assert waits(6) - waits(5) == 5


def test_a_long_chain_and_a_broad_root(backend: str) -> None:
    for parents in ([-1, *range(64)], [-1] + [0] * 64):
        logits = torch.zeros(1, 65, 70)
        draft = torch.arange(64)[None]
        verdict = verify([logits], draft, coins(1, 64, 0.0), Law(), parents=ints(*parents))
        assert verdict.num_accepted.item() == (64 if parents[2] == 1 else 1)
    logits[:, 0, :63] = -INF  # the last child but one is the first that is possible
    verdict = verify([logits], draft, coins(1, 64, 0.0), Law(), parents=ints(*parents))
    assert verdict.path[0, 0] == 64


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_ragged_row_is_the_shorter_call(backend: str, length: int) -> None:
    logits = [torch.randn(4, 4, 20) for _ in range(2)]
    draft = torch.randint(0, 20, (4, 3))
    numbers = coins(4, 3, 0.02)
    ragged = draft.clone()
    ragged[:, length:] = PADDING
    rows = length + 1
    long = verify(logits, ragged, numbers, Law(HALVES), proposers=ints(0, 1, 0))
    short = verify(
        [member[:, :rows] for member in logits],
        draft[:, :length],
        numbers[:, :rows],
        Law(HALVES),
        proposers=ints(0, 1, 0)[:length],
    )
    assert torch.equal(long.tokens[:, :rows], short.tokens)
    assert torch.equal(long.log_probs[:, :rows], short.log_probs)
    assert torch.equal(long.num_accepted, short.num_accepted)
    assert torch.equal(long.path[:, :length], short.path)
    assert (long.tokens[:, rows:] == PADDING).all()
    assert not long.status.any()


def test_a_ragged_row_without_a_bonus_stops_at_its_end(backend: str) -> None:
    draft = torch.tensor([[1, 2, PADDING], [PADDING] * 3])
    verdict = verify([torch.zeros(2, 3, 5)], draft, coins(2, 3, 0.0), Law(), bonus=False)
    assert verdict.tokens.tolist() == [[1, 2, PADDING, PADDING], [PADDING] * 4]
    assert verdict.num_accepted.tolist() == [2, 0]


def test_a_missing_sibling_is_skipped(backend: str) -> None:
    verdict = verify(
        [torch.zeros(1, 3, 5)],
        torch.tensor([[PADDING, 3]]),
        coins(1, 2, 0.0),
        Law(),
        parents=ints(-1, 0, 0),
    )
    assert verdict.path.tolist() == [[2, PADDING]]
    assert verdict.status.item() == 0


@pytest.mark.parametrize("token", [20, 21, -2, 2**31 - 1, -(2**31), 2**40, -(2**62)])
@pytest.mark.parametrize("proposer", [POINT_MASS, 0])
def test_an_invalid_token_is_rejected_and_the_target_stays(
    backend: str, token: int, proposer: int
) -> None:
    logits = [torch.randn(2, 2, 24)]  # columns 20 to 23 are padding
    logits[0][..., 20:] = NAN
    numbers = coins(2, 1, 0.0)
    law = Law(vocab_size=20)
    verdict = verify(logits, torch.full((2, 1), token), numbers, law, proposers=ints(proposer))
    expected = sample([logits[0][:, :1]], numbers[:, :1], law)
    assert verdict.num_accepted.tolist() == [0, 0]
    assert torch.equal(verdict.tokens[:, :1], expected.tokens)
    assert verdict.status.tolist() == [Status.INVALID_DRAFT] * 2


@pytest.mark.parametrize("proposer", [2, 99, -2, 2**31 - 1, -(2**31)])
def test_an_unknown_proposer_is_an_invalid_draft(backend: str, proposer: int) -> None:
    logits = [torch.randn(2, 3, 20) for _ in range(2)]
    numbers = coins(2, 2, 0.0)
    draft = torch.randint(0, 20, (2, 2))
    verdict = verify(logits, draft, numbers, Law(HALVES), proposers=ints(0, proposer))
    assert verdict.num_accepted.tolist() == [1, 1]
    assert verdict.status.tolist() == [Status.INVALID_DRAFT] * 2
    drawn = sample([member[:, 1:2] for member in logits], numbers[:, 1:2], Law(HALVES))
    assert torch.equal(verdict.tokens[:, 1:2], drawn.tokens)


def test_the_sibling_of_an_invalid_token_is_tried(backend: str) -> None:
    for temperature in (0.0, 1.0):
        logits = torch.zeros(1, 3, 5)
        logits[..., 3] = 1.0
        verdict = verify(
            [logits],
            torch.tensor([[7, 3]]),
            coins(1, 2, 0.0),
            Law(temperature=temperature),
            parents=ints(-1, 0, 0),
        )
        assert verdict.path.tolist() == [[2, PADDING]]
        assert verdict.status.item() == Status.INVALID_DRAFT


def test_a_draft_that_its_own_law_excludes_is_rejected(backend: str) -> None:
    """Zero draft probability: no 0/0, and no token that the target has not."""
    expert, amateur = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    amateur[..., 2] = -INF
    verdict = verify(
        [expert, amateur], torch.tensor([[2]]), coins(1, 1, 0.0), Law(HALVES), proposers=ints(1)
    )
    assert verdict.num_accepted.item() == 0
    assert verdict.tokens[0, 0] == 2  # all of the residual
    assert verdict.status.item() == 0


def test_an_empty_residual_leaves_the_target(backend: str) -> None:
    logits = torch.randn(1, 2, 9)
    logits[..., 4] = -INF
    numbers = coins(1, 1, 0.0)
    verdict = verify([logits], torch.tensor([[4]]), numbers, Law(), proposers=ints(0))
    assert verdict.tokens[0, 0] == sample([logits[:, :1]], numbers[:, :1], Law()).tokens.item()
    assert verdict.num_accepted.item() == 0
    assert verdict.status.item() == Status.EMPTY_RESIDUAL


def test_a_member_and_its_logits_apart_are_the_same_draft(backend: str) -> None:
    logits = [2 * torch.randn(6, 4, 30) for _ in range(2)]
    draft = torch.randint(0, 30, (6, 3))
    numbers = coins(6, 3, 0.3)
    law = Law(HALVES, temperature=(0.7, 0.7), top_p=0.95)
    expected = verify(logits, draft, numbers, law, proposers=ints(1, 1, 1))
    for apart in (logits[1].clone(), logits[1][:, :3].clone()):
        assert_same(verify(logits, draft, numbers, law, draft_logits=apart), expected)


@pytest.mark.parametrize("temperature", [torch.tensor(1.3), torch.full((6,), 1.3)])
def test_a_draft_has_its_own_temperature(backend: str, temperature: Tensor) -> None:
    logits = [2 * torch.randn(6, 4, 30) for _ in range(2)]
    draft = logits[1][:, :3].argmax(-1)
    numbers = coins(6, 3, 0.7)
    law = Law(HALVES, temperature=(0.7, 1.3))
    expected = verify(logits, draft, numbers, law, proposers=ints(1, 1, 1))
    apart = verify(
        logits, draft, numbers, law, draft_logits=logits[1], draft_temperature=temperature
    )
    assert_same(apart, expected)
    default = verify(logits, draft, numbers, law, draft_logits=logits[1])
    as_first = verify(
        logits, draft, numbers, law, draft_logits=logits[1], draft_temperature=torch.tensor(0.7)
    )
    assert_same(default, as_first)
    assert not torch.equal(default.tokens, expected.tokens)


def test_each_row_has_its_own_draft_temperature(backend: str) -> None:
    logits = [2 * torch.randn(6, 3, 30) for _ in range(2)]
    draft = logits[1][:, :2].argmax(-1)
    numbers = coins(6, 2, 0.7)
    temperature = torch.linspace(0.3, 2.0, 6)
    together = verify(
        logits,
        draft,
        numbers,
        Law(HALVES),
        draft_logits=logits[1],
        draft_temperature=temperature,
    )
    for b in range(6):
        row = slice(b, b + 1)
        alone = verify(
            [member[row] for member in logits],
            draft[row],
            numbers[row],
            Law(HALVES),
            draft_logits=logits[1][row],
            draft_temperature=temperature[b],
        )
        assert_same(together, alone, row)
    assert together.num_accepted.max() > together.num_accepted.min()


def test_no_proposer_is_a_point_mass(backend: str) -> None:
    logits = [torch.randn(6, 3, 30)]
    draft = torch.randint(0, 30, (6, 2))
    numbers = coins(6, 2, 0.03)
    expected = verify(logits, draft, numbers, Law())
    assert_same(
        verify(logits, draft, numbers, Law(), proposers=ints(POINT_MASS, POINT_MASS)), expected
    )


def test_lenience(backend: str) -> None:
    batch = 15 if backend == "triton" else 50  # its interpreter is slow
    logits = [torch.randn(batch, 3, 30) for _ in range(2)]
    draft = logits[1][:, :2].argmax(-1)
    numbers = torch.rand(batch, 3, 4)
    proposers = ints(1, 1)

    def accepted(**options: Any) -> Verdict:
        return verify(logits, draft, numbers, Law(HALVES), proposers=proposers, **options)

    assert_same(accepted(acceptance=Acceptance("lenient", lenience=1)), accepted())
    few, more = accepted(), accepted(acceptance=Acceptance("lenient", lenience=0.5))
    assert (more.num_accepted >= few.num_accepted).all()
    assert more.num_accepted.sum() > few.num_accepted.sum()
    all_kept = accepted(acceptance=Acceptance("lenient", lenience=0.01))
    assert all_kept.num_accepted.tolist() == [2] * batch


@pytest.mark.parametrize("how", ["temperature", "rule"])
def test_greedy_emits_the_argmax_whatever_the_draft(backend: str, how: str) -> None:
    batch, vocab_size = 6, 6
    logits = [2 * torch.randn(batch, 4, vocab_size) for _ in range(2)]
    options = {"temperature": 0.0, "top_k": 1} if how == "temperature" else {}
    rule = "rejection" if how == "temperature" else "greedy"
    best = mix(logits, Law(HALVES))[0].argmax(-1)
    draft = torch.randint(0, vocab_size, (batch, 3))
    draft[:2] = best[:2, :3]
    proposals: list[dict[str, Any]] = [
        {},
        {"proposers": ints(0, POINT_MASS, 1)},
        {"draft_logits": torch.randn(batch, 3, vocab_size)},
    ]
    for proposal in proposals:
        for coin in (0.0, TOP):
            numbers = coins(batch, 3, coin)
            verdict = verify(
                logits, draft, numbers, Law(HALVES, **options), acceptance=rule, **proposal
            )
            for b in range(batch):
                matches = (draft[b] == best[b, :3]).int().cumprod(0).sum().item()
                assert verdict.num_accepted[b] == matches
                assert verdict.tokens[b, : matches + 1].tolist() == best[b, : matches + 1].tolist()
            assert not verdict.status.any()


def test_a_greedy_row_does_not_look_at_the_draft(backend: str) -> None:
    logits = torch.randn(2, 3, 9)
    verdict = verify(
        [logits],
        logits[:, :2].argmax(-1),
        coins(2, 2, TOP),
        Law(temperature=0.0),
        draft_logits=torch.full((2, 2, 9), NAN),
    )
    assert verdict.num_accepted.tolist() == [2, 2]
    assert verdict.status.tolist() == [0, 0]


def test_greedy_takes_the_lowest_of_tied_tokens(backend: str) -> None:
    logits = torch.zeros(1, 2, 2000)
    logits[..., 1500:] = 1.0
    law = Law(temperature=0.0)
    for token, accepted in ((1500, 1), (1501, 0)):
        verdict = verify([logits], torch.tensor([[token]]), coins(1, 1, TOP), law)
        assert verdict.num_accepted.item() == accepted
        assert verdict.tokens[0, 0] == 1500


def test_greedy_text_does_not_depend_on_the_tree(backend: str) -> None:
    """With the argmax among the children it is found, as whichever child it is."""
    logits = torch.randn(1, 5, 9)
    best = logits[0, 0].argmax().item()
    wrong = [(best + k) % 9 for k in (1, 2, 3)]
    for place in range(4):
        children = [*wrong[:place], best, *wrong[place:]]
        verdict = verify(
            [logits],
            torch.tensor([children]),
            coins(1, 4, TOP),
            Law(temperature=0.0),
            parents=ints(-1, 0, 0, 0, 0),
        )
        assert verdict.path[0, 0] == place + 1


def test_greedy_and_sampled_rows_mix(backend: str) -> None:
    logits = [torch.randn(6, 3, 20) for _ in range(2)]
    draft = torch.randint(0, 20, (6, 2))
    numbers = coins(6, 2, 0.02)
    temperature = torch.tensor([0.0, 0.8] * 3)
    together = verify(logits, draft, numbers, Law(HALVES, temperature=temperature))
    for b in range(6):
        row = slice(b, b + 1)
        law = Law(HALVES, temperature=temperature[b].item())
        alone = verify([member[row] for member in logits], draft[row], numbers[row], law)
        assert_same(together, alone, row)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_degenerate_rows(backend: str, temperature: float) -> None:
    logits = torch.zeros(4, 2, 2000)
    logits[0, :, 3] = NAN
    logits[0, :, 1999] = 100.0
    logits[1, :, 1500] = INF
    logits[2] = -INF
    logits[3] = NAN
    draft = torch.tensor([[1999], [1500], [5], [5]])
    verdict = verify([logits], draft, coins(4, 1, 0.0), Law(temperature=temperature))
    assert verdict.num_accepted.tolist() == [1, 1, 0, 0]
    assert verdict.tokens.tolist() == [[1999, 1999], [1500, 1500], [0, PADDING], [0, PADDING]]
    assert verdict.status.tolist() == [
        Status.NAN_LOGITS,
        Status.INFINITE_LOGITS,
        Status.EMPTY_LAW,
        Status.NAN_LOGITS | Status.EMPTY_LAW,
    ]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_a_degenerate_draft_keeps_the_emitted_token_in_the_target(
    backend: str, garbage: float
) -> None:
    logits = torch.full((1, 2, 8), -INF)
    logits[..., 2] = logits[..., 6] = 0.0
    verdict = verify(
        [logits],
        torch.tensor([[4]]),
        coins(1, 1, 0.0),
        Law(),
        draft_logits=torch.full((1, 1, 8), garbage),
    )
    assert verdict.tokens[0, 0] in (2, 6)
    bits = {NAN: Status.NAN_LOGITS, INF: Status.INFINITE_LOGITS, -INF: 0}
    assert verdict.status.item() & (Status.NAN_LOGITS | Status.INFINITE_LOGITS) == bits[garbage]


def test_only_what_was_consulted_is_reported(backend: str) -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 2] = NAN
    logits[0, :2, 4] = -INF
    verdict = verify([logits], torch.tensor([[1, 4]]), coins(1, 2, 0.0), Law())
    assert verdict.num_accepted.item() == 1
    assert verdict.status.item() == 0


def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    logits = [2 * torch.randn(6, 7, 1100) for _ in range(2)]
    draft = torch.randint(0, 1100, (6, 6))
    numbers = coins(6, 6, 1e-4)
    options: dict[str, Any] = {"parents": ints(*BUSHY), "proposers": ints(0, 1, -1, 0, 1, -1)}
    together = verify(logits, draft, numbers, Law(HALVES, top_p=0.99), **options)
    order = torch.randperm(6)
    shuffled = [member[order] for member in logits]
    law = Law(HALVES, top_p=0.99)
    other = verify(shuffled, draft[order], numbers[order], law, **options)
    assert_same(together, other, order)
    for b in range(6):
        row = slice(b, b + 1)
        alone = verify(
            [member[row].clone() for member in logits], draft[row], numbers[row], law, **options
        )
        assert_same(together, alone, row)


def test_padding_strides_and_widths_do_not_matter(backend: str) -> None:
    logits = [torch.randn(3, 4, 21), torch.randn(3, 4, 21).bfloat16()]
    draft = torch.randint(0, 21, (3, 3))
    numbers = coins(3, 3, 0.05)
    apart = torch.randn(3, 4, 21)
    law = Law(HALVES, top_k=9)
    expected = verify(logits, draft, numbers, law, draft_logits=apart)

    def padded(tensor: Tensor, extra: int) -> Tensor:
        wide = torch.full((6, 9, 21 + extra), NAN, dtype=tensor.dtype)
        wide[::2, 1:9:2, :21] = tensor
        return wide[::2, 1:9:2]

    views = [padded(member, extra) for member, extra in zip(logits, (0, 11), strict=True)]
    law = Law(HALVES, top_k=9, vocab_size=21)
    verdict = verify(
        views,
        draft.repeat(1, 2)[:, :3],
        numbers.repeat(1, 1, 2)[..., :4],
        law,
        draft_logits=padded(apart, 5),
    )
    assert_same(verdict, expected)


def test_inputs_are_not_modified(backend: str) -> None:
    logits = [torch.randn(2, 3, 9) for _ in range(2)]
    logits[0][0, 0, 0] = NAN
    others = [
        torch.randint(0, 9, (2, 2)),
        torch.rand(2, 3, 4),
        ints(-1, 0, 0),
        torch.randn(2, 2, 9),
        torch.tensor([0.5, 0.9]),
    ]
    before = [tensor.clone() for tensor in (*logits, *others)]
    draft, numbers, parents, apart, temperature = others
    for law in (Law(HALVES, top_k=3, top_p=0.9), Law(HALVES, temperature=0.0)):
        verify(
            logits,
            draft,
            numbers,
            law,
            parents=parents,
            draft_logits=apart,
            draft_temperature=temperature,
        )
    for tensor, copy in zip((*logits, *others), before, strict=True):
        torch.testing.assert_close(tensor, copy, equal_nan=True, atol=0, rtol=0)


def test_an_empty_batch(backend: str) -> None:
    draft = torch.empty(0, 3, dtype=torch.int64)
    verdict = verify([torch.empty(0, 4, 9)], draft, torch.empty(0, 4, 4), Law())
    assert verdict.tokens.shape == (0, 4)
    assert verdict.path.shape == (0, 3)


LAWS: list[tuple[tuple[float, ...], dict[str, Any]]] = [
    ((1.0,), {}),
    ((0.5, 0.3, 0.2), {"temperature": (0.7, 1.0, 1.3)}),
    ((0.5, 0.5), {"temperature": 0.8, "top_k": 7, "top_p": 0.9}),
    ((0.5, 0.5), {"min_p": 0.05, "top_p": 0.95, "scope": "ensemble"}),
    ((1.5, -0.5), {"ensemble": "product", "plausibility": 0.05, "temperature": 0.9}),
    ((0.6, 0.4), {"ensemble": "product", "scope": "ensemble", "temperature": 1.2, "top_k": 20}),
]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(3, torch.float32), (40, torch.float16), (1500, torch.bfloat16), (9000, torch.float32)],
)
@pytest.mark.parametrize(("weights", "options"), LAWS, ids=str)
@pytest.mark.parametrize("tree", [None, BUSHY], ids=["chain", "tree"])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_every_backend_emits_what_the_reference_emits(
    backend: str,
    vocab_size: int,
    dtype: torch.dtype,
    weights: tuple[float, ...],
    options: dict[str, Any],
    tree: tuple[int, ...] | None,
) -> None:
    batch, nodes, members = 4, 6, len(weights)
    shared = 3 * torch.randn(batch, nodes + 1, vocab_size)
    logits = [(shared + torch.randn_like(shared)).to(dtype) for _ in weights]
    law = Law(weights, **options)
    rows = [member[:, :nodes] for member in logits]
    draft = sample(rows, torch.rand(batch, nodes, 4), law, member=0).tokens
    arguments = law.tensors("verify", draft.device, vocab_size)
    parents = None if tree is None else ints(*tree)[None]
    apart = (shared + torch.randn_like(shared)).to(dtype)
    drawn = torch.zeros(1, nodes, dtype=torch.int32)
    mixed = torch.randint(-1, members, (batch, nodes), dtype=torch.int32)
    for proposers, draft_logits, acceptance in (
        (drawn, None, "rejection"),
        (mixed, None, Acceptance("lenient", lenience=0.8)),
        (None, apart, "rejection"),
        (None, None, "rejection"),
        (None, None, "greedy"),
    ):
        chosen = Acceptance.of(acceptance)
        numbers = torch.rand(batch, nodes + 1, 4)
        verdict = verify(
            logits,
            draft,
            numbers,
            law,
            parents=parents,
            proposers=proposers,
            draft_logits=draft_logits,
            acceptance=acceptance,
        )
        call = VerifyCall(
            logits, draft, numbers, arguments, parents, proposers, draft_logits
        )._replace(acceptance=chosen.rule.name, parameters=chosen.parameters)
        expected = Verdict(*reference.verify(call))
        torch.testing.assert_close(verdict.log_probs, expected.log_probs, atol=2e-5, rtol=1e-5)
        assert_same(verdict._replace(log_probs=expected.log_probs), expected)


def test_a_weight_for_each_position_is_used_at_it(backend: str) -> None:
    logits = [torch.randn(2, 3, 9) for _ in range(2)]
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]).expand(2, 3, 2)
    numbers = coins(2, 2, 0.0)
    draft = torch.randint(0, 9, (2, 2))
    verdict = verify(logits, draft, numbers, Law(weights))
    for row, row_weights in enumerate(weights[0].tolist()):
        law = laws.ensemble_law([member[0, row] for member in logits], row_weights)
        log_prob = law.log()[verdict.tokens[0, row]].float()
        torch.testing.assert_close(verdict.log_probs[0, row], log_prob, atol=1e-5, rtol=1e-5)


def known_lse(logits: list[Tensor], temperature: float = 1.0) -> Tensor:
    return torch.stack([(one.double() / temperature).logsumexp(-1) for one in logits], -1).float()


@pytest.mark.parametrize("vocab_size", [30, 2500])
def test_log_sum_exps_that_are_known_change_nothing(backend: str, vocab_size: int) -> None:
    shared = 2 * torch.randn(6, 4, vocab_size)
    logits = [shared + torch.randn_like(shared) for _ in range(3)]
    apart = shared + torch.randn_like(shared)
    numbers = coins(6, 3, 0.0)
    numbers[2:, 1:, 0] = torch.tensor([0.4, 0.4, TOP, TOP])[:, None]
    law = Law((0.5, 0.3, 0.2), temperature=0.8)
    lse = known_lse(logits, 0.8)
    half = lse.masked_fill(torch.rand(lse.shape) < 0.5, NAN)
    for drafts in (
        {},
        {"proposers": ints(1, 1, 1)},
        {"draft_logits": apart},
    ):
        source = drafts.get("draft_logits", logits[1])
        tokens = source[:, :3].argmax(-1)
        expected = verify(logits, tokens, numbers, law, **drafts)
        tellings: list[dict[str, Tensor]] = [{"lse": lse}, {"lse": half}]
        if "draft_logits" in drafts:
            own = known_lse([apart], 0.8)[..., 0]
            tellings += [{"draft_lse": own}, {"lse": half, "draft_lse": own}]
        for told in tellings:
            found = verify(logits, tokens, numbers, law, **drafts, **told)
            torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
            assert_same(found._replace(log_probs=expected.log_probs), expected)


def test_a_row_that_is_known_is_read_where_a_token_is_drawn_only(backend: str) -> None:
    shared = 2 * torch.randn(4, 4, 2500)
    logits = [shared + torch.randn_like(shared) for _ in range(2)]
    apart = shared + torch.randn_like(shared)
    tokens = apart[:, :3].argmax(-1)
    numbers = coins(4, 3, 0.0)
    numbers[::2, 3, 0] = TOP  # the last draft of every other sequence is at risk
    told = {"lse": known_lse(logits), "draft_lse": known_lse([apart])[..., 0]}
    expected = verify(logits, tokens, numbers, Law(HALVES), draft_logits=apart, **told)
    assert set(expected.num_accepted.tolist()) == {2, 3}
    for b, stop in enumerate(expected.num_accepted.tolist()):
        for row in range(stop):
            for one in (*logits, apart):
                kept = one[b, row, tokens[b, row]].clone()
                one[b, row] = NAN
                one[b, row, tokens[b, row]] = kept
        logits[0][b, stop, 7] = NAN  # of no weight, but reported
    found = verify(logits, tokens, numbers, Law(HALVES), draft_logits=apart, **told)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.status.tolist() == [Status.NAN_LOGITS] * 4


@pytest.mark.parametrize("law", [Law(temperature=0.7), Law(HALVES, temperature=0.7)])
def test_what_sample_has_found_can_be_told(backend: str, law: Law) -> None:
    logits = [2 * torch.randn(6, 3, 30) for _ in law.weights]
    alone = None if len(logits) == 1 else 1
    drafted = sample([one[:, :2] for one in logits], torch.rand(6, 2, 4), law, member=alone)
    torch.testing.assert_close(drafted.lse, known_lse([logits[-1][:, :2]], 0.7)[..., 0])
    numbers = coins(6, 2, 0.6)
    target = [torch.randn(6, 3, 30)]
    options = {"draft_logits": logits[-1], "draft_temperature": torch.tensor(0.7)}
    expected = verify(target, drafted.tokens, numbers, Law(), **options)
    padded = torch.cat((drafted.lse, torch.full((6, 1), NAN)), 1)
    found = verify(target, drafted.tokens, numbers, Law(), draft_lse=padded, **options)
    assert torch.equal(found.tokens, expected.tokens)


def test_what_is_not_finite_is_not_known(backend: str) -> None:
    logits = [torch.randn(1, 2, 9)]
    numbers, token = coins(1, 1, 0.3), torch.tensor([[4]])
    expected = verify(logits, token, numbers, Law())
    for nothing in (NAN, INF, -INF):
        lse = torch.full((1, 2, 1), nothing)
        assert_same(verify(logits, token, numbers, Law(), lse=lse), expected)
    logits[0][0, 0, 2] = INF
    found = verify(logits, token, numbers, Law(), lse=known_lse(logits))
    assert found.tokens[0, 0] == 2
    assert found.status == Status.INFINITE_LOGITS


def test_where_the_temperature_is_0_nothing_is_taken_from_them(backend: str) -> None:
    logits = [torch.randn(2, 2, 9) for _ in range(2)]
    numbers, token = coins(2, 1, 0.3), torch.tensor([[4], [5]])
    wrong = torch.full((2, 2, 2), 50.0)
    for temperature in (0.0, (0.0, 1.0)):
        law = Law(HALVES, temperature=temperature)
        lse = wrong if temperature == 0.0 else torch.where(ints(1, 0) > 0, wrong, known_lse(logits))
        expected = verify(logits, token, numbers, law, proposers=ints(0))
        found = verify(logits, token, numbers, law, proposers=ints(0), lse=lse)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.num_accepted, expected.num_accepted)


def withdrawn_distance(grid: int, *, corrected: bool) -> float:
    """How far the law of a token is from the target's if its draft may be withdrawn.

    A draft x of q is withdrawn where keeps(x) is false. Then q'(x) = q(x) keeps(x) is what it was
    drawn from: less than 1 in all, and a withdrawn token has no mass in it, so it is rejected. If
    not `corrected`, nothing is said of it, and what follows is drawn as if nothing was proposed.
    """
    vocab_size = 5
    target, draft = torch.randn(vocab_size), torch.randn(vocab_size)
    keeps = torch.tensor([True, False, True, False, True])
    q, law = draft.double().softmax(-1), torch.zeros(vocab_size).double()
    masked = draft.masked_fill(~keeps, -INF) if corrected else draft
    points = (torch.arange(grid) + 0.5) / grid
    numbers = torch.zeros(2 * grid, 2, 4)
    numbers[:grid, 1, 0] = points  # which coins keep the draft
    numbers[grid:, 1, 0] = TOP  # what is drawn if it is not kept
    numbers[grid:, 0, 3] = points
    for token in range(vocab_size):
        offered = token if corrected or keeps[token] else -1
        verdict = verify(
            [target.expand(2 * grid, 2, -1).contiguous()],
            torch.full((2 * grid, 1), offered),
            numbers,
            Law(),
            draft_logits=masked.expand(2 * grid, 1, -1).contiguous(),
            draft_lse=draft.logsumexp(-1).expand(2 * grid, 1).contiguous(),
        )
        kept = verdict.num_accepted[:grid].double().mean()
        assert keeps[token] or kept == 0
        drawn = verdict.tokens[grid:, 0].bincount(minlength=vocab_size) / grid
        law[token] += q[token] * kept
        law += q[token] * (1 - kept) * drawn
    return float((law - target.double().softmax(-1)).abs().sum() / 2)


def test_a_draft_that_may_be_withdrawn_is_exact_if_its_law_says_so(backend: str) -> None:
    grid = 16 if backend == "triton" else 128  # its interpreter is slow
    assert withdrawn_distance(grid, corrected=True) < 2 / grid


def test_a_draft_that_may_be_withdrawn_must_say_so() -> None:
    assert withdrawn_distance(128, corrected=False) > 8 / 128


@pytest.mark.parametrize(
    ("law", "given", "message"),
    [
        (Law(HALVES), {"lse": torch.zeros(2, 4, 2)}, r"lse: expected \(2, 3, 2\) float32"),
        (Law(HALVES), {"lse": torch.zeros(2, 3, 2).double()}, "lse: expected .* float32"),
        (Law(HALVES, top_k=3), {"lse": torch.zeros(2, 3, 2)}, "None for a law with filters"),
        (
            Law(HALVES, scope="ensemble"),
            {"lse": torch.zeros(2, 3, 2)},
            "None for a law other than a mixture of scope 'member'",
        ),
        (
            Law((1.0, 1.0), "product"),
            {"lse": torch.zeros(2, 3, 2)},
            "None for a law other than a mixture of scope 'member'",
        ),
        (Law(HALVES), {"draft_lse": torch.zeros(2, 2)}, "None without draft_logits"),
        (
            Law(HALVES),
            {"draft_lse": torch.zeros(2, 3), "draft_logits": torch.zeros(2, 2, 5)},
            r"draft_lse: expected \(2, 2\) float32",
        ),
        (
            Law(HALVES, min_p=0.1),
            {"draft_lse": torch.zeros(2, 2), "draft_logits": torch.zeros(2, 2, 5)},
            "None for a law with filters",
        ),
    ],
    ids=str,
)
def test_log_sum_exps_that_do_not_fit_are_refused(
    law: Law, given: dict[str, Tensor], message: str
) -> None:
    logits = [torch.zeros(2, 3, 5)] * 2
    with pytest.raises(ValueError, match=f"verify: .*{message}"):
        verify(logits, torch.zeros(2, 2, dtype=torch.int32), coins(2, 2, 0.0), law, **given)


def test_tv_at_its_threshold_1_keeps_every_draft_token(backend: str) -> None:
    # No token is common to target and draft: the distance is 1, and rounding lifts its sum.
    batch, width = 24, 41
    rows = 3 * torch.randn(2, batch, 2, width)
    rows[0, ..., ::2] = rows[1, ..., 1::2] = -torch.inf
    drafts = sample([rows[1][:, :1]], torch.rand(batch, 1, 4), Law()).tokens
    for top_k in (0, 3):
        verdict = verify(
            [rows[0]],
            drafts,
            torch.rand(batch, 2, 4),
            Law(),
            draft_logits=rows[1][:, :1],
            acceptance=Acceptance("tv", threshold=1.0, top_k=top_k),
        )
        assert verdict.num_accepted.tolist() == [1] * batch
