# SPDX-License-Identifier: Apache-2.0
"""The weight head: what it computes, what it reads and writes, and what it refuses.

A new way for a file to be wrong is one more entry of `BROKEN`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from toys import toy

from specens import SpeculativeDecoder
from specens.members.weight_head import WeightHead, hidden_size, last_hidden
from specens_kernels import Ensemble, Refusal

DRAFT, TARGET = 3, 5


def head(**changes: Any) -> WeightHead:
    facts: dict[str, Any] = {
        "delta": torch.linspace(-1, 1, DRAFT + TARGET),
        "bias": torch.tensor(0.3),
        "draft_size": DRAFT,
        "target_size": TARGET,
        "metadata": {"draft": "small", "target": "large", "temperature": 0.7},
    }
    return WeightHead(**(facts | changes))


def hidden(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, DRAFT).to(dtype), torch.randn(2, 4, TARGET).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_the_sigmoid_of_a_product_with_the_draft_first(dtype: torch.dtype) -> None:
    draft, target = hidden(dtype)
    got = head().draft_weight(draft, target)
    row = torch.cat([draft, target], -1).double()
    expected = torch.sigmoid(row @ head().delta.double() + 0.3)
    assert got.shape == (2, 4)
    assert got.dtype == torch.float32
    # Eight terms of order one in float32.
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    # The order matters, or the line above proved nothing.
    wrong = torch.sigmoid(torch.cat([target, draft], -1).double() @ head().delta.double() + 0.3)
    assert (wrong - expected).abs().max() > 0.01


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    draft, target = torch.randn(4, 6, 128), torch.randn(4, 6, 192)
    one = WeightHead(torch.randn(320), torch.zeros(()))
    whole = one.draft_weight(draft, target)
    for b in range(4):
        for t in range(6):
            alone = one.draft_weight(draft[b : b + 1, t : t + 1], target[b : b + 1, t : t + 1])
            assert alone.item() == whole[b, t].item()


def test_autocast_leaves_float32() -> None:
    draft, target = hidden()
    expected = head().draft_weight(draft, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head().draft_weight(draft, target), expected)


def test_a_head_is_for_an_ensemble_by_what_it_is_not_by_its_name() -> None:
    summed = Ensemble("mine", "logits")
    folded = Ensemble("product", "logits", fold=lambda scores, weights: scores.amax(0))
    assert head(ensemble="product").is_for("product")
    assert head(ensemble="product").is_for(summed)
    assert not head(ensemble="product").is_for(folded)
    assert not head().is_for(summed)
    both = [toy(0), toy(1)]
    weights = WeightHead(torch.zeros(32), torch.tensor(0.0), "product")
    assert SpeculativeDecoder(both, schedule="plain", weights=weights, ensemble=summed).head
    with pytest.raises(Refusal, match="two members and ensemble 'product' for this head"):
        SpeculativeDecoder(both, schedule="plain", weights=weights, ensemble=folded)


@pytest.mark.parametrize("draft_weight", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_constant_head_says_its_number_everywhere(draft_weight: float) -> None:
    constant = WeightHead.constant(DRAFT, TARGET, draft_weight, ensemble="product")
    got = constant.draft_weight(*hidden())
    torch.testing.assert_close(got, torch.full((2, 4), draft_weight))
    assert constant.ensemble == "product"


def test_gradients_reach_delta_and_bias() -> None:
    one = head()
    one.delta.requires_grad_()
    one.bias.requires_grad_()
    torch.autograd.backward(one.draft_weight(*hidden()).sum())
    assert one.delta.grad is not None
    assert one.bias.grad is not None
    assert one.delta.grad.abs().min() > 0


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    one = head(ensemble="product")
    one.delta.requires_grad_()
    one.save(tmp_path / "new" / "folder")
    got = WeightHead.load(tmp_path / "new" / "folder")
    assert torch.equal(got.delta, one.delta)
    assert torch.equal(got.bias, one.bias)
    assert not got.delta.requires_grad
    assert (got.ensemble, got.metadata) == ("product", one.metadata)
    assert (got.draft_size, got.target_size) == (DRAFT, TARGET)


def upstream(folder: Path, weight: Tensor, bias: Tensor, facts: Any = None) -> None:
    """A head as the published training code writes it."""
    folder.mkdir(exist_ok=True)
    torch.save({"summary.weight": weight, "summary.bias": bias}, folder / "ensemble_head.bin")
    if facts is not None:
        (folder / "ensemble_config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("described", [False, True])
def test_a_published_head_is_read_as_the_softmax_of_its_two_rows(
    tmp_path: Path, described: bool
) -> None:
    weight = torch.randn(2, DRAFT + TARGET).bfloat16()
    bias = torch.tensor([0.5, -0.25]).bfloat16()
    facts = {
        "draft_model_path": "small",
        "target_model_path": "large",
        "draft_hidden_size": DRAFT,
        "target_hidden_size": TARGET,
    }
    upstream(tmp_path, weight, bias, facts if described else None)
    got = WeightHead.load(tmp_path)
    draft, target = hidden()
    scores = torch.cat([draft, target], -1) @ weight.float().T + bias.float()
    # Eight terms of order one in float32.
    expected = scores.softmax(-1)[..., 0]
    torch.testing.assert_close(got.draft_weight(draft, target), expected, atol=1e-6, rtol=0)
    assert got.ensemble == "product"  # the published code mixes logits
    assert got.draft_size == (DRAFT if described else None)
    assert got.metadata == ({"draft": "small", "target": "large"} if described else {})


class Malicious:
    """An object whose pickle would run code."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (pytest.fail, ("code of a pickle was run",))


