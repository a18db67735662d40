# SPDX-License-Identifier: Apache-2.0
"""`bench_verify.py --tree`: `verify` on draft trees, against a chain, torch and a sweep of bytes.

Contestants: `ours`, the op on a tree; `chain`, the op on a chain that reads as many rows, which
says what trees cost by themselves; `eager`, the walk as one writes it in torch over the laws of all
nodes, with the same tokens; `floor`, one sweep, by the native code, of as many rows. Situations:
`first`, the first child is kept at every level; `last`, every child but the last is rejected;
`none`, every child of the root is rejected. The children are draws of a separate draft. To add a
tree, name its widths in `WIDTHS`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import harness
import torch
from harness import WRONG, Spread
from torch import Tensor
from verify_contestants import draw

from specens_kernels import Law, Verdict, backend, native, tree, verify

# Children of every node, level by level.
WIDTHS = {"4x2x1": (4, 2, 1), "8x4x1": (8, 4, 1)}
SITUATIONS = ("first", "last", "none")
MOST_OF_CHAIN = 1.3  # times its time
MAX_COIN = 1 - 2.0**-24
COLUMNS = ("tree", "vocabulary", "members", "dtype", "children kept", "threads", "rows")
RATIOS = (("ours", "chain"), ("eager", "ours"), ("ours", "floor"))


@dataclass(frozen=True)
class Case:
    """One sequence: its tree, the shapes of the laws, and which children are kept."""

    widths: str
    vocab_size: int
    members: int
    dtype: str
    situation: str

    @property
    def parents(self) -> list[int]:
        """Level by level."""
        parents, level = [-1], [0]
        for width in WIDTHS[self.widths]:
            parents += [node for node in level for _ in range(width)]
            level = list(range(len(parents) - width * len(level), len(parents)))
        return parents

    @property
    def path(self) -> list[int]:
        """The nodes that are kept, from the root on."""
        below, path = tree.children(self.parents), [0]
        while self.situation != "none" and below[path[-1]]:
            path.append(below[path[-1]][0 if self.situation == "first" else -1])
        return path

    @property
    def rows(self) -> int:
        """Rows of each law that are read: one a node of the path, one a further rejection there."""
        below = tree.children(self.parents)
        rejected = [len(below[node]) - 1 for node in self.path if below[node]]
        if self.situation == "first":
            return len(self.path)
        return len(self.path) + sum(rejected)


@dataclass(frozen=True)
class Inputs:
    """Logits (1, N+1, V) of the members and of the draft, tokens (1, N), uniforms (1, N+1, 4)."""

    logits: list[Tensor]
    draft_logits: Tensor
    tokens: Tensor
    uniforms: Tensor
    parents: list[int]

    @classmethod
    def make(cls, case: Case, parents: list[int], kept: Sequence[int]) -> "Inputs":
        """Correlated laws; coins and tokens such that the nodes `kept` are, and no other."""
        generator = torch.Generator().manual_seed(len(parents))
        shape = (1, len(parents), case.vocab_size)
        dtype = getattr(torch, case.dtype)
        shared = torch.randn(shape, generator=generator) * 2
        noisy = [shared + torch.randn(shape, generator=generator) for _ in range(case.members + 1)]
        *logits, draft_logits = (each.to(dtype) for each in noisy)
        target = sum(each.float().softmax(-1) for each in logits)[0] / case.members
        draft = draft_logits.float().softmax(-1)[0]
        tokens = torch.zeros(1, len(parents) - 1, dtype=torch.int64)
        uniforms = torch.randint(2**24, (1, len(parents), 4), generator=generator) * 2.0**-24
        for node, below in enumerate(tree.children(parents)):
            law = target[node]
            for child in below:
                excess = law - draft[node]
                tokens[0, child - 1] = law.argmax() if child in kept else excess.argmin()
                uniforms[0, child, 0] = 0.0 if child in kept else MAX_COIN
                law = excess.clamp(min=0) / excess.clamp(min=0).sum()
        return cls(logits, draft_logits, tokens, uniforms, parents)

    def ours(self, chain: bool = False) -> Callable[[], Verdict]:
        """The op."""
        law = Law([1 / len(self.logits)] * len(self.logits))
        parents = None if chain else torch.tensor(self.parents)
        given: dict[str, Any] = {"draft_logits": self.draft_logits, "parents": parents}
        return lambda: verify(self.logits, self.tokens, self.uniforms, law, **given)

    def walk(self) -> list[int]:
        """The program in torch: every law first, then from the root down. The emitted tokens."""
        target = sum(each[0].float().softmax(-1) for each in self.logits) / len(self.logits)
        draft = self.draft_logits[0].float().softmax(-1)
        below, node, emitted = tree.children(self.parents), 0, []
        while True:
            law = target[node]
            for child in below[node]:
                token = int(self.tokens[0, child - 1])
                if self.uniforms[0, child, 0] * draft[node, token] < law[token]:
                    emitted.append(token)
                    break
                law = (law - draft[node]).clamp(min=0)
                law = law / law.sum()
            else:
                last = draw(law[None], self.uniforms[:, node, 1:])
                return [*emitted, int(last)]
            node = child

    def floor(self, rows: int) -> Callable[[], Any]:
        """A sweep of so many rows of every law."""
        width = self.draft_logits.shape[-1]
        laws = [each[:, :rows] for each in [*self.logits, self.draft_logits]]
        return lambda: native.floor_sweep(laws, width)


def contestants(case: Case) -> dict[str, Callable[[], Any]]:
    """Those of one case whose tokens are the reference's."""
    path = case.path
    inputs = Inputs.make(case, case.parents, path)
    line = list(range(case.rows))
    chained = Inputs.make(case, [-1, *line[:-1]], line)
    every: dict[str, Callable[[], Any]] = {
        "ours": inputs.ours(),
        "chain": chained.ours(chain=True),
        "eager": inputs.walk,
    }
    right: dict[str, Callable[[], Any]] = {}
    for name, run in every.items():
        with backend("reference"):
            expected = (chained.ours(chain=True) if name == "chain" else inputs.ours())()
        kept = (case.rows if name == "chain" else len(path)) - 1
        assert expected.num_accepted.item() == kept, name
        tokens = run()
        tokens = tokens if name == "eager" else tokens.tokens[0, : kept + 1].tolist()
        if tokens == expected.tokens[0, : kept + 1].tolist():
            right[name] = run
    if native.AVAILABLE:
        right["floor"] = chained.floor(case.rows)
    return right


