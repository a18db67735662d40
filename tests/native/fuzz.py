# SPDX-License-Identifier: Apache-2.0
"""Random calls of the registered ops on native kernels under sanitizers, most of them wrong.

`fuzz.py MODULE CALLS [FIRST]`, where MODULE is `_C` built with SPECENS_SANITIZE=address,undefined;
CTest runs a few, `make fuzz` many. A call is a seed: a random call of `calls.py`, whose arguments
are then spoilt as graphs, FSDP and mistakes spoil them: narrowed, strided, expanded, freed, of
another type or range. It is handed to `torch.ops.specens`, which the public functions' reading does
not protect. Native kernels and the reference must answer alike: both refuse it, or both compute the
same. A sanitizer's report ends the process. To add a way of spoiling, add a function to `TENSORS`
or values to `VALUES`.
"""

import logging
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]


def load(path: str) -> None:
    """Let the package find this module as its own. Torch has loaded the OpenMP that it needs."""
    name = "specens_kernels._C"
    loader = ExtensionFileLoader(name, path)
    spec = spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    sys.modules[name] = module_from_spec(spec)
    loader.exec_module(sys.modules[name])


def narrow(tensor: Tensor, dice: random.Random) -> Tensor:
    dim = dice.randrange(tensor.dim())
    size = tensor.shape[dim]
    return tensor.narrow(dim, 0, dice.randrange(size)) if size > 0 else tensor[None]


def strided(tensor: Tensor, dice: random.Random) -> Tensor:
    """The same numbers, in rows that have gaps or lie across."""
    dim = dice.randrange(tensor.dim())
    if dice.random() < 0.5:
        return tensor.transpose(dim, -1).contiguous().transpose(dim, -1)
    step = dice.choice([2, 3])
    return tensor.repeat_interleave(step, dim)[(slice(None),) * dim + (slice(None, None, step),)]


def expanded(tensor: Tensor, dice: random.Random) -> Tensor:
    """One number, row or column for all: stride 0."""
    dim = dice.randrange(tensor.dim())
    return tensor.narrow(dim, 0, min(1, tensor.shape[dim])).expand(tensor.shape)


def wider(tensor: Tensor, dice: random.Random) -> Tensor:
    """Expanded beyond its shape."""
    shape = list(tensor.shape)
    dim = dice.randrange(len(shape))
    shape[dim] = dice.choice([0, 1, shape[dim] + 1, 2 * shape[dim]])
    return tensor.flatten()[:1].view([1] * len(shape)).expand(shape) if tensor.numel() else tensor


def zero(tensor: Tensor, dice: random.Random) -> Tensor:
    """What autograd makes of a gradient that is 0."""
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def freed(tensor: Tensor, dice: random.Random) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: Tensor, dice: random.Random) -> Tensor:
    tensor = tensor.clone()
    storage = tensor.untyped_storage()
    storage.resize_(dice.randrange(storage.nbytes() + 1))
    return tensor


def retyped(tensor: Tensor, dice: random.Random) -> Tensor:
    known = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8]
    return tensor.to(dice.choice([*known, torch.bool, torch.complex64]))


def reshaped(tensor: Tensor, dice: random.Random) -> Tensor:
    forms = (tensor[None], tensor.flatten(), tensor.flatten()[:0], tensor.new_zeros(()))
    return dice.choice([*forms, tensor.unsqueeze(-1)])


def elsewhere(tensor: Tensor, dice: random.Random) -> Tensor:
    return tensor.to("meta")


def sparse(tensor: Tensor, dice: random.Random) -> Tensor:
    return tensor.to_sparse()


def negative(tensor: Tensor, dice: random.Random) -> Tensor:
    """The same numbers, the opposite of what memory holds."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


def trained(tensor: Tensor, dice: random.Random) -> Tensor:
    return torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor


def unaligned(tensor: Tensor, dice: random.Random) -> Tensor:
    """One number off, the last one at the end of its memory."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].copy_(tensor.flatten()).view(tensor.shape)


def misaligned(tensor: Tensor, dice: random.Random) -> Tensor:
    """Of a buffer, beginning between two numbers."""
    memory = bytearray(tensor.nbytes + 1)
    if tensor.numel() == 0:
        return tensor
    memory[1:] = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


TENSORS: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    *(narrow, strided, expanded, wider, zero, freed, cut, retyped, reshaped),
    *(elsewhere, sparse, negative, trained, unaligned, misaligned),
)
# Whose numbers are taken as they are: what wrong ones make is no law, and not one to agree on.
UNCHECKED = {"weights", "lse", "draft_lse", "space"}
# By the type of the argument.
VALUES: dict[type, tuple[Any, ...]] = {
    bool: (False, True),
    int: (-(2**63), -2, -1, 0, 1, 2, 3, 7, 8, 9, 1024, 2**31, 2**40, 2**63 - 1),
    float: (float("nan"), float("inf"), -1.0, -0.0, 0.5, 1.0, 1e-320, 1e39, 2.0),
    str: (
        "",
        "with",
        "without",
        "member",
        "ensemble",
        "logits",
        "probabilities",
        "block",
        "js",
        "typical",
        "x@y",
    ),
}


def spoilt(argument: Any, dice: random.Random) -> tuple[str, Any]:
    """How an argument was spoilt, and what is left of it."""
    if isinstance(argument, Tensor):
        if dice.random() < 0.05:
            return "left out", None
        way = dice.choice(TENSORS)
        return way.__name__, way(argument, dice)
    if isinstance(argument, list):
        places = list(argument)
        if not places or dice.random() < 0.15:
            length = dice.choice([0, 1, len(places) + 1, 5, 17])
            return "of another length", (places * 17 or [0.5] * 17)[:length]
        place = dice.randrange(len(places))
        how, places[place] = spoilt(places[place], dice)
        return how, places
    return "another value", dice.choice(VALUES.get(type(argument), (None,)))


