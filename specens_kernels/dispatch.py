# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs an op: the backends, and each op's registration with torch.

PyTorch's dispatcher picks by device: the reference is registered for every one, and for the CPU and
CUDA a function that asks the backends in order. Whichever runs, the op's check of `checks.py` comes
first, for a graph or another caller of `torch.ops.specens` passes the public function by. A schema
follows from the annotations of the op's reference. To add an op: its check; its fake and a line at
the end here; and its public function in `ops.py`.
To add a backend: a module with `AVAILABLE`, `REASON` and the ops, and its name in the two tables.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import arguments, cache_checks, checks, cuda, native, reference, triton
from .call import PADDED, AttentionCall, Layout, Slabs, VerifyCall
from .eager import is_eager_call
from .law import LawTensors
from .refusal import Refusal, Unsupported
from .storage import is_readable, unreadable

# For each type of device, the backends that "auto" tries, the best first.
PREFERRED = {"cpu": ("native",), "cuda": ("cuda", "triton")}
MODULES: dict[str, ModuleType] = {"native": native, "triton": triton, "cuda": cuda}
BACKENDS = ("auto", *MODULES, "reference")

_logger = logging.getLogger("specens_kernels")


def _backend_from_environment() -> str:
    name = os.environ.get("SPECENS_BACKEND", "auto")
    if name not in BACKENDS:
        raise Refusal.unknown("environment", "SPECENS_BACKEND", name, BACKENDS)
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
    arguments.name("backend", "name", name, BACKENDS)
    if name in MODULES:
        _available(name)
    before = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(before)


def first_backend(device: str) -> str:
    """The backend that ops on this type of device are asked for first, here and now."""
    chosen = _backend.get()
    if chosen != "auto":
        return chosen
    able = (name for name in PREFERRED.get(device, ()) if MODULES[name].AVAILABLE)
    return next(able, "reference")


def _first_that_can(
    name: str, check: Callable[..., None], reference_op: Callable[..., Any], device: str
) -> Callable[..., Any]:
    """The implementation of one op on one type of device; what a backend refuses goes to the next.

    Why a backend was left is said once, in the log.
    """
    logged: set[str] = set()

    def run(*arguments: Any) -> Any:
        check(*arguments)
        chosen = _backend.get()
        if chosen == "reference":
            return reference_op(*arguments)
        if chosen != "auto":
            return getattr(_available(chosen), name)(*arguments)
        for each in PREFERRED[device]:
            module = MODULES[each]
            if not module.AVAILABLE:
                continue
            try:
                return getattr(module, name)(*arguments)
            except Unsupported as reason:
                if str(reason) not in logged:
                    logged.add(str(reason))
                    following = PREFERRED[device][PREFERRED[device].index(each) + 1 :]
                    able = [other for other in following if MODULES[other].AVAILABLE]
                    instead = able[0] if able else "the reference, which is slow,"
                    _logger.warning("%s: %s; %s runs instead", name, reason, instead)
        return reference_op(*arguments)

    return run


def _available(name: str) -> ModuleType:
    if not MODULES[name].AVAILABLE:
        raise Unsupported(
            "backend", "name", "a backend that runs here", f"{name!r}: {MODULES[name].REASON}"
        )
    return MODULES[name]


# A copy of the package under another name, as Hugging Face's `kernels` loads it, has its own ops.
NAMESPACE = "specens" if __package__ == "specens_kernels" else str(__package__).replace(".", "_")
_library: Any = torch.library.Library  # untyped
_lib = _library(NAMESPACE, "DEF")
# Graphs that inductor captures by itself count all memory of a warm-up as theirs, and would find a
# stream's workspace unaccounted for. A graph that the caller captures may hold the ops.
_define = partial(_lib.define, tags=(torch.Tag.cudagraph_unsafe,))

_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    Sequence[Tensor]: "Tensor[]",
    Slabs: "Tensor(a!)[]",
    Sequence[float]: "float[]",
    str: "str",
    float: "float",
    int: "int",
    bool: "bool",
}
# What crosses the dispatcher as its fields, and their types.
_FIELDS: dict[Any, dict[str, Any]] = {
    LawTensors: {
        name: kind
        for name, kind in get_type_hints(LawTensors).items()
        if name not in ("flat", "made")
    },
    Layout: {name: kind for name, kind in get_type_hints(Layout).items() if name != "out"},
    VerifyCall: get_type_hints(VerifyCall),
    AttentionCall: get_type_hints(AttentionCall),
}


