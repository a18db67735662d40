# SPDX-License-Identifier: Apache-2.0
"""Every ensemble is a distribution with the right limits, through `mix` on every backend.

The law by definition is `laws.ensemble_law`; here are the facts that hold without computing it.
"""

import copy
import dataclasses
import gc
import logging
import math
import pickle
from typing import Any

import laws
import pytest
import torch
from folds import FOLDS, TWINS
from torch import Tensor

import specens_kernels
from specens_kernels import (
    ENSEMBLES,
    Ensemble,
    Law,
    Refusal,
    Status,
    Unsupported,
    mix,
    native,
    sample,
    verify,
)

INF, NAN = math.inf, math.nan
EVERY = pytest.mark.parametrize("ensemble", ENSEMBLES.values(), ids=lambda e: e.name)
SCOPES = pytest.mark.parametrize("scope", ["member", "ensemble"])

# log_probs are float32: one part in 2^-24 for each of a few operations on numbers up to about 10.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def members(count: int = 3, vocab_size: int = 37) -> list[Tensor]:
    return [2 * torch.randn(2, 3, vocab_size) for _ in range(count)]


def probs(logits: list[Tensor], law: Law) -> Tensor:
    return mix(logits, law)[0].exp()


@EVERY
@SCOPES
def test_it_is_a_distribution(backend: str, ensemble: Ensemble, scope: str) -> None:
    law = Law((0.5, 0.3, 0.2), ensemble.name, temperature=0.7, scope=scope)
    mass = probs(members(), law)
    assert (mass >= 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)


@EVERY
def test_one_member_is_its_own_softmax(backend: str, ensemble: Ensemble) -> None:
    (logits,) = members(1)
    log_probs, status = mix([logits], Law((1.0,), ensemble.name, temperature=0.5))
    torch.testing.assert_close(log_probs, (logits / 0.5).log_softmax(-1), **CLOSE)
    assert not status.any()


@EVERY
@SCOPES
def test_the_order_of_members_does_not_matter(backend: str, ensemble: Ensemble, scope: str) -> None:
    first, second, third = members()
    options = {"ensemble": ensemble.name, "scope": scope, "top_k": 9}
    one = mix([first, second, third], Law((0.5, 0.3, 0.2), **options))[0]
    other = mix([third, first, second], Law((0.2, 0.5, 0.3), **options))[0]
    torch.testing.assert_close(one, other, **CLOSE)


@EVERY
@SCOPES
@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
def test_weight_0_is_absence(backend: str, ensemble: Ensemble, scope: str, garbage: float) -> None:
    first, second = members(2)
    absent = torch.full_like(first, garbage)
    options = {"ensemble": ensemble.name, "scope": scope, "temperature": 0.8}
    with_it = mix([first, absent, second], Law((0.6, 0.0, 0.4), **options))
    without = mix([first, second], Law((0.6, 0.4), **options))
    assert torch.equal(with_it[0], without[0])
    assert not with_it[1].any()


def test_weight_0_may_hold_in_some_rows_only(backend: str) -> None:
    first, second = members(2)
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]).expand(2, -1, -1)
    mass = probs([first, second], Law(weights))
    torch.testing.assert_close(mass[:, 0], first[:, 0].softmax(-1), **CLOSE)
    torch.testing.assert_close(mass[:, 1], second[:, 1].softmax(-1), **CLOSE)
    half = (first[:, 2].softmax(-1) + second[:, 2].softmax(-1)) / 2
    torch.testing.assert_close(mass[:, 2], half, **CLOSE)


def test_a_mixture_lies_between_its_members(backend: str) -> None:
    logits = members()
    alone = torch.stack([member.softmax(-1) for member in logits])
    mass = probs(logits, Law((0.5, 0.3, 0.2)))
    assert (mass >= alone.amin(0) - 1e-6).all()
    assert (mass <= alone.amax(0) + 1e-6).all()


def test_equal_weights_of_a_product_are_the_geometric_mean(backend: str) -> None:
    logits = members()
    mean = torch.stack([member.double().log_softmax(-1) for member in logits]).mean(0).exp()
    expected = (mean / mean.sum(-1, keepdim=True)).float()
    torch.testing.assert_close(probs(logits, Law((1 / 3,) * 3, "product")), expected, **CLOSE)


@pytest.mark.parametrize("strength", [0.1, 0.5, 2.0])
def test_contrastive_decoding_is_a_product_with_weights_of_both_signs(
    backend: str, strength: float
) -> None:
    expert, amateur = members(2)
    law = Law((1 + strength, -strength), "product", plausibility=0.1)
    kept = expert.softmax(-1) >= 0.1 * expert.softmax(-1).amax(-1, keepdim=True)
    contrast = (1 + strength) * expert.log_softmax(-1) - strength * amateur.log_softmax(-1)
    expected = contrast.masked_fill(~kept, -INF).softmax(-1)
    torch.testing.assert_close(probs([expert, amateur], law), expected, atol=1e-5, rtol=1e-4)
    assert (~kept).any()


