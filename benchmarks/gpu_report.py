# SPDX-License-Identifier: Apache-2.0
"""What GPU kernels need of a GPU, found without one: registers, shared memory, spills, load width.

    python benchmarks/gpu_report.py            # print the table
    python benchmarks/gpu_report.py --check    # and fail where it exceeds gpu_budget.json
    python benchmarks/gpu_report.py --write    # and make that the budget

Every launch in a few representative calls is recorded on tensors without data, and its
Triton kernel compiled for each target by the compilers that Triton brings: ptxas for NVIDIA's, LLVM
for AMD's. The CUDA kernels are compiled by nvcc, where there is one; the emulator says how large
their blocks are. As many are compiled at once as there are processors. To add kernels: a function
that yields functions of no arguments, each of which returns `Row`s; it is named in `SOURCES`.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the emulator

import simt
import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specens_kernels import (
    Acceptance,
    Law,
    attention,
    backend,
    compact,
    mix,
    sample,
    uniforms,
    verify,
)
from specens_kernels import triton as kernels
from specens_kernels.call import AttentionCall, VerifyCall

ROOT = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name("gpu_budget.json")
VOCAB_SIZE, NODES = 128_256, 4
# One rule of each kind that `judge` knows: what it is compiled to depends on the rule.
JUDGED = ("cascade_v1", "js:top_k=50", "block", "entropy_veto", "mentored")
MOST = "M=8"  # as many members as a kernel takes; the CUDA kernels are the same for any number
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    spills: instructions that touch local memory; on AMD, vector registers kept there; of nvcc's
        kernels, bytes. occupancy: of a multiprocessor's warps; None where it is not known.
        wide_loads: of 128 bits from global memory.
    """

    kernel: str
    target: str
    registers: int
    shared: int
    spills: int
    occupancy: float | None
    wide_loads: int


Compilation = Callable[[], list[Row]]


