# SPDX-License-Identifier: Apache-2.0
"""Bytes of GPU memory that a verification loads and stores, counted, beside its peers' and a floor.

Ours are counted where they happen: the SIMT emulator counts what the CUDA kernels load and store,
the interpreter's guard what the Triton kernels do, both while the kernels run and give the
reference's answer. The peers are plain references of published algorithms, written as the launches
that they make: each launch says what it loads and stores by doing it through `Memory`, and what
comes out must be the same tokens. The floor is what no exact verification by sweeps can do without:
every row whose normaliser decides about a draft once, unless it is known, and then the row that the
last token is drawn from, of the draft's law, too, if a dense draft was rejected.

What is known before is told to ours alone, for no peer can be told: nothing, the log-sum-exps of
the draft ("dense, lse": `sample` returns them) or of every row ("fused head": the LM head's
epilogue does).

* `eager`: the batched torch program of verify_contestants.py; every operator of it is a launch.
* `flashinfer-like`: a float32 softmax of every row of every law, the mixture of them, and a chain
  of speculative sampling that sweeps the rejected row twice.
* `mrv2-like`: vLLM's second model runner, for M members: a processed float32 copy of every row,
  statistics of each block, and a resampling of the rejected row.

The ops for trees come last, as traffic_of_trees.py says.

No GPU is needed and no time is claimed. The Triton kernels run at one sequence only: what they
move does not depend on the batch, and the interpreter is slow.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the emulator
sys.path.append(str(Path(__file__).parents[1] / "tests" / "tools"))  # the guard

import harness
import simt
import torch
import traffic_of_trees
import triton_guard
from harness import WRONG
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from verify_contestants import draw, straightforward

from specens_kernels import Law, backend, verify
from specens_kernels.refusal import Unsupported

VOCAB_SIZE = 128256
NUM_DRAFTS = 4
DRAFTS = ("one-hot", "dense", "dense, lse", "fused head")
TARGETS = {"over_floor": 1.10, "mrv2_over_ours": 4.0, "flashinfer_over_ours": 12.0}


@dataclass
class Memory:
    """Counts what launches load from and store to global memory."""

    loaded: int = 0
    stored: int = 0
    launches: int = 0

    @contextmanager
    def launch(self) -> Iterator[None]:
        """One kernel."""
        self.launches += 1
        yield

    def load(self, tensor: Tensor) -> Tensor:
        """The tensor, every element of it read."""
        self.loaded += tensor.numel() * tensor.element_size()
        return tensor

    def store(self, tensor: Tensor) -> Tensor:
        """The tensor, every element of it written."""
        self.stored += tensor.numel() * tensor.element_size()
        return tensor


class _Operators(TorchDispatchMode):
    """Every operator that computes is a launch: it loads its inputs and stores its outputs."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        if any(tensor.untyped_storage().data_ptr() not in addresses for tensor in outputs):
            with self.memory.launch():
                if func.overloadpacket is torch.ops.aten.gather:  # reads what it picks
                    self.memory.load(args[2])
                    self.memory.load(outputs[0])
                else:
                    for tensor in inputs:
                        self.memory.load(tensor)
                for tensor in outputs:
                    self.memory.store(tensor)
        return result