@SCOPES
def test_plausibility_1_leaves_the_experts_best_token(backend: str, scope: str) -> None:
    expert, amateur = members(2)
    law = Law((1.5, -0.5), "product", plausibility=1.0, temperature=0.5, scope=scope)
    mass = probs([expert, amateur], law)
    assert torch.equal(mass.argmax(-1), expert.argmax(-1))
    assert torch.equal(mass.amax(-1), torch.ones(2, 3))


def test_plausibility_is_measured_at_the_temperature_of_its_scope(backend: str) -> None:
    expert = torch.tensor([[[0.0, -1.0, -2.0, -3.0]]])
    # exp(-1 / T): at T = 2 of the expert's own law 0.61, 0.37, 0.22; at T = 1 0.37, 0.14, 0.05.
    for scope, survivors in (("member", 3), ("ensemble", 2)):
        law = Law((1.0,), "product", temperature=2.0, plausibility=0.3, scope=scope)
        assert (probs([expert], law) > 0).sum() == survivors


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_any_member_vetoes_a_token_of_a_product(backend: str, weight: float) -> None:
    first, second = members(2)
    second[..., 5] = -INF
    mass = probs([first, second], Law((1.0, weight), "product"))
    assert (mass[..., 5] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)


def test_infinities_of_a_product_that_cancel_are_a_veto(backend: str) -> None:
    """+inf is all the mass for a positive weight, none for a negative one, and none for both."""
    first, second = members(2)
    law = Law((1.0, -0.5), "product", scope="ensemble")
    first[..., 3], second[..., 3] = INF, INF
    second[..., 4] = INF
    mass = probs([first, second], law)
    assert (mass[..., 3:5] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)
    first[..., 5] = INF
    mass = probs([first, second], law)
    assert (mass[..., 5] == 1).all()


def test_an_infinite_logit_takes_all_the_mass_of_its_member(backend: str) -> None:
    """Before the fold if members are warped, so the others' tokens are gone; else after it."""
    first, second = members(2)
    first[..., 3], second[..., 3] = INF, -INF
    log_probs, status = mix([first, second], Law((0.5, 0.5), "product"))
    assert torch.isneginf(log_probs).all()
    assert (status == Status.INFINITE_LOGITS | Status.EMPTY_LAW).all()
    mass = probs([first, second], Law((0.5, 0.5), "product", scope="ensemble"))
    assert (mass[..., 3] == 0).all()
    assert (mass[..., :3] > 0).all()


def test_no_member_vetoes_a_token_of_a_mixture(backend: str) -> None:
    first, second = members(2)
    second[..., 5] = -INF
    mass = probs([first, second], Law((0.75, 0.25)))
    torch.testing.assert_close(mass[..., 5], 0.75 * first.softmax(-1)[..., 5], **CLOSE)


def test_every_entry_is_the_weighted_sum_of_its_space() -> None:
    """What every backend computes: an entry with a fold would run on the reference alone."""
    logits = members()
    for ensemble in ENSEMBLES.values():
        assert ensemble.fold is None
        assert ensemble.source
        for weights in ((0.5, 0.3, 0.2), (1.0, 0.0, 0.0)):
            with specens_kernels.backend("reference"):
                twin = mix(logits, Law(weights, TWINS[ensemble.name], top_k=9))
                entry = mix(logits, Law(weights, ensemble, top_k=9))
            torch.testing.assert_close(twin, entry, **CLOSE)


EVERY_FOLD = pytest.mark.parametrize("fold", FOLDS)


def by_definition(logits: list[Tensor], weights: tuple[float, ...], **options: Any) -> Tensor:
    """(B, T, V) law."""
    batch, rows = logits[0].shape[:2]
    return torch.stack(
        [
            torch.stack(
                [
                    laws.ensemble_law([member[b, t] for member in logits], weights, **options)
                    for t in range(rows)
                ]
            )
            for b in range(batch)
        ]
    ).float()


@EVERY_FOLD
@SCOPES
def test_a_backend_obeys_a_fold_or_refuses_it(backend: str, fold: str, scope: str) -> None:
    """None computes something else without a word."""
    logits, weights = members(), (0.5, 0.25, 0.25)
    options: dict[str, Any] = {"temperature": 0.7, "scope": scope}
    law = Law(weights, FOLDS[fold], **options)
    draft = torch.randint(0, 37, (2, 2))
    calls = {
        "mix": lambda: mix(logits, law),
        "sample": lambda: sample(logits, torch.rand(2, 3, 4), law),
        "verify": lambda: verify(logits, draft, torch.rand(2, 3, 4), law),
    }
    if backend == "reference":
        expected = by_definition(logits, weights, ensemble=fold, **options)
        torch.testing.assert_close(probs(logits, law), expected, **CLOSE)
        others = [probs(logits, Law(weights, entry, **options)) for entry in ENSEMBLES.values()]
        assert all((other - expected).abs().max() > 0.01 for other in others)
        return
    for call in calls.values():
        with pytest.raises(Unsupported, match=f"{backend}: ensemble: expected fold=None, .*{fold}"):
            call()