class Multiprocessor(NamedTuple):
    """Limits of one, from NVIDIA's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024),
}
REGISTERS = 64 * 1024
RESERVED_SHARED = 1024  # by the driver, for each block


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most there can be: the formula of cuda_occupancy.h."""
    limits = MULTIPROCESSORS[target.rstrip("a")]
    by_warp = -(-registers * 32 // 256) * 256
    # Registers are given to warps in each of four partitions.
    resident = REGISTERS // 4 // by_warp * 4
    blocks = min(
        limits.blocks,
        limits.warps // warps,
        resident // warps,
        limits.shared // (-(-(shared + RESERVED_SHARED) // 128) * 128),
    )
    return blocks * warps / limits.warps


class Launch(NamedTuple):
    """A kernel and its arguments, by name."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int


def recorded(run: Callable[[], object]) -> list[tuple[Any, dict[str, Any], int]]:
    """The launches of a call, none of which runs."""
    found = []
    jit = triton.runtime.jit.JITFunction
    stock = jit.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        warps = options.pop("num_warps")
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        found.append((self, named, warps))

    jit.run = record
    try:
        run()
    finally:
        jit.run = stock
    return found


def made(ensemble: str, members: int, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """bfloat16 logits of one sequence, and their law."""
    law = Law([1 / members] * members, ensemble, **options)
    shape = (1, NODES + 1, VOCAB_SIZE)
    logits = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(members)]
    return logits, law.tensors("report", torch.device("meta"), VOCAB_SIZE)


def verifies(
    logits: list[torch.Tensor], law: Any, rule: str = "rejection", known: bool = False
) -> None:
    """One `verify`, whose drafts are the last member's; with `known`, a separate draft's, and all
    log-sum-exps are."""
    acceptance = Acceptance.parse(rule)
    tokens = torch.empty(1, NODES, dtype=torch.int64, device="meta")
    numbers = torch.empty(1, NODES + 1, 4, device="meta")
    call = VerifyCall(logits, tokens, numbers, law, acceptance=acceptance.rule.name)
    call = call._replace(parameters=acceptance.parameters)
    if known:
        lse = torch.empty(1, NODES + 1, len(logits), device="meta")
        call = call._replace(draft_logits=logits[0], lse=lse, draft_lse=lse[..., 0])
    else:
        call = call._replace(proposers=torch.empty_like(tokens))
    kernels.verify(call)


def the_other_ops() -> None:
    logits, law = made("mixture", 2)
    kernels.mix(logits, law)
    kernels.sample(logits, torch.empty(1, NODES + 1, 4, device="meta"), law, -1)
    words = torch.empty(1, NODES, dtype=torch.int64, device="meta")
    kernels.uniforms(words[:, 0], words, 0, 0)


def attends(size: int, nodes: int, dtype: torch.dtype = torch.bfloat16, window: int = 0) -> None:
    """One `attention` of 32 heads to 8 key heads."""
    device = torch.device("meta")
    query = torch.empty(1, nodes, 32, size, dtype=dtype, device=device).transpose(1, 2)
    cache = torch.empty(1, 8, 4096, size, dtype=dtype, device=device)
    lengths = torch.empty(1, dtype=torch.int64, device=device)
    visible = torch.empty(1, nodes, 1, dtype=torch.int64, device=device)
    depths = torch.empty(1, nodes, dtype=torch.int32, device=device) if window else None
    rest = (depths, None, None, size**-0.5, 0.0, window)
    kernels.attention(AttentionCall(query, cache, cache, lengths, visible, *rest))


def compacts() -> None:
    """The accepted path of 30 layers' keys and values."""
    device = torch.device("meta")
    slab = torch.empty(60, 1, 8, 4096, 64, dtype=torch.bfloat16, device=device)
    lengths = torch.empty(1, dtype=torch.int64, device=device)
    kernels.compact([slab], lengths, torch.empty(1, 5, dtype=torch.int32, device=device), None)


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and calls; between them they launch every kernel."""
    for ensemble, members in (("mixture", 1), ("mixture", 2), ("mixture", 3), ("product", 2)):
        yield f"{ensemble} M={members}", partial(verifies, *made(ensemble, members))
    yield "product M=3", partial(verifies, *made("product", 3))
    yield "known M=3", partial(verifies, *made("mixture", 3), known=True)
    for ensemble in ("mixture", "product"):
        yield f"{ensemble} {MOST}", partial(verifies, *made(ensemble, 8))
    filters = {"scope": "ensemble", "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    yield "filtered M=2", partial(verifies, *made("mixture", 2, **filters))
    yield "M=2", the_other_ops
    for size in (64, 128):
        for nodes in (1, 8, 32):
            yield f"E={size} {4 * nodes} rows", partial(attends, size, nodes)
    yield "E=64 32 rows float32", partial(attends, 64, 8, torch.float32)
    for size in (64, 128):
        yield f"E={size} 32 rows window", partial(attends, size, 8, window=512)
    yield "slots", compacts
    for rule in JUDGED:
        yield f"{rule} M=2", partial(verifies, *made("mixture", 2), rule)


def launches() -> Iterator[Launch]:
    """Of every call, each kernel once."""
    for case, call in calls():
        known = {}
        for kernel, arguments, warps in recorded(call):
            name = f"{kernel.fn.__name__} {case}"
            if case.split()[0] in JUDGED and kernel.fn.__name__ != "judge":
                continue
            known.setdefault(name, Launch(name, kernel, arguments, warps))
        yield from known.values()


def signature(value: Any, path: tuple[int, ...], constants: Any, hints: Any) -> Any:
    """Types of an argument as the JIT would specialise on it; fills constants and hints."""
    if isinstance(value, torch.Tensor):
        hints[path] = [["tt.divisibility", 16]]
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
    if isinstance(value, tuple):
        types = [signature(part, (*path, i), constants, hints) for i, part in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if isinstance(value, tl.constexpr):
        value = value.value
    elif isinstance(value, int) and not isinstance(value, bool) and value != 1:
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"
    elif isinstance(value, float):
        return "fp32"
    constants[path] = value
    return "constexpr"


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """The compiled kernel."""
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    types = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        value = tl.constexpr(value) if parameter.is_constexpr else value
        types[parameter.name] = signature(value, (i,), constants, hints)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=hints)
    return triton.compile(source, target=target, options={"num_warps": launch.warps})


def nvidia_rows(launch: Launch, arch: int) -> list[Row]:
    """The row of one launch."""
    compiled = compile_launch(launch, GPUTarget("cuda", arch, 32))
    target = f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        used = _output(BINARIES / "cuobjdump", "-res-usage", path)
        code = _output(BINARIES / "nvdisasm", "-c", path)
    registers = int(re.search(r"REG:(\d+)", used)[1])
    row = Row(
        launch.name,
        target,
        registers,
        compiled.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        occupancy(target, registers, compiled.metadata.shared, launch.warps),
        len(re.findall(r"\bLDG\.E(?:\.\w+)*?\.128\b", code)),
    )
    return [row]


def amd_rows(launch: Launch) -> list[Row]:
    """The row of one launch."""
    code = compile_launch(launch, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]

    def count(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", code)[1])

    row = Row(
        launch.name,
        "gfx942",
        count("vgpr_count"),
        count("group_segment_fixed_size"),
        count("vgpr_spill_count"),
        None,
        len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
    )
    return [row]


def _output(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def triton_compilations() -> Iterator[Compilation]:
    """Every launch on every target; those that take long, of the most members or a rule, on one."""
    for launch in launches():
        if launch.name.endswith(MOST) or launch.name.startswith("judge "):
            yield partial(nvidia_rows, launch, 90)
            continue
        for arch in (80, 90, 100):
            yield partial(nvidia_rows, launch, arch)
        yield partial(amd_rows, launch)


FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "--Werror=all-warnings", "-Xptxas", "-v")
_KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\n}", re.DOTALL)
_WIDE_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?\.v4\.[bfsu]32\b")


def cuda_compilations() -> Iterator[Compilation]:
    """Every kernel of csrc/cuda on every target."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or simt.what_is_missing():
        print(f"no CUDA kernels in this report: {simt.what_is_missing() or 'no nvcc'}")
        return
    blocks = block_sizes()
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for target in ("sm_80", "sm_90a", "sm_100a"):
            yield partial(cuda_rows, source, target, nvcc, blocks)


def block_sizes() -> dict[str, tuple[int, int]]:
    """Kernel -> threads of a block and bytes of its shared memory."""
    logits = [torch.randn(1, 3, 50) for _ in range(2)]
    numbers, words = torch.rand(1, 3, 4), torch.zeros(1, 2, dtype=torch.int64)
    law = Law((0.5, 0.5), scope="ensemble", temperature=0.7, top_k=5)
    with simt.emulated() as module, backend("cuda"):
        mix(logits, law)
        sample(logits, numbers, law)
        verify(logits, words, numbers, law, proposers=words)
        verify(logits, words, numbers, law, acceptance="block")
        uniforms(words[:, 0], words, 0)
        found: dict[str, tuple[int, int]] = module.blocks()
        compact([torch.zeros(1, 1, 1, 3, 4)], words[:, 0], words.int())
        found |= {"move_path": module.blocks()["move_path"]}
        for name, dtype, size, rows in attention_variants():
            query, cache = (torch.zeros(1, n, 1, size, dtype=dtype) for n in (rows, 1))
            zero = torch.zeros(1, dtype=torch.int64)
            attention(query, cache, cache, zero, zero[:, None, None] + 1)
            found |= {name: module.blocks()[name.split("<")[0]]}
        found["join_splits"] = module.blocks()["join_splits"]
    return found


def attention_variants() -> Iterator[tuple[str, torch.dtype, int, int]]:
    """Names of the kernels that attend, and dtype, head size and packed rows that they are for."""
    for size in (64, 128, 256):
        yield f"attend_floats<{size}, 4>", torch.float32, size, 8
        yield f"attend_floats<{size}, 1>", torch.float32, size, 32
        rows = {32: (2, 2)} if size == 256 else {16: (1, 4), 32: (2, 2), 64: (4, 1), 128: (8, 1)}
        for count, (row_warps, slot_warps) in rows.items():
            for name, dtype in (("BFloat16", torch.bfloat16), ("Float16", torch.float16)):
                yield (
                    f"attend_halves<{name}, {size}, {row_warps}, {slot_warps}>",
                    dtype,
                    size,
                    count,
                )


def kernel_name(symbol: str) -> str:
    """The kernel's name in a mangled symbol, with the number of its variant if it is a template."""
    if found := re.search(r"\d(attend_[a-z]+)I(?:NS_\d+(\w+?)E)?((?:Li\d+E)+)E", symbol):
        numbers = [found[2]] * bool(found[2]) + re.findall(r"\d+", found[3])
        return f"{found[1]}<{', '.join(numbers)}>"
    found = re.search(r"\d([a-z]+(?:_[a-z]+)+|thresholds|judge)(?:ILNS\w*?E(\d)E)?E", symbol)
    if found is None:
        return symbol
    return found[1] + (f"<{found[2]}>" if found[2] else "")


def cuda_rows(
    source: Path, target: str, nvcc: str, blocks: dict[str, tuple[int, int]]
) -> list[Row]:
    """One row for each kernel of a file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-arch={target}", "-cubin", "--keep", "--keep-dir", folder]
        command += [str(source), "-o", str(Path(folder, "kernels.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{source.name} for {target}:\n{done.stderr}")
        code = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    bodies = dict(_ENTRY.findall(code))
    rows = []
    symbol, spills = "", 0
    for line in done.stderr.splitlines():
        if found := _KERNEL.search(line):
            symbol = found[1]
        elif found := _SPILLS.search(line):
            spills = sum(map(int, found.groups()))
        elif found := _USED.search(line):
            name, registers = kernel_name(symbol), int(found[1])
            threads, shared = blocks[name if name in blocks else name.split("<")[0]]
            share = occupancy(target, registers, shared, threads // 32)
            wide = len(_WIDE_LOAD.findall(bodies[symbol]))
            rows.append(Row(f"cuda {name}", target, registers, shared, spills, share, wide))
    return rows


SOURCES = (triton_compilations, cuda_compilations)


def compiled(compilations: Sequence[Compilation]) -> list[Row]:
    """Their rows, in order. Launches cannot be sent to a process, so processes are forked."""
    with multiprocessing.get_context("fork").Pool(
        initializer=_keep, initargs=(compilations,)
    ) as pool:
        parts = pool.imap(_rows_at, range(len(compilations)))
        return [row for rows in parts for row in rows]


_COMPILATIONS: list[Compilation] = []


def _keep(compilations: Sequence[Compilation]) -> None:
    _COMPILATIONS[:] = compilations


def _rows_at(index: int) -> list[Row]:
    return _COMPILATIONS[index]()


def excesses(row: Row, budget: dict[str, Any] | None) -> Iterator[str]:
    """What is wrong with a row."""
    where = f"{row.kernel} on {row.target}"
    if budget is None:
        yield f"{where}: expected an entry in {BUDGET.name}, got none"
        return
    if row.spills > budget["spills"]:
        yield f"{where}: spills: expected {budget['spills']}, got {row.spills}"
    for name in ("registers", "shared"):
        if getattr(row, name) > budget[name]:
            yield f"{where}: {name}: expected <= {budget[name]}, got {getattr(row, name)}"
    if budget["wide_loads"] and not row.wide_loads:
        yield f"{where}: expected 128-bit loads, got none"


def table(rows: list[Row]) -> Table:
    columns = ("kernel", "target", "registers", "shared", "spills", "occupancy", "128-bit loads")
    made = Table(*columns)
    for row in rows:
        share = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        numbers = (row.registers, row.shared, row.spills, share, row.wide_loads)
        made.add_row(row.kernel, row.target, *map(str, numbers))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and load width of kernels.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = compiled([compilation for source in SOURCES for compilation in source()])
    Console(width=120).print(table(rows))
    if options.write:
        budget = {f"{row.kernel} {row.target}": asdict(row) for row in rows}
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    if not options.check:
        return 0
    budget = json.loads(BUDGET.read_text())
    problems = [
        text for row in rows for text in excesses(row, budget.get(f"{row.kernel} {row.target}"))
    ]
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
