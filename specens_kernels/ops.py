# SPDX-License-Identifier: Apache-2.0
"""The public ops: docstring, check, schema, fake and registration of each.

The PyTorch dispatcher picks the backend: the reference is registered for every device, the native
kernels for the CPU where `specens_kernels._C` was built. Arguments are checked here, once; kernels
assume checked input. To add an op: write it in `reference.py`, then its schema, fake and public
function here, and a test file and a benchmark of the same name.
"""

import enum
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from . import cuda, native, reference, triton
from .acceptance import Acceptance
from .call import VerifyCall
from .law import Law, LawTensors, nobody_listens
from .reference import PADDING
from .refusal import Refusal, Unsupported

POINT_MASS = PADDING
# For each type of device, the backends that "auto" tries, the best first.
_PREFERRED = {"cpu": ("native",), "cuda": ("cuda", "triton")}
_MODULES: dict[str, ModuleType] = {"native": native, "triton": triton, "cuda": cuda}
BACKENDS = ("auto", *_MODULES, "reference")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)

_logger = logging.getLogger("specens_kernels")


class Stream(enum.IntEnum):
    """What a random number is for; numbers of different streams are independent.

    VERIFY: acceptance coins (word 0 of a block) and residual or bonus draws (words 1 to 3).
    DRAFT: a proposer's draws; the index is the member.
    COMPONENT: which member of a mixture a token is drawn from (word 0).
    """

    VERIFY = 0
    DRAFT = 1
    COMPONENT = 2


class Status(enum.IntFlag):
    """What a degenerate input did to a row; 0 for a healthy one. Only what was consulted counts."""

    NAN_LOGITS = reference.NAN_LOGITS
    INFINITE_LOGITS = reference.INFINITE_LOGITS
    EMPTY_LAW = reference.EMPTY_LAW
    INVALID_DRAFT = reference.INVALID_DRAFT
    EMPTY_RESIDUAL = reference.EMPTY_RESIDUAL


class Sample(NamedTuple):
    """What `sample` returns.

    tokens: (B, T) int64.
    log_probs: (B, T) float32. Log-probability of each token under the law it was drawn from.
    lse: (B, T) float32. Log-sum-exp of that law's kept scores; 0 for several members of scope
        "member" in space "probabilities". NaN, which is not known, for one such member whose
        weights are a tensor.
    status: (B, T) int32. `Status` bits.
    """

    tokens: Tensor
    log_probs: Tensor
    lse: Tensor
    status: Tensor


class Verdict(NamedTuple):
    """What `verify` returns.

    tokens: (B, N+1) int64. Accepted tokens, then the residual or bonus token; padded with -1.
    log_probs: (B, N+1) float32. Of each emitted token under the ensemble (before a greedy
        collapse).
    num_accepted: (B,) int32. Draft tokens kept; the residual or bonus token is not counted.
    path: (B, N) int32. Nodes kept, from the root down; padded with -1.
    status: (B,) int32. `Status` bits.
    """

    tokens: Tensor
    log_probs: Tensor
    num_accepted: Tensor
    path: Tensor
    status: Tensor


# --- public functions -----------------------------------------------------------------------------