def test_a_member_alone_has_no_fold(backend: str) -> None:
    """So that every backend draws its proposals."""
    logits, numbers = members(2), torch.rand(2, 3, 4)
    law = Law((0.5, 0.5), FOLDS["minimum"], temperature=0.7)
    found = sample(logits, numbers, law, member=1)
    assert torch.equal(
        found.tokens, sample(logits, numbers, Law((0.5, 0.5), temperature=0.7), member=1).tokens
    )
    # The law is the same object, whose addresses a backend may have noted.
    if backend != "reference":
        with pytest.raises(Unsupported, match="fold=None"):
            mix(logits, law)


@EVERY_FOLD
def test_auto_runs_the_reference_and_says_so(fold: str, caplog: pytest.LogCaptureFixture) -> None:
    if not native.AVAILABLE:
        pytest.skip(native.REASON)
    logits = members()
    named = dataclasses.replace(FOLDS[fold], name=f"mine_{fold}")  # nobody has said it yet
    law = Law((0.5, 0.25, 0.25), named)
    with caplog.at_level(logging.WARNING, "specens_kernels"), specens_kernels.backend("auto"):
        found = mix(logits, law)
    assert [record.getMessage() for record in caplog.records] == [
        f"mix: native: ensemble: expected fold=None, got the fold of 'mine_{fold}'; the "
        "reference, which is slow, runs instead"
    ]
    with specens_kernels.backend("reference"):
        assert torch.equal(found[0], mix(logits, law)[0])


def test_a_fold_sees_all_members_and_the_weights_of_each_row() -> None:
    seen = []

    def watch(laws: Tensor, weights: Tensor) -> Tensor:
        seen.append((laws, weights))
        return laws[0] * weights[0] + laws[1] * weights[1]

    logits = members(2)
    logits[1][0, 0] = -INF
    weights = torch.rand(2, 3, 2).softmax(-1)
    with specens_kernels.backend("reference"):
        found = mix(logits, Law(weights, Ensemble("watched", "probabilities", fold=watch)))
        assert torch.equal(found[0], mix(logits, Law(weights))[0])
    ((stacked, given),) = seen
    assert (stacked.shape, given.shape) == ((2, 2, 3, 37), (2, 2, 3, 1))
    assert stacked.dtype == given.dtype == torch.float64
    assert torch.equal(given[..., 0], weights.double().movedim(-1, 0))
    assert (stacked[1, 0, 0] == 0).all()  # a member without mass
    torch.testing.assert_close(stacked.sum(-1)[0], torch.ones(2, 3).double())


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (lambda laws, weights: laws, r"expected \(2, 3, 37\) of laws \(3, 2, 3, 37\), got \(3, 2"),
        (lambda laws, weights: laws[0] * 1j, "expected real numbers on cpu, got .*complex128"),
        (
            lambda laws, weights: laws[0].to_sparse(),
            "expected a dense tensor that holds its memory",
        ),
        (lambda laws, weights: laws[0].to("meta"), "expected real numbers on cpu, got .* on meta"),
        (lambda laws, weights: 1.0, r"expected \(2, 3, 37\) of laws .*, got float"),
        (lambda laws, weights: laws[0] - laws[1], "expected finite numbers >= 0, got -"),
        (lambda laws, weights: laws[0] / 0, "expected finite numbers >= 0, got inf to inf"),
        (lambda laws, weights: laws[0] * NAN, "expected finite numbers >= 0, got nan to nan"),
    ],
)
def test_what_a_fold_may_not_return_is_refused(fold: Any, message: str) -> None:
    law = Law((1.0, 1.0, 1.0), Ensemble("mine", "probabilities", fold=fold))
    with (
        specens_kernels.backend("reference"),
        pytest.raises(Refusal, match=f"mine: fold: {message}"),
    ):
        mix(members(), law)


