# SPDX-License-Identifier: Apache-2.0
"""`compact` of an accepted path, keys and values of all layers, against torch's indexing.

Contestants: `ours`, the op, once for all layers; `layers`, an index_put for each layer and each
sequence, as a cache without the op does it; `gather`, one gather and one scatter of a whole slab.
Five nodes are accepted, none of which lies where it belongs. Before the clocks run, each contestant
has to leave the same cache behind.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import harness
import torch
from harness import WRONG, Spread
from torch import Tensor

from specens_kernels import compact, native

PATH = (2, 5, 9, 14, 20)
SLOTS, LENGTH = 2048, 1500
PEERS = ("layers", "gather")
TARGET_US = 20.0  # of a model of 30 layers and one sequence


@dataclass(frozen=True)
class Case:
    """A model: layers, key heads and their size; sequences in a batch."""

    layers: int
    key_heads: int
    size: int
    batch: int
    dtype: str

    @property
    def bytes_moved(self) -> int:
        """Read, and written."""
        item = 2 if self.dtype == "bfloat16" else 4
        rows = 2 * self.layers * self.batch * self.key_heads * len(PATH)
        return 2 * rows * self.size * item


CASES = (
    Case(30, 3, 64, 1, "float32"),
    Case(30, 3, 64, 8, "float32"),
    Case(24, 2, 64, 1, "float32"),
    Case(32, 8, 128, 1, "bfloat16"),
)


def contestants(case: Case, slab: Tensor) -> dict[str, Callable[[], Any]]:
    """Each moves the rows of one (2 L, B, K, S, E) slab."""
    path = torch.tensor([PATH] * case.batch, dtype=torch.int32)
    lengths = torch.full((case.batch,), LENGTH)
    sources = lengths[:, None] + path.long()
    targets = lengths[:, None] + 1 + torch.arange(len(PATH))
    shape = (*slab.shape[:3], len(PATH), case.size)
    from_rows, to_rows = (each[None, :, None, :, None].expand(shape) for each in (sources, targets))

    def layers() -> None:
        for layer, b in itertools.product(slab.unbind(), range(case.batch)):
            layer[b, :, targets[b]] = layer[b, :, sources[b]]

    return {
        "ours": lambda: compact([slab], lengths, path),
        "layers": layers,
        "gather": lambda: slab.scatter_(3, to_rows, slab.gather(3, from_rows)),
    }


def measure(case: Case, threads: int, rounds: int) -> dict[str, Any]:
    """One row of the result."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shape = (2 * case.layers, case.batch, case.key_heads, SLOTS, case.size)
    slab = torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))
    before = slab.clone()
    expected = before.clone()
    for i, node in enumerate(PATH):
        expected[:, :, :, LENGTH + 1 + i] = before[:, :, :, LENGTH + node]
    right = {}
    for name, function in contestants(case, slab).items():
        slab.copy_(before)
        function()
        if torch.equal(slab, expected):
            right[name] = function
    clocks = {name: harness.clock(function) for name, function in right.items()}
    samples = harness.interleave(clocks, rounds, 5.0)
    seconds: dict[str, Any] = {name: Spread.of(values) for name, values in samples.items()}
    seconds |= dict.fromkeys({"ours", *PEERS} - right.keys(), WRONG)
    row = {**asdict(case), "threads": threads, "bytes": case.bytes_moved, "seconds": seconds}
    for name in samples.keys() - {"ours"} if "ours" in samples else ():
        row[f"{name}_over_ours"] = Spread.of(harness.ratios(samples[name], samples["ours"]))
    return row


COLUMNS = ["layers", "key heads", "batch", "dtype", "ours µs", "layers/ours", "gather/ours"]


def shown(row: dict[str, Any]) -> list[str]:
    """The row as it is printed: medians."""
    ours = row["seconds"]["ours"]
    heads = f"{row['key_heads']} of {row['size']}"
    return [
        *(str(row["layers"]), heads, str(row["batch"]), row["dtype"]),
        f"{ours.median * 1e6:.1f}" if isinstance(ours, Spread) else ours,
        *(f"{row[key].median:.1f}" if key in row else "-" for key in _ratios()),
    ]


def _ratios() -> list[str]:
    return [f"{name}_over_ours" for name in PEERS]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Target C1 with its figure, and whether it is a pass or a miss."""
    found = []
    for row in rows:
        ours = row["seconds"]["ours"]
        if (row["layers"], row["batch"]) == (30, 1) and ours != WRONG:
            figure = round(ours.median * 1e6, 1)
            about = {"threads": row["threads"], "id": "C1", "dtype": row["dtype"], "ratio": "µs"}
            verdict = "pass" if figure <= TARGET_US else "miss"
            aim = {"target": f"<= {TARGET_US:g}", "figure": figure, "verdict": verdict}
            found.append({**about, **aim})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    options = harness.arguments("compact against torch's indexing.").parse_args(arguments)
    before = torch.get_num_threads()
    grid = list(itertools.product(CASES[:1] if options.quick else CASES, options.threads))
    rounds = 9 if options.quick else 101
    rows = [measure(case, threads, rounds) for case, threads in harness.in_time(options, grid)]
    torch.set_num_threads(before)
    print(harness.table([*COLUMNS, "threads"], [[*shown(row), row["threads"]] for row in rows]))
    found = verdicts(rows)
    for verdict in found:
        print(*verdict.values())
    wrong = sum(WRONG in row["seconds"].values() for row in rows)
    isa = native.cpu_isa() if native.AVAILABLE else "reference"
    headline = {"isa": isa, "wrong_rows": wrong, "targets": found}
    first = options.threads[0]
    cells = [shown(row) for row in rows if row["threads"] == first]
    caption = f"`compact` of {len(PATH)} accepted nodes, all layers, threads: {first}"
    tables = {"compact": {"caption": caption, "columns": COLUMNS, "rows": cells}}
    return harness.finish("bench_compact", options, rows, tables, headline)


if __name__ == "__main__":
    raise SystemExit(main())