def measure(case: Case, threads: int, rounds: int, budget_s: float) -> dict[str, Any]:
    """One row of the result."""
    torch.set_num_threads(threads)
    clocks = {name: harness.clock(run) for name, run in contestants(case).items()}
    samples = harness.interleave(clocks, rounds, budget_s)
    times: dict[str, Any] = dict.fromkeys(("ours", "chain", "eager"), WRONG)
    times |= {name: Spread.of(values) for name, values in samples.items()}
    row = {**asdict(case), "nodes": len(case.parents) - 1, "rows": case.rows, "threads": threads}
    row["seconds"] = times
    for over, under in RATIOS:
        if over in samples and under in samples:
            ratios = harness.ratios(samples[over], samples[under])
            row[f"{over}_over_{under}"] = Spread.of(ratios)
    return row


def cases(options: argparse.Namespace) -> list[Case]:
    """What is measured; --quick keeps one tree and one vocabulary."""
    vocab_sizes = sorted(options.vocab_sizes)
    shapes = (
        [("bfloat16", 2)] if options.quick else [("bfloat16", 1), ("bfloat16", 3), ("float32", 2)]
    )
    return [
        Case(widths, vocab_size, members, dtype, situation)
        for widths in (list(WIDTHS)[:1] if options.quick else WIDTHS)
        for vocab_size in (vocab_sizes[:1] if options.quick else (vocab_sizes[0], vocab_sizes[-1]))
        for dtype, members in shapes
        for situation in SITUATIONS
    ]


def shown(row: dict[str, Any]) -> list[str]:
    """The row as it is printed."""
    keys = ("widths", "vocab_size", "members", "dtype", "situation", "threads", "rows")
    times = [row["seconds"].get(name, "-") for name in ("ours", "chain", "eager", "floor")]
    ratios = [row.get(f"{over}_over_{under}") for over, under in RATIOS]
    return [
        *(str(row[key]) for key in keys),
        *(time.text(1e6, 0) if isinstance(time, Spread) else time for time in times),
        *("-" if ratio is None else f"{ratio.median:.2f}" for ratio in ratios),
    ]


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst case of each situation, and whether it is within the target."""
    targets = []
    for threads in sorted({row["threads"] for row in rows}):
        for situation in SITUATIONS:
            ratios = [
                row["ours_over_chain"].median
                for row in rows
                if (row["threads"], row["situation"]) == (threads, situation)
                and "ours_over_chain" in row
            ]
            if ratios:
                of = {"threads": threads, "ratio": f"ours_over_chain, kept: {situation}"}
                worst = round(max(ratios), 2)
                verdict = "pass" if worst <= MOST_OF_CHAIN else "miss"
                aim = {"target": f"<= {MOST_OF_CHAIN}", "figure": worst, "verdict": verdict}
                targets.append({"id": "V1", **of, **aim})
    wrong = sum(WRONG in row["seconds"].values() for row in rows)
    return {"wrong_rows": wrong, "targets": targets}


def page_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows: medians, the largest thread count."""
    most = max(row["threads"] for row in rows)
    lines = []
    for row in rows:
        if row["threads"] == most:
            time = row["seconds"]["ours"]
            ratios = [row.get(f"{over}_over_{under}") for over, under in RATIOS]
            keys = ("widths", "vocab_size", "members", "dtype", "situation")
            line = [
                *(row[key] for key in keys),
                time if time == WRONG else f"{time.median * 1e6:.0f}",
            ]
            lines.append(
                line + ["-" if ratio is None else f"{ratio.median:.2f}" for ratio in ratios]
            )
    columns = [*COLUMNS[:5], "µs", *("/".join(pair) for pair in RATIOS)]
    caption = f"`verify` on trees, one sequence, threads: {most}"
    return {"caption": caption, "columns": columns, "rows": lines}


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    rounds, budget_s = (9, 1.0) if options.quick else (21, 6.0)
    before = torch.get_num_threads()
    rows = []
    grid = [(case, threads) for case in cases(options) for threads in options.threads]
    for case, threads in harness.in_time(options, grid):
        rows.append(measure(case, threads, rounds, budget_s))
        print(*shown(rows[-1])[:7], "done", flush=True)
    torch.set_num_threads(before)
    columns = [*COLUMNS, "ours µs", "chain µs", "eager µs", "floor µs"]
    columns += ["/".join(pair) for pair in RATIOS]
    print(harness.table(columns, [shown(row) for row in rows]))
    tables = {"verify_tree": page_table(rows)}
    return harness.finish("bench_verify_tree", options, rows, tables, headline(rows))
