# SPDX-License-Identifier: Apache-2.0
"""`attention` of a tree's nodes to a long cache, against torch's attention and against floors.

Contestants: `ours`, the op, which takes lengths and words; the others take a mask that is made
beforehand: `hf`, scaled_dot_product_attention of keys and values repeated for every head, as
transformers calls it whenever there is a mask; `gqa`, the same with enable_gqa; `packed`, the same
with a key head's queries as rows of one; `bmm`, two products and a softmax over these rows; `flex`,
torch's compiled FlexAttention, in one case of each dtype, for it compiles for many seconds.
Floors: `read`, a sum over the bytes of keys and values; `products`, the two products alone, of keys
that are transposed already. One row, one layer. Wall time decides; with one thread, the thread's
own CPU time stands beside it, which a busy machine does not lengthen. More threads than the first
number are timed at the headline's shape alone. The bits of a result are compared, too: over batch,
row, threads, capacity and pages.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import harness
import torch
from harness import WRONG, Spread
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from specens_kernels import attention, backend, native, tree

SHAPES = ((32, 8, 64), (32, 4, 128))  # heads, key heads, size
SLOTS = (512, 4096, 16384)
NODES = (1, 4, 16, 64, 128)
DTYPES = ("float32", "bfloat16")
PEERS = ("hf", "gqa", "packed", "bmm", "flex")
FLOORS = ("read", "products")
HEADLINE = SHAPES[0], 4096
FLEX_NODES = 16
# Least ratios of time at the headline's shape, by dtype and contestant; of bfloat16, where the
# machine has AMX and where it has not.
TARGETS: dict[str, dict[str, dict[int, float]]] = {
    "float32": {"hf": {4: 25.0, 16: 12.0, 64: 5.0}, "packed": {4: 1.8, 16: 1.8, 64: 1.8}},
    "bfloat16": {"packed": {4: 2.0, 16: 2.0, 64: 2.0}},
}
AMX_TARGETS = {"hf": {4: 10.0, 16: 10.0, 64: 8.0}, "packed": {16: 4.0, 64: 4.0}}
AMX_READ = 1.2  # most times the read floor, of up to 16 rows
IDS = {"float32": "A1", "bfloat16": "A2"}


@dataclass(frozen=True)
class Case:
    """One call: heads, key heads and size of a head; slots in use and nodes among them."""

    heads: int
    key_heads: int
    size: int
    slots: int
    nodes: int
    dtype: str

    @property
    def bytes_read(self) -> int:
        """Of keys and values."""
        item = 2 if self.dtype == "bfloat16" else 4
        return 2 * self.key_heads * self.slots * self.size * item

    @property
    def flops(self) -> int:
        """Of the two products."""
        return 4 * self.nodes * self.heads * self.slots * self.size


class Inputs(NamedTuple):
    """A query as models have it, a cache of a larger capacity, and a random tree."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor
    visible: Tensor
    mask: Tensor  # (1, 1, N+1, S) bool
    above: Tensor  # (N+1, N+1) bool, `tree.ancestors`

    @classmethod
    def make(cls, case: Case) -> "Inputs":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))

        room = 64
        cache = normal(2, 1, case.key_heads, case.slots + room, case.size)
        query = normal(1, case.nodes, case.heads, case.size).transpose(1, 2)
        below = torch.arange(case.nodes)
        parents = below - 1 - (torch.rand(case.nodes, generator=generator) * 4).long()
        parents = parents.clamp(min=0).index_fill(0, torch.tensor([0]), -1)
        prefix = case.slots - case.nodes
        mask = torch.ones(1, 1, case.nodes, case.slots, dtype=torch.bool)
        above = tree.ancestors(parents)[0]
        mask[0, 0, :, prefix:] = above
        keys, values = cache[:, :, :, : case.slots].unbind()
        words = tree.visible(parents)
        return cls(query, keys, values, torch.tensor([prefix]), words, mask, above)


def repeated(cache: Tensor, group: int) -> Tensor:
    """(1, H, S, E), as transformers' repeat_kv makes it."""
    batch, heads, slots, size = cache.shape
    wide = cache[:, :, None].expand(batch, heads, group, slots, size)
    return wide.reshape(batch, heads * group, slots, size)


