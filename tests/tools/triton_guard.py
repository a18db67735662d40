# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made strict: what a GPU would do wrong or differently becomes an error.

`install()` patches `triton.runtime.interpreter` of Triton 3.6 and 3.7, for good. From then on

* bfloat16 is bfloat16: stock, arithmetic runs on its bit patterns and casts to it do not round;
* a comparison is boolean: stock, it cannot be broadcast;
* every address must lie inside a tensor of the launch, views up to their last element;
* no program may touch a byte that another program of the launch stores to, atomics apart, and no
  two lanes of a store may write the same element;
* `counted()` counts launches, and the bytes of every active lane that loads or stores. A byte that
  two lanes load counts twice; a GPU's caches would make that less.

A violation raises `KernelFault`, with the kernel's line. TRITON_INTERPRET=1 must be set before
triton is imported.
"""

import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

Array = Any  # numpy's, whose dtype varies
NOBODY = -1
_BLOCK = 1 << 16  # owners are noted by blocks of elements, for a tensor may be larger than memory


class KernelFault(AssertionError):
    """What a kernel did that a GPU would not forgive."""


@dataclass
class Traffic:
    """Of one kernel: launches, programs, and bytes of active lanes."""

    launches: int = 0
    programs: int = 0
    loaded: int = 0
    stored: int = 0


@dataclass
class Buffer:
    """A tensor of a launch, and the last program that loaded or stored each element."""

    name: str
    begin: int
    end: int
    loaders: dict[int, Array] = field(default_factory=dict)
    storers: dict[int, Array] = field(default_factory=dict)

    def owners(self, blocks: dict[int, Array], block: int) -> Array:
        """The last programs at one block of elements."""
        if block not in blocks:
            blocks[block] = numpy.full(min(_BLOCK, self.end - self.begin), NOBODY, numpy.int32)
        return blocks[block]


@dataclass
class Launch:
    """The tensors that a running kernel was given."""

    kernel: str
    buffers: list[Buffer]
    traffic: Traffic

    def access(self, kind: str, pointers: Array, mask: Array, size: int, program: int) -> None:
        """Check the active lanes of one load, store or atomic."""
        addresses = numpy.broadcast_to(pointers, numpy.broadcast_shapes(pointers.shape, mask.shape))
        active = addresses[numpy.broadcast_to(mask, addresses.shape)].astype(numpy.int64)
        if active.size == 0:
            return
        if kind == "load":
            self.traffic.loaded += active.size * size
        else:
            self.traffic.stored += active.size * size
        outside = numpy.ones(active.size, bool)
        for buffer in self.buffers:
            inside = (active >= buffer.begin) & (active + size <= buffer.end)
            if inside.any():
                outside &= ~inside
                self._own(buffer, kind, active[inside] - buffer.begin, size, program)
            if not outside.any():
                return
        self._fail_outside(kind, int(active[outside][0]), int(outside.sum()), program)

    def _own(self, buffer: Buffer, kind: str, offsets: Array, size: int, program: int) -> None:
        if kind == "atomic":
            return
        if kind == "store" and len(numpy.unique(offsets)) < len(offsets):
            raise KernelFault(
                f"{self.kernel}: two lanes store to the same element of {buffer.name} {_line()}"
            )
        elements = offsets // size  # of one size for all accesses to a tensor
        for block in numpy.unique(elements // _BLOCK).tolist():
            places = elements[elements // _BLOCK == block] % _BLOCK
            storers = buffer.owners(buffer.storers, block)
            loaders = buffer.owners(buffer.loaders, block)
            rivals = [storers[places]] + ([loaders[places]] if kind == "store" else [])
            for owners in rivals:
                other = owners[(owners != NOBODY) & (owners != program)]
                if other.size:
                    raise KernelFault(
                        f"{self.kernel}: race on {buffer.name}: program {program} {kind}s what "
                        f"program {other[0]} also touches {_line()}"
                    )
            (storers if kind == "store" else loaders)[places] = program

    def _fail_outside(self, kind: str, address: int, count: int, program: int) -> None:
        nearest = min(self.buffers, key=lambda b: min(abs(address - b.begin), abs(address - b.end)))
        raise KernelFault(
            f"{self.kernel}: out-of-bounds {kind} of {count} elements by program {program}, "
            f"{address - nearest.begin} bytes into the {nearest.end - nearest.begin} of "
            f"{nearest.name} {_line()}"
        )


def _line() -> str:
    """Where the kernel is: the innermost frame that is neither Triton's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "/triton/runtime/" in frame.filename or "/triton/language/" in frame.filename:
            continue
        if frame.filename not in (__file__, "<string>"):
            return f"[{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}]"
    return "[?]"


_counters: list[dict[str, Traffic]] = []
_running: list[Launch] = []


@contextmanager
def counted() -> Iterator[dict[str, Traffic]]:
    """Traffic by kernel of every launch inside the block."""
    traffic: dict[str, Traffic] = defaultdict(Traffic)
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def _widened(bits: Array) -> Array:
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _rounded(values: Array) -> Array:
    """float32 to the nearest bfloat16's bits, ties to even."""
    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(numpy.uint32)) >> 16).astype(
        numpy.uint16
    )
    quiet = numpy.uint16(0x7FC0)
    return numpy.where(numpy.isnan(values), quiet, nearest).reshape(numpy.shape(values))


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(_widened(handle.data), tl.float32)


