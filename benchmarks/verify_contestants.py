# SPDX-License-Identifier: Apache-2.0
"""What `bench_verify.py` times: its inputs, our op, the same maths in torch, a floor, and a peer.

To add a contestant, write a function that takes a `Case` and its `Inputs` and gives what to call,
and name it in `contestants`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specens_kernels import Law, native, verify
from specens_kernels.reference import SUB_TILE, TILE

NUM_DRAFTS = 5
# Drafts kept per sequence; over eight sequences the mean is that of an acceptance of 0.7 a draft.
TYPICAL = (2, 0, 4, 1, 5, 3, 0, 1)


@dataclass(frozen=True)
class Case:
    """One input: the shapes, and how many drafts of each sequence are kept."""

    vocab_size: int
    members: int
    batch: int
    dtype: str
    situation: str
    kept: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what is kept from the situation."""
        everything = (NUM_DRAFTS,) * self.batch
        kept = everything if self.situation == "accepted" else TYPICAL[: self.batch]
        object.__setattr__(self, "kept", kept)

    @property
    def rows_read(self) -> int:
        """Rows of each member that must be read, over all sequences: up to the emitted token's."""
        return sum(kept + 1 for kept in self.kept)

    @property
    def draft_rows_read(self) -> int:
        """Rows of the separate draft that must be read."""
        return 0 if self.members > 1 else sum(min(kept + 1, NUM_DRAFTS) for kept in self.kept)

    @property
    def bytes_read(self) -> int:
        """Bytes of logits that must be read."""
        rows = self.rows_read * self.members + self.draft_rows_read
        return rows * self.vocab_size * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Inputs:
    """Logits (B, N+1, V) per member; drafts from member 0, or for M = 1 from `draft_logits`."""

    logits: list[Tensor]
    draft_logits: Tensor | None
    tokens: Tensor
    uniforms: Tensor
    weights: Tensor

    @classmethod
    def make(cls, case: Case, seed: int = 0) -> "Inputs":
        """Correlated laws, and coins and tokens such that exactly `case.kept` drafts are kept."""
        generator = torch.Generator().manual_seed(seed)
        shape = (case.batch, NUM_DRAFTS + 1, case.vocab_size)
        shared = torch.randn(shape, generator=generator) * 2
        dtype = getattr(torch, case.dtype)
        logits = [
            (shared + torch.randn(shape, generator=generator)).to(dtype)
            for _ in range(case.members)
        ]
        draft_logits = None
        if case.members == 1:
            noise = torch.randn(shape, generator=generator)[:, :NUM_DRAFTS]
            draft_logits = (shared[:, :NUM_DRAFTS] + noise).to(dtype)
        weights = torch.full((case.members,), 1 / case.members)
        source = logits[0][:, :NUM_DRAFTS] if draft_logits is None else draft_logits
        draft = source.float().softmax(-1)
        target = sum(w * x.float().softmax(-1) for w, x in zip(weights, logits, strict=True))
        tokens = draft.argmax(-1)
        uniforms = torch.randint(2**24, (*shape[:2], 4), generator=generator) * 2.0**-24
        uniforms[:, :, 0] = 0.0  # every draft with any mass is kept ...
        for b, kept in enumerate(case.kept):
            if kept < NUM_DRAFTS:  # ... but this one, whose mass under the draft is far too large
                tokens[b, kept] = (draft[b, kept] - target[b, kept]).argmax()
                uniforms[b, kept + 1, 0] = 1 - 2.0**-24
        return cls(logits, draft_logits, tokens, uniforms, weights)

    def cuda(self) -> "Inputs":
        """The same on the current CUDA device."""
        draft_logits = None if self.draft_logits is None else self.draft_logits.cuda()
        logits = [tensor.cuda() for tensor in self.logits]
        rest = (self.tokens.cuda(), self.uniforms.cuda(), self.weights.cuda())
        return Inputs(logits, draft_logits, *rest)


