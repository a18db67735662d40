# SPDX-License-Identifier: Apache-2.0
"""The native CPU kernels, under the signatures of the ops in `ops.py`.

A call flattens its tensors into one list of addresses and strides, in the order that
csrc/arguments.h reads, and allocates the results. What the kernels cannot do raises `Unsupported`
with the reason, and `ops.py` runs the reference instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, empty, float32, get_num_threads, int32, int64

from .call import VerifyCall
from .law import LawTensors
from .refusal import Unsupported

# torch has loaded the OpenMP runtime that `_C` needs, so `_C` comes after it.
try:
    from . import _C
except ImportError as error:
    AVAILABLE = False
    REASON = f"the native kernels are not built ({error})"
    _RULES: dict[str, int] = {}
    _MAX_MEMBERS = 0
else:
    AVAILABLE = True
    REASON = ""
    _RULES = _C.rules()
    _MAX_MEMBERS = _C.MAX_MEMBERS
    # A wrong SPECENS_CPU_ISA is reported here, not at the first call.
    _C.cpu_isa()

_SPACES = {"probabilities": 0, "logits": 1}  # rules.h
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_NO_VALUES = (0, 0, 0, 0)
_MAX_PARAMETERS = 4  # rules.h


def acceptance_rules() -> list[str]:
    """The acceptance rules that have a native kernel, on chains."""
    return list(_RULES)


def cpu_isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "baseline"; SPECENS_CPU_ISA chooses it."""
    return str(_C.cpu_isa())


def floor_sweep(logits: Sequence[Tensor], vocab_size: int) -> float:
    """One sweep for maximum and sum of exponentials over every row; the benchmark's floor."""
    batch, rows = logits[0].shape[:2]
    return float(_C.floor_sweep([*_members(logits), batch, rows, vocab_size, get_num_threads()]))


def uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    """See `reference.uniforms`."""
    if not seeds.is_cpu:
        raise _elsewhere(seeds)
    flat, out = flatten_uniforms(seeds, positions, stream, index)
    _C.uniforms(flat)
    return out


