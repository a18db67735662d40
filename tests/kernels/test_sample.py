# SPDX-License-Identifier: Apache-2.0
"""`sample`: the law by exact inversion, the geometry of the draw, greedy rows, degenerate rows."""

import math
import mmap
from typing import Any

import laws
import pytest
import torch
from calls import SMALL, TILES, Dice, call, check
from folds import law_of
from torch import Tensor

import specens_kernels
from specens_kernels import Law, Sample, Status, mix, reference, sample, verify

INF, NAN = math.inf, math.nan
TILE, SUB_TILE = 8192, 1024

LAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": (0.6, 1.3), "top_p": 0.85},
    {"min_p": 0.2, "scope": "ensemble"},
    {"ensemble": "product", "temperature": 1.5, "top_p": 0.9, "scope": "ensemble"},
]
# Folds of one's own, which the reference alone obeys.
FOLDED: list[dict[str, Any]] = [
    {"ensemble": "minimum", "temperature": (0.6, 1.3)},
    {"ensemble": "quadratic_mean", "top_k": 4, "scope": "ensemble"},
    {"ensemble": "highest_logit", "top_p": 0.85},
]


def numbers_of(*words: Tensor | float) -> Tensor:
    """(K, 1, 4) uniforms; word 0 is not for draws."""
    columns = [torch.as_tensor(word, dtype=torch.float64).reshape(-1) for word in words]
    count = max(map(len, columns))
    return torch.stack([torch.full((count,), 0.5), *(c.expand(count) for c in columns)], -1)[
        :, None
    ]


def measured_law(tokens_at: Any, vocab_size: int, resolution: float) -> Tensor:
    """(V,) law of a draw whose last number is uniform, from where the token changes."""
    wanted = torch.arange(vocab_size - 1)
    edges = laws.bisect(lambda u: tokens_at(u) <= wanted, vocab_size - 1, resolution)
    return torch.cat([torch.zeros(1), edges, torch.ones(1)]).double().diff()


@pytest.mark.parametrize("options", LAWS + FOLDED, ids=str)
@pytest.mark.parametrize("member", [None, 1])
def test_the_law_by_exact_inversion(options: dict[str, Any], member: int | None) -> None:
    """In float64, to the last bits, past the checks of the public op."""
    logits = [2 * torch.randn(5, dtype=torch.float64) for _ in range(2)]
    law = law_of((0.25, 0.75), **options)

    def tokens_at(points: Tensor) -> Tensor:
        count = len(points)
        arguments = law.tensors("sample", points.device, 5)
        rows = [row.expand(count, 1, 5) for row in logits]
        drawn = reference.sample(
            rows, numbers_of(0.3, 0.6, points), arguments, -1 if member is None else member
        )
        return drawn[0][:, 0]

    observed = measured_law(tokens_at, 5, 2.0**-44)
    assert (observed - expected_law(logits, options, member)).abs().sum() < 1e-12


def expected_law(logits: list[Tensor], options: dict[str, Any], member: int | None) -> Tensor:
    if member is None:
        return laws.ensemble_law(logits, (0.25, 0.75), **options)
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, tuple):
        temperature = temperature[member]
    filters = {key: options[key] for key in ("top_k", "top_p", "min_p") if key in options}
    return laws.filtered(logits[member], temperature, **filters).softmax(-1)


@pytest.mark.parametrize("options", LAWS, ids=str)
@pytest.mark.parametrize("member", [None, 1])
def test_the_public_op_draws_that_law(
    backend: str, options: dict[str, Any], member: int | None
) -> None:
    logits = [2 * torch.randn(5) for _ in range(2)]

    def tokens_at(points: Tensor) -> Tensor:
        rows = [row.expand(len(points), 1, 5) for row in logits]
        numbers = numbers_of(0.3, 0.6, points).float()
        return sample(rows, numbers, Law((0.25, 0.75), **options), member=member).tokens[:, 0]

    observed = measured_law(tokens_at, 5, 2.0**-24)
    # Each edge is known to 2^-24, and the arithmetic of a kernel to a few parts of it.
    assert (observed - expected_law(logits, options, member)).abs().sum() < 5e-6


