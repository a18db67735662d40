# SPDX-License-Identifier: Apache-2.0
"""Whole forwards over a long text: layers that attend through the kernel, and through masks.

One member, one cache of random keys and values, models of real shapes with random weights. A
forward verifies a chain of 7 drafts behind the last token, or writes one token. Contestants:
`mask`, torch's attention and a 4-D mask, as transformers has it; `kernel`, the op; and the bound
`none`, the same forward whose layers attend to nothing. `read` is a sum over the bytes of keys and
values: `none` and `read`, one after the other, are a floor. Wall time decides; with one thread, the
thread's own CPU time stands beside it.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import torch
from bench_attention import timed
from harness import WRONG, Spread
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specens.members.slot import SlotMember
from specens_kernels import native
from specens_kernels.layers import Layers

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
TINY = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
SLOTS = (512, 4096, 16384)
NODES = (8, 1)  # a verification, plain decoding
DTYPES = ("float32", "bfloat16")
# Of a forward of 8 nodes: least share of the bound, by slots; and least gain.
SHARES = {4096: 0.85, 16384: 0.60}
GAINS = {512: 1.0}
# Of the logits' spread, root mean square: layers round in another order.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}


def build(name: str, dtype: str, tiny: bool) -> Any:
    """A model of random weights."""
    changes = TINY | ({} if name.startswith("smol") else {"hidden_size": 112}) if tiny else {}
    shape = SHAPES[name] | changes | {"max_position_embeddings": 2 * max(SLOTS)}
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.requires_grad_(False).eval()


def filled(model: Any, slots: int) -> SlotMember:
    """A member whose cache holds so many tokens, of random keys and values."""
    member = SlotMember(model, kernel=True)
    member.start(1, slots)
    member.forward(torch.zeros(1, 1, dtype=torch.int64), [1])
    member._reserve(slots)
    for slab in member.cache.slabs:
        slab[..., :slots, :].normal_()
    return member


def attending_to_nothing(
    self: Layers, query: Tensor, keys: Tensor, values: Tensor, **options: Any
) -> Tensor:
    """The result's shape, without a look at keys and values."""
    batch, heads, nodes, _ = query.shape
    return query.new_zeros((batch, nodes, heads, values.shape[-1]))