def mix(logits: list[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """See `reference.mix`."""
    if not logits[0].is_cpu:
        raise _elsewhere(logits[0])
    flat, results = flatten_mix(logits, law)
    flat.append(get_num_threads())
    _C.mix(flat)
    return results


def sample(
    logits: list[Tensor], numbers: Tensor, law: LawTensors, member: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sample`."""
    if not numbers.is_cpu:
        raise _elsewhere(numbers)
    flat, results = flatten_sample(logits, numbers, law, member)
    flat.append(get_num_threads())
    _C.sample(flat)
    return results


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.verify`."""
    if not call.draft_tokens.is_cpu:
        raise _elsewhere(call.draft_tokens)
    flat, results = flatten_verify(call)
    flat.append(get_num_threads())
    _C.verify(flat)
    return results


def _elsewhere(tensor: Tensor) -> Unsupported:
    return Unsupported("native", "tensors", "tensors on cpu", f"one on {tensor.device}")


# --- flat arguments, which csrc/arguments.h reads, and the results they point to ---


def flatten_uniforms(
    seeds: Tensor, positions: Tensor, stream: int, index: int
) -> tuple[list[Any], Tensor]:
    """Arguments and result of `uniforms`."""
    batch, rows = seeds.shape[0], positions.shape[1]
    out = empty(batch, rows, 4, dtype=float32, device=positions.device)
    batch_stride, row_stride = positions.stride()
    if positions.shape[0] == 1:
        batch_stride = 0
    flat = [seeds.data_ptr(), seeds.stride(0), 0, 0]
    flat += positions.data_ptr(), batch_stride, row_stride, 0
    flat += stream, index, batch, rows, out.data_ptr()
    return flat, out


def flatten_mix(logits: list[Tensor], law: LawTensors) -> tuple[list[Any], tuple[Tensor, Tensor]]:
    """Arguments and results of `mix`."""
    law.refuse_fold("native")
    flat = _members(logits) + _law(law)
    batch, rows = logits[0].shape[:2]
    device = logits[0].device
    log_probs = empty(batch, rows, law.vocab_size, dtype=float32, device=device)
    status = empty(batch, rows, dtype=int32, device=device)
    flat += batch, rows, log_probs.data_ptr(), status.data_ptr()
    return flat, (log_probs, status)


def flatten_sample(
    logits: list[Tensor], numbers: Tensor, law: LawTensors, member: int
) -> tuple[list[Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Arguments and results of `sample`."""
    if member < 0:
        law.refuse_fold("native")
    flat = _members(logits) + _law(law)
    batch, rows, _ = numbers.shape
    device = numbers.device
    tokens = empty(batch, rows, dtype=int64, device=device)
    log_probs = empty(batch, rows, dtype=float32, device=device)
    lse = empty(batch, rows, dtype=float32, device=device)
    status = empty(batch, rows, dtype=int32, device=device)
    flat += member, batch, rows, numbers.data_ptr()
    flat += numbers.stride()
    flat += tokens.data_ptr(), log_probs.data_ptr(), lse.data_ptr(), status.data_ptr()
    return flat, (tokens, log_probs, lse, status)


def flatten_verify(
    call: VerifyCall,
) -> tuple[list[Any], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Arguments and results of `verify`."""
    (
        logits,
        draft_tokens,
        numbers,
        law,
        parents,
        proposers,
        draft_logits,
        draft_temperature,
        lse,
        draft_lse,
        acceptance,
        parameters,
        memory,
        bonus,
    ) = call
    if parents is not None:
        raise Unsupported("native", "parents", "None", "a tree")
    if acceptance not in _RULES:
        raise Unsupported.unknown("native", "acceptance", acceptance, _RULES)
    law.refuse_fold("native")
    flat = _members(logits) + _law(law)
    draft = _NO_VALUES if draft_logits is None else _logits(draft_logits)
    if draft_temperature is None:
        draft_temperature = law.temperature
    batch, nodes = draft_tokens.shape
    device = draft_tokens.device
    tokens = empty(batch, nodes + 1, dtype=int64, device=device)
    log_probs = empty(batch, nodes + 1, dtype=float32, device=device)
    num_accepted = empty(batch, dtype=int32, device=device)
    path = empty(batch, nodes, dtype=int32, device=device)
    status = empty(batch, dtype=int32, device=device)
    flat.append(_RULES[acceptance])
    flat += *parameters, *(0.0,) * (_MAX_PARAMETERS - len(parameters))
    flat += _NO_VALUES if memory is None else _per_row(memory)
    flat += bonus, batch, nodes
    flat += _integers(draft_tokens)
    flat += _NO_VALUES if proposers is None else _integers(proposers)
    flat.append(numbers.data_ptr())
    flat += numbers.stride()
    flat += draft
    flat += _per_row(draft_temperature)
    flat += _NO_VALUES if lse is None else (lse.data_ptr(), *lse.stride())
    flat += _NO_VALUES if draft_lse is None else (draft_lse.data_ptr(), *draft_lse.stride(), 0)
    flat += tokens.data_ptr(), log_probs.data_ptr(), num_accepted.data_ptr(), path.data_ptr()
    flat.append(status.data_ptr())
    return flat, (tokens, log_probs, num_accepted, path, status)


def _logits(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address, dtype and strides over batch and row of (B, T, V)."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise Unsupported("native", "logits", "bfloat16, float16 or float32", tensor.dtype)
    if tensor._is_zerotensor():
        raise Unsupported("native", "logits", "tensors with memory", "a zero tensor")
    batch_stride, row_stride, _ = tensor.stride()
    return tensor.data_ptr(), dtype, batch_stride, row_stride


def _members(logits: Sequence[Tensor]) -> list[Any]:
    if len(logits) > _MAX_MEMBERS:
        raise Unsupported("native", "logits", f"at most {_MAX_MEMBERS} members", len(logits))
    flat: list[Any] = [len(logits)]
    for tensor in logits:
        flat += _logits(tensor)
    return flat


def _law(law: LawTensors) -> list[Any]:
    if law.flat:
        return law.flat
    flat: list[Any] = [*_weights(law.weights), *_per_row(law.temperature)]
    for value in (law.top_k, law.top_p, law.min_p):
        flat += _NO_VALUES if value is None else _per_row(value)
    flat += _SPACES[law.space], law.scope == "member", law.plausibility, law.vocab_size
    if law.flat is not None:
        law.flat[:] = flat  # at once: threads may share a law
    return flat


def _weights(weights: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch, row and member of (M,), (B, M) or (B, T, M)."""
    if weights.dtype != float32:
        raise Unsupported("native", "weights", "float32", weights.dtype)
    strides = weights.stride()
    if len(strides) == 1:
        return weights.data_ptr(), 0, 0, strides[0]
    if len(strides) == 2:
        return weights.data_ptr(), strides[0], 0, strides[1]
    return weights.data_ptr(), strides[0], strides[1], strides[2]


def _per_row(value: Tensor) -> tuple[int, int, int, int]:
    """Address and strides over batch and member of (B or 1,) or (B or 1, M or 1)."""
    shape, strides = value.shape, value.stride()
    batch_stride = strides[0] if shape[0] != 1 else 0
    member_stride = strides[1] if len(shape) == 2 and shape[1] != 1 else 0
    return value.data_ptr(), batch_stride, 0, member_stride


def _integers(value: Tensor) -> tuple[int, bool, int, int]:
    """Address, width and strides of (B or 1, columns)."""
    batch_stride, column_stride = value.stride()
    if value.shape[0] == 1:
        batch_stride = 0
    return value.data_ptr(), value.dtype == int64, batch_stride, column_stride