def straightforward(
    logits: Sequence[Tensor],
    draft_logits: Tensor | None,
    tokens: Tensor,
    uniforms: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one would write in torch: (last token, drafts kept, log-probabilities), each per row."""
    laws = [member.float().softmax(-1) for member in logits]
    target = laws[0] * weights[0]
    for law, weight in zip(laws[1:], weights[1:], strict=True):
        target = target + law * weight
    num_drafts = tokens.shape[1]
    draft = laws[0][:, :num_drafts] if draft_logits is None else draft_logits.float().softmax(-1)
    chosen = tokens[..., None]
    target_mass = target[:, :num_drafts].gather(-1, chosen)[..., 0]
    draft_mass = draft.gather(-1, chosen)[..., 0]
    accepted = uniforms[:, 1:, 0] * draft_mass < target_mass
    num_accepted = accepted.int().cumprod(1).sum(1)
    width = target.shape[-1]
    row = num_accepted[:, None, None]
    mass = target.gather(1, row.expand(-1, 1, width))[:, 0]
    drafted = draft.gather(1, row.clamp(max=num_drafts - 1).expand(-1, 1, width))[:, 0]
    rejected = (num_accepted < num_drafts)[:, None]
    residual = (mass - torch.where(rejected, drafted, 0.0)).clamp(min=0)
    last = draw(residual, uniforms.gather(1, row.expand(-1, 1, 4))[:, 0, 1:])
    last_mass = mass.gather(-1, last[:, None])
    log_probs = torch.cat((target_mass, last_mass), 1).log()
    return last, num_accepted, log_probs


def draw(mass: Tensor, numbers: Tensor) -> Tensor:
    """The op's hierarchical inverse CDF, so that the answer must be the same token."""
    tiles = -(-mass.shape[-1] // TILE)
    grid = torch.nn.functional.pad(mass, (0, tiles * TILE - mass.shape[-1]))
    grid = grid.view(-1, tiles, TILE // SUB_TILE, SUB_TILE)
    rows = torch.arange(len(mass), device=mass.device)
    tile = pick(grid.sum((-1, -2)), numbers[:, 0])
    sub_tile = pick(grid[rows, tile].sum(-1), numbers[:, 1])
    token = pick(grid[rows, tile, sub_tile], numbers[:, 2])
    return tile * TILE + sub_tile * SUB_TILE + token


def pick(mass: Tensor, number: Tensor) -> Tensor:
    cumulative = mass.cumsum(-1)
    return (cumulative <= number[:, None] * cumulative[:, -1:]).sum(-1)


def known(inputs: Inputs, told: str) -> dict[str, Tensor]:
    """The log-sum-exps that the op is told: "nothing", those of the "draft", or "all"."""
    if told == "nothing":
        return {}
    lse = torch.stack([one.float().logsumexp(-1) for one in inputs.logits], -1)
    if inputs.draft_logits is not None:
        draft = {"draft_lse": inputs.draft_logits.float().logsumexp(-1)}
        return draft if told == "draft" else {"lse": lse} | draft
    if told == "draft":  # the first member has drafted, and has not seen its own last draft
        lse[..., 1:] = lse[:, NUM_DRAFTS:] = torch.nan
    return {"lse": lse}


def ours(inputs: Inputs, told: str = "nothing") -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """The op, in the form of `straightforward`'s answer."""
    law = Law([1 / len(inputs.logits)] * len(inputs.logits))
    given = known(inputs, told)
    proposers = None
    if inputs.draft_logits is None:
        proposers = torch.zeros(1, NUM_DRAFTS, dtype=torch.int32, device=inputs.tokens.device)

    def run() -> Any:
        return verify(
            inputs.logits,
            inputs.tokens,
            inputs.uniforms,
            law,
            proposers=proposers,
            draft_logits=inputs.draft_logits,
            **given,
        )

    return run


def floor(case: Case, inputs: Inputs) -> Callable[[], Any] | None:
    """A sweep of as many rows as must be read; None where there are no native kernels."""
    if not native.AVAILABLE or inputs.tokens.is_cuda:
        return None
    width = case.vocab_size
    rows = [tensor.view(1, -1, width)[:, : case.rows_read] for tensor in inputs.logits]
    if inputs.draft_logits is None:
        return lambda: native.floor_sweep(rows, width)
    drafts = [inputs.draft_logits.view(1, -1, width)[:, : case.draft_rows_read]]
    return lambda: (native.floor_sweep(rows, width), native.floor_sweep(drafts, width))


class OwnNumbers(NamedTuple):
    """The answer of a program that draws its own random numbers: (B, N + 1) and (B,)."""

    tokens: Tensor
    num_accepted: Tensor


def flashinfer(case: Case, inputs: Inputs) -> Callable[[], OwnNumbers] | None:
    """FlashInfer's softmax of every law, the mixture, its chain; None where it is not installed.

    It draws its own random numbers: for each sequence we look for a seed with which it keeps as
    many drafts as the others do.
    """
    if find_spec("flashinfer") is None:
        return None
    sampling = import_module("flashinfer.sampling")
    if "seed" not in inspect.signature(sampling.chain_speculative_sampling).parameters:
        print("flashinfer: expected chain_speculative_sampling(seed=...), got none: left out")
        return None
    tokens, share = inputs.tokens.int(), 1 / case.members
    offsets = torch.zeros(case.batch, dtype=torch.int64, device=tokens.device)

    def law(logits: Tensor) -> Tensor:
        return sampling.softmax(logits.reshape(-1, case.vocab_size)).view(logits.shape)

    def run(seeds: Tensor) -> OwnNumbers:
        laws = [law(logits) for logits in inputs.logits]
        target = laws[0] if case.members == 1 else laws[0] * share
        for other in laws[1:]:
            target.add_(other, alpha=share)
        if inputs.draft_logits is None:
            draft = laws[0][:, :NUM_DRAFTS].contiguous()
        else:
            draft = law(inputs.draft_logits)
        found, _, kept = sampling.chain_speculative_sampling(
            draft, tokens, target, seed=seeds, offset=offsets
        )
        return OwnNumbers(found, kept)

    wanted = torch.tensor(case.kept, device=tokens.device)
    seeds = torch.zeros(case.batch, dtype=torch.int64, device=tokens.device)
    for seed in reversed(range(1000)):
        hits = run(torch.full_like(seeds, seed)).num_accepted == wanted
        seeds = torch.where(hits, seed, seeds)
    return lambda: run(seeds)


def contestants(case: Case, inputs: Inputs, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Everything that runs on this case."""
    packed = (
        inputs.logits, inputs.draft_logits, inputs.tokens, inputs.uniforms, inputs.weights
    )  # fmt: skip
    found: dict[str, Callable[[], Any]] = {
        "ours": ours(inputs),
        "told draft": ours(inputs, "draft"),
        "told all": ours(inputs, "all"),
        "eager": lambda: straightforward(*packed),
    }
    if compiled:
        torch._dynamo.reset()
        program = torch.compile(straightforward, fullgraph=True, dynamic=False)
        found["compiled"] = lambda: program(*packed)
    sweep = floor(case, inputs)
    if sweep is not None:
        found["floor"] = sweep
    chain = flashinfer(case, inputs) if inputs.tokens.is_cuda else None
    if chain is not None:
        found["flashinfer"] = chain
    return found
