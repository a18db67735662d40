# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels, under the signatures of the ops in `reference/`.

A call becomes a flat list, to which the number of threads is added. What the kernels cannot do
raises `Unsupported` with the reason, and `dispatch.py` runs the reference instead.
"""

from collections.abc import Sequence

from torch import Tensor, get_num_threads

from . import cache_checks, flat
from .acceptance import ACCEPTANCE_RULES
from .acceptance.requests import within_ranges
from .call import AttentionCall, VerifyCall
from .law import LawTensors
from .refusal import Unsupported

_C = flat.MODULE
AVAILABLE, REASON = _C is not None, flat.REASON
if AVAILABLE:
    # A wrong SPECENS_CPU_ISA is reported here, not at the first call.
    _C.cpu_isa()


def cpu_isa() -> str:
    """The instruction set in use; SPECENS_CPU_ISA chooses it.

    "avx512", "avx2" or "baseline"; or "avx512bf16" or "amx", which are "avx512" but for attention
    to bfloat16. "amx" runs only where it is asked for: it was tested without a processor that has
    it.
    """
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
    logits: list[Tensor], numbers: Tensor, law: LawTensors, member: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sample`."""
    if not numbers.is_cpu:
        raise _elsewhere(numbers)
    if member < 0:
        law.refuse_fold("native")
    arguments, results = flat.flattened_sample(logits, numbers, law, member, rows)
    if rows is not None:
        flat.refuse_outside("sample", "rows", rows, len(logits[0]), rows.shape[1])
    arguments.append(get_num_threads())
    _C.sample(arguments)
    return results


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.verify`."""
    if not call.draft_tokens.is_cpu:
        raise _elsewhere(call.draft_tokens)
    flat.refuse("native", call)
    parameters = call.layout.request_parameters
    if parameters is not None:
        parameters = within_ranges(ACCEPTANCE_RULES[call.acceptance], parameters)
        call = call._replace(layout=call.layout._replace(request_parameters=parameters))
    arguments, results = flat.flattened_verify(call)
    if call.layout.rows is not None:
        rows, ends = call.layout.rows, call.layout.num_drafts
        count = len(call.logits[0])
        flat.refuse_outside("verify", "rows", rows, count, rows.shape[1], ends, call.bonus)
    if call.layout.draft_rows is not None and call.draft_logits is not None:
        rows, ends = call.layout.draft_rows, call.layout.num_drafts
        count, nodes = len(call.draft_logits), call.draft_tokens.shape[1]
        flat.refuse_outside("verify", "draft_rows", rows, count, nodes, ends)
    arguments.append(get_num_threads())
    _C.verify(arguments)
    return results


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `reference.attention`."""
    if not call.query.is_cpu:
        raise _elsewhere(call.query)
    arguments, results = flat.flattened_attention(call)
    cache_checks.check_attention_slots(call)
    arguments.append(get_num_threads())
    _C.attention(arguments)
    return results


def compact(slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None) -> None:
    """See `reference.compact`."""
    if not lengths.is_cpu:
        raise _elsewhere(lengths)
    cache_checks.check_compact_slots(slabs, lengths, path, block_table)
    arguments = flat.flattened_compact(slabs, lengths, path, block_table)
    arguments.append(get_num_threads())
    _C.compact(arguments)


def _elsewhere(tensor: Tensor) -> Unsupported:
    return Unsupported("native", "tensors", "tensors on cpu", f"one on {tensor.device}")