@pytest.mark.parametrize("space", ["probabilities", "logits"])
def test_a_fold_may_write_into_what_it_is_given(space: Any) -> None:
    def careless(laws: Tensor, weights: Tensor) -> Tensor:
        result = (weights * laws).sum(0)
        laws.fill_(NAN)
        weights.fill_(NAN)
        return result

    def careful(laws: Tensor, weights: Tensor) -> Tensor:
        return (weights * laws).sum(0)

    logits, numbers = members(2), torch.rand(2, 3, 4)
    tokens = torch.randint(0, 37, (2, 2))
    for dtype in (torch.float32, torch.float64):
        for weights in (torch.tensor([0.25, 0.75]), torch.rand(2, 2), torch.rand(2, 3, 2)):
            given, before = weights.to(dtype), [value.clone() for value in (weights, *logits)]
            answers = []
            for fold in (careless, careful):
                law = Law(given, Ensemble("mine", space, fold=fold))
                with specens_kernels.backend("reference"):
                    verdict = verify(logits, tokens, numbers, law)
                    answers.append((*mix(logits, law), *sample(logits, numbers, law), *verdict))
            for one, other in zip(*answers, strict=True):
                assert torch.equal(one, other)
            for value, kept in zip((given, *logits), before, strict=True):
                assert torch.equal(value, kept.to(value.dtype))


def test_a_fold_of_logits_that_is_nan_gives_no_mass() -> None:
    logits = members(2)
    logits[0][..., 5], logits[1][..., 5] = -INF, -INF
    law = Law((1.0, -1.0), FOLDS["contrast"])
    with specens_kernels.backend("reference"):
        mass = probs(logits, law)
    assert (mass[..., 5] == 0).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 3), **CLOSE)


def test_a_fold_that_leaves_nothing_is_an_empty_law() -> None:
    first = torch.tensor([[[0.0, -INF]]])
    law = Law((1.0, 1.0), FOLDS["minimum"])
    with specens_kernels.backend("reference"):
        log_probs, status = mix([first, first.flip(-1)], law)
    assert torch.isneginf(log_probs).all()
    assert (status == Status.EMPTY_LAW).all()


def test_two_folds_of_one_name_are_not_confused() -> None:
    logits, weights = members(2), (0.5, 0.5)
    low = Law(weights, Ensemble("extreme", "probabilities", fold=lambda laws, w: laws.amin(0)))
    high = Law(weights, Ensemble("extreme", "probabilities", fold=lambda laws, w: laws.amax(0)))
    with specens_kernels.backend("reference"):
        for law, name in ((low, "minimum"), (high, "maximum"), (low, "minimum")):
            assert torch.equal(mix(logits, law)[0], mix(logits, Law(weights, FOLDS[name]))[0])


def lowest(laws: Tensor, weights: Tensor) -> Tensor:
    """One that can be pickled."""
    return laws.amin(0)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_a_copy_of_an_ensemble_obeys_its_fold_and_outlives_it(copied: Any) -> None:
    original = Ensemble("lowest", "probabilities", fold=lowest)
    other = copied(original)
    assert other == original
    assert other.key != original.key
    del original
    gc.collect()
    logits = members(2)
    with specens_kernels.backend("reference"):
        expected = mix(logits, Law((0.5, 0.5), FOLDS["minimum"]))[0]
        assert torch.equal(mix(logits, Law((0.5, 0.5), other))[0], expected)


def test_a_fold_that_is_gone_is_an_error_and_not_another_one() -> None:
    key = Ensemble("gone", "probabilities", fold=lowest).key
    gc.collect()
    with pytest.raises(Refusal, match=r"ensemble: key: expected .* in use, got 'gone@"):
        Ensemble.by_key(key)


def test_a_wrong_ensemble_is_refused() -> None:
    with pytest.raises(Refusal, match=r"ensemble: space: expected one of .*, got 'probs'"):
        Ensemble("mine", "probs")  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="ensemble: fold: expected None or a function, got 'amax'"):
        Ensemble("mine", "logits", fold="amax")  # type: ignore[arg-type]


def test_the_weights_of_a_fold_are_its_own_business_but_finite() -> None:
    Law((2.0, -1.0), FOLDS["minimum"])
    with pytest.raises(Refusal, match="weights: expected M >= 1 finite numbers"):
        Law((NAN, 1.0), FOLDS["minimum"])


def test_log_sum_exps_do_not_go_with_a_fold() -> None:
    logits, numbers = members(2), torch.rand(2, 3, 4)
    lse = torch.stack([member.logsumexp(-1) for member in logits], -1)
    law = Law((0.5, 0.5), FOLDS["minimum"])
    with pytest.raises(Refusal, match=r"^verify: lse: expected None"):
        verify(logits, torch.zeros(2, 2, dtype=torch.int64), numbers, law, lse=lse)


def test_a_fold_survives_torch_compile() -> None:
    laws = [Law((0.5, 0.5), FOLDS[name], temperature=0.7) for name in ("minimum", "maximum")]

    def run(first: Tensor, second: Tensor, law: Law) -> Tensor:
        return mix([first, second], law)[0] * 2

    logits = members(2)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for law in (*laws, laws[0]):
        assert torch.equal(compiled(*logits, law), run(*logits, law))