@pytest.mark.parametrize(
    ("backend", "count"),
    [("native", 200_000), pytest.param("reference", 8_000, marks=pytest.mark.slow)],
    indirect=["backend"],
)
def test_draws_fit_the_law_and_not_a_close_one(backend: str, count: int) -> None:
    row = torch.linspace(1.5, -1.5, 16)
    law = laws.ensemble_law([row, row.flip(0)], (0.8, 0.2))
    close = laws.ensemble_law([row, row.flip(0)], (0.7, 0.3))
    assert laws.power(law, close, count, 1e-4) > 0.999
    tokens = torch.cat(
        [
            sample(
                [row.expand(1000, 1, 16), row.flip(0).expand(1000, 1, 16)],
                torch.rand(1000, 1, 4),
                Law((0.8, 0.2)),
            ).tokens.flatten()
            for _ in range(count // 1000)
        ]
    )
    counts = torch.bincount(tokens, minlength=16)
    assert laws.chi_square(counts, law).p_value > 1e-4
    assert laws.chi_square(counts, close).p_value < 1e-4


@pytest.mark.parametrize("vocab_size", [1, 2, 1023, 1024, 1025, 8191, 8192, 8193, 20_000])
def test_a_token_owns_its_box_of_tile_sub_tile_and_token(backend: str, vocab_size: int) -> None:
    """Just inside the corners of its box every token is drawn, and outside of them another."""
    logits = torch.randn(vocab_size)
    law = logits.double().softmax(-1)
    borders = [0, 1, 1023, 1024, 2047, 2048, 8191, 8192, 16_383, 16_384, vocab_size - 1]
    tokens = sorted({token for token in borders if token < vocab_size})

    def span(low: int, start: int, stop: int, end: int) -> tuple[float, float]:
        """Where [start, stop) lies in [low, end), by mass."""
        total = law[low:end].sum()
        return (law[low:start].sum() / total).item(), (law[low:stop].sum() / total).item()

    corners, expected = [], []
    for token in tokens:
        tile = token // TILE * TILE
        sub_tile = token // SUB_TILE * SUB_TILE
        box = [
            span(0, tile, tile + TILE, vocab_size),
            span(tile, sub_tile, sub_tile + SUB_TILE, tile + TILE),
            span(sub_tile, token, token + 1, sub_tile + SUB_TILE),
        ]
        for at in (0.02, 0.98):  # of each side, so that float32 sums do not matter
            corners.append([low + at * (high - low) for low, high in box])
            expected.append(token)
        for level, (low, high) in enumerate(box):
            for outside in (low - 0.02 * (high - low), high + 0.02 * (high - low)):
                if 0 <= outside < 1 - 2**-24:
                    inside = [(a + b) / 2 for a, b in box]
                    inside[level] = outside
                    corners.append(inside)
                    expected.append(-1 - token)
    words = torch.tensor(corners).float()
    numbers = torch.cat([torch.full((len(words), 1), 0.5), words], -1)[:, None]
    drawn = sample([logits.expand(len(words), 1, vocab_size)], numbers, Law()).tokens[:, 0]
    for token, wanted in zip(drawn.tolist(), expected, strict=True):
        assert token == wanted if wanted >= 0 else token != -1 - wanted


@pytest.mark.parametrize("vocab_size", [3, 1025, 8193, 20_000])
def test_tokens_without_mass_are_never_drawn(backend: str, vocab_size: int) -> None:
    """Not at the ends of the numbers either, nor in tiles that have no mass at all."""
    logits = torch.full((vocab_size,), -INF)
    alive = torch.tensor([1, vocab_size - 2])
    logits[alive] = torch.tensor([0.0, 1.0])
    ends = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    words = torch.cartesian_prod(ends, ends, ends)
    numbers = torch.cat([torch.full((64, 1), 0.5), words], -1)[:, None]
    drawn = sample([logits.expand(64, 1, vocab_size)], numbers, Law())
    assert torch.isin(drawn.tokens, alive).all()
    assert drawn.tokens[0] == 1
    assert drawn.tokens[-1] == vocab_size - 2
    assert not drawn.status.any()


@pytest.mark.parametrize("vocab_size", [7, 1500, 9000])
@pytest.mark.parametrize("options", [*LAWS, {"temperature": 0.0}], ids=str)
def test_every_backend_draws_the_same_token(
    backend: str, vocab_size: int, options: dict[str, Any]
) -> None:
    logits = [3 * torch.randn(8, 4, vocab_size) for _ in range(2)]
    law = law_of((0.25, 0.75), **options)
    numbers = torch.rand(8, 4, 4)
    drawn = sample(logits, numbers, law)
    arguments = law.tensors("sample", numbers.device, vocab_size)
    expected = Sample(*reference.sample(logits, numbers, arguments, -1))
    assert torch.equal(drawn.tokens, expected.tokens)
    torch.testing.assert_close(drawn.log_probs, expected.log_probs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(drawn.lse, expected.lse, atol=2e-5, rtol=1e-5)
    assert torch.equal(drawn.status, expected.status)


def test_log_probs_and_lse_are_those_of_the_law(backend: str) -> None:
    logits = [2 * torch.randn(3, 4, 50) for _ in range(2)]
    law = Law((0.25, 0.75), temperature=0.8, top_k=20)
    drawn = sample(logits, torch.rand(3, 4, 4), law)
    expected = mix(logits, law)[0].gather(-1, drawn.tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(drawn.log_probs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn.lse, torch.zeros(3, 4), atol=1e-5, rtol=0)
    alone = sample(logits, torch.rand(3, 4, 4), law, member=1)
    kept = laws.filtered(logits[1][0, 0], 0.8, top_k=20)
    torch.testing.assert_close(alone.lse[0, 0], kept.logsumexp(-1).float(), atol=1e-5, rtol=1e-5)
    log_prob = (kept - kept.logsumexp(-1))[alone.tokens[0, 0]]
    torch.testing.assert_close(alone.log_probs[0, 0], log_prob.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_one_member_of_a_weight_nobody_knows_has_no_lse_to_tell(
    backend: str, weight: float
) -> None:
    """Only the host could say whether it is drawn from at all."""
    logits = 2 * torch.randn(2, 3, 50)
    law = Law(torch.tensor([weight]), temperature=0.8)
    drawn = sample([logits], torch.rand(2, 3, 4), law)
    assert drawn.lse.isnan().all()
    tokens, numbers = drawn.tokens[:, :2], torch.rand(2, 3, 4)
    told = verify([logits], tokens, numbers, law, lse=drawn.lse[..., None])
    for one, other in zip(told, verify([logits], tokens, numbers, law), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("member", [None, 0])
@pytest.mark.parametrize("vocab_size", [6, 9000])
def test_greedy_takes_the_lowest_of_the_best(
    backend: str, member: int | None, vocab_size: int
) -> None:
    logits = torch.zeros(1, 1, vocab_size)
    best = vocab_size // 2
    logits[..., best:] = 1.0
    for number in (0.0, 0.5, 1 - 2**-24):
        numbers = torch.full((1, 1, 4), number)
        law = Law((0.5, 0.5), temperature=0.0, top_p=0.1)
        assert sample([logits, logits], numbers, law, member=member).tokens.item() == best


def test_greedy_and_sampled_rows_mix(backend: str) -> None:
    row = torch.tensor([0.0, 2.0, 1.0]).expand(4, 1, 3)
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0])
    numbers = torch.full((4, 1, 4), 1 - 2**-24)
    law = Law(temperature=temperature)
    assert sample([row], numbers, law).tokens.flatten().tolist() == [1, 2, 1, 2]


def test_a_member_alone_does_not_see_the_others(backend: str) -> None:
    first = torch.randn(2, 3, 9)
    other = torch.full_like(first, NAN)
    numbers = torch.rand(2, 3, 4)
    drawn = sample([other, first], numbers, Law((0.5, 0.5), temperature=(0.3, 0.8)), member=1)
    expected = sample([first], numbers, Law(temperature=0.8))
    assert torch.equal(drawn.tokens, expected.tokens)
    torch.testing.assert_close(drawn.log_probs, expected.log_probs)
    assert not drawn.status.any()


def test_word_0_is_for_coins(backend: str) -> None:
    logits = [torch.randn(4, 2, 9)]
    numbers = torch.rand(4, 2, 4)
    other = numbers.clone()
    other[..., 0] = 1 - numbers[..., 0]
    assert torch.equal(sample(logits, numbers, Law()).tokens, sample(logits, other, Law()).tokens)


def test_a_row_does_not_depend_on_its_neighbours(backend: str) -> None:
    logits = [torch.randn(6, 3, 1030) for _ in range(2)]
    numbers = torch.rand(6, 3, 4)
    law = Law((0.5, 0.5), top_p=0.9)
    drawn = sample(logits, numbers, law)
    order = torch.randperm(6)
    shuffled = sample([member[order] for member in logits], numbers[order], law)
    for one, other in zip(drawn, shuffled, strict=True):
        assert torch.equal(one[order], other)
    for b in range(6):
        alone = sample(
            [member[b : b + 1, 1:2].clone() for member in logits], numbers[b : b + 1, 1:2], law
        )
        assert alone.tokens.item() == drawn.tokens[b, 1]
        assert alone.log_probs.item() == drawn.log_probs[b, 1]


def test_padding_is_not_drawn(backend: str) -> None:
    logits = torch.full((5, 1, 40), NAN)
    logits[..., :7] = torch.randn(7)
    numbers = torch.rand(5, 1, 4)
    numbers[0] = 1 - 2**-24
    drawn = sample([logits], numbers, Law(vocab_size=7))
    assert torch.equal(drawn.tokens, sample([logits[..., :7].clone()], numbers, Law()).tokens)
    assert not drawn.status.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("member", [None, 0])
def test_degenerate_rows(backend: str, temperature: float, member: int | None) -> None:
    logits = torch.zeros(1, 4, 2000)
    logits[0, 0, 1999] = 100.0
    logits[0, 0, 3] = NAN
    logits[0, 1, 1500] = INF
    logits[0, 2] = -INF
    logits[0, 3] = NAN
    drawn = sample([logits], torch.rand(1, 4, 4), Law(temperature=temperature), member=member)
    assert drawn.tokens[0].tolist() == [1999, 1500, 0, 0]
    assert drawn.status[0].tolist() == [
        Status.NAN_LOGITS,
        Status.INFINITE_LOGITS,
        Status.EMPTY_LAW,
        Status.NAN_LOGITS | Status.EMPTY_LAW,
    ]
    torch.testing.assert_close(drawn.log_probs[0], torch.tensor([0.0, 0.0, -INF, -INF]))


def test_rows_beyond_2_to_the_31_elements_are_found(backend: str) -> None:
    """Row offsets are 64-bit. Of the memory between the rows no page is ever touched."""
    far = 2**31 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 8)), dtype=torch.bfloat16)
    logits = memory.as_strided((2, 1, 8), (far, 8, 1))
    logits[0, 0, 1] = logits[1, 0, 5] = 9.0
    drawn = sample([logits], torch.rand(2, 1, 4), Law(temperature=0.0))
    assert drawn.tokens.flatten().tolist() == [1, 5]


