# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels, under the signatures of the ops in `reference/`.

A call becomes a flat list, to which the number of threads is added. What the kernels cannot do
raises `Unsupported` with the reason, and `dispatch.py` runs the reference instead.
"""

from collections.abc import Sequence

from torch import Tensor, get_num_threads

from . import flat
from .call import AttentionCall, VerifyCall
from .law import LawTensors
from .refusal import Unsupported

_C = flat.MODULE
AVAILABLE, REASON = _C is not None, flat.REASON
if AVAILABLE:
    # A wrong SPECENS_CPU_ISA is reported here, not at the first call.
    _C.cpu_isa()


def cpu_isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"; SPECENS_CPU_ISA chooses it."""
    return str(_C.cpu_isa())


def floor_sweep(logits: Sequence[Tensor], vocab_size: int) -> float:
    """One sweep for maximum and sum of exponentials over every row; the benchmark's floor."""
    batch, rows = logits[0].shape[:2]
    return float(
        _C.floor_sweep([*flat.flattened_logits(logits), batch, rows, vocab_size, get_num_threads()])
    )


def uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    """See `reference.uniforms`."""
    if not seeds.is_cpu:
        raise _elsewhere(seeds)
    arguments, numbers = flat.flattened_uniforms(seeds, positions, stream, index)
    _C.uniforms(arguments)
    return numbers


def mix(logits: list[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """See `reference.mix`."""
    if not logits[0].is_cpu:
        raise _elsewhere(logits[0])
    law.refuse_fold("native")
    arguments, results = flat.flattened_mix(logits, law)
    arguments.append(get_num_threads())
    _C.mix(arguments)
    return results


def sample(
    logits: list[Tensor], numbers: Tensor, law: LawTensors, member: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sample`."""
    if not numbers.is_cpu:
        raise _elsewhere(numbers)
    if member < 0:
        law.refuse_fold("native")
    arguments, results = flat.flattened_sample(logits, numbers, law, member)
    arguments.append(get_num_threads())
    _C.sample(arguments)
    return results


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.verify`."""
    if not call.draft_tokens.is_cpu:
        raise _elsewhere(call.draft_tokens)
    flat.refuse("native", call)
    arguments, results = flat.flattened_verify(call)
    arguments.append(get_num_threads())
    _C.verify(arguments)
    return results


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `reference.attention`."""
    raise Unsupported.unknown("native", "op", "attention", ("mix", "sample", "uniforms", "verify"))


def compact(slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None) -> None:
    """See `reference.compact`."""
    raise Unsupported.unknown("native", "op", "compact", ("mix", "sample", "uniforms", "verify"))


def _elsewhere(tensor: Tensor) -> Unsupported:
    return Unsupported("native", "tensors", "tensors on cpu", f"one on {tensor.device}")
