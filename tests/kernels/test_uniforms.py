# SPDX-License-Identifier: Apache-2.0
"""`uniforms`: Philox-4x32-10 to the letter, and numbers that depend on their coordinates only."""

import itertools

import pytest
import torch
from laws import chi_square

from specens_kernels import Stream, uniforms

# From kat_vectors of Random123, the authors' library: counter, key, output, in 32-bit words.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (  # the digits of pi
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def int64(low: int, high: int) -> torch.Tensor:
    word = low | high << 32
    return torch.tensor([word - (1 << 64) if word >> 63 else word])


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(
    backend: str, counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]
) -> None:
    numbers = uniforms(int64(*key), int64(*counter[:2])[None], counter[2], index=counter[3])
    assert numbers.dtype == torch.float32
    assert (numbers.double() * 2**24).flatten().tolist() == [word >> 8 for word in output]


def test_a_number_does_not_depend_on_its_neighbours(backend: str) -> None:
    seeds = torch.randint(-(2**62), 2**62, (7,))
    positions = torch.randint(0, 2**40, (7, 5))
    numbers = uniforms(seeds, positions, Stream.VERIFY)
    assert numbers.shape == (7, 5, 4)
    for b, t in itertools.product(range(7), range(5)):
        alone = uniforms(seeds[b : b + 1], positions[b : b + 1, t : t + 1], Stream.VERIFY)
        assert torch.equal(alone[0, 0], numbers[b, t])
    order = torch.randperm(7)
    assert torch.equal(uniforms(seeds[order], positions[order], Stream.VERIFY), numbers[order])


def test_positions_may_be_shared_and_strided(backend: str) -> None:
    seeds = torch.arange(6)[::2]
    shared = torch.arange(4)[None]
    expected = uniforms(seeds.clone(), shared.expand(3, 4).clone(), Stream.DRAFT)
    assert torch.equal(uniforms(seeds, shared, Stream.DRAFT), expected)
    assert torch.equal(uniforms(seeds, torch.arange(8)[None, ::2] // 2, Stream.DRAFT), expected)


def test_no_two_blocks_are_the_same(backend: str) -> None:
    """Streams, indices, positions and seeds, high words too, each change every number."""
    high = 1 << 32
    seeds = torch.tensor([0, 1, high, -1])
    positions = torch.tensor([[0, 1, high, -1]])
    blocks = [
        uniforms(seeds, positions, stream, index=index).flatten(0, 1)
        for stream, index in itertools.product([*Stream, 2**32 - 1], [0, 1, 2**32 - 1])
    ]
    blocks = torch.cat(blocks)
    assert len(blocks.unique(dim=0)) == len(blocks) == 4 * 4 * 4 * 3
    assert len(blocks.flatten().unique()) > 0.99 * blocks.numel()


def test_numbers_are_multiples_of_2_to_the_minus_24_in_0_1(backend: str) -> None:
    numbers = uniforms(torch.arange(50), torch.arange(200)[None], Stream.COMPONENT)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    scaled = numbers.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    assert (scaled.long() & 1).double().mean() > 0.4  # the last of the 24 bits is used


def test_each_word_is_uniform_and_neighbours_are_independent(backend: str) -> None:
    numbers = uniforms(torch.arange(100), torch.arange(400)[None], Stream.VERIFY)
    bins = (numbers * 8).long()
    even = torch.full((64,), 1 / 64)
    for word in range(4):
        pairs = {
            "next position": (bins[:, :-1, word], bins[:, 1:, word]),
            "next seed": (bins[:-1, :, word], bins[1:, :, word]),
            "next word": (bins[:, :, word], bins[:, :, (word + 1) % 4]),
        }
        for name, (one, other) in pairs.items():
            counts = torch.bincount((one * 8 + other).flatten(), minlength=64)
            assert chi_square(counts, even).p_value > 1e-4, name


def test_empty_shapes(backend: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert uniforms(none, torch.zeros(1, 3, dtype=torch.int64), 0).shape == (0, 3, 4)
    assert uniforms(torch.zeros(2, dtype=torch.int64), none[None], 0).shape == (2, 0, 4)