@dataclass(frozen=True)
class Inputs:
    """One batch: logits (B, N+1, V) per member, and what was drafted from what."""

    logits: list[Tensor]
    draft_logits: Tensor | None  # (B, N, V); None: point masses
    tokens: Tensor
    uniforms: Tensor
    weights: Tensor
    kept: int  # drafts of each sequence that are kept
    lse: Tensor | None = None  # (B, N+1, M), where it is known
    draft_lse: Tensor | None = None  # (B, N)

    @classmethod
    def make(cls, members: int, batch: int, dense: bool, vocab_size: int) -> "Inputs":
        """Correlated laws; a dense draft is rejected at the last node, a point mass never."""
        generator = torch.Generator().manual_seed(members)
        shape = (batch, NUM_DRAFTS + 1, vocab_size)
        shared = torch.randn(shape, generator=generator) * 2
        logits = [
            (shared + torch.randn(shape, generator=generator)).bfloat16() for _ in range(members)
        ]
        noise = torch.randn(shape, generator=generator)[:, :NUM_DRAFTS]
        draft_logits = (shared[:, :NUM_DRAFTS] + noise).bfloat16() if dense else None
        weights = torch.full((members,), 1 / members)
        target = sum(w * x.float().softmax(-1) for w, x in zip(weights, logits, strict=True))
        uniforms = torch.randint(2**24, (*shape[:2], 4), generator=generator) * 2.0**-24
        uniforms[..., 0] = 0.0
        tokens = target[:, :NUM_DRAFTS].argmax(-1)
        kept = NUM_DRAFTS
        if draft_logits is not None:
            kept = NUM_DRAFTS - 1
            excess = draft_logits[:, kept].float().softmax(-1) - target[:, kept]
            tokens[:, kept] = excess.argmax(-1)
            uniforms[:, kept + 1, 0] = 1 - 2.0**-24
        return cls(logits, draft_logits, tokens, uniforms, weights, kept)

    def told(self, draft: str) -> "Inputs":
        """The same, knowing what a kind of DRAFTS does."""
        members = torch.stack([x.double().logsumexp(-1) for x in self.logits], -1).float()
        own = None if self.draft_logits is None else self.draft_logits.double().logsumexp(-1)
        return replace(
            self,
            lse=members if draft == "fused head" else None,
            draft_lse=own.float() if own is not None and draft != "dense" else None,
        )

    @property
    def floor(self) -> int:
        """Bytes that must be loaded."""
        batch, _, vocab_size = self.logits[0].shape
        row = batch * vocab_size * self.logits[0].element_size()
        members = len(self.logits)
        rows = members if self.lse is not None else (NUM_DRAFTS + 1) * members
        if self.draft_logits is not None:
            rows += 1 if self.draft_lse is not None else NUM_DRAFTS + 1
        return rows * row