def _schema(kinds: Mapping[str, Any]) -> str:
    """The arguments of an op in the dispatcher's language, from annotations."""
    return ", ".join(
        _schema(_FIELDS[kind]) if kind in _FIELDS else f"{_TYPES[kind]} {name}"
        for name, kind in kinds.items()
    )


def flattened(arguments: Iterable[Any]) -> list[Any]:
    """Arguments of a backend's op as its schema has them."""
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (VerifyCall, AttentionCall)):
            flat += flattened(argument)
        elif isinstance(argument, Layout):
            flat += argument[:-1]
        elif isinstance(argument, LawTensors):
            flat += argument.arguments
        else:
            flat.append(argument)
    return flat


def _rebuilt(op: str, kinds: Mapping[str, Any], flat: Iterator[Any]) -> list[Any]:
    """The way back: arguments of these types from their fields."""
    return [
        kind(*_rebuilt(op, _FIELDS[kind], flat))
        if kind in _FIELDS
        else _crossed(op, name, kind, next(flat))
        for name, kind in kinds.items()
    ]


def _crossed(op: str, name: str, kind: Any, value: Any) -> Any:
    """An argument as it came: the dispatcher lets None pass for a tensor."""
    if value is None and kind is Tensor:
        raise Refusal(op, name, "a tensor", None)
    if isinstance(value, list) and any(each is None for each in value):
        raise Refusal(op, name, "tensors", "None among them")
    return value


def _fake_uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> Tensor:
    shape = (seeds.shape[0], positions.shape[1], 4)
    return torch.empty(shape, dtype=torch.float32, device=positions.device)


def _fake_mix(logits: list[Tensor], law: LawTensors) -> tuple[Tensor, Tensor]:
    batch, rows = logits[0].shape[0], logits[0].shape[1]
    wide = any(tensor.dtype == torch.float64 for tensor in logits)
    dtype = torch.float64 if wide else torch.float32
    log_probs = logits[0].new_empty((batch, rows, law.vocab_size), dtype=dtype)
    return log_probs, logits[0].new_empty((batch, rows), dtype=torch.int32)


def _fake_sample(
    logits: list[Tensor], uniforms: Tensor, law: LawTensors, member: int, rows: Tensor | None
) -> tuple[Tensor, ...]:
    drawn, each = uniforms.shape[:-1], uniforms.shape[:2]
    dtypes = (torch.int64, torch.float32, torch.float32, torch.int32)
    shapes = (drawn, drawn, each, each)
    return tuple(
        uniforms.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def _fake_verify(call: VerifyCall) -> tuple[Tensor, ...]:
    batch, nodes = call.draft_tokens.shape
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
        ((batch, nodes + 1), torch.int64),
        ((batch, nodes + 1), torch.float32),
        ((batch,), torch.int32),
        ((batch, nodes), torch.int32),
        ((batch,), torch.int32),
    )
    return tuple(call.draft_tokens.new_empty(shape, dtype=dtype) for shape, dtype in results)


def fake_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """What `attention` returns, of fakes."""
    batch, heads, nodes, _ = call.query.shape
    out = call.query.new_empty((batch, nodes, heads, call.values.shape[-1]))
    return out, call.query.new_empty((batch, heads, nodes), dtype=torch.float32)


def _fake_compact(
    slabs: list[Tensor], lengths: Tensor, path: Tensor, block_table: Tensor | None
) -> None:
    """Writes to its slabs, and returns nothing."""


