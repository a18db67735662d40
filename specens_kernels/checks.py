# SPDX-License-Identifier: Apache-2.0
"""Checks of the ops' arguments: what does not fit raises a `Refusal`, and kernels need not ask.

Each op has a check of all that crosses the dispatcher, `check_<op>`. It runs inside the registered
implementations, so that it holds for whoever calls: the public function, an exported graph, or
`torch.ops.specens` by itself. What only the public functions take is read here first (`tensors`,
`members`, `nodes`, ...). To check a new argument, add it to its op's check.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .acceptance import ACCEPTANCE_RULES, AcceptanceRule
from .call import DRAWS, PADDED, VerifyCall
from .eager import is_eager_call
from .ensembles import SPACES, Ensemble
from .law import FLOATS, INTEGERS, SCOPES, Law, LawTensors
from .refusal import Refusal, shown
from .storage import cast, is_tensor, viewable, wrong

_FILTERS = range(2, 5)  # their places in `LawTensors`


def tensors(op: str, names: Sequence[str], values: Sequence[object]) -> None:
    """Refuse what is no tensor."""
    for name, value in zip(names, values, strict=True):
        if not is_tensor(value):
            raise Refusal(op, name, "a tensor", shown(value))


def members(op: str, logits: Any, law: Law) -> tuple[list[Tensor], LawTensors]:
    """The logits as a list, and the law's parameters."""
    if not isinstance(logits, (list, tuple)) or len(logits) == 0:
        raise Refusal(op, "logits", "a list of M >= 1 tensors", f"a {type(logits).__name__}")
    for m, tensor in enumerate(logits):
        if not isinstance(tensor, Tensor) or tensor.is_nested:
            raise Refusal(op, f"logits[{m}]", "a tensor", shown(tensor))
    if not isinstance(law, Law):
        raise Refusal(op, "law", "a Law", shown(law))
    vocab_size = law.vocab_size
    if vocab_size is None:
        vocab_size = max(min([tensor.shape[-1] if tensor.dim() else 1 for tensor in logits]), 1)
    return [*logits], law.tensors(op, logits[0].device, vocab_size)


def nodes(name: str, value: Tensor) -> Tensor:
    """(B or 1, columns), of those or (columns,)."""
    return viewable("verify", name, value)[None] if value.dim() == 1 else value


def draft_temperature(value: Tensor) -> Tensor:
    """(1,) or (B,) float32, of (), (1,) or (B,) float."""
    if value.dim() > 1 or value.dtype not in FLOATS:
        raise wrong("verify", "draft_temperature", "() or (B,) float", value)
    return cast(
        "verify",
        "draft_temperature",
        viewable("verify", "draft_temperature", value).reshape(-1),
        torch.float32,
    )


def packed(argument: str, value: Tensor, dimensions: int) -> Tensor:
    """(L, ...), of that or of (slots, steps, ...) in so many dimensions; never a copy.

    Its row is slot * steps + step.
    """
    if value.dim() != dimensions:
        return value
    slots, steps, *rest = value.shape
    try:
        return viewable("verify", argument, value).view(slots * steps, *rest)
    except RuntimeError:
        expected = "slots whose steps lie at equal distances, of which (L, ...) is a view"
        got = f"strides {value.stride()} of {tuple(value.shape)}"
        raise Refusal("verify", argument, expected, got) from None


def memory(value: Tensor) -> Tensor:
    """(B,) float64, of (B,) float."""
    if value.dtype not in FLOATS:
        raise wrong("verify", "memory", "(B,) float", value)
    return cast("verify", "memory", value, torch.float64)


def check_uniforms(seeds: Tensor, positions: Tensor, stream: int, index: int) -> None:
    """All that `uniforms` takes."""
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise wrong("uniforms", "seeds", "(B,) int64", seeds)
    if positions.dim() != 2 or positions.dtype != torch.int64:
        raise wrong("uniforms", "positions", "(B, T) int64", positions)
    if positions.shape[0] not in (1, seeds.shape[0]):
        raise wrong("uniforms", "positions", f"(B={seeds.shape[0]}, T) or (1, T)", positions)
    if seeds.device != positions.device:
        raise wrong("uniforms", "positions", f"device {seeds.device}", positions)
    for name, value in (("stream", stream), ("index", index)):
        if not 0 <= value < 2**32:
            raise Refusal("uniforms", name, "an integer in [0, 2^32)", value)