def uniforms(seeds: Tensor, positions: Tensor, stream: Stream | int, *, index: int = 0) -> Tensor:
    """Random numbers that depend on nothing but their coordinates.

    Philox-4x32-10 with key `seeds` and counter (position, stream, index), so a token's randomness
    is the same in any batch slot, for any batch size, on every backend.

    Args:
        seeds: (B,) int64. One per sequence.
        positions: (B, T) or (1, T) int64. Absolute position of the token that each block is for.
        stream: a `Stream`, or any integer in [0, 2^32).
        index: an integer in [0, 2^32) that separates blocks of one stream, such as the member.
    Returns:
        (B, T, 4) float32 in [0, 1), multiples of 2^-24.
    Raises:
        ValueError: a shape or dtype disagrees.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise _wrong("uniforms", "seeds", "(B,) int64", seeds)
    if positions.dim() != 2 or positions.dtype != torch.int64:
        raise _wrong("uniforms", "positions", "(B, T) int64", positions)
    if positions.shape[0] not in (1, seeds.shape[0]):
        raise _wrong("uniforms", "positions", f"(B={seeds.shape[0]}, T) or (1, T)", positions)
    if seeds.device != positions.device:
        raise _wrong("uniforms", "positions", f"device {seeds.device}", positions)
    for name, value in (("stream", int(stream)), ("index", index)):
        if not 0 <= value < 2**32:
            raise ValueError(f"uniforms: {name}: expected an integer in [0, 2^32), got {value}")
    numbers: Tensor = _call_uniforms(seeds, positions, int(stream), index)
    return numbers


def mix(logits: Sequence[Tensor], law: Law) -> tuple[Tensor, Tensor]:
    """The ensemble's law itself, for log-probabilities and debugging. It has no gradient.

    Args:
        logits: M tensors (B, T, V_m) bfloat16, float16, float32 or float64, any strides with
            contiguous rows. Each member's bare logits; columns from `vocab_size` on are ignored.
        law: how they become one distribution.
    Returns:
        log_probs: (B, T, V) float32 (float64 if a member is). Normalised, -inf where no mass is.
        status: (B, T) int32. `Status` bits.
    Raises:
        ValueError: a shape, dtype or device disagrees.

    Source: Fu et al. 2025, arXiv:2502.01662.
    """
    tensors, parameters = _members("mix", logits, law)
    log_probs, status = _call_mix(tensors, parameters)
    return log_probs, status


def sample(
    logits: Sequence[Tensor], uniforms: Tensor, law: Law, *, member: int | None = None
) -> Sample:
    """Draw one token per row from the ensemble, or from one member's own warped law.

    The draw is a hierarchical inverse CDF over 8,192-token tiles and 1,024-token sub-tiles. A row
    whose temperatures are all 0 takes the law's most probable token, the lowest id on ties.

    Args:
        logits: M tensors (B, T, V_m), as for `mix`.
        uniforms: (B, T, 4) float32 in [0, 1). Words 1 to 3 of each block are used.
        law: how the members become one distribution.
        member: draw from this member alone, warped as `law` says; None draws from the ensemble.
    Returns:
        Sample: tokens, log_probs, lse and status, each (B, T).
    Raises:
        ValueError: a shape, dtype or device disagrees, or there is no such member.

    Source: Fu et al. 2025, arXiv:2502.01662.
    """
    tensors, parameters = _members("sample", logits, law)
    batch, rows = logits[0].shape[0], logits[0].shape[1]
    _check_uniforms("sample", uniforms, batch, rows, logits[0].device)
    if member is not None and not 0 <= member < len(logits):
        raise ValueError(f"sample: member: expected None or 0 to {len(logits) - 1}, got {member}")
    if member is not None:
        return Sample(*_call_sample(tensors, uniforms, parameters, member))
    alone = len(logits) == 1 and parameters.averages_members
    if not alone or not isinstance(law.weights, Tensor):
        # Alone it is the same law, but one that has a log-sum-exp, which `verify` can be told.
        return Sample(*_call_sample(tensors, uniforms, parameters, 0 if alone else -1))
    drawn = Sample(*_call_sample(tensors, uniforms, parameters, -1))
    # The mixture's, 0, would pass for the member's.
    return drawn._replace(lse=torch.full_like(drawn.lse, torch.nan))


def verify(
    logits: Sequence[Tensor],
    draft_tokens: Tensor,
    uniforms: Tensor,
    law: Law,
    *,
    parents: Tensor | None = None,
    proposers: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_temperature: Tensor | None = None,
    lse: Tensor | None = None,
    draft_lse: Tensor | None = None,
    acceptance: Acceptance | str = "rejection",
    memory: Tensor | None = None,
    bonus: bool = True,
) -> Verdict:
    """Keep the longest path of drafted tokens that the ensemble accepts, and emit one token more.

    From the root down, the children of a node are tried in order: a child is kept iff
    `coin * draft < kept`, and what the rule leaves of the target, for `rejection` the residual
    max(target - kept, 0), is the next child's target. Where no child is kept the last residual is
    drawn from; where there is none to try, the target (the bonus token). No (V,) probability tensor
    is written. The emitted law is the ensemble's, at every position, if the rule is lossless and
    each draft was drawn from the law it is said to be from.

    Args:
        logits: M tensors (B, N+1, V_m), as for `mix`. Row 0 is the law after the last committed
            token, row i the law after node i. (B, N, V_m) if not `bonus`.
        draft_tokens: (B, N) int32 or int64. Token of node i at i - 1; -1 where there is none.
        uniforms: (B, N+1, 4) float32 in [0, 1). Word 0 of row i is node i's coin; words 1 to 3 of
            row i draw the token after node i. The same uniforms give the same tokens everywhere.
        law: how the members become one distribution. The proposal is warped the same way.
        parents: (N+1,), (1, N+1) or (B, N+1) int32 or int64. Parent of each node, lower than the
            node; -1 for the root, node 0. None is a chain.
        proposers: (N,), (1, N) or (B, N) int32 or int64. The member whose law each node was drawn
            from; -1 for a point mass. None is a point mass everywhere, unless `draft_logits`.
        draft_logits: (B, N, V_d) or (B, N+1, V_d). Bare logits of a separate draft; row i is the
            law that the children of node i were drawn from.
        draft_temperature: () or (B,) float. The draft's; None is the law's for the first member.
        lse: (B, N+1, M) float32; (B, N, M) if not `bonus`. Log-sum-exp of each member's logits over
            its temperature, as a fused LM head has found it, or `sample` of that member alone; what
            is not finite is not known. A row that is known is read only where a token is drawn, and
            what is wrong with it is reported there only. It is taken as it is: a wrong one, 0 for
            instance, makes a wrong law and sets no bit. For mixtures of scope "member" without
            filters; nothing is taken from it where the temperature is 0.
        draft_lse: (B, N) or (B, N+1) float32, as `draft_logits`. The same of the draft's. A larger
            one makes the draft's law sum to less than 1: that of drafts which could be withdrawn.
        acceptance: a rule with its parameters, or the name of an entry of `ACCEPTANCE_RULES`, with
            its defaults. In rows of temperature 0 a draft is kept iff it is the ensemble's most
            probable token or the rule trusts it. "block" takes chains only.
        memory: (B,) float. For rules that remember: what of the tokens before; None is 0.
        bonus: whether a path that ends without a rejection emits a bonus token.
    Returns:
        Verdict: tokens, log_probs, num_accepted, path and status.
    Raises:
        ValueError: a shape, dtype or device disagrees, or the rule is unknown.

    Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318; Fu et al.
    2025, arXiv:2502.01662.
    """
    if draft_tokens.dim() != 2 or draft_tokens.dtype not in _INTEGERS:
        raise _wrong("verify", "draft_tokens", "(B, N) int32 or int64", draft_tokens)
    tensors, parameters = _members("verify", logits, law)
    batch, nodes = draft_tokens.shape
    device = draft_tokens.device
    rows = nodes + 1 if bonus else nodes
    if logits[0].shape[0] != batch or logits[0].shape[1] != rows or logits[0].device != device:
        raise _wrong("verify", "logits[0]", f"(B={batch}, {rows}, V) on {device}", logits[0])
    _check_uniforms("verify", uniforms, batch, nodes + 1, device)
    chosen = Acceptance.of(acceptance)
    if chosen.rule.block and parents is not None:
        raise ValueError("verify: parents: expected None for acceptance 'block', got a tensor")
    if memory is not None and not chosen.rule.remembers:
        raise ValueError(
            f"verify: memory: expected None for acceptance {chosen.rule.name!r}, got a tensor"
        )
    if memory is not None:
        memory = _check_memory(memory, batch, device)
    parents = _broadcast("parents", parents, batch, nodes + 1, device)
    proposers = _broadcast("proposers", proposers, batch, nodes, device)
    if draft_logits is not None:
        if proposers is not None:
            raise ValueError("verify: proposers: expected None beside draft_logits, got a tensor")
        _check_draft_logits(draft_logits, batch, nodes, parameters.vocab_size, device)
    if draft_temperature is not None:
        draft_temperature = _per_row("draft_temperature", draft_temperature, batch, device)
    if lse is not None:
        if not parameters.averages_members:
            expected = "None for a law other than a mixture of scope 'member'"
            raise Refusal("verify", "lse", expected, "a tensor")
        _check_lse("lse", lse, (batch, rows, len(tensors)), parameters, device)
    if draft_lse is not None:
        if draft_logits is None:
            raise ValueError("verify: draft_lse: expected None without draft_logits, got a tensor")
        _check_lse("draft_lse", draft_lse, draft_logits.shape[:2], parameters, device)
    call = VerifyCall(
        tensors,
        draft_tokens,
        uniforms,
        parameters,
        parents,
        proposers,
        draft_logits,
        draft_temperature,
        lse,
        draft_lse,
        chosen.rule.name,
        chosen.parameters,
        memory,
        bonus,
    )
    return Verdict(*_call_verify(call))


# --- backends -------------------------------------------------------------------------------------


def _backend_from_environment() -> str:
    name = os.environ.get("SPECENS_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"SPECENS_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_initial = _backend_from_environment()
# Of a thread, or of a task: two of them may each choose one at a time.
_backend = ContextVar("specens_backend", default=_initial)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of every op inside the block, for this thread or task.

    SPECENS_BACKEND chooses for the whole process: it is what every thread begins with.

    Args:
        name: "auto": on a CPU native, on a GPU cuda or else triton, and the reference for what
            these cannot do. "reference". "native", "triton", "cuda": that one; raises
            NotImplementedError for what it cannot do, such as tensors on another device. Devices
            other than cpu and cuda have the reference alone, whatever is chosen.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name in _MODULES:
        _available(name)
    before = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(before)


def _first_that_can(name: str, reference_op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The implementation of one op on one type of device; what a backend refuses goes to the next.

    Why a backend was left is said once, in the log.
    """
    logged: set[str] = set()

    def run(*arguments: Any) -> Any:
        chosen = _backend.get()
        if chosen == "reference":
            return reference_op(*arguments)
        if chosen != "auto":
            return getattr(_available(chosen), name)(*arguments)
        for each in _PREFERRED[device]:
            module = _MODULES[each]
            if not module.AVAILABLE:
                continue
            try:
                return getattr(module, name)(*arguments)
            except Unsupported as reason:
                if str(reason) not in logged:
                    logged.add(str(reason))
                    _logger.warning("%s: %s; another backend runs instead", name, reason)
        return reference_op(*arguments)

    return run