def eager(memory: Memory, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The batched program, operator by operator."""
    draft = inputs.draft_logits if inputs.draft_logits is not None else _one_hot(inputs)
    with _Operators(memory):
        last, num_accepted, _ = straightforward(
            inputs.logits, draft, inputs.tokens, inputs.uniforms, inputs.weights
        )
    return last, num_accepted


def _one_hot(inputs: Inputs) -> Tensor:
    """Logits whose softmax is a point mass, which these programs need as a tensor."""
    shape = (*inputs.tokens.shape, inputs.logits[0].shape[-1])
    logits = torch.full(shape, -torch.inf, dtype=torch.bfloat16)
    return logits.scatter(-1, inputs.tokens[..., None], 0.0)


def flashinfer_like(memory: Memory, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """softmax per law (a float32 copy, two reads, one write), mixture, chain."""
    given = inputs.draft_logits if inputs.draft_logits is not None else _one_hot(inputs)
    laws = []
    for logits in [*inputs.logits, given]:
        with memory.launch():
            wide = memory.store(memory.load(logits).float())
        with memory.launch():
            memory.load(wide)  # maxima and sums
            laws.append(memory.store(memory.load(wide).softmax(-1)))
    *members, draft = laws
    target = members[0]
    if len(members) > 1:
        with memory.launch():
            pairs = zip(members, inputs.weights, strict=True)
            target = memory.store(torch.stack([memory.load(x) * w for x, w in pairs]).sum(0))
    with memory.launch():
        return _chain(memory, inputs, target, draft, sweeps=2)


def _chain(
    memory: Memory, inputs: Inputs, target: Tensor, draft: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Coins against gathered masses, then `sweeps` reads of the row that is drawn from."""
    chosen = inputs.tokens[..., None]
    target_mass = memory.load(target[:, :NUM_DRAFTS].gather(-1, chosen)[..., 0])
    draft_mass = memory.load(draft.gather(-1, chosen)[..., 0])
    accepted = inputs.uniforms[:, 1:, 0] * draft_mass < target_mass
    num_accepted = accepted.int().cumprod(1).sum(1)
    rows = torch.arange(len(target))
    mass = target[rows, num_accepted]
    rejected = num_accepted < NUM_DRAFTS
    drafted = draft[rows, num_accepted.clamp(max=NUM_DRAFTS - 1)] * rejected[:, None]
    for _ in range(sweeps):
        memory.load(mass)
        memory.load(drafted[rejected])
    numbers = inputs.uniforms[rows, num_accepted, 1:]
    return draw((mass - drafted).clamp(min=0), numbers), num_accepted


def mrv2_like(memory: Memory, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Processed float32 copies, block statistics, decisions, one resampled row."""
    copies = []
    for logits in inputs.logits:
        with memory.launch():
            copies.append(memory.store(memory.load(logits).float()))
    dense = inputs.draft_logits
    with memory.launch():  # statistics of all rows but the bonus token's, and of the draft's
        for copy in copies:
            memory.load(copy[:, :NUM_DRAFTS])
        if dense is not None:
            memory.load(dense)
    with memory.launch():  # decisions: gathered numbers only
        pass
    laws = [copy.softmax(-1) for copy in copies]
    pairs = zip(laws, inputs.weights, strict=True)
    target = torch.stack([law * weight for law, weight in pairs]).sum(0)
    draft = (dense if dense is not None else _one_hot(inputs)).float().softmax(-1)
    uncounted = Memory()
    last, num_accepted = _chain(uncounted, inputs, target, draft, sweeps=0)
    rows = torch.arange(len(target))
    with memory.launch():  # resampling of one row
        for copy in copies:
            memory.load(copy[rows, num_accepted])
        rejected = num_accepted < NUM_DRAFTS
        if dense is not None:
            memory.load(dense[rows, num_accepted.clamp(max=NUM_DRAFTS - 1)][rejected])
    with memory.launch():  # the token into its place
        memory.store(last)
    return last, num_accepted


PEERS: dict[str, Callable[[Memory, Inputs], tuple[Tensor, Tensor]]] = {
    "eager": eager,
    "flashinfer-like": flashinfer_like,
    "mrv2-like": mrv2_like,
}


def _verdict(inputs: Inputs) -> tuple[Tensor, Tensor]:
    law = Law([1 / len(inputs.logits)] * len(inputs.logits))
    verdict = verify(
        inputs.logits,
        inputs.tokens,
        inputs.uniforms,
        law,
        draft_logits=inputs.draft_logits,
        lse=inputs.lse,
        draft_lse=inputs.draft_lse,
    )
    num_accepted = verdict.num_accepted.long()
    return verdict.tokens.gather(1, num_accepted[:, None])[:, 0], num_accepted


def cuda(memory: Memory, run: Callable[[], Any]) -> Any:
    """A call on the emulator of the CUDA kernels."""
    with simt.emulated() as module, backend("cuda"):
        module.reset_traffic()
        answer = run()
        for launches, loaded, stored in module.traffic().values():
            memory.launches += launches
            memory.loaded += loaded
            memory.stored += stored
    return answer


def triton(memory: Memory, run: Callable[[], Any]) -> Any:
    """A call of the Triton kernels in the interpreter."""
    triton_guard.install()
    with backend("triton"), triton_guard.counted() as kernels:
        answer = run()
    for kernel in kernels.values():
        memory.launches += kernel.launches
        memory.loaded += kernel.loaded
        memory.stored += kernel.stored
    return answer


OURS = {"cuda": cuda, "triton": triton}


def measure(members: int, batch: int, dense: bool, vocab_size: int) -> list[dict[str, Any]]:
    """One row for each contestant and kind of draft; what a kernel refuses is left out."""
    inputs = Inputs.make(members, batch, dense, vocab_size)
    with backend("reference"):
        expected = _verdict(inputs)
    assert expected[1].tolist() == [inputs.kept] * batch
    peers = {name: _count(partial(run, inputs=inputs), expected) for name, run in PEERS.items()}
    rows = []
    for draft in DRAFTS[1:] if dense else DRAFTS[:1]:
        told = inputs.told(draft)
        counted = {}
        for name, run in OURS.items():
            if name == "triton" and batch > 1:
                continue
            with suppress(Unsupported):
                counted[name] = _count(partial(run, run=partial(_verdict, told)), expected)
        for name, memory in (counted | peers).items():
            row = {"contestant": name, "members": members, "batch": batch, "draft": draft}
            row |= {"floor": told.floor // batch, "launches": WRONG, "bytes": WRONG}
            row["over_floor"] = WRONG
            if memory is not None:
                moved = memory.loaded + memory.stored
                row |= {"launches": memory.launches, "bytes": moved // batch}
                row["over_floor"] = round(moved / told.floor, 3)
            rows.append(row)
    return rows


def _count(
    run: Callable[[Memory], tuple[Tensor, Tensor]], expected: tuple[Tensor, Tensor]
) -> Memory | None:
    """What a contestant moves; None if its tokens are not the reference's."""
    memory = Memory()
    answer = run(memory)
    right = all(torch.equal(a, b.long()) for a, b in zip(expected, answer, strict=True))
    return memory if right else None


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures that have targets, at their worst or where they are asked for."""
    bytes_of = {
        (row["contestant"], row["members"], row["batch"], row["draft"]): row["bytes"]
        for row in rows
    }
    found: dict[str, Any] = {"targets": TARGETS | {"cuda_launches": 2, "triton_launches": 4}}
    for name in OURS:
        mine = [row for row in rows if row["contestant"] == name]
        found[f"{name}_launches"] = max(row["launches"] for row in mine)
        found[f"{name}_over_floor"] = max(row["over_floor"] for row in mine)
    most = max(row["members"] for row in rows)
    for peer in PEERS:
        for draft in DRAFTS:
            ours = bytes_of["cuda", most, 1, draft]
            ratio = bytes_of[peer, most, 1, draft] / ours
            kind = draft.replace(",", "").replace(" ", "_")
            found[f"{peer}_over_cuda_{kind}_M{most}"] = round(ratio, 2)
    found["wrong_rows"] = sum(row["bytes"] == WRONG for row in rows)
    return found


def readme_tables(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the README shows: one sequence."""
    columns = ["members", "draft", "floor MB", *OURS, *PEERS]
    lines = []
    for members in sorted({row["members"] for row in rows}):
        for draft in DRAFTS:
            these = [
                row
                for row in rows
                if (row["members"], row["batch"], row["draft"]) == (members, 1, draft)
            ]
            cells = {row["contestant"]: f"{row['bytes'] / 1e6:.2f}" for row in these}
            floor = f"{these[0]['floor'] / 1e6:.2f}"
            found = [cells.get(name, "-") for name in (*OURS, *PEERS)]
            lines.append([members, draft, floor, *found])
    caption = f"MB loaded and stored, {NUM_DRAFTS} drafts, bfloat16, vocabulary {VOCAB_SIZE:,}"
    return {"traffic": {"caption": caption, "columns": columns, "rows": lines}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, save."""
    parser = harness.arguments("Bytes moved by verify on a GPU, counted without one.")
    parser.add_argument("--batches", type=harness.numbers, default=[1, 64])
    options = parser.parse_args(arguments)
    batches = [1] if options.quick else options.batches
    rows = []
    for batch in batches:
        for members in (1, 2, 3):
            for dense in (False, True):
                rows += measure(members, batch, dense, VOCAB_SIZE)
                print(f"members {members}, batch {batch}, dense {dense}: done", flush=True)
    columns = list(rows[0])
    print(harness.table(columns, [[row[name] for name in columns] for row in rows]))
    of_trees = traffic_of_trees.rows(OURS, Memory)
    tables = {**readme_tables(rows), "tree_traffic": traffic_of_trees.page_table(of_trees)}
    print(harness.table(traffic_of_trees.COLUMNS, tables["tree_traffic"]["rows"]))
    found = headline(rows) | {"tree_targets": traffic_of_trees.targets(of_trees)}
    return harness.finish("bench_traffic", options, rows + of_trees, tables, found)


if __name__ == "__main__":
    raise SystemExit(main())