def test_inputs_are_not_modified(backend: str) -> None:
    logits = [torch.randn(2, 3, 17)]
    numbers = torch.rand(2, 3, 4)
    before = logits[0].clone(), numbers.clone()
    sample(logits, numbers, Law(top_k=3))
    assert torch.equal(logits[0], before[0])
    assert torch.equal(numbers, before[1])


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_empty_shapes(backend: str, shape: tuple[int, int]) -> None:
    drawn = sample([torch.zeros(*shape, 5)], torch.zeros(*shape, 4), Law())
    assert all(value.shape == shape for value in drawn)


def conditional_laws(tokens_at: Any, vocab_size: int, count: int, resolution: float) -> Any:
    """Of each list of `count` - 1 distinct tokens: the law of the next one, by inversion."""
    laws_after: dict[tuple[int, ...], Tensor] = {}

    def visit(numbers: tuple[float, ...], drawn: tuple[int, ...]) -> None:
        law = measured_law(lambda u: tokens_at(numbers, u), vocab_size, resolution)
        laws_after[drawn] = law
        if len(drawn) + 1 < count:
            middles = law.cumsum(-1) - law / 2
            for token in range(vocab_size):
                if law[token] > 0:
                    visit((*numbers, middles[token].item()), (*drawn, token))

    visit((), ())
    return laws_after