def _available(name: str) -> ModuleType:
    if not _MODULES[name].AVAILABLE:
        raise Unsupported(
            "backend", "name", "a backend that runs here", f"{name!r}: {_MODULES[name].REASON}"
        )
    return _MODULES[name]


# --- schemas, fakes, registration -----------------------------------------------------------------

_library: Any = torch.library.Library  # untyped
_lib = _library("specens", "DEF")
# Graphs that inductor captures by itself count all memory of a warm-up as theirs, and would find a
# stream's workspace unaccounted for. A graph that the caller captures may hold the ops.
_define = partial(_lib.define, tags=(torch.Tag.cudagraph_unsafe,))

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    Sequence[Tensor]: "Tensor[]",
    Sequence[float]: "float[]",
    str: "str",
    float: "float",
    int: "int",
    bool: "bool",
}
# What crosses the dispatcher as its fields, and their types.
_FIELDS: dict[Any, dict[str, Any]] = {
    LawTensors: {name: kind for name, kind in get_type_hints(LawTensors).items() if name != "flat"},
    VerifyCall: get_type_hints(VerifyCall),
}


def _schema(kinds: Mapping[str, Any]) -> str:
    """The arguments of an op in the dispatcher's language, from annotations."""
    return ", ".join(
        _schema(_FIELDS[kind]) if kind in _FIELDS else f"{_TYPES[kind]} {name}"
        for name, kind in kinds.items()
    )


