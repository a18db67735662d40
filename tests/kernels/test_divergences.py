# SPDX-License-Identifier: Apache-2.0
"""Divergences: definitions written out, bounds, gradients in float64, and memory.

The definitions below are the specification; a new divergence needs one more entry of `DEFINED`.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specens_kernels import DIVERGENCES, Refusal, divergence, divergences

TRAINABLE = [name for name, entry in DIVERGENCES.items() if entry.weighted_slope is not None]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(p, q).sum(-1)


DEFINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "js": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "js_fsd": lambda p, q: (kl((p + q) / 2, p) + kl((p + q) / 2, q)) / 2,
    "tv": lambda p, q: 1 - torch.minimum(p, q).sum(-1),
}


def logits(rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(rows, width).double(), 2 * torch.randn(rows, width).double()


@pytest.fixture(params=[1, 1 << 22])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, and all at once."""
    monkeypatch.setattr(divergences, "_CHUNK_NUMBERS", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_are_the_definitions(kind: str) -> None:
    target, draft = logits()
    expected = DEFINED[kind](target.softmax(-1), draft.softmax(-1))
    # float64, sums of nine numbers of order one.
    torch.testing.assert_close(divergence(target, draft, kind), expected, atol=1e-12, rtol=0)
    assert divergence(target[None], draft[None], kind).shape == (1, 6)
    assert divergence(target[:0], draft[:0], kind).shape == (0,)
    assert divergence(target, target, kind).abs().max() < 1e-12
    others = [DEFINED[name](target.softmax(-1), draft.softmax(-1)) for name in DEFINED]
    assert sum(bool(torch.allclose(expected, other)) for other in others) == 1


def test_js_is_bounded_and_the_published_formula_is_not() -> None:
    target = torch.tensor([[40.0, 0.0]]).double()
    draft = torch.tensor([[0.0, 40.0]]).double()
    assert divergence(target, draft, "js").item() == pytest.approx(math.log(2))
    assert divergence(target, draft, "js_fsd").item() > 9


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kind", TRAINABLE)
def test_gradients_are_those_of_the_definitions(kind: str) -> None:
    target, draft = logits()
    draft.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: divergence(target, z, kind), (draft,))
    weight = torch.randn(6).double()
    (got,) = torch.autograd.grad((weight * divergence(target, draft, kind)).sum(), draft)
    law = DEFINED[kind](target.softmax(-1), draft.softmax(-1))
    (expected,) = torch.autograd.grad((weight * law).sum(), draft)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_rows_that_do_not_count_get_no_gradient(kind: str) -> None:
    target, draft = logits()
    target[1] = torch.nan
    draft.requires_grad_()
    rows = divergence(target, draft, kind)
    (got,) = torch.autograd.grad(rows[[0, 2]].sum(), draft)
    assert (got.abs().sum(-1) > 0).tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("kind", TRAINABLE)
def test_tokens_without_mass_count_nothing(kind: str) -> None:
    target, draft = logits(2, 5)
    padded = [torch.nn.functional.pad(z, (0, 3), value=-torch.inf) for z in (target, draft)]
    padded[1].requires_grad_()
    rows = divergence(padded[0], padded[1], kind)
    torch.testing.assert_close(rows, divergence(target, draft, kind))
    (got,) = torch.autograd.grad(rows.sum(), padded[1])
    assert (got[:, 5:] == 0).all()
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    target, draft = (z.to(dtype) for z in logits())
    draft.requires_grad_()
    rows = divergence(target, draft, "kl")
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, divergence(target.float(), draft.float(), "kl"))
    (got,) = torch.autograd.grad(rows.sum(), draft)
    assert got.dtype == dtype


class LargestTensors(TorchDispatchMode):
    """Counts the results of operations that are as large as `numbers`."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.made = numbers, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func in (torch.ops.aten.index_put_.default,)
        if isinstance(result, Tensor) and result.numel() >= self.numbers and not is_view:
            self.made += 1
        return result


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_gradient_is_the_only_tensor_of_its_size(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergences, "_CHUNK_NUMBERS", 9)
    target, draft = logits()
    draft.requires_grad_()
    with LargestTensors(draft.numel()) as forward:
        total = divergence(target, draft, kind).sum()
    with LargestTensors(draft.numel()) as backward:
        torch.autograd.grad(total, draft)
    assert (forward.made, backward.made) == (0, 1)


def test_mistakes_are_refused() -> None:
    target, draft = logits()
    with pytest.raises(ValueError, match=r"kind: expected one of js.*, got 'jeffreys'"):
        divergence(target, draft, "jeffreys")
    with pytest.raises(ValueError, match=r"target_logits: expected \(6, 9\) as draft_logits"):
        divergence(target[:, :8], draft)
    draft.requires_grad_()
    with pytest.raises(ValueError, match="kind: expected one with a gradient, got 'js_fsd'"):
        divergence(target, draft, "js_fsd")
    with torch.no_grad():
        assert divergence(target, draft, "js_fsd").shape == (6,)
    with pytest.raises(ValueError, match="target_logits: expected no gradient"):
        divergence(draft, target)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_where_there_is_no_law_there_is_no_divergence(kind: str) -> None:
    good = torch.tensor([[0.0, 1.0, 2.0]])
    for broken in (math.nan, math.inf, [-math.inf] * 3):
        bad = good.clone()
        bad[0, : 1 if isinstance(broken, float) else 3] = torch.tensor(broken)
        assert divergence(bad, good, kind).isnan().all()
        assert divergence(good, bad, kind).isnan().all()
        if DIVERGENCES[kind].weighted_slope is not None:
            wanted = good.clone().requires_grad_()
            divergence(bad, wanted, kind).sum().backward()
            assert wanted.grad is not None
            assert wanted.grad.isnan().all()


@pytest.mark.parametrize(
    ("target", "draft", "expected"),
    [
        (torch.ones(2, 3, device="meta"), torch.ones(2, 3), "target_logits: expected a tensor on"),
        (torch.ones(2, 0), torch.ones(2, 0), r"draft_logits: expected \(..., V >= 1\) float"),
        (torch.ones(2, 3).to_sparse(), torch.ones(2, 3), "target_logits: expected a dense tensor"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), torch.ones(2, 3), "target_logits: expected"),
    ],
    ids=["device", "no vocabulary", "sparse", "float8"],
)
def test_tensors_that_it_cannot_read_are_refused(
    target: Tensor, draft: Tensor, expected: str
) -> None:
    with pytest.raises(Refusal, match=f"^divergence: {expected}"):
        divergence(target, draft)