def check_mix(logits: list[Tensor], law: LawTensors) -> None:
    """All that `mix` takes."""
    _check_members("mix", logits, law)


def check_sample(
    logits: list[Tensor],
    uniforms: Tensor,
    law: LawTensors,
    member: int,
    rows: Tensor | None = None,
) -> None:
    """All that `sample` takes; member -1 is the ensemble."""
    if rows is None:
        _check_members("sample", logits, law)
        batch, count = logits[0].shape[0], logits[0].shape[1]
    else:
        batch, count = _check_packed_members("sample", logits, law, rows)
    many = tuple(uniforms.shape[2:3]) if uniforms.dim() == 4 else ()
    if many == (0,):
        raise Refusal("sample", "uniforms", "a block or more for each row", tuple(uniforms.shape))
    _check_numbers("sample", uniforms, batch, count, logits[0].device, *many)
    if not -1 <= member < len(logits):
        raise Refusal("sample", "member", f"None or 0 to {len(logits) - 1}", member)


def check_verify(call: VerifyCall) -> None:
    """All that `verify` takes."""
    drafts, logits, law = call.draft_tokens, call.logits, call.law
    if drafts.dim() != 2 or drafts.dtype not in INTEGERS:
        raise wrong("verify", "draft_tokens", "(B, N) int32 or int64", drafts)
    batch, count = drafts.shape
    device = drafts.device
    rows = count + 1 if call.bonus else count
    if call.layout.rows is None:
        _check_members("verify", logits, law)
        if logits[0].shape[0] != batch or logits[0].shape[1] != rows or logits[0].device != device:
            raise wrong("verify", "logits[0]", f"(B={batch}, {rows}, V) on {device}", logits[0])
    else:
        _check_places("rows", call.layout.rows, batch, (rows,), device)
        _check_packed_members("verify", logits, law, call.layout.rows)
    _check_numbers("verify", call.uniforms, batch, count + 1, device)
    rule = _check_rule(call.acceptance, call.parameters)
    if call.layout is not PADDED:
        _check_layout(call, rule, batch, count, device)
    if call.draws != "with":
        arguments.name("verify", "draws", call.draws, DRAWS)
        if rule.independent:
            expected = f"'with' for acceptance {rule.name!r}"
            raise Refusal("verify", "draws", expected, shown(call.draws))
    if rule.block and call.parents is not None:
        raise Refusal("verify", "parents", "None for acceptance 'block'", "a tensor")
    if call.memory is not None:
        _check_memory(call.memory, rule, batch, device)
    if call.parents is not None:
        _check_nodes("parents", call.parents, batch, count + 1, device)
    if call.proposers is not None:
        _check_nodes("proposers", call.proposers, batch, count, device)
    if call.draft_logits is not None:
        if call.layout.draft_rows is None:
            _check_draft_logits(call.draft_logits, batch, count, law.vocab_size, device)
        else:
            _check_packed_draft(call.draft_logits, law.vocab_size, device)
    if call.draft_temperature is not None:
        _check_draft_temperature(call.draft_temperature, batch, device)
    if call.lse is not None:
        if not law.averages_members:
            expected = "None for a law other than a mixture of scope 'member'"
            raise Refusal("verify", "lse", expected, "a tensor")
        shape = (*logits[0].shape[:-1], len(logits))
        _check_lse("lse", call.lse, shape, law.filters, device)
    if call.draft_lse is not None:
        if call.draft_logits is None:
            raise Refusal("verify", "draft_lse", "None without draft_logits", "a tensor")
        filters = law.filters if call.layout.draft_filtered else ()
        _check_lse("draft_lse", call.draft_lse, call.draft_logits.shape[:-1], filters, device)


