# SPDX-License-Identifier: Apache-2.0
"""`WeightHead`: how much the draft counts at each position, learned (DIVERSED, arXiv:2604.07622).

A head looks at both models' last hidden states, the input of their LM heads, and says the draft's
weight in the ensemble of draft and target; the target's is the rest. The published head has one row
per model and a softmax over the two, which is a sigmoid of their difference: one row is kept here.
A hidden state depends on the prefix alone and never on the token that is judged; that makes
verification with such weights exact for their ensemble. To add an input, extend `draft_weight`.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specens_kernels import ENSEMBLES, Ensemble, Refusal
from specens_kernels.arguments import count, number
from specens_kernels.refusal import shown

_WEIGHTS, _FACTS = "weight_head.safetensors", "weight_head.json"
_UPSTREAM_WEIGHTS, _UPSTREAM_FACTS = "ensemble_head.bin", "ensemble_config.json"
# Torch numbers hooks without a lock: two of two threads might get one number.
_HOOKS = threading.Lock()


@dataclass(eq=False)
class WeightHead:
    """The draft's weight at each position, from both models' last hidden states.

    delta: (H_draft + H_target,) float32; the draft's part comes first.
    bias: () float32.
    ensemble: "mixture" or "product"; what the weights are for.
    draft_size, target_size: H_draft and H_target; None where a file did not say.
    metadata: what else is known, as JSON: names of the models, task, temperature.
    """

    delta: Tensor
    bias: Tensor
    ensemble: str = "mixture"
    draft_size: int | None = None
    target_size: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes and names; keep float32 whatever came."""
        if self.ensemble not in ENSEMBLES:
            raise Refusal.unknown("head", "ensemble", self.ensemble, ENSEMBLES)
        self.delta, self.bias = self.delta.float(), self.bias.float()
        if self.delta.dim() != 1 or self.delta.numel() == 0:
            raise Refusal("head", "delta", "(H_draft + H_target,)", tuple(self.delta.shape))
        if self.bias.dim() != 0:
            raise Refusal("head", "bias", "()", tuple(self.bias.shape))
        sizes = (self.draft_size, self.target_size)
        if None not in sizes and sum(size or 0 for size in sizes) != self.delta.numel():
            raise Refusal("head", "delta", f"{sizes[0]} + {sizes[1]} numbers", self.delta.numel())

    def is_for(self, ensemble: Ensemble | str) -> bool:
        """Whether the weights are for such an ensemble, whatever it is called."""
        given = Ensemble.of(ensemble)
        return given.fold is None and given.space == ENSEMBLES[self.ensemble].space

    def draft_weight(self, draft_hidden: Tensor, target_hidden: Tensor) -> Tensor:
        """The draft's share; the target's is one minus it.

        Args:
            draft_hidden: (B, T, H_draft) of any float dtype.
            target_hidden: (B, T, H_target), the same positions.
        Returns:
            (B, T) float32 in (0, 1). Differentiable.
        """
        sizes = (draft_hidden.shape[-1], target_hidden.shape[-1])
        known = (self.draft_size, self.target_size)
        if sum(sizes) != self.delta.numel() or (None not in known and sizes != known):
            expected = self.delta.numel() if None in known else f"{known[0]} + {known[1]}"
            raise Refusal(
                "head",
                "hidden states",
                f"sizes {expected} of draft + target",
                f"{sizes[0]} + {sizes[1]}",
            )
        if draft_hidden.shape[:-1] != target_hidden.shape[:-1]:
            shape = (*draft_hidden.shape[:-1], sizes[1])
            raise Refusal("head", "target_hidden", str(shape), tuple(target_hidden.shape))
        draft_part, target_part = self.delta[: sizes[0]], self.delta[sizes[0] :]
        # Products and sums rather than a matmul: autocast and TF32 leave them in float32, and a
        # row's sum does not depend on the rows beside it.
        score = (draft_hidden.float() * draft_part).sum(-1)
        score = score + (target_hidden.float() * target_part).sum(-1)
        return torch.sigmoid(score + self.bias)

    @classmethod
    def constant(
        cls,
        draft_size: int,
        target_size: int,
        draft_weight: float = 0.5,
        *,
        ensemble: str = "mixture",
    ) -> "WeightHead":
        """A head that says `draft_weight` everywhere: [0, 1]; where training starts."""
        if not 0.0 <= number(draft_weight) <= 1.0:
            raise Refusal("head", "draft_weight", "a number in [0, 1]", shown(draft_weight))
        for name, size in (("draft_size", draft_size), ("target_size", target_size)):
            if count(size) < 1:
                raise Refusal("head", name, "a count >= 1", shown(size))
        return cls(
            torch.zeros(draft_size + target_size),
            torch.logit(torch.tensor(draft_weight, dtype=torch.float64)).float(),
            ensemble,
            draft_size,
            target_size,
        )

    def to(self, device: torch.device | str) -> "WeightHead":
        """This head on another device; itself if it is there."""
        delta, bias = self.delta.to(device), self.bias.to(device)
        if delta is self.delta and bias is self.bias:
            return self
        return WeightHead(
            delta,
            bias,
            self.ensemble,
            self.draft_size,
            self.target_size,
            self.metadata,
        )

    def save(self, folder: str | Path) -> None:
        """Write `weight_head.safetensors` and `weight_head.json`; the folder may be new."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"delta": self.delta, "bias": self.bias}
        # Cloned: safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / _WEIGHTS)
        facts = {
            "ensemble": self.ensemble,
            "draft_hidden_size": self.draft_size,
            "target_hidden_size": self.target_size,
            "metadata": self.metadata,
        }
        (folder / _FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "WeightHead":
        """Read a head from a folder: ours, or one in the layout of the published code.

        The published layout is `ensemble_head.bin` (`summary.weight` (2, H), `summary.bias` (2,);
        row 0 is the draft's) and maybe `ensemble_config.json`; it is read without running pickled
        code. The published code mixes logits, so such a head is for a "product".

        Raises:
            ValueError: there is no such file, or not what it should hold.
        """
        folder = Path(path).expanduser()
        if (folder / _WEIGHTS).is_file():
            head = _read(cls, folder)
        elif (folder / _UPSTREAM_WEIGHTS).is_file():
            head = _read_upstream(cls, folder)
        else:
            raise Refusal(
                "head",
                "path",
                f"a folder with {_WEIGHTS} or {_UPSTREAM_WEIGHTS}",
                repr(str(path)),
            )
        if not bool(head.delta.isfinite().all()) or bool(head.bias.isnan()):
            raise Refusal("head", "delta", "finite numbers", "NaN or infinity")
        return head


def _read(cls: type[WeightHead], folder: Path) -> WeightHead:
    file = folder / _WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise Refusal("head", _WEIGHTS, "safetensors", error) from error
    if sorted(tensors) != ["bias", "delta"]:
        raise Refusal("head", _WEIGHTS, "bias and delta", sorted(tensors))
    facts = _read_facts(folder / _FACTS)
    draft_size, target_size = _sizes(facts, _FACTS)
    metadata = facts.get("metadata", {})
    if not isinstance(metadata, dict):
        raise Refusal("head", _FACTS, "an object as metadata", repr(metadata))
    ensemble = str(facts.get("ensemble", "mixture"))
    return cls(tensors["delta"], tensors["bias"], ensemble, draft_size, target_size, metadata)


def _read_upstream(cls: type[WeightHead], folder: Path) -> WeightHead:
    file = folder / _UPSTREAM_WEIGHTS
    try:
        if not is_zipfile(file):  # the reader of torch's older format fails in many ways
            raise EOFError("no zip file")
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        raise Refusal(
            "head",
            _UPSTREAM_WEIGHTS,
            "a state dict of tensors alone",
            next(iter(str(error).splitlines()), type(error).__name__),
        ) from error
    shapes = {
        name: tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        for name, tensor in (state.items() if isinstance(state, Mapping) else ())
    }
    rows = shapes.get("summary.weight", ())
    if len(shapes) != 2 or len(rows) != 2 or rows[0] != 2 or shapes.get("summary.bias") != (2,):
        raise Refusal(
            "head",
            _UPSTREAM_WEIGHTS,
            "summary.weight (2, H) and summary.bias (2,)",
            shapes or type(state).__name__,
        )
    weight, bias = state["summary.weight"].float(), state["summary.bias"].float()
    facts: dict[str, Any] = {}
    if (folder / _UPSTREAM_FACTS).is_file():
        facts = _read_facts(folder / _UPSTREAM_FACTS)
    draft_size, target_size = _sizes(facts, _UPSTREAM_FACTS)
    metadata = {
        new: facts[old]
        for new, old in (("draft", "draft_model_path"), ("target", "target_model_path"))
        if old in facts
    }
    delta = weight[0] - weight[1]
    return cls(delta, bias[0] - bias[1], "product", draft_size, target_size, metadata)


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal("head", file.name, "a JSON file", error) from error
    if not isinstance(facts, dict):
        raise Refusal("head", file.name, "an object", type(facts).__name__)
    return facts


def _sizes(facts: Mapping[str, Any], file: str) -> tuple[int | None, int | None]:
    sizes = facts.get("draft_hidden_size"), facts.get("target_hidden_size")
    for size in sizes:
        if size is not None and (not isinstance(size, int) or size < 1):
            raise Refusal("head", file, "counts as hidden sizes", repr(size))
    return sizes


@contextmanager
def last_hidden(model: Any) -> Iterator[list[Tensor]]:
    """Collect the LM head's input, (B, T, H), at each forward of this thread within the context.

    It has a row for each row of logits, also where `logits_to_keep` leaves some out. Nothing else
    is kept, unlike with `output_hidden_states`, which holds on to every layer.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise Refusal("head", "model", "a causal LM", f"{type(model).__name__} without an LM head")
    collected: list[Tensor] = []
    thread = threading.get_ident()

    def collect(_: Any, inputs: Any) -> None:
        # The head is shared, and other threads' forwards come by here, too.
        if threading.get_ident() == thread:
            collected.append(inputs[0])

    def remove() -> None:
        # By itself, not by its handle, of which an interrupt may deprive us.
        for key, hook in list(head._forward_pre_hooks.items()):
            if hook is collect:
                del head._forward_pre_hooks[key]

    try:
        with _HOOKS:
            head.register_forward_pre_hook(collect)
        yield collected
    finally:
        try:
            remove()
        finally:  # an interrupt may come in the first time
            remove()


def hidden_size(model: Any) -> int:
    """H: the width of the LM head's input."""
    head = model.get_output_embeddings()
    size = getattr(head, "in_features", None)  # quantised weights have packed shapes
    return int(size if size is not None else head.weight.shape[1])