def _in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operation on widened operands, rounded back if its result is a float."""

    def run(self: Any, *operands: Any) -> Any:
        if not any(_is_bfloat16(operand) for operand in operands):
            return function(self, *operands)
        result = function(self, *(_as_float32(operand) for operand in operands))
        if result.dtype.scalar != tl.float32:
            return result
        return interpreter.TensorHandle(_rounded(result.data), tl.bfloat16)

    return run


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    """A comparison of widened operands, whose result is boolean; stock, it has their type."""

    def run(self: Any, a: Any, b: Any) -> Any:
        result = function(self, _as_float32(a), _as_float32(b))
        return interpreter.TensorHandle(result.data, tl.int1)

    return run


def _install_bfloat16() -> None:
    stock = interpreter._convert_float

    def convert(values: Array, source: Any, target: Any, rounding: Any) -> Array:
        if source == tl.bfloat16 and target == tl.float32:
            return _widened(values).view(numpy.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return _rounded(values)
        return stock(values, source, target, rounding)

    interpreter._convert_float = convert
    builder = interpreter.InterpreterBuilder
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _in_float32(getattr(builder, name)))
    for name in dir(builder):
        if name.startswith(("create_fcmp", "create_icmp")):
            setattr(builder, name, _comparison(getattr(builder, name)))
    dot = builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: dot(self, _as_float32(a), _as_float32(b), *rest)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple):
        fields = getattr(value, "_fields", range(len(value)))
        for part, inner in zip(fields, value, strict=True):
            yield from _tensors(f"{name}.{part}", inner)


def _buffers(arguments: dict[str, Any]) -> list[Buffer]:
    found = {}
    for name, value in arguments.items():
        for inner, tensor in _tensors(name, value):
            if tensor.numel() > 0:
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin = tensor.data_ptr()
                end = begin + (last + 1) * tensor.element_size()
                found.setdefault((begin, end), Buffer(inner, begin, end))
    return list(found.values())


def _program() -> int:
    x, y, z = interpreter.interpreter_builder.grid_idx
    _, columns, depth = interpreter.interpreter_builder.grid_dim
    return int((x * columns + y) * depth + z)


def _size(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def _check(kind: str, pointers: Any, mask: Array) -> None:
    if _running:
        _running[-1].access(kind, pointers.data, mask, _size(pointers), _program())


def _launch(self: Any, *arguments: Any, **options: Any) -> None:
    """Runs the grid on the tensors themselves: all are on the CPU, so none is copied."""
    named = dict(zip(self.arg_names, arguments, strict=False))
    named |= {name: value for name, value in options.items() if name in self.arg_names}
    traffic = Traffic(launches=1)
    _running.append(Launch(self.fn.__name__, _buffers(named), traffic))
    try:
        with numpy.errstate(all="ignore"):
            traffic.programs = _run_grid(self, named)
    except interpreter.InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KernelFault):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    finally:
        _running.pop()
    for counter in _counters:
        known = counter[self.fn.__name__]
        known.launches += 1
        known.programs += traffic.programs
        known.loaded += traffic.loaded
        known.stored += traffic.stored


def _run_grid(self: Any, named: dict[str, Any]) -> int:
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    # Triton 3.6 makes no index of an array of one element, which is what its reductions return.
    scope.set_attr(tl.tensor, "__index__", lambda value: int(value.handle.data.item()))
    try:
        given = {
            name: value if name in self.constexprs else interpreter._implicit_cvt(value)
            for name, value in named.items()
        }
        grid = self.grid(given) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for place in numpy.ndindex(*grid):
            interpreter.interpreter_builder.set_grid_idx(*place)
            try:
                self.fn(**given)
            except interpreter.InterpreterError:
                raise
            except Exception as error:
                raise interpreter.InterpreterError(repr(error)) from error
    finally:
        scope.restore()
    return int(numpy.prod(grid))


def _call(self: Any, *arguments: Any, **options: Any) -> Any:
    """A device function called by another; stock, each call patches `triton.language` again."""
    if not _running:
        raise KernelFault(f"{self.fn.__name__}: called outside a launch")
    return self.rewrite()(*arguments, **options)


def _np_dtype(dtype: Any) -> Any:
    """As stock, which builds its table at every call."""
    name = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _stock_np_dtype(dtype)
    return _np_dtypes[name]


_np_dtypes: dict[str, Any] = {}
_stock_np_dtype = interpreter._get_np_dtype


def _install_checks() -> None:
    interpreter._get_np_dtype = _np_dtype
    builder = interpreter.InterpreterBuilder
    interpreter.GridExecutor.__call__ = _launch
    interpreter.InterpretedFunction.__call__ = _call
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check("load", pointers, mask.data)
        return stock_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check("store", pointers, mask.data)
        return stock_store(self, pointers, value, mask, *rest)

    def rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check("atomic", pointers, mask.data)
        return stock_rmw(self, operation, pointers, value, mask, *rest)

    def cas(self: Any, pointers: Any, *rest: Any) -> Any:
        _check("atomic", pointers, numpy.ones(numpy.shape(pointers.data), bool))
        return stock_cas(self, pointers, *rest)

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas


_installed = False


def install() -> None:
    """Make the interpreter strict, once."""
    global _installed
    if not _installed:
        _installed = True
        _install_bfloat16()
        _install_checks()