@pytest.mark.parametrize("options", LAWS[:3], ids=str)
@pytest.mark.parametrize("member", [None, 1])
def test_several_tokens_are_drawn_without_replacement(
    backend: str, options: dict[str, Any], member: int | None
) -> None:
    logits = [2 * torch.randn(4) for _ in range(2)]

    def tokens_at(before: tuple[float, ...], points: Tensor) -> Tensor:
        count = len(before) + 1
        numbers = torch.full((len(points), 1, count, 4), 0.5)
        numbers[:, 0, :-1, 3] = torch.tensor(before)
        numbers[:, 0, -1, 3] = points.float()
        rows = [row.expand(len(points), 1, 4) for row in logits]
        law = Law((0.25, 0.75), **options)
        return sample(rows, numbers, law, member=member, count=count).tokens[:, 0, -1]

    first = expected_law(logits, options, member)
    for drawn, observed in conditional_laws(tokens_at, 4, 3, 2.0**-24).items():
        left = first.index_fill(0, torch.tensor(drawn, dtype=torch.int64), 0.0)
        if left.sum() > 1e-6:
            assert (observed - left / left.sum()).abs().sum() < 1e-5, drawn


@pytest.mark.parametrize("vocab_size", [5, 1500, 9000, 20_000])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_of_several_tokens_the_first_is_the_one_and_none_comes_twice(
    backend: str, vocab_size: int, temperature: float
) -> None:
    logits = [3 * torch.randn(4, 3, vocab_size) for _ in range(2)]
    numbers, law = torch.rand(4, 3, 4, 4), Law((0.5, 0.5), temperature=temperature)
    for member in (None, 1):
        many = sample(logits, numbers, law, member=member, count=4)
        one = sample(logits, numbers[:, :, 0], law, member=member)
        assert torch.equal(many.tokens[..., 0], one.tokens)
        assert torch.equal(many.log_probs[..., 0], one.log_probs)
        assert torch.equal(many.lse, one.lse)
        assert torch.equal(many.status, one.status)
        assert (many.tokens.sort(-1).values.diff(dim=-1) > 0).all()
        with specens_kernels.backend("reference"):
            right = sample(logits, numbers, law, member=member, count=4)
        assert torch.equal(many.tokens, right.tokens)
        torch.testing.assert_close(many.log_probs, right.log_probs, atol=1e-5, rtol=3e-6)


