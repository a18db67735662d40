# SPDX-License-Identifier: Apache-2.0
"""Which way of keeping state is exact for a model: found by running it, not by a list of names.

Each kind of member plays the same short game of ragged forwards, rollbacks and selections, and
must give the logits of a plain forward over the same tokens. The first that does is chosen. To
test a new kind, add it to `_candidates`.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specens.members.by_row import CropMember, ReplayMember
from specens.members.cache import Masks, Signature, layer_kinds
from specens.members.evaluation import evaluating
from specens.members.facts import (
    check_causal_lm,
    forward_arguments,
    model_name,
    text_config,
    vocab_size,
)
from specens.members.kernel import implementation_of, serves
from specens.members.member import Member
from specens.members.slot import LONGEST_PROMPT, SlotMember
from specens_kernels import Refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("auto", "slot", "crop", "replay")

logger = logging.getLogger("specens")

# Windows up to this many tokens are crossed by the test, and indexes that choose up to this many
# keys; longer ones would make it slow, and are taken from the configuration.
LONGEST_TESTED_WINDOW = 64

# What a model raises when it is run in a way it does not support.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Probe:
    """What a model was found able to do.

    Attributes:
        model: its name.
        mode: "slot", "crop" or "replay", see `member.py`.
        attention: "kernel" or "mask": what its layers attend through (slot).
        tree: a tree of tokens can be scored in one forward.
        per_type: masks are a dict by layer type (slot).
        continuation: "chunk", "token" or "none": what its cache can be continued with (replay).
        logits_to_keep: "rows", "last" or "all": the form of that argument it understands.
        reason: why the faster modes were refused; empty for "slot".
        mask_reason: why a slot mode's layers do not attend through a kernel.
        layout: key and value tensors of its layers, per shape (slot).
    """

    model: str
    mode: str
    attention: str = "mask"
    tree: bool = False
    per_type: bool = False
    continuation: str = "chunk"
    logits_to_keep: str = "all"
    reason: str = ""
    mask_reason: str = field(default="", compare=False)
    layout: dict[Signature, int] = field(default_factory=dict, compare=False, repr=False)

    def member(self, model: "PreTrainedModel") -> Member:
        """A member of the kind this probe found exact."""
        if self.mode == "slot":
            return SlotMember(
                model,
                kernel=self.attention == "kernel",
                per_type=self.per_type,
                logits_to_keep=self.logits_to_keep,
                counts=self.layout,
            )
        if self.mode == "crop":
            return CropMember(model, logits_to_keep=self.logits_to_keep)
        return ReplayMember(
            model, continuation=self.continuation, logits_to_keep=self.logits_to_keep
        )


_probes: WeakKeyDictionary[Any, dict[tuple[Any, ...], Probe]] = WeakKeyDictionary()


def probe(model: "PreTrainedModel", *, mode: str = "auto") -> Probe:
    """Test in a few short forwards how this model can be run exactly; remembered per model.

    The model, its flags and the global random state are left as they were.

    Args:
        model: a causal LM of transformers.
        mode: test only this mode; "auto" takes the first of slot, crop and replay that is exact.
    Raises:
        ValueError: not a causal LM, or `mode` is not exact for it.
    """
    check_causal_lm(model)
    implementation = implementation_of(text_config(model))
    # Another backend may be chosen for ops, and another model may be compiled.
    kernel = not serves(model, implementation)
    key = (mode, implementation, model.dtype, model.device, kernel)
    known = _probes.setdefault(model, {})
    if key not in known:
        with _undisturbed(model):
            known[key] = _examine(model, mode, serves(model, implementation))
    return known[key]


def member(model: "PreTrainedModel", *, mode: str = "auto") -> Member:
    """A member for this model: the fastest kind that reproduces the model's own logits.

    Args:
        model: a causal LM of transformers; it is not modified.
        mode: "slot", "crop" or "replay" insists on one kind; "auto" lets `probe` choose.
    Raises:
        ValueError: not a causal LM, an unknown mode, or one that is not exact for this model.
    """
    if mode not in MODES:
        raise Refusal.unknown("member", "mode", mode, MODES)
    return probe(model, mode=mode).member(model)


def ignores(model: "PreTrainedModel", name: str, tokens: Tensor, value: Tensor | bool) -> bool:
    """Whether an argument of a model's forward changes no logits of these tokens.

    Args:
        model: a causal LM of transformers.
        name: of the argument; one that the forward does not have changes nothing.
        tokens: (B, S) int64.
        value: the argument's.
    """
    if name not in forward_arguments(model):
        return True
    with _undisturbed(model):
        tokens = tokens.to(model.device)
        value = value if isinstance(value, bool) else value.to(model.device)
        expected = model(tokens, return_dict=True).logits
        try:
            logits = model(tokens, return_dict=True, **{name: value}).logits
        except REFUSALS:
            return False
        return bool(_errors(logits, expected).max() < _rounding(model) ** 0.5)


def _examine(model: "PreTrainedModel", mode: str, no_kernel: str) -> Probe:
    """The first candidate that is exact; `no_kernel` says why its layers need masks, or nothing."""
    name = model_name(model)
    # A rounding that sends a token to other experts is no fault of the mode and happens with
    # some inputs; a wrong mask is wrong for all.
    seeds = range(3 if _is_coarse(model) else 1)
    games = cache(partial(_Game, model))
    _begin(model, games)
    kept = games(0).logits_to_keep()
    refused: list[str] = []
    for candidate in _candidates(model, Probe(name, "", logits_to_keep=kept)):
        kernel = candidate.attention == "kernel"
        if mode not in ("auto", candidate.mode) or (kernel and no_kernel):
            continue
        found, fault = _tried(model, candidate, [partial(games, seed) for seed in seeds])
        if found is None and kernel:
            no_kernel = fault
        elif found is None:
            refused.append(f"{candidate.mode}: {fault}")
        else:
            reason = "; ".join(refused)
            if found.mode != "slot" and mode == "auto":
                logger.warning("%s: %s mode, row by row (%s)", name, found.mode, reason)
            if found.mode == "slot" and not kernel:
                logger.info("%s: slot mode with masks, no kernel (%s)", name, no_kernel)
                found = replace(found, mask_reason=no_kernel)
            return replace(found, reason=reason)
    raise Refusal(
        "member", "mode", f"one that is exact for {name}", f"{mode!r} ({'; '.join(refused)})"
    )


def _begin(model: "PreTrainedModel", games: Callable[[int], "_Game"]) -> None:
    """Make the first game, or refuse a model that cannot read."""
    try:
        games(0)
    except Refusal:
        raise
    except REFUSALS as raised:
        positions = getattr(text_config(model), "max_position_embeddings", "unknown")
        fault = f"{type(raised).__name__}: {raised}".splitlines()[0]
        raise Refusal(
            "member",
            "model",
            "a causal LM that reads 20 tokens, as its test does",
            f"{type(model).__name__} of {positions} positions ({fault})",
        ) from raised


def _tried(
    model: "PreTrainedModel", candidate: Probe, games: "Sequence[Callable[[], _Game]]"
) -> tuple[Probe | None, str]:
    """A candidate that one of the games finds exact, and what it can; or None, and its fault."""
    try:
        member = candidate.member(model)
        for make in games:
            game = make()
            if isinstance(member, SlotMember):
                member.longest_prompt = 0  # so that the game has prompts of both kinds
            error = game.play(member)
            if not error < game.tolerance:
                continue
            if not isinstance(member, SlotMember):
                return candidate, ""
            member.longest_prompt = LONGEST_PROMPT
            tree = game.tree(member)
            if candidate.attention == "kernel" and not tree:
                return None, "a tree's logits are not those of its paths"
            return replace(candidate, tree=tree, layout=member.layout), ""
        fault = f"logits are off by {error:.2g} of their spread"
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as refusal:
        fault = (str(refusal) or "no message").splitlines()[0]
        if not isinstance(refusal, NotImplementedError):
            fault = f"{type(refusal).__name__}: {fault}"
    return None, fault.removeprefix(f"{candidate.mode}: ").removeprefix("kernel: ")


def _candidates(model: "PreTrainedModel", blank: Probe) -> Iterator[Probe]:
    """Every way to run a model, fastest first."""
    config = text_config(model)
    # A model that wants a dict may take one tensor too, and is then wrong beyond its window.
    forms = [True] if getattr(config, "layer_types", None) else []
    forms += [False] if len(layer_kinds(config)) == 1 else []
    for per_type in forms:
        for attention in ("kernel", "mask"):
            yield replace(blank, mode="slot", attention=attention, per_type=per_type)
    yield replace(blank, mode="crop")
    for continuation in ("chunk", "token", "none"):
        yield replace(blank, mode="replay", continuation=continuation)


class _Game:
    """Two rows of random tokens, the logits a plain forward gives them, and moves to test."""

    def __init__(self, model: "PreTrainedModel", seed: int) -> None:
        self.model = model
        self.vocab_size = vocab_size(model)
        self.prompt = 8
        chosen = _chosen_keys(text_config(model))
        reaches = [_window(text_config(model)), chosen]
        tested = [reach for reach in reaches if reach and reach <= LONGEST_TESTED_WINDOW]
        self.prompt = max([self.prompt, *(reach + 4 for reach in tested)])
        generator = torch.Generator().manual_seed(seed)
        width = self.prompt + 12
        # Two rows are played with; an index breaks ties among keys by how many there are, which a
        # few rows at a few lengths need not show.
        rows, lengths = 2, [self.prompt, self.prompt + 6]
        if chosen in tested:
            rows, lengths = 16, list(range(self.prompt - 4, width))
        tokens = torch.randint(0, self.vocab_size, (rows, width), generator=generator)
        # The embedding of padding is zero in some models, and what they say after it no text.
        padding = getattr(text_config(model), "pad_token_id", None)
        if isinstance(padding, int):
            tokens[tokens == padding] = (padding + 1) % self.vocab_size
        self.sequences = tokens.to(model.device)
        extra = {"use_cache": False} if "use_cache" in forward_arguments(model) else {}
        self._plain: Callable[[Tensor], Tensor] = lambda tokens: (
            model(tokens, return_dict=True, **extra).logits
        )
        self.expected = torch.cat([self._plain(row[None]) for row in self.sequences])
        noise = max(map(self._noise, lengths))
        # Rounding stays well below the square root of the unit roundoff, relative to the spread
        # of the logits, and a wrong mask or position well above. In low precision what two plain
        # forwards differ by is measured; beyond a quarter of the spread nothing is rounding.
        rounding = _rounding(model) ** 0.5
        if not noise < (0.2 if _is_coarse(model) else rounding):
            fault = (
                f"{type(model).__name__}, whose logits depend on later tokens or their number "
                f"(by {noise:.2g} of their spread)"
            )
            raise Refusal("member", "model", "a causal LM", fault)
        self.tolerance = min(max(rounding, 4 * noise), 0.25)

    def _noise(self, length: int) -> float:
        """How much two plain forwards differ, one of a prefix and one of the whole."""
        prefix = self._plain(self.sequences[:, :length])
        return self.typical(_errors(prefix, self.expected[:, :length]))

    def typical(self, errors: Tensor) -> float:
        """The largest of (n,) errors; in low precision the upper quartile."""
        # There one token in many may be sent to other experts; a wrong mask spoils half of the
        # positions, or all.
        level = 0.75 if _is_coarse(self.model) else 1.0
        return float(errors.nan_to_num(float("inf")).quantile(level))

    def play(self, member: Member) -> float:
        """The error of a member in the kind of move it does worst."""
        n = self.prompt
        errors: dict[str, list[Tensor]] = {}

        def feed(
            kind: str,
            rows: Sequence[int],
            counts: Sequence[int],
            among: Sequence[int] | None = None,
        ) -> None:
            starts = [member.lengths[row] for row in (among or range(len(rows)))]
            q = max(counts)
            spans = [slice(start, start + q) for start in starts]
            tokens = [self.sequences[row, span] for row, span in zip(rows, spans, strict=True)]
            logits = member.forward(torch.stack(tokens), counts, among)
            for row, span, count, row_logits in zip(rows, spans, counts, logits, strict=True):
                expected = self.expected[row, span][:count]
                errors.setdefault(kind, []).append(_errors(row_logits[:count], expected))

        def reject(lengths: Sequence[int]) -> None:
            junk = self.sequences[: len(lengths)].flip(1)[:, :2]
            member.forward(junk, [2] * len(lengths))
            member.rollback(lengths)

        member.start(2, n + 16)
        feed("prompt", [0, 1], [n, n - 3])
        feed("ragged", [0, 1], [3, 1])
        member.rollback([n - 2, n - 2])
        feed("equal", [0, 1], [1, 1])
        reject([n - 2, n - 2])
        feed("equal", [0, 1], [1, 1])
        feed("chunk", [0, 1], [4, 0])
        feed("ragged", [0, 1], [2, 3])
        feed("rows", [1], [2], [1])
        reject([n + 3, n + 4])
        member.select([1])
        feed("selected", [1], [3])
        reject([n + 5])
        feed("selected", [1], [1])
        return max(self.typical(torch.cat(of_kind)) for of_kind in errors.values())

    def tree(self, member: SlotMember) -> bool:
        """Whether a tree's logits are those of its paths, in rows of two lengths."""
        n = self.prompt
        member.start(2, n + 8)
        member.forward(self.sequences[:2, :n], [n, n - 1])
        # Node 0 has children 1 and 2; node 3 is a child of 1.
        tree_mask = torch.eye(4, dtype=torch.bool, device=self.sequences.device)
        tree_mask[1, 0] = tree_mask[2, 0] = tree_mask[3, 0] = tree_mask[3, 1] = True
        rows = []
        for row, length in enumerate(member.lengths):
            path = self.sequences[row, length : length + 3]
            sibling = (path[1:2] + 1) % self.vocab_size
            rows.append(torch.stack([path[0], path[1], sibling[0], path[2]]))
        logits = member.forward_tree(torch.stack(rows), [0, 1, 1, 2], tree_mask)
        for row, length in enumerate(member.lengths):
            path = torch.cat([self.sequences[row, : length + 1], rows[row][2:3]])
            beside = self._plain(path[None])[0, -1:]
            expected = torch.cat(
                [
                    self.expected[row, length : length + 2],
                    beside,
                    self.expected[row, length + 2 : length + 3],
                ]
            )
            if not float(_errors(logits[row], expected).max()) < self.tolerance:
                return False
        return True

    def logits_to_keep(self) -> str:
        """The most capable form of the argument of that name which the model understands."""
        if "logits_to_keep" not in forward_arguments(self.model):
            return "all"
        tokens = self.sequences[:2, : self.prompt]
        index = torch.tensor([[2, 3], [0, 1]], device=tokens.device)
        expected = torch.stack([self.expected[0, 2:4], self.expected[1, 0:2]])
        for form, argument in (("rows", index), ("last", 2)):
            if form == "last":
                expected = self.expected[:2, self.prompt - 2 : self.prompt]
            try:
                logits = self.model(tokens, return_dict=True, logits_to_keep=argument).logits
            except REFUSALS:
                continue
            if logits.shape != expected.shape:
                continue
            if self.typical(_errors(logits, expected)) < 0.25:
                return form
        return "all"