def _register(
    name: str, reference_op: Callable[..., Any], check: Callable[..., None], fake: Any
) -> Callable[..., Any]:
    """Register one op under the schema of its reference; returns the function to call."""
    kinds = get_type_hints(reference_op, include_extras=True)
    returned = kinds.pop("return")
    tensors = () if returned is type(None) else get_args(returned) or (returned,)
    results = ", ".join("Tensor" for _ in tensors)
    _define(f"{name}({_schema(kinds)}) -> ({results})")
    reference_op = torch.no_grad()(reference_op)

    def checked(*arguments: Any) -> Any:
        """On devices that have the reference alone."""
        check(*arguments)
        return reference_op(*arguments)

    def checked_fake(*arguments: Any) -> Any:
        check(*arguments)
        return fake(*arguments)

    def rebuilding(implementation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *flat: implementation(*_rebuilt(name, kinds, iter(flat)))

    def check_memory(arguments: Iterable[Any], tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if not is_readable(tensor):
                raise _unreadable(name, kinds, arguments)

    def readable(implementation: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse tensors that cannot be read; fakes never can."""

        def run(*arguments: Any) -> Any:
            check_memory(arguments, _tensors(arguments))
            return implementation(*arguments)

        return run

    written = Slabs in kinds.values()
    runs = {device: _first_that_can(name, check, reference_op, device) for device in PREFERRED}
    if written:
        runs = {device: _noting_writes(run) for device, run in runs.items()}
    _lib.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _lib.impl(name, rebuilding(readable(checked)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", rebuilding(checked_fake), lib=_lib)
    for device, run in runs.items():
        _lib.impl(name, rebuilding(readable(run)), device.upper())
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    # Torch's own way is to expand one number, which leaves no rows.

    def of_zeros(*flat: Any) -> Any:
        if written:
            raise Refusal(name, "slabs", "tensors that can be written to", "a tensor of zeros")
        return op(*map(_written_out, flat))

    _lib.impl(name, of_zeros, "ZeroTensor")

    def call(*arguments: Any) -> Any:
        tensors = _tensors(arguments)
        run = runs.get(tensors[0].device.type)
        # The dispatcher would only call one of our functions, at twice a small call's cost.
        if run is None or not is_eager_call(tensors):
            return op(*flattened(arguments))
        check_memory(arguments, tensors)
        return run(*arguments)

    return call


def register_written(schema: str, implementation: Any, fake: Any) -> None:
    """Register an op that is made of others, and writes where its schema says so."""
    _define(schema)
    name = schema.partition("(")[0]
    _lib.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _lib.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_lib)


def _noting_writes(run: Callable[..., Any]) -> Callable[..., Any]:
    """Tell whoever has saved a slab for its gradient that it is another one now."""

    def noting(slabs: list[Tensor], *arguments: Any) -> Any:
        result = run(slabs, *arguments)
        for slab in slabs:
            if not slab.is_inference():
                increment_version(slab)
        return result

    return noting


def _written_out(argument: Any) -> Any:
    """Tensors that are 0 without memory as tensors of zeros."""
    if isinstance(argument, list):
        return [_written_out(each) for each in argument]
    if isinstance(argument, Tensor) and argument._is_zerotensor():
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    return argument


def _unreadable(name: str, kinds: Mapping[str, Any], arguments: Iterable[Any]) -> Refusal:
    """The refusal of the first tensor that cannot be read."""
    given = dict(zip(_field_names(kinds), flattened(arguments), strict=True))
    for argument, value in given.items():
        for place, tensor in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(tensor, Tensor) and not is_readable(tensor):
                where = f"{argument}[{place}]" if isinstance(value, list) else argument
                return unreadable(name, where, tensor)
    raise AssertionError("every tensor can be read")


def _field_names(kinds: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, kind in kinds.items():
        names += _field_names(_FIELDS[kind]) if kind in _FIELDS else [name]
    return names


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """All of them, but a law's own."""
    tensors: list[Tensor] = []
    for argument in arguments:
        kind = type(argument)
        if argument is None or argument is PADDED or kind is str or kind is bool:
            continue
        if kind is Tensor or isinstance(argument, Tensor):
            tensors.append(argument)
        elif kind is list:  # of tensors, or of a rule's parameters
            tensors += argument if argument and isinstance(argument[0], Tensor) else []
        elif kind is VerifyCall or kind is AttentionCall or kind is Layout:
            tensors += _tensors(argument)
        elif kind is LawTensors and argument.flat is None:
            tensors += _tensors(argument[:5])
    return tensors


call_uniforms = _register("uniforms", reference.uniforms, checks.check_uniforms, _fake_uniforms)
call_mix = _register("mix", reference.mix, checks.check_mix, _fake_mix)
call_sample = _register("sample", reference.sample, checks.check_sample, _fake_sample)
call_verify = _register("verify", reference.verify, checks.check_verify, _fake_verify)
call_attention = _register(
    "attention", reference.attention, cache_checks.check_attention, fake_attention
)
call_compact = _register("compact", reference.compact, cache_checks.check_compact, _fake_compact)

if not native.AVAILABLE:
    _logger.warning("specens_kernels: %s; ops run the reference, which is slow", native.REASON)
