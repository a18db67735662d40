# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/cuda, under the signatures of the ops in `reference/`.

A call flattens its tensors as `native.py` does, lends the stream's workspace to the kernels and
launches them on torch's current stream: no synchronisation, nothing that a CUDA graph could not
hold, once a first call has made the law's numbers tensors. What the kernels cannot do raises
`Unsupported`.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import flat
from .call import PADDED, AttentionCall, VerifyCall
from .law import LawTensors
from .refusal import Unsupported

# Tests put the emulated kernels here, which take CPU tensors.
module: Any = flat.MODULE

if module is None:
    AVAILABLE, REASON = False, flat.REASON
elif not hasattr(module, "cuda_verify"):
    AVAILABLE, REASON = False, "the native kernels were built without nvcc"
else:
    AVAILABLE, REASON = True, ""

# Those of the table that the kernels share, but for a rate that is chosen by the depth.
RULES = {name: rule for name, rule in flat.RULES.items() if name != "synthetic"}
_MAX_MEMBERS = 8
_MAX_ROWS = 65_535
_MAX_VOCABULARY = 2048 * 1024
_MAX_SIZE = 256  # of a head
_MAX_SLOTS = 65_535 * 256  # the least that a grid's splits hold
_LEAST_CAPABILITY = (8, 0)  # CMakeLists.txt builds for no older device
# Why a device runs none of the kernels; empty if it may run them.
_refusals: dict[torch.device, str] = {}
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    """See `reference.uniforms`."""
    _check_device(seeds.device)
    arguments, out = flat.flattened_uniforms(seeds, positions, stream, index)
    arguments.append(_stream(out.device))
    _call(module.cuda_uniforms, arguments, out.device)
    return out


def mix(logits: list[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    """See `reference.mix`."""
    law.refuse_fold("cuda")
    _check(logits, law)
    arguments, results = flat.flattened_mix(logits, law)
    _launch(module.cuda_mix, module.cuda_mix_workspace, arguments, logits[0].device)
    return results


def sample(
    logits: list[Tensor], numbers: Tensor, law: LawTensors, member: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.sample`."""
    if rows is not None:
        raise Unsupported("cuda", "rows", "None", "a tensor")
    if numbers.dim() == 4:
        raise Unsupported("cuda", "count", "None", numbers.shape[2])
    if member < 0:
        law.refuse_fold("cuda")
    _check(logits, law)
    arguments, results = flat.flattened_sample(logits, numbers, law, member, None)
    _launch(module.cuda_sample, module.cuda_sample_workspace, arguments, logits[0].device)
    return results


def verify(call: VerifyCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `reference.verify`."""
    if call.parents is not None:
        raise Unsupported("cuda", "parents", "None", "a tree")
    if call.proposers is not None and call.draft_logits is not None:
        raise Unsupported("cuda", "proposers", "None beside draft_logits", "a tensor")
    if call.layout is not PADDED:
        call.layout.refuse("cuda")
        call = call._replace(layout=PADDED)  # tokens go to memory of their own
    if call.acceptance not in RULES:
        raise Unsupported.unknown("cuda", "acceptance", call.acceptance, RULES)
    flat.refuse("cuda", call)
    _check(call.logits, call.law)
    arguments, results = flat.flattened_verify(call)
    _launch(module.cuda_verify, module.cuda_verify_workspace, arguments, call.draft_tokens.device)
    return results


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `reference.attention`."""
    device = call.query.device
    _check_device(device)
    _check_heads(call)
    arguments, results = flat.flattened_attention(call)
    arguments.append(_capacity(call))
    _launch(module.cuda_attention, module.cuda_attention_workspace, arguments, device)
    return results


def compact(slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None) -> None:
    """See `reference.compact`."""
    _check_device(lengths.device)
    arguments = flat.flattened_compact(slabs, lengths, path, block_table)
    slots = min(slab.shape[3] for slab in slabs)
    arguments.append(slots * (1 if block_table is None else block_table.shape[1]))
    arguments.append(_stream(lengths.device))
    _call(module.cuda_compact, arguments, lengths.device)


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" and module is flat.MODULE:
        raise Unsupported("cuda", "tensors", "tensors on a CUDA device", f"one on {device}")
    if device not in _refusals:
        _refusals[device] = _too_old(device)
    if _refusals[device]:
        raise _refused(_refusals[device])


def _too_old(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return ""
    given, least = (".".join(map(str, each)) for each in (capability, _LEAST_CAPABILITY))
    return f"{device} of compute capability {given}, older than {least}"


def _refused(why: str) -> Unsupported:
    return Unsupported("cuda", "device", "one that runs the kernels", why)


def _check(logits: list[Tensor], law: LawTensors) -> None:
    _check_device(logits[0].device)
    if len(logits) > _MAX_MEMBERS:
        raise Unsupported("cuda", "logits", f"at most {_MAX_MEMBERS} members", len(logits))
    rows = logits[0].shape[0] * logits[0].shape[1]
    if rows > _MAX_ROWS:
        raise Unsupported("cuda", "logits", f"at most {_MAX_ROWS} rows", rows)
    if law.vocab_size > _MAX_VOCABULARY:
        raise Unsupported("cuda", "vocab_size", f"at most {_MAX_VOCABULARY}", law.vocab_size)


def _check_heads(call: AttentionCall) -> None:
    for name, size in (("keys", call.keys.shape[3]), ("values", call.values.shape[3])):
        if size > _MAX_SIZE:
            raise Unsupported("cuda", name, f"heads of at most {_MAX_SIZE}", size)
    key_heads = call.query.shape[0] * call.keys.shape[1]
    if key_heads > _MAX_ROWS:
        raise Unsupported("cuda", "keys", f"at most {_MAX_ROWS} key heads of a batch", key_heads)
    if _capacity(call) > _MAX_SLOTS:
        raise Unsupported("cuda", "keys", f"at most {_MAX_SLOTS} slots", _capacity(call))


def _capacity(call: AttentionCall) -> int:
    """Slots of a row of the batch."""
    table = call.block_table
    return int(call.keys.shape[2] * (1 if table is None else table.shape[1]))


def _launch(
    function: Any, workspace_bytes: Any, arguments: list[Any], device: torch.device
) -> None:
    """Call `function` with the arguments, the stream's workspace and the stream."""
    stream = _stream(device)
    needed = workspace_bytes(arguments)
    key = (device, stream)
    # A graph has its own, which every replay zeroes: it may outlive the stream's, run on another
    # stream, and be the first to run of several.
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    workspace = None if captured else _workspaces.get(key)
    if workspace is None or workspace.numel() < needed:
        workspace = torch.zeros(needed, dtype=torch.uint8, device=device)
        if not captured:
            _workspaces[key] = workspace
    arguments += workspace.data_ptr(), workspace.numel(), stream
    _call(function, arguments, device)


def _call(function: Any, arguments: list[Any], device: torch.device) -> None:
    """With the tensors' device as the current one, which the stream must belong to."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            function(arguments)
    except module.CudaUnsupported as error:
        _refusals[device] = str(error)
        raise _refused(str(error)) from error


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