def raw(seed: int) -> tuple[Any, list[Any], dict[str, str]]:
    """An op, its arguments as they cross the dispatcher, and how which were spoilt."""
    import calls
    import draft_trees
    import engine_calls

    from specens_kernels import ACCEPTANCE_RULES, Acceptance, checks, dispatch
    from specens_kernels.call import Layout, VerifyCall

    dice = random.Random(seed)
    if seed % 16 == 0:
        seeds, positions = torch.arange(dice.randrange(4)), torch.arange(dice.randrange(5))[None]
        name, arguments = "uniforms", [seeds, positions, dice.randrange(3), dice.randrange(3)]
    else:
        sizes = calls.SMALL if seed % 4 else calls.TILES
        if seed % 3 == 0:
            one = draft_trees.tree_call(seed, sizes, sorted(ACCEPTANCE_RULES))
        elif seed % 3 == 1:
            one = engine_calls.engine_call(seed, sizes, sorted(ACCEPTANCE_RULES))
        else:
            one = calls.call(seed, sizes)
        name = one.op
        logits, parameters = checks.members(name, one.arguments[0], one.arguments[-1])
        if name == "mix":
            given: tuple[Any, ...] = (logits, parameters)
        elif name == "sample":
            member = one.options["member"]
            numbers = one.arguments[1]
            if seed % 5 == 0:  # several draws of a row
                numbers = numbers[:, :, None] / torch.arange(1, 4)[:, None]
            given = (logits, numbers, parameters, -1 if member is None else member, None)
        else:
            rule = Acceptance.of(one.options.pop("acceptance"))
            options = {
                key: value if value is None else checks.nodes(key, value)
                for key, value in one.options.items()
                if key in ("parents", "proposers")
            }
            rest = {key: value for key, value in one.options.items() if key not in options}
            if rest.get("draft_temperature") is not None:
                rest["draft_temperature"] = checks.draft_temperature(rest["draft_temperature"])
            layout = {name: rest.pop(name) for name in Layout._fields if name in rest}
            if rule.numbers and seed % 2:
                # Some beyond their range.
                several = torch.tensor([rule.numbers] * len(one.arguments[1]), dtype=torch.float64)
                several *= dice.choice([1.0, 1.0, 1.0, -1.0, 1e300, float("nan")])
                layout["request_parameters"] = several
            if "draft_rows" in layout:
                rest["draft_logits"] = checks.packed("draft_logits", rest["draft_logits"], 3)
                if rest.get("draft_lse") is not None:
                    rest["draft_lse"] = checks.packed("draft_lse", rest["draft_lse"], 2)
            given = (
                VerifyCall(
                    logits,
                    *one.arguments[1:3],
                    parameters,
                    acceptance=rule.rule.name,
                    parameters=rule.parameters,
                    **options,
                    **rest,
                    layout=Layout(**layout),
                ),
            )
        arguments = dispatch.flattened(given)
    arguments = [list(each) if isinstance(each, tuple) else each for each in arguments]
    op = getattr(torch.ops.specens, name).default
    ways = {}
    places = [place for place, argument in enumerate(arguments) if argument is not None]
    for place in dice.sample(places, dice.choice([0, 1, 1, 1, 2])):
        how, arguments[place] = spoilt(arguments[place], dice)
        ways[op._schema.arguments[place].name] = how
    return op, arguments, ways


def answer(op: Any, arguments: list[Any], backend: str) -> Any:
    """The results, or why there are none."""
    import specens_kernels

    with specens_kernels.backend(backend):
        try:
            results = op(*arguments)
        except specens_kernels.Refusal as refusal:
            return str(refusal)
        except (RuntimeError, TypeError) as error:
            # Torch's own: the schema does not take it, or no tensor says where to run.
            if "specens::" in str(error):
                return "torch refused it"
            raise
    return (results,) if isinstance(results, Tensor) else results


def compare(seed: int, ours: Any, right: Any, ways: dict[str, str]) -> None:
    if isinstance(ours, str) or isinstance(right, str):
        assert ours == right, f"seed {seed}: native: {ours}\nreference: {right}"
        return
    if UNCHECKED & set(ways):
        return
    for one, other in zip(ours, right, strict=True):
        same = {"atol": 1e-5, "rtol": 3e-6, "equal_nan": True}  # as in `calls.check`
        torch.testing.assert_close(one, other, **same, msg=lambda text: f"seed {seed}: {text}")


def main(path: str, calls: int, first: int = 0) -> None:
    load(path)
    import_module("specens_kernels.ops")
    logging.getLogger("specens_kernels").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # torch's, of sparse tensors and of what is cast
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(first, first + calls):
        op, arguments, ways = raw(seed)
        ours = answer(op, arguments, "auto")
        compare(seed, ours, answer(op, arguments, "reference"), ways)
        outcome = "refused" if isinstance(ours, str) else "answered"
        outcomes.update((way, outcome) for way in list(ways.values()) or ["as it was"])
    for way in sorted({way for way, _ in outcomes}):
        counts = [f"{outcomes[way, each]:6} {each}" for each in ("answered", "refused")]
        sys.stdout.write(f"{way:18} {' '.join(counts)}\n")
    sys.stdout.write(f"{calls} calls, no report\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