def _errors(logits: Tensor, expected: Tensor) -> Tensor:
    """(n,) float64. Of (…, V) logits, root mean square in units of the logits' spread."""
    expected = expected.to(torch.float64).flatten(0, -2)
    error = logits.to(expected).flatten(0, -2) - expected
    return error.square().mean(-1).sqrt() / expected.std(-1).clamp_min(1e-30)


def _rounding(model: "PreTrainedModel") -> float:
    """The unit roundoff of a model's products."""
    # No dtype is finer than float32, in which norms and states are computed anyway.
    epsilon = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))
    if model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return max(epsilon, 2.0**-10)
    return epsilon


def _is_coarse(model: "PreTrainedModel") -> bool:
    return torch.finfo(model.dtype).eps > torch.finfo(torch.float32).eps


def _window(config: Any) -> int | None:
    """The shortest window of a model's layers, or None."""
    try:
        masks = Masks(
            config, per_type=len(layer_kinds(config)) > 1, additive=False, dtype=torch.float32
        )
    except NotImplementedError:
        return None
    return masks.window


def _chosen_keys(config: Any) -> int | None:
    """How many keys a layer with an index chooses of all there are, or None."""
    blocks = getattr(config, "index_topk_blocks", None)
    if blocks:
        return int(blocks * getattr(config, "index_block_size", 1))
    return getattr(config, "index_topk", None) or getattr(config, "indexer_budget", None)


@contextmanager
def _undisturbed(model: "PreTrainedModel") -> Iterator[None]:
    """Evaluation mode without gradients or warnings."""
    with evaluating([model]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