def _flattened(arguments: Iterable[Any]) -> list[Any]:
    """Arguments of a backend's op as the schema has them."""
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, VerifyCall):
            flat += _flattened(argument)
        elif isinstance(argument, LawTensors):
            flat += argument.arguments
        else:
            flat.append(argument)
    return flat


def _unflattened(kinds: Iterable[Any], flat: Iterator[Any]) -> list[Any]:
    """The other way."""
    return [
        kind(*_unflattened(_FIELDS[kind].values(), flat)) if kind in _FIELDS else next(flat)
        for kind in kinds
    ]


def _fake_uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    shape = (seeds.shape[0], positions.shape[1], 4)
    return torch.empty(shape, dtype=torch.float32, device=positions.device)


def _fake_mix(logits: list[Tensor], *law: Any) -> tuple[Tensor, Tensor]:
    batch, rows = logits[0].shape[0], logits[0].shape[1]
    wide = any(tensor.dtype == torch.float64 for tensor in logits)
    dtype = torch.float64 if wide else torch.float32
    log_probs = logits[0].new_empty((batch, rows, law[-1]), dtype=dtype)
    return log_probs, logits[0].new_empty((batch, rows), dtype=torch.int32)


def _fake_sample(logits: list[Tensor], numbers: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtypes = (torch.int64, torch.float32, torch.float32, torch.int32)
    return tuple(numbers.new_empty(numbers.shape[:2], dtype=dtype) for dtype in dtypes)


def _fake_verify(logits: list[Tensor], draft_tokens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, nodes = draft_tokens.shape
    return (
        draft_tokens.new_empty((batch, nodes + 1), dtype=torch.int64),
        draft_tokens.new_empty((batch, nodes + 1), dtype=torch.float32),
        draft_tokens.new_empty((batch,), dtype=torch.int32),
        draft_tokens.new_empty((batch, nodes), dtype=torch.int32),
        draft_tokens.new_empty((batch,), dtype=torch.int32),
    )


def _register(name: str, reference_op: Callable[..., Any], fake: Any) -> Callable[..., Any]:
    """Register one op under the schema of its reference; returns the function to call."""
    kinds = get_type_hints(reference_op)
    returned = kinds.pop("return")
    results = ", ".join("Tensor" for _ in get_args(returned) or (returned,))
    _define(f"{name}({_schema(kinds)}) -> ({results})")
    reference_op = torch.no_grad()(reference_op)

    def unflattened(implementation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *flat: implementation(*_unflattened(kinds.values(), iter(flat)))

    _lib.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _lib.impl(name, unflattened(reference_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"specens::{name}", fake, lib=_lib)
    runs = {device: _first_that_can(name, reference_op, device) for device in _PREFERRED}
    for device, run in runs.items():
        _lib.impl(name, unflattened(run), device.upper())
    op: Callable[..., Any] = getattr(torch.ops.specens, name).default

    def call(*arguments: Any) -> Any:
        tensors = _tensors(arguments)
        # The dispatcher would only call one of our functions, at twice a small call's cost.
        if tensors[0].device.type in runs and nobody_listens(tensors):
            return runs[tensors[0].device.type](*arguments)
        return op(*_flattened(arguments))

    return call


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """All of them, but a law's own."""
    tensors: list[Tensor] = []
    for argument in arguments:
        if argument is None:
            continue
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, list):
            tensors += argument
        elif isinstance(argument, VerifyCall):
            tensors += _tensors(argument)
        elif isinstance(argument, LawTensors) and argument.flat is None:
            tensors += _tensors(argument[:5])
    return tensors


_call_uniforms = _register("uniforms", reference.uniforms, _fake_uniforms)
_call_mix = _register("mix", reference.mix, _fake_mix)
_call_sample = _register("sample", reference.sample, _fake_sample)
_call_verify = _register("verify", reference.verify, _fake_verify)

if not native.AVAILABLE:
    _logger.warning("specens_kernels: %s; ops run the reference, which is slow", native.REASON)


# --- checks ---------------------------------------------------------------------------------------


def _wrong(op: str, argument: str, expected: str, got: Tensor) -> ValueError:
    found = f"{tuple(got.shape)} {str(got.dtype).removeprefix('torch.')} on {got.device}"
    return ValueError(f"{op}: {argument}: expected {expected}, got {found}")


def _members(op: str, logits: Any, law: Law) -> tuple[list[Tensor], LawTensors]:
    """The checked logits and the law's parameters."""
    if isinstance(logits, Tensor) or len(logits) == 0:
        raise ValueError(f"{op}: logits: expected a list of M >= 1 tensors, got {type(logits)}")
    first = logits[0]
    shape, device = first.shape, first.device
    vocab_size = law.vocab_size or max(min([tensor.shape[-1:].numel() for tensor in logits]), 1)
    for m, tensor in enumerate(logits):
        size = tensor.shape
        if (
            len(size) != 3
            or size[0] != shape[0]
            or size[1] != shape[1]
            or size[2] < vocab_size
            or tensor.dtype not in _FLOATS
            or tensor.device != device
        ):
            expected = f"(B, T, V >= {vocab_size}) float, like logits[0] {tuple(shape)} on {device}"
            raise _wrong(op, f"logits[{m}]", expected, tensor)
        if tensor.stride()[2] != 1 and size[2] > 1:
            raise _wrong(op, f"logits[{m}]", "contiguous rows", tensor)
    return list(logits), law.tensors(op, shape[0], shape[1], len(logits), device, vocab_size)


def _check_uniforms(op: str, numbers: Tensor, batch: int, rows: int, device: torch.device) -> None:
    if (
        numbers.shape != (batch, rows, 4)
        or numbers.dtype != torch.float32
        or numbers.device != device
    ):
        raise _wrong(op, "uniforms", f"(B={batch}, {rows}, 4) float32 on {device}", numbers)


def _broadcast(
    argument: str, value: Tensor | None, batch: int, columns: int, device: torch.device
) -> Tensor | None:
    if value is None:
        return None
    if value.dim() == 1:
        value = value[None]
    if (
        value.dim() != 2
        or value.shape[0] not in (1, batch)
        or value.shape[1] != columns
        or value.dtype not in _INTEGERS
        or value.device != device
    ):
        expected = f"(B={batch} or 1, {columns}) int32 or int64 on {device}"
        raise _wrong("verify", argument, expected, value)
    return value


def _check_draft_logits(
    draft: Tensor, batch: int, nodes: int, vocab_size: int, device: torch.device
) -> None:
    shape = draft.shape
    if (
        draft.dim() != 3
        or shape[0] != batch
        or shape[1] not in (nodes, nodes + 1)
        or shape[2] < vocab_size
        or draft.dtype not in _FLOATS
        or draft.device != device
    ):
        expected = f"(B={batch}, N={nodes} or N+1, V >= {vocab_size}) float on {device}"
        raise _wrong("verify", "draft_logits", expected, draft)
    if draft.stride(-1) != 1 and shape[2] > 1:
        raise _wrong("verify", "draft_logits", "contiguous rows", draft)


def _check_lse(
    argument: str,
    lse: Tensor,
    shape: Sequence[int],
    law: LawTensors,
    device: torch.device,
) -> None:
    if any(value is not None for value in (law.top_k, law.top_p, law.min_p)):
        raise ValueError(f"verify: {argument}: expected None for a law with filters, got a tensor")
    if lse.shape != tuple(shape) or lse.dtype != torch.float32 or lse.device != device:
        raise _wrong("verify", argument, f"{tuple(shape)} float32 on {device}", lse)


def _per_row(argument: str, value: Tensor, batch: int, device: torch.device) -> Tensor:
    """(1,) or (B,) float32, of (), (1,) or (B,) float."""
    shape = value.shape
    if (
        len(shape) > 1
        or (len(shape) == 1 and shape[0] not in (1, batch))
        or value.dtype not in _FLOATS
        or value.device != device
    ):
        raise _wrong("verify", argument, f"() or (B={batch},) float on {device}", value)
    return value.reshape(-1).to(torch.float32)


def _check_memory(memory: Tensor, batch: int, device: torch.device) -> Tensor:
    """(B,) float64."""
    if memory.shape != (batch,) or memory.dtype not in _FLOATS or memory.device != device:
        raise _wrong("verify", "memory", f"(B={batch},) float on {device}", memory)
    return memory.double()