def _check_members(op: str, logits: list[Tensor], law: LawTensors) -> None:
    _check_rows(op, logits, law.vocab_size)
    shape = logits[0].shape
    _check_law(op, law, shape[0], shape[1], len(logits), logits[0].device)


def _check_packed_members(
    op: str, logits: list[Tensor], law: LawTensors, rows: Tensor
) -> tuple[int, int]:
    """Of packed rows: M >= 1 tensors (L, V >= vocab_size), and B and T of where they lie."""
    if len(logits) == 0:
        raise Refusal(op, "logits", "a list of M >= 1 tensors", "none")
    first, device = logits[0].shape, logits[0].device
    for m, tensor in enumerate(logits):
        if tensor.dim() != 2 or tensor.shape[0] != first[0] or tensor.device != device:
            length = f"L={first[0]}" if m else "L"
            raise wrong(
                op, f"logits[{m}]", f"({length}, V) on {device}, for rows are given", tensor
            )
    if rows.dim() != 2 or rows.dtype not in INTEGERS or rows.device != device:
        raise wrong(op, "rows", f"(B, T) int32 or int64 on {device}", rows)
    _check_rows(op, [tensor[None] for tensor in logits], law.vocab_size)
    _check_law(op, law, rows.shape[0], rows.shape[1], len(logits), device)
    return rows.shape[0], rows.shape[1]


def _check_places(
    argument: str, value: Tensor, batch: int, columns: Sequence[int], device: torch.device
) -> None:
    """Where rows of a batch lie."""
    if (
        value.dim() != 2
        or value.shape[0] != batch
        or value.shape[1] not in columns
        or value.dtype not in INTEGERS
        or value.device != device
    ):
        expected = f"(B={batch}, {' or '.join(map(str, columns))}) int32 or int64 on {device}"
        raise wrong("verify", argument, expected, value)


def _check_layout(
    call: VerifyCall, rule: AcceptanceRule, batch: int, count: int, device: torch.device
) -> None:
    """What an engine's own buffers ask for, but the members' rows."""
    drafts = call.layout.num_drafts
    if drafts is not None and (
        drafts.shape != (batch,) or drafts.dtype not in INTEGERS or drafts.device != device
    ):
        raise wrong("verify", "num_drafts", f"(B={batch},) int32 or int64 on {device}", drafts)
    if call.layout.draft_rows is not None:
        if call.draft_logits is None:
            raise Refusal("verify", "draft_rows", "None without draft_logits", "a tensor")
        _check_places("draft_rows", call.layout.draft_rows, batch, (count, count + 1), device)
    arguments.name("verify", "draft_space", call.layout.draft_space, SPACES)
    if call.layout.draft_space == "probabilities":
        if call.draft_logits is None:
            raise Refusal("verify", "draft_logits", "the probabilities of draft_space", "None")
        for name in ("draft_temperature", "draft_lse"):
            if getattr(call, name) is not None:
                raise Refusal("verify", name, "None for probabilities", "a tensor")
    if call.layout.request_parameters is not None:
        _check_request_parameters(call.layout.request_parameters, rule, batch, device)
    if call.layout.out is not None:
        _check_out(call.layout.out, call.draft_tokens, device)


def _check_request_parameters(
    value: Tensor, rule: AcceptanceRule, batch: int, device: torch.device
) -> None:
    """A rule's numbers for each request, or its rates by position."""
    right = value.dim() == 2 and value.shape[0] in (1, batch)
    if right:
        columns = value.shape[1]
        right = columns > 0 if rule.by_position else columns == len(rule.parameters)
    if not right or value.dtype != torch.float64 or value.device != device:
        expected = f"numbers or (B={batch},) tensors on {device}"
        raise wrong("verify", f"acceptance {rule.name!r}", expected, value)