def test_random_draws_of_several_tokens(backend: str) -> None:
    """Of laws as hard as those of test_conformance.py."""
    for seed in range(300):
        one = call(seed, SMALL if seed % 4 else TILES)
        if one.op == "sample":
            logits, numbers, law = one.arguments
            several = Dice(seed).numbers(*numbers.shape[:2], 4, 4)
            check(
                backend,
                one._replace(arguments=(logits, several, law), options={**one.options, "count": 4}),
            )


def test_several_tokens_at_temperature_0_are_the_most_probable(backend: str) -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0, 3.0, -INF, 0.0]]])
    drawn = sample([logits], torch.rand(1, 1, 6, 4), Law(temperature=0.0), count=6)
    assert drawn.tokens.flatten().tolist() == [1, 3, 2, 0, 5, -1]
    assert drawn.log_probs[0, 0, 5] == -INF
    assert drawn.status.item() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_law_of_fewer_tokens_has_no_more(backend: str, temperature: float) -> None:
    logits = torch.full((2, 1, 3000), -INF)
    logits[0, 0, [7, 2999]] = 1.0
    law = Law(temperature=temperature)
    drawn = sample([logits], torch.rand(2, 1, 4, 4), law, count=4)
    assert sorted(drawn.tokens[0, 0, :2].tolist()) == [7, 2999]
    assert drawn.tokens[0, 0, 2:].tolist() == [-1, -1]
    assert drawn.tokens[1].flatten().tolist() == [-1] * 4
    assert drawn.log_probs[drawn.tokens < 0].isneginf().all()
    assert drawn.status.flatten().tolist() == [0, Status.EMPTY_LAW]
