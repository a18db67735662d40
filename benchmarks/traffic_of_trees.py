# SPDX-License-Identifier: Apache-2.0
"""What `bench_traffic.py` counts of the ops for trees: `attention`, `compact`, `verify` on a tree.

The floor of `attention` is one read of the cache's keys and values and of the queries, and one
write of what comes out; what splits of the cache say to one another is beside it (`parts`). That of
`compact` is one read and one write of each row that moves. That of `verify` is what verify_trees.py
calls the rows of a tree. To add a case: one more entry in `cases`.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import verify_trees
from torch import Tensor

from specens_kernels import attention, backend, compact, tree
from specens_kernels.refusal import Unsupported

VOCAB_SIZE = 128256
HEADS, KEY_HEADS, SIZE, SLOTS = 32, 8, 64, 2048
# Times the floor and the parts.
TARGETS = {"attention": 1.10, "compact": 1.10, "verify": 1.05}
LAUNCHES = {"attention": 2, "compact": 1}
COLUMNS = ("op", "case", "contestant", "launches", "floor MB", "moved MB", "over floor")


class Case(NamedTuple):
    """A call, the bytes that it must move, and those that its splits say to one another.

    close: how far an answer may be from the reference's; 0 is not at all.
    """

    op: str
    name: str
    run: Callable[[], list[Tensor]]
    floor: int
    parts: int = 0
    close: float = 0.0


def attends(nodes: int) -> Case:
    """A random tree behind a long cache."""
    torch.manual_seed(nodes)
    total = SLOTS + nodes
    query = torch.randn(1, HEADS, nodes, SIZE).bfloat16()
    keys, values = (torch.randn(1, KEY_HEADS, total, SIZE).bfloat16() for _ in range(2))
    parents = torch.tensor([-1, *(node // 2 for node in range(nodes - 1))])
    arguments = (query, keys, values, torch.tensor([SLOTS]), tree.visible(parents))
    rows = HEADS * nodes
    packed = rows // KEY_HEADS
    split = 256 if packed <= 32 else 512
    splits = -(-total // split)
    floor = 2 * (keys.numel() + values.numel() + 2 * query.numel()) + 4 * rows
    # Written and read: values, a maximum and a sum of each row.
    parts = 2 * splits * rows * (SIZE + 2) * 4
    return Case(
        "attention", f"{nodes} nodes", lambda: [attention(*arguments)[0]], floor, parts, 0.02
    )


def compacts() -> Case:
    """Five nodes of 30 layers."""
    path = torch.tensor([[2, 3, 5, 9, 11]], dtype=torch.int32)
    slab = torch.randn(60, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20])

    def run() -> list[Tensor]:
        moved = slab.clone()
        compact([moved], lengths, path)
        return [moved]

    return Case("compact", "5 nodes, 30 layers", run, 2 * slab[:, :, :, :5].numel() * 4)


def verifies(members: int, situation: str) -> Case:
    """One of verify_trees.py's."""
    case = verify_trees.Case("4x2x1", VOCAB_SIZE, members, "bfloat16", situation)
    run = verify_trees.Inputs.make(case, case.parents, case.path).ours()
    floor = case.rows * (members + 1) * VOCAB_SIZE * 2
    # A leaf has no children, and no draft whose law would be read.
    floor -= VOCAB_SIZE * 2 * (situation != "none")
    return Case("verify", f"M={members}, kept: {situation}", lambda: [run().tokens], floor)


def cases() -> Iterator[Case]:
    """In the order of the table."""
    yield from map(attends, (1, 4, 8, 16))
    yield compacts()
    for members in (1, 3):
        for situation in verify_trees.SITUATIONS:
            yield verifies(members, situation)


Counter = Callable[[Any, Callable[[], Any]], Any]


def rows(counters: dict[str, Counter], memory: Callable[[], Any]) -> list[dict[str, Any]]:
    """One row for each case and backend; what a kernel refuses is left out.

    Args:
        counters: of each backend, a function of a memory and a call that runs the call.
        memory: makes one.
    """
    found = []
    for case in cases():
        with backend("reference"):
            expected = case.run()
        for name, count in counters.items():
            bytes_of = memory()
            with suppress(Unsupported):
                answers = count(bytes_of, case.run)
                agree = [
                    torch.allclose(a, b, 0.0, case.close)
                    for a, b in zip(answers, expected, strict=True)
                ]
                if not all(agree):
                    raise AssertionError(f"{name}: {case.op}, {case.name}: another answer")
                moved = bytes_of.loaded + bytes_of.stored
                row = {"op": case.op, "case": case.name, "contestant": name}
                row |= {"launches": bytes_of.launches, "floor": case.floor, "parts": case.parts}
                over = round(moved / (case.floor + case.parts), 3)
                found.append({**row, "bytes": moved, "over_floor": over})
    return found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst case of each op and backend against its targets."""
    found = []
    for op, most in TARGETS.items():
        for name in sorted({row["contestant"] for row in rows}):
            mine = [row for row in rows if (row["op"], row["contestant"]) == (op, name)]
            if not mine:
                continue
            figures = {"over_floor": (most, max(row["over_floor"] for row in mine))}
            if op in LAUNCHES:
                figures["launches"] = (LAUNCHES[op], max(row["launches"] for row in mine))
            for figure, (aim, worst) in figures.items():
                verdict = "pass" if worst <= aim else "miss"
                target = {"id": f"{op} {name}", "ratio": figure, "target": f"<= {aim}"}
                found.append({**target, "figure": worst, "verdict": verdict})
    return found


def page_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows."""
    lines = []
    for row in rows:
        megabytes = [f"{row[key] / 1e6:.3f}" for key in ("floor", "bytes")]
        keys = ("op", "case", "contestant", "launches")
        lines.append([*(row[key] for key in keys), *megabytes, row["over_floor"]])
    caption = "Bytes moved by the ops for trees, one sequence, over the floor and the splits' parts"
    return {"caption": caption, "columns": list(COLUMNS), "rows": lines}