def _check_out(out: Tensor, drafts: Tensor, device: torch.device) -> None:
    """What the tokens are written to."""
    batch, count = drafts.shape
    if out.shape != (batch, count + 1) or out.dtype not in INTEGERS or out.device != device:
        expected = f"(B={batch}, {count + 1}) int32 or int64 on {device}"
        raise wrong("verify", "out", expected, out)
    row, column = out.stride()
    if (column != 1 and count > 0) or (row <= count and batch > 1):
        raise wrong("verify", "out", "contiguous rows that do not overlap", out)
    if _meet(out, drafts):
        raise wrong("verify", "out", "memory of its own, not the drafts'", out)


def _meet(out: Tensor, drafts: Tensor) -> bool:
    """Whether some of their memory may be the same."""
    if out.numel() == 0 or drafts.numel() == 0 or not is_eager_call((out, drafts)):
        return False
    spans = []
    for tensor in (out, drafts):
        row, column = tensor.stride()
        reach = (len(tensor) - 1) * row + (tensor.shape[1] - 1) * column + 1
        spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.itemsize))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def _check_packed_draft(draft: Tensor, vocab_size: int, device: torch.device) -> None:
    """Logits of a draft outside the ensemble, packed."""
    if (
        draft.dim() != 2
        or draft.shape[1] < vocab_size
        or draft.dtype not in FLOATS
        or draft.device != device
    ):
        expected = f"(L, V >= {vocab_size}) or (slots, steps, V) float on {device}"
        raise wrong("verify", "draft_logits", expected, draft)
    if draft.stride(-1) != 1 and draft.shape[1] > 1:
        raise wrong("verify", "draft_logits", "contiguous rows", draft)


def _check_rows(op: str, logits: Sequence[Tensor], vocab_size: int) -> None:
    """M >= 1 tensors (B, T, V >= vocab_size), which lie alike but for their strides."""
    if len(logits) == 0:
        raise Refusal(op, "logits", "a list of M >= 1 tensors", "none")
    if vocab_size < 1:
        raise Refusal(op, "vocab_size", "a count >= 1", vocab_size)
    shape, device = logits[0].shape, logits[0].device
    for m, tensor in enumerate(logits):
        size = tensor.shape
        if (
            len(size) != 3
            or size[0] != shape[0]
            or size[1] != shape[1]
            or size[2] < vocab_size
            or tensor.dtype not in FLOATS
            or tensor.device != device
        ):
            expected = f"(B, T, V >= {vocab_size}) float, like logits[0] {tuple(shape)} on {device}"
            raise wrong(op, f"logits[{m}]", expected, tensor)
        if tensor.stride()[2] != 1 and size[2] > 1:
            raise wrong(op, f"logits[{m}]", "contiguous rows", tensor)


def _check_law(
    op: str, law: LawTensors, batch: int, rows: int, count: int, device: torch.device
) -> None:
    if not law.made:
        _check_law_kinds(op, law, device)
    shape = law.weights.shape
    if (
        not 1 <= len(shape) <= 3
        or shape[-1] != count
        or (len(shape) > 1 and shape[0] != batch)
        or (len(shape) == 3 and shape[1] != rows)
    ):
        expected = f"(M={count},), (B={batch}, M) or (B, T={rows}, M)"
        raise Refusal(op, "weights", expected, tuple(shape))
    shape = law.temperature.shape
    most = count if law.scope == "member" else 1
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] not in (1, most):
        expected = f"(), (B={batch},) or (B or 1, {most})"
        raise Refusal(op, "temperature", expected, tuple(shape))
    for place in _FILTERS:
        value: Any = law[place]
        if value is not None and (value.dim() != 1 or value.shape[0] not in (1, batch)):
            raise Refusal(op, LawTensors._fields[place], f"(B={batch},)", tuple(value.shape))


def _check_law_kinds(op: str, law: LawTensors, device: torch.device) -> None:
    """What a `Law` sees to when it makes them."""
    for name, value in zip(LawTensors._fields[:5], law[:5], strict=True):
        dtype = torch.int32 if name == "top_k" else torch.float32
        if value is not None and (value.dtype != dtype or value.device != device):
            raise wrong(op, name, f"{str(dtype).removeprefix('torch.')} on {device}", value)
    arguments.name(op, "space", law.space, SPACES)
    arguments.name(op, "scope", law.scope, SCOPES)
    if law.fold:
        Ensemble.by_key(law.fold)
    if not 0 <= law.plausibility <= 1 or (law.plausibility > 0 and law.space != "logits"):
        expected = "0, or for space 'logits' a number in [0, 1]"
        raise Refusal(op, "plausibility", expected, law.plausibility)