def contestants(case: Case, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Ours, the peers and the floors; all but the floors return (1, N+1, H, E)."""
    query, keys, values, lengths, visible, mask, _ = inputs
    group = case.heads // case.key_heads
    shape = (1, case.key_heads, group * case.nodes, case.size)
    rows_mask = mask.repeat(1, 1, group, 1)
    added = torch.zeros(rows_mask.shape, dtype=query.dtype)
    added.masked_fill_(~rows_mask, torch.finfo(query.dtype).min)
    transposed, masses = keys.mT.contiguous(), torch.rand(*shape[:3], case.slots).to(query.dtype)
    rows = query.reshape(shape)
    words = [cache.contiguous().view(torch.int64) for cache in (keys, values)]

    def in_place(out: Tensor) -> Tensor:
        return out.view(1, case.heads, case.nodes, case.size).transpose(1, 2).contiguous()

    def bmm() -> Tensor:
        scores = query.reshape(shape) @ keys.mT * case.size**-0.5 + added
        return in_place(scores.float().softmax(-1).to(query.dtype) @ values)

    def hf() -> Tensor:
        wide = repeated(keys, group), repeated(values, group)
        return in_place(scaled_dot_product_attention(query, *wide, mask))

    def gqa() -> Tensor:
        return in_place(scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True))

    def packed() -> Tensor:
        return in_place(scaled_dot_product_attention(query.reshape(shape), keys, values, rows_mask))

    return {
        "ours": lambda: attention(query, keys, values, lengths, visible)[0],
        "hf": hf,
        "gqa": gqa,
        "packed": packed,
        "bmm": bmm,
        "read": lambda: [each.sum() for each in words],
        "products": lambda: (rows @ transposed, masses @ values),
    }


def flex(case: Case, inputs: Inputs) -> tuple[Callable[[], Any], dict[str, float]]:
    """FlexAttention, whose mask is made beforehand, and what both took: seconds."""
    query, keys, values, _, _, _, above = inputs
    prefix, last = case.slots - case.nodes, case.nodes - 1

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        return (slot < prefix) | above[row, (slot - prefix).clamp(0, last)]

    compiled = torch.compile(flex_attention, dynamic=False)
    began = time.perf_counter()
    mask = create_block_mask(sees, None, None, case.nodes, case.slots, device="cpu")
    masked = time.perf_counter()

    def run() -> Tensor:
        out = compiled(query, keys, values, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    run()
    return run, {"mask": masked - began, "first call": time.perf_counter() - masked}


def gate(case: Case, inputs: Inputs) -> Callable[[str, Any], bool]:
    """Whether an answer is the reference's, up to the rounding of its type and of masses."""
    with backend("reference"):
        expected = attention(*inputs[:5])[0].float()
    most = 2e-2 if case.dtype == "bfloat16" else 2e-5

    def agrees(name: str, answer: Any) -> bool:
        return name in FLOORS or bool((answer.float() - expected).abs().max() <= most)

    return agrees


def timed(function: Callable[[], Any], cpu: list[float]) -> harness.Contestant:
    """Wall time of a call, and in `cpu` the thread's own; as `harness.clock`."""
    began = time.perf_counter()
    function()
    number = max(1, int(2e-3 / (time.perf_counter() - began)))

    def measure(_: int) -> float:
        began, began_cpu = time.perf_counter(), time.thread_time()
        for _ in range(number):
            function()
        cpu.append((time.thread_time() - began_cpu) / number)
        return (time.perf_counter() - began) / number

    return measure


def measure(
    case: Case, threads: int, rounds: int, budget_s: float, with_flex: bool = False
) -> dict[str, Any]:
    """One row of the result."""
    inputs = Inputs.make(case)
    agrees = gate(case, inputs)
    torch.set_num_threads(threads)
    found = contestants(case, inputs)
    row: dict[str, Any] = {**asdict(case), "threads": threads}
    row |= {"bytes": case.bytes_read, "flops": case.flops}
    if with_flex:
        found["flex"], row["flex_seconds"] = flex(case, inputs)
    right = {name: function for name, function in found.items() if agrees(name, function())}
    cpu: dict[str, list[float]] = {name: [] for name in right}
    clocks = {name: timed(function, cpu[name]) for name, function in right.items()}
    samples = harness.interleave(clocks, rounds, budget_s)
    times: dict[str, Any] = {name: Spread.of(values) for name, values in samples.items()}
    times |= dict.fromkeys(found.keys() - right.keys(), WRONG)
    row["seconds"] = times
    if threads == 1:
        row["cpu_seconds"] = {name: Spread.of(values) for name, values in cpu.items()}
    for name in samples.keys() - {"ours"} if "ours" in samples else ():
        over, under = ("ours", name) if name in FLOORS else (name, "ours")
        row[f"{over}_over_{under}"] = Spread.of(harness.ratios(samples[over], samples[under]))
    return row


def bits(dtype: torch.dtype) -> dict[str, bool]:
    """Whether a result keeps its bits, by what is changed beside it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    nodes, page, lengths = 9, 16, torch.tensor([1500, 40, 777])
    query, keys, values = normal(3, 8, nodes, 64), normal(3, 2, 1600, 64), normal(3, 2, 1600, 64)
    words = tree.visible(tree.chain(nodes - 1))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = attention(query, keys, values, lengths, words)

    def same(*given: Tensor, rows: Sequence[int] = (0, 1, 2), **options: Any) -> bool:
        found = attention(*given, words, **options)
        return all(torch.equal(a, b[list(rows)]) for a, b in zip(found, whole, strict=True))

    order = [2, 0, 1]
    moved = (query[order], keys[order], values[order], lengths[order])
    alone = [
        same(*(x[b : b + 1] for x in (query, keys, values, lengths)), rows=[b]) for b in (0, 1)
    ]
    wide = [torch.cat((cache, cache), 2)[:, :, :2500] for cache in (keys, values)]
    table = torch.randperm(300, generator=generator)
    pools = [torch.empty(300, 2, page, 64, dtype=dtype) for _ in range(2)]
    for pool, cache in zip(pools, (keys, values), strict=True):
        pool[table] = cache.unflatten(2, (100, page)).transpose(1, 2).flatten(0, 1)
    found = {
        "batch": all(alone),
        "row": same(*moved, rows=order),
        "capacity": same(query, *wide, lengths),
        "pages": same(query, *pools, lengths, block_table=table.view(3, 100).int()),
    }
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found[f"{threads} threads"] = same(query, keys, values, lengths)
    torch.set_num_threads(before)
    return found


def cases(options: argparse.Namespace) -> list[tuple[Case, int]]:
    """What is measured, and threads; --quick keeps the headline's shape and lengths up to it."""
    if options.quick:
        grid = itertools.product(SHAPES[:1], sorted(options.slots)[:2][::-1], (4, 16), DTYPES)
    else:
        grid = itertools.product(SHAPES, options.slots, NODES, DTYPES)
        # Where the longest cache says nothing that others do not, it would take most of the time.
        long = max(SLOTS)
        grid = (c for c in grid if c[1] < long or (c[0] == SHAPES[0] and c[2] < max(NODES)))
    every = [Case(*shape, slots, nodes, dtype) for shape, slots, nodes, dtype in grid]
    first, *more = options.threads
    known = [(case, first) for case in every]
    return known + [(case, count) for count in more for case in every if is_headline(case)]


def is_headline(case: Case) -> bool:
    """Whether targets are of this shape and length."""
    return ((case.heads, case.key_heads, case.size), case.slots) == HEADLINE


COLUMNS = (
    *("heads", "slots", "nodes", "dtype", "threads"),
    *(f"{name} µs" for name in ("ours", *PEERS, *FLOORS)),
    *(f"{name}/ours" for name in PEERS),
    *("ours/read", "ours/products", "GFLOP/s"),
)


def time_of(row: dict[str, Any], name: str) -> str:
    value = row["seconds"].get(name, "-")
    return f"{value.median * 1e6:.0f}" if isinstance(value, Spread) else value


def shown(row: dict[str, Any]) -> list[str]:
    """The row as it is printed: medians."""
    ratios = [f"{name}_over_ours" for name in PEERS] + [f"ours_over_{name}" for name in FLOORS]
    mine = row["seconds"]["ours"]
    speed = "-" if mine == WRONG else f"{row['flops'] / mine.median / 1e9:.0f}"
    return [
        f"{row['heads']}:{row['key_heads']}, {row['size']}",
        *(str(row[key]) for key in ("slots", "nodes", "dtype", "threads")),
        *(time_of(row, name) for name in ("ours", *PEERS, *FLOORS)),
        *(f"{row[name].median:.2f}" if name in row else "-" for name in ratios),
        speed,
    ]


def verdicts(rows: Sequence[dict[str, Any]], threads: int, isa: str) -> list[dict[str, Any]]:
    """Each target with its figure, and whether it is a pass or a miss."""
    found = []
    targets = TARGETS | ({"bfloat16": AMX_TARGETS} if isa == "amx" else {})
    for row in rows:
        shape = (row["heads"], row["key_heads"], row["size"])
        if (shape, row["slots"]) != HEADLINE or row["threads"] != threads:
            continue
        for name, least in targets[row["dtype"]].items():
            ratio = row.get(f"{name}_over_ours")
            if row["nodes"] in least and ratio is not None:
                target = least[row["nodes"]]
                passed = ratio.median >= target
                found.append(_verdict(row, f"{name}_over_ours", f">= {target:g}", ratio, passed))
        packed_rows = row["nodes"] * row["heads"] // row["key_heads"]
        if isa == "amx" and row["dtype"] == "bfloat16" and packed_rows <= 16:
            ratio = row["ours_over_read"]
            passed = ratio.median <= AMX_READ
            found.append(_verdict(row, "ours_over_read", f"<= {AMX_READ:g}", ratio, passed))
    return found


def _verdict(
    row: dict[str, Any], name: str, target: str, ratio: Spread, passed: bool
) -> dict[str, Any]:
    verdict = {
        "id": IDS[row["dtype"]],
        "dtype": row["dtype"],
        "nodes": row["nodes"],
        "ratio": name,
        "target": target,
    }
    verdict |= {"figure": round(ratio.median, 2), "verdict": "pass" if passed else "miss"}
    if "cpu_seconds" in row:
        times = {name: spread.minimum for name, spread in row["cpu_seconds"].items()}
        over, under = name.split("_over_")
        verdict["by_least_cpu_time"] = round(times[over] / times[under], 2)
    return verdict


def bits_verdict(dtype: str) -> dict[str, Any]:
    """Target A4, whose figure counts the changes that do not show."""
    kept = bits(getattr(torch, dtype))
    passed = all(kept.values())
    verdict = {"id": "A4", "dtype": dtype, "ratio": "bits of " + ", ".join(kept)}
    verdict |= {"target": f"{len(kept)} of {len(kept)}", "figure": sum(kept.values())}
    return {**verdict, "verdict": "pass" if passed else "miss"}


def tables(rows: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """The page's: one thread count; ratios are medians."""
    columns = ["heads", "slots", "nodes", "dtype", "ours µs"]
    columns += [f"{name}/ours" for name in PEERS] + ["ours/read"]
    cells = []
    for row in rows:
        if row["threads"] == threads and row["seconds"]["ours"] != WRONG:
            ratios = [f"{name}_over_ours" for name in PEERS] + ["ours_over_read"]
            text = [f"{row[name].median:.1f}" if name in row else "-" for name in ratios]
            cells.append([*shown(row)[:4], time_of(row, "ours"), *text])
    caption = f"attention of one layer, threads: {threads}; peers over `ours`, and over one read"
    return {"attention": {"caption": caption, "columns": columns, "rows": cells}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = harness.arguments("attention of a tree against torch's, and against floors.")
    parser.add_argument("--slots", type=harness.numbers, default=list(SLOTS))
    options = parser.parse_args(arguments)
    if not native.AVAILABLE:
        print(f"{native.REASON}: `ours` is the reference")
    effort = (9, 1.5) if options.quick else (9, 2.0)  # rounds, and seconds for them
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for case, threads in harness.in_time(options, cases(options)):
        flexed = is_headline(case) and case.nodes == FLEX_NODES and threads == options.threads[0]
        more = (21, 5.0) if is_headline(case) and not options.quick else effort
        rows.append(measure(case, threads, *more, flexed and not options.quick))
        print(" ".join(shown(rows[-1])[:5]), "done", flush=True)
    torch.set_num_threads(before)
    print(harness.table(COLUMNS, [shown(row) for row in rows]))
    isa = native.cpu_isa() if native.AVAILABLE else "reference"
    found = [
        {"threads": threads, **verdict}
        for threads in sorted(options.threads)
        for verdict in verdicts(rows, threads, isa)
    ]
    found += [bits_verdict(name) for name in DTYPES]
    for verdict in found:
        print(*verdict.values())
    wrong = sum(WRONG in row["seconds"].values() for row in rows)
    headline = {"isa": isa, "wrong_rows": wrong, "targets": found}
    return harness.finish(
        "bench_attention", options, rows, tables(rows, options.threads[0]), headline
    )


if __name__ == "__main__":
    raise SystemExit(main())