def contestants(member: SlotMember, slots: int, nodes: int) -> dict[str, Callable[[], Tensor]]:
    """The same forward, thrice, and a read of its cache."""
    tokens = torch.arange(nodes)[None] + 1

    def forward() -> Tensor:
        member.lengths = [slots - nodes]
        return member.forward(tokens, [nodes])

    def through(how: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            member._kernel = how
            return forward()

        return run

    def none() -> Tensor:
        attend, Layers.__call__ = Layers.__call__, attending_to_nothing
        member._kernel = True
        try:
            return forward()
        finally:
            Layers.__call__ = attend

    words = [slab.view(torch.int64) for slab in member.cache.slabs]
    return {
        "mask": through(False),
        "kernel": through(True),
        "none": none,
        "read": lambda: torch.stack([each.sum() for each in words]),
    }


def measure(
    member: SlotMember, case: dict[str, Any], threads: int, rounds: int, budget_s: float
) -> dict[str, Any]:
    """One row of the result."""
    torch.set_num_threads(threads)
    found = contestants(member, case["slots"], case["nodes"])
    expected = found["mask"]().float()
    error = (found["kernel"]().float() - expected).square().mean(-1).sqrt() / expected.std(-1)
    right = bool(error.max() <= ROUNDING[case["dtype"]])
    names = [name for name in found if right or name != "kernel"]
    cpu: dict[str, list[float]] = {name: [] for name in names}
    clocks = {name: timed(found[name], cpu[name]) for name in names}
    samples = harness.interleave(clocks, rounds, budget_s)
    row: dict[str, Any] = {**case, "threads": threads, "error": float(error.max())}
    row["seconds"] = {name: Spread.of(values) for name, values in samples.items()}
    if not right:
        row["seconds"]["kernel"] = WRONG
        return row
    if threads == 1:
        row["cpu_seconds"] = {name: Spread.of(values) for name, values in cpu.items()}
    for over, under in (("mask", "kernel"), ("mask", "none"), ("none", "kernel")):
        row[f"{over}_over_{under}"] = Spread.of(harness.ratios(samples[over], samples[under]))
    floor = [sum(both) for both in zip(samples["none"], samples["read"], strict=True)]
    row["floor_over_kernel"] = Spread.of(harness.ratios(floor, samples["kernel"]))
    return row


COLUMNS = ("model", "dtype", "slots", "nodes", "threads", "mask ms", "kernel ms", "none ms")
COLUMNS += ("read ms", "gain", "bound", "share", "of floor")
RATIOS = ("mask_over_kernel", "mask_over_none", "none_over_kernel", "floor_over_kernel")


def shown(row: dict[str, Any]) -> list[str]:
    """The row as it is printed: medians."""
    times = [row["seconds"][name] for name in ("mask", "kernel", "none", "read")]
    return [
        *(str(row[name]) for name in COLUMNS[:5]),
        *(f"{time.median * 1e3:.1f}" if isinstance(time, Spread) else time for time in times),
        *(f"{row[name].median:.2f}" if name in row else "-" for name in RATIOS),
    ]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Target A3 with its figures: of each forward of 8 nodes, whether it is a pass or a miss."""
    found = []
    for row in rows:
        if row["nodes"] != NODES[0] or "mask_over_kernel" not in row:
            continue
        for name, least in (("none_over_kernel", SHARES), ("mask_over_kernel", GAINS)):
            if row["slots"] not in least:
                continue
            figure, target = row[name].median, least[row["slots"]]
            verdict = {key: row[key] for key in ("model", "dtype", "slots", "threads")}
            verdict |= {"target": "A3", "ratio": name, "least": target, "figure": round(figure, 2)}
            verdict["of_floor"] = round(row["floor_over_kernel"].median, 2)
            found.append(verdict | {"verdict": "pass" if figure >= target else "miss"})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = harness.arguments("whole forwards through the kernel, and through masks.")
    parser.add_argument("--slots", type=harness.numbers, default=list(SLOTS))
    parser.add_argument("--models", default=",".join(SHAPES), help="some of them")
    parser.add_argument("--tiny", action="store_true", help="two small layers, to try the script")
    options: argparse.Namespace = parser.parse_args(arguments)
    if not native.AVAILABLE:
        print(f"{native.REASON}: `kernel` is the reference")
    rounds, budget_s = (3, 1.0) if options.quick else (11, 6.0)
    before = torch.get_num_threads()
    slots = sorted(options.slots)[: 1 if options.quick else None]
    grid = itertools.product(options.models.split(","), DTYPES, slots)
    rows: list[dict[str, Any]] = []
    built: tuple[Any, Any] = (None, None)
    with torch.inference_mode():
        for name, dtype, size in harness.in_time(options, list(grid)):
            if built[0] != (name, dtype):
                built = (name, dtype), build(name, dtype, options.tiny)
            member = filled(built[1], size)
            for nodes, threads in itertools.product(NODES, sorted(options.threads)):
                case = {"model": name, "dtype": dtype, "slots": size, "nodes": nodes}
                rows.append(measure(member, case, threads, rounds, budget_s))
                print(" ".join(shown(rows[-1])), flush=True)
    torch.set_num_threads(before)
    print(harness.table(COLUMNS, [shown(row) for row in rows]))
    found = verdicts(rows)
    for verdict in found:
        print(*verdict.values())
    wrong = sum(WRONG in row["seconds"].values() for row in rows)
    isa = native.cpu_isa() if native.AVAILABLE else "reference"
    headline = {"isa": isa, "wrong_rows": wrong, "targets": found}
    return harness.finish("bench_forward", options, rows, {}, headline)


if __name__ == "__main__":
    raise SystemExit(main())