def _check_rule(name: str, parameters: Sequence[float]) -> AcceptanceRule:
    rule = ACCEPTANCE_RULES.get(name)
    if rule is None:
        raise Refusal.unknown("verify", "acceptance", name, sorted(ACCEPTANCE_RULES))
    if not parameters and not rule.parameters:
        return rule
    if len(parameters) != len(rule.parameters):
        expected = f"{len(rule.parameters)} numbers for acceptance {name!r}"
        raise Refusal("verify", "parameters", expected, shown(list(parameters)))
    for parameter, value in zip(rule.parameters, parameters, strict=True):
        parameter.check(name, value)
    return rule


def _check_numbers(
    op: str, numbers: Tensor, batch: int, rows: int, device: torch.device, *count: int
) -> None:
    """The blocks that an op draws with: one a row, or so many."""
    if (
        numbers.shape != (batch, rows, *count, 4)
        or numbers.dtype != torch.float32
        or numbers.device != device
    ):
        shape = ", ".join(map(str, (rows, *count)))
        raise wrong(op, "uniforms", f"(B={batch}, {shape}, 4) float32 on {device}", numbers)


def _check_nodes(
    argument: str, value: Tensor, batch: int, columns: int, device: torch.device
) -> None:
    if (
        value.dim() != 2
        or value.shape[0] not in (1, batch)
        or value.shape[1] != columns
        or value.dtype not in INTEGERS
        or value.device != device
    ):
        expected = f"(B={batch} or 1, {columns}) int32 or int64 on {device}"
        raise wrong("verify", argument, expected, value)


def _check_draft_logits(
    draft: Tensor, batch: int, count: int, vocab_size: int, device: torch.device
) -> None:
    """Logits of a draft outside the ensemble."""
    shape = draft.shape
    if (
        draft.dim() != 3
        or shape[0] != batch
        or shape[1] not in (count, count + 1)
        or shape[2] < vocab_size
        or draft.dtype not in FLOATS
        or draft.device != device
    ):
        expected = f"(B={batch}, N={count} or N+1, V >= {vocab_size}) float on {device}"
        raise wrong("verify", "draft_logits", expected, draft)
    if draft.stride(-1) != 1 and shape[2] > 1:
        raise wrong("verify", "draft_logits", "contiguous rows", draft)


def _check_draft_temperature(value: Tensor, batch: int, device: torch.device) -> None:
    if (
        value.dim() != 1
        or value.shape[0] not in (1, batch)
        or value.dtype != torch.float32
        or value.device != device
    ):
        raise wrong("verify", "draft_temperature", f"() or (B={batch},) float on {device}", value)


def _check_lse(
    argument: str,
    lse: Tensor,
    shape: Sequence[int],
    filters: Sequence[Tensor | None],
    device: torch.device,
) -> None:
    """Log-sum-exps, of the members or of a separate draft."""
    if any(value is not None for value in filters):
        raise Refusal("verify", argument, "None for a law with filters", "a tensor")
    if lse.shape != tuple(shape) or lse.dtype != torch.float32 or lse.device != device:
        raise wrong("verify", argument, f"{tuple(shape)} float32 on {device}", lse)


def _check_memory(memory: Tensor, rule: AcceptanceRule, batch: int, device: torch.device) -> None:
    """Of a rule that remembers."""
    if not rule.remembers:
        raise Refusal("verify", "memory", f"None for acceptance {rule.name!r}", "a tensor")
    if memory.shape != (batch,) or memory.dtype != torch.float64 or memory.device != device:
        raise wrong("verify", "memory", f"(B={batch},) float on {device}", memory)
