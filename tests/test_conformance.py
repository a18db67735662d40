# SPDX-License-Identifier: Apache-2.0
"""Every backend against the reference: the same tokens for the same uniforms.

The same tokens, counts, paths and status for random calls at sizes from 2 to 262,144, and for a
list of hard ones. A situation is a seed, and a failure prints it.
"""

from typing import Any

import pytest
import torch
from calls import REAL, SMALL, TILES, Call, call, check

import specens_kernels
from specens_kernels import ENSEMBLES, Law, sample

pytestmark = pytest.mark.parametrize("backend", ["native"], indirect=True)


@pytest.mark.parametrize("first", range(0, 2000, 50))
def test_small_vocabularies(backend: str, first: int) -> None:
    for seed in range(first, first + 50):
        check(call(seed, SMALL), backend)


@pytest.mark.parametrize("first", range(10_000, 10_300, 15))
def test_vocabularies_around_a_tile(backend: str, first: int) -> None:
    for seed in range(first, first + 15):
        check(call(seed, TILES), backend)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20_000, 20_040, 5))
def test_real_vocabularies(backend: str, first: int) -> None:
    for seed in range(first, first + 5):
        check(call(seed, REAL), backend)


# --- searches ---


@pytest.mark.parametrize("scope", ["member", "ensemble"])
@pytest.mark.parametrize(
    "options", [{"top_k": 700}, {"top_k": 5000}, {"top_p": 0.3}, {"top_p": 0.95}], ids=str
)
@pytest.mark.parametrize("levels", [1, 2, 40, 0], ids="levels {}".format)
def test_thresholds_among_thousands_of_ties(
    backend: str, scope: str, options: dict[str, Any], levels: int
) -> None:
    """A threshold that cannot be listed, for too many tokens tie or lie between."""
    logits = torch.randn(1, 2, 20_000) * 2
    if levels > 0:
        logits = (logits.clamp(-1.9, 1.9) / 4 * levels).round() * 4 / levels
    members = [logits.bfloat16(), torch.randn(1, 2, 20_000)]
    law = Law((0.5, 0.5), scope=scope, **options)
    one = Call("mix", (members, law), {}, "")
    expected, found = one.run("reference")[0], one.run(backend)[0]
    assert torch.equal(expected.isinf(), found.isinf())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ensemble", sorted(ENSEMBLES))
def test_greedy_takes_the_lowest_of_tied_tokens_in_any_tile(backend: str, ensemble: str) -> None:
    vocab_size = 30_000
    logits = torch.randn(1, 3, vocab_size)
    for row, places in enumerate([(0, 29_999), (8191, 8192), (1024, 1023, 20_000)]):
        logits[0, row, list(places)] = 9.0
    law = Law((0.5, 0.5), ensemble, temperature=0.0)
    with specens_kernels.backend(backend):
        drawn = sample([logits, logits.clone()], torch.rand(1, 3, 4), law)
    assert drawn.tokens.tolist() == [[0, 8191, 1023]]


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_greedy_between_confident_members_that_disagree(backend: str, first: int) -> None:
    """The best two tokens differ by what single-precision normalisers cannot tell."""
    for seed in range(first, first + 100):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 1, 1, 17, generator=generator)
        best = torch.randint(17, (2, 1, 1, 1), generator=generator)
        members = list(logits.scatter_add(-1, best, torch.full(best.shape, 20.0)).unbind())
        law = Law((0.5, 0.5), temperature=0.0)
        one = Call("sample", (members, torch.zeros(1, 1, 4), law), {}, f"seed {seed}")
        check(one, backend)


def test_greedy_ties_do_not_depend_on_the_order_of_a_sum(backend: str) -> None:
    members = [torch.tensor([[[-1.0, 2.0, 19.0]]]), torch.tensor([[[-1.0, 19.0, 2.0]]])]
    for logits in (members, members[::-1]):
        with specens_kernels.backend(backend):
            drawn = sample(logits, torch.zeros(1, 1, 4), Law((0.5, 0.5), temperature=0.0))
        assert drawn.tokens.item() == 1


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -0.5)], ids=str)
def test_a_nan_that_a_filter_would_pass_over_is_seen(
    backend: str, weights: tuple[float, ...]
) -> None:
    for vocab_size in (2048, 8192):
        members = [3 * torch.randn(1, 4, vocab_size) for _ in weights]
        members[0][0, :, 777] = torch.nan
        law = Law(weights, "product", top_k=3, plausibility=0.1)
        check(Call("mix", (members, law), {}, f"{weights}, {vocab_size}"), backend)