def ours(tensors: dict[str, Tensor], facts: str = "{}") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(tensors, folder / "weight_head.safetensors")
        (folder / "weight_head.json").write_text(facts)

    return write


GOOD = {"delta": torch.zeros(8), "bias": torch.zeros(())}
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda folder: None, "expected a folder with weight_head.safetensors or"),
    "no description": (
        lambda folder: save_file(GOOD, folder / "weight_head.safetensors"),
        "weight_head.json: expected a JSON file",
    ),
    "not safetensors": (
        lambda folder: (folder / "weight_head.safetensors").write_text("text"),
        "expected safetensors",
    ),
    "other names": (ours({"weight": torch.zeros(8)}), "expected bias and delta, got"),
    "matrix": (ours(GOOD | {"delta": torch.zeros(2, 4)}), "delta: expected (H_draft + H_target,)"),
    "bias": (ours(GOOD | {"bias": torch.zeros(1)}), "bias: expected ()"),
    "nan": (ours(GOOD | {"delta": torch.full((8,), torch.nan)}), "expected finite numbers"),
    "sum": (
        ours(GOOD, '{"draft_hidden_size": 3, "target_hidden_size": 4}'),
        "expected 3 + 4 numbers, got 8",
    ),
    "size": (ours(GOOD, '{"draft_hidden_size": "3"}'), "expected counts as hidden sizes"),
    "ensemble": (
        ours(GOOD, '{"ensemble": "sum"}'),
        "ensemble: expected one of mixture, product, got 'sum'",
    ),
    "metadata": (ours(GOOD, '{"metadata": 3}'), "expected an object as metadata"),
    "list": (ours(GOOD, "[]"), "expected an object, got list"),
    "upstream: not torch": (
        lambda folder: (folder / "ensemble_head.bin").write_text("text"),
        "expected a state dict of tensors alone",
    ),
    "upstream: code": (
        lambda folder: torch.save({"summary.weight": Malicious()}, folder / "ensemble_head.bin"),
        "expected a state dict of tensors alone",
    ),
    "upstream: keys": (
        lambda folder: torch.save({"weight": torch.zeros(2, 8)}, folder / "ensemble_head.bin"),
        "expected summary.weight (2, H) and summary.bias (2,), got {'weight': (2, 8)}",
    ),
    "upstream: rows": (
        lambda folder: upstream(folder, torch.zeros(3, 8), torch.zeros(3)),
        "expected summary.weight (2, H)",
    ),
    "upstream: not a dict": (
        lambda folder: torch.save(torch.zeros(2), folder / "ensemble_head.bin"),
        "got Tensor",
    ),
    "upstream: size": (
        lambda folder: upstream(folder, torch.zeros(2, 8), torch.zeros(2), dict.fromkeys(SIZES, 5)),
        "expected 5 + 5 numbers, got 8",
    ),
}
SIZES = ("draft_hidden_size", "target_hidden_size")


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused(tmp_path: Path, fault: str) -> None:
    write, message = BROKEN[fault]
    write(tmp_path)
    with pytest.raises(ValueError, match=r"^head: ") as error:
        WeightHead.load(tmp_path)
    assert message in str(error.value)


def test_hidden_states_of_another_model_are_refused() -> None:
    draft, target = hidden()
    with pytest.raises(ValueError, match=r"expected sizes 3 \+ 5 of draft \+ target, got 5 \+ 3"):
        head().draft_weight(target, draft)
    with pytest.raises(ValueError, match="expected sizes 8 of draft"):
        head(draft_size=None).draft_weight(draft, draft)
    with pytest.raises(ValueError, match=r"target_hidden: expected \(2, 4, 5\)"):
        head().draft_weight(draft, target[:, :3])


@pytest.mark.parametrize("draft_weight", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_constant_is_a_share(draft_weight: Any) -> None:
    with pytest.raises(ValueError, match="draft_weight: expected a number in"):
        WeightHead.constant(DRAFT, TARGET, draft_weight)


@pytest.mark.parametrize("size", [0, "3", 2.0, None])
def test_hidden_sizes_are_counts(size: Any) -> None:
    with pytest.raises(ValueError, match="head: target_size: expected a count >= 1, got"):
        WeightHead.constant(DRAFT, size)


def test_to_keeps_everything() -> None:
    one = head()
    assert one.to("cpu") is one
    moved = one.to("meta")
    assert moved.delta.device.type == "meta"
    assert (moved.draft_size, moved.metadata) == (DRAFT, one.metadata)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_last_hidden_state_is_what_the_lm_head_reads(kind: str) -> None:
    model = toy(0, kind=kind)
    tokens = torch.randint(11, (2, 5))
    with torch.no_grad(), last_hidden(model) as states:
        whole = model(tokens).logits
        model(tokens, logits_to_keep=2)
    assert [tuple(state.shape) for state in states] == [(2, 5, 16), (2, 2, 16)]
    assert hidden_size(model) == 16
    assert torch.equal(model.get_output_embeddings()(states[0]), whole)
    with torch.no_grad():
        model(tokens)
    assert len(states) == 2  # the hook is gone
