# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functions that sample, for any device: its names, arguments, layouts and results.

The laws are FlashInfer's, and the ops `mix`, `sample` and `verify` obey them: probabilities become
logits by their logarithm, and a row need not sum to 1. Random numbers are `uniforms`, so that a
seed and an offset give the same tokens on every device, but not the ones that FlashInfer draws.
Another function of FlashInfer's is one more here.
"""

from typing import Any

import torch
from torch import Tensor

from specens_kernels import Law, Refusal, Stream, arguments, mix, sample, uniforms, verify
from specens_kernels.refusal import shown
from specens_kernels.storage import wrong

_ORDERS = ("top_k_first", "joint")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_COUNTS = (torch.int32, torch.int64)
# What stands for a draft's probability of 0.
_LEAST_DRAFT = 1e-30
# Rows of one call draw with positions so far apart: more than there are offsets of a seed.
_ROW = 2**40


def softmax(
    logits: Tensor,
    temperature: Tensor | float | None = None,
    enable_pdl: bool | None = None,
) -> Tensor:
    """The probabilities of logits over a temperature.

    Args:
        logits: (B, V) float.
        temperature: a number or (B,) float. 0 makes all tokens equal, as in FlashInfer; elsewhere
            here it is greedy.
        enable_pdl: not looked at.
    Returns:
        (B, V) float32.
    Raises:
        Refusal: a shape or a dtype disagrees, or the temperature is no number.

    Source: FlashInfer's softmax.
    """
    _check_rows("softmax", "logits", logits)
    if isinstance(temperature, Tensor):
        _check_parameter("softmax", "temperature", temperature, len(logits), floating=True)
        inverse = torch.where(temperature == 0, 0.0, 1 / temperature.float())[:, None]
        return (logits.float() * inverse).softmax(-1)
    value = 1.0 if temperature is None else arguments.number(temperature)
    if value != value:
        raise Refusal("softmax", "temperature", "a number or (B,) float", shown(temperature))
    return (logits.float() * (1 / value if value else 0.0)).softmax(-1)


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
) -> Tensor:
    """Tokens of the softmax of logits; arguments as for `top_k_top_p_sampling_from_logits`."""
    draw = _Draw("sampling_from_logits", logits, "logits", indices, generator, seed, offset)
    return draw.tokens(check_nan)


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens of probabilities; arguments as for `top_k_top_p_sampling_from_probs`."""
    draw = _Draw("sampling_from_probs", probs, "probs", indices, generator, seed, offset)
    return draw.result(check_nan, return_valid)


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens of the nucleus; arguments as for `top_k_top_p_sampling_from_probs`."""
    draw = _Draw("top_p_sampling_from_probs", probs, "probs", indices, generator, seed, offset)
    return draw.result(check_nan, return_valid, top_p=top_p)


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens of the k likeliest; arguments as for `top_k_top_p_sampling_from_probs`."""
    draw = _Draw("top_k_sampling_from_probs", probs, "probs", indices, generator, seed, offset)
    return draw.result(check_nan, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Tensor | float,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens whose probability is at least min_p times the largest.

    Arguments, results and refusals are those of `top_k_top_p_sampling_from_probs`; min_p is a
    number in [0, 1] or (rows,) float.

    Source: Nguyen et al. 2024, arXiv:2407.01082; FlashInfer's min_p_sampling_from_probs.
    """
    draw = _Draw("min_p_sampling_from_probs", probs, "probs", indices, generator, seed, offset)
    return draw.result(check_nan, return_valid, min_p=min_p)


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    top_k_max: int | None = None,
) -> Tensor:
    """Tokens of the softmax of logits, filtered as by `top_k_top_p_sampling_from_probs`."""
    op = "top_k_top_p_sampling_from_logits"
    draw = _Draw(op, logits, "logits", indices, generator, seed, offset)
    _check_order(op, filter_apply_order)
    if filter_apply_order == "joint":
        draw.filter(top_p=top_p)
        return draw.tokens(check_nan, top_k=top_k)
    return draw.tokens(check_nan, top_k=top_k, top_p=top_p)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Tensor | int,
    top_p: Tensor | float,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
    return_valid: bool = False,
    top_k_max: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens of the k likeliest of a nucleus.

    A token is kept iff fewer than top_k have a larger probability, and iff the mass of those is
    less than top_p: tied tokens are kept or dropped together, as in FlashInfer.

    Args:
        probs: (rows, V) float. Need not be normalised.
        top_k: a count, or (rows,) int32 or int64. V or more and below 0 are off, 0 is as 1.
        top_p: a mass in [0, 1], or (rows,) float. 1 is off; 0 keeps the likeliest.
        indices: (B,) int32 or int64. Row of `probs` of each token; None is each row once.
        filter_apply_order: "top_k_first", where the mass is that of the k likeliest, or "joint",
            where it is that of all.
        deterministic: not looked at; results never depend on timing.
        generator: where a seed is drawn from; None is torch's own of the device. It advances.
        check_nan: whether NaN is refused; it looks at the host.
        seed: a number, or (1,) or (B,) int64 or uint64. Given with `offset`, nothing is drawn from
            a generator, and other tokens need another offset or seed.
        offset: as `seed`; 0 to 2^40 - 1.
        return_valid: whether to return `valid`, too.
        top_k_max: not looked at. FlashInfer may cut a tensor top_k at it.
    Returns:
        samples: (B,) int32, or of the dtype of `indices`.
        valid: (B,) bool. Whether the row had a law.
    Raises:
        Refusal: a shape, a dtype, a device or a name disagrees; a seed without an offset.

    Source: FlashInfer's top_k_top_p_sampling_from_probs.
    """
    op = "top_k_top_p_sampling_from_probs"
    draw = _Draw(op, probs, "probs", indices, generator, seed, offset)
    _check_order(op, filter_apply_order)
    if filter_apply_order == "joint":
        draw.filter(top_p=top_p)
        return draw.result(check_nan, return_valid, top_k=top_k)
    return draw.result(check_nan, return_valid, top_k=top_k, top_p=top_p)


def top_k_renorm_probs(
    probs: Tensor, top_k: Tensor | int, is_deterministic: bool = False
) -> Tensor:
    """(B, V) of the dtype of `probs`. The law of the k likeliest tokens, ties kept together."""
    _check_rows("top_k_renorm_probs", "probs", probs)
    return _law_of("top_k_renorm_probs", probs, top_k=top_k).to(probs.dtype)


def top_p_renorm_probs(
    probs: Tensor, top_p: Tensor | float, is_deterministic: bool = False
) -> Tensor:
    """(B, V) float32. The law of the nucleus, ties kept together."""
    _check_rows("top_p_renorm_probs", "probs", probs)
    return _law_of("top_p_renorm_probs", probs, top_p=top_p)


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: Tensor | int | None = None,
    offset: Tensor | int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify chains of drafts: `verify` with the rule "rejection", of probabilities.

    Args:
        draft_probs: (B, N, V) float. The laws that the drafts were drawn from.
        draft_token_ids: (B, N) int32 or int64. -1, which FlashInfer does not take, is none. One
            that its own law has no mass for is kept iff the target has some, as there.
        target_probs: (B, N+1, V) float.
        maybe_output_accepted_token_num: (B,) int32 or int64, added to: drafts that pass their own
            test, whether or not an earlier one was rejected.
        maybe_output_emitted_draft_token_num: (B,) int32 or int64, added to: drafts that were
            emitted; the token drawn after them is not counted.
        deterministic: not looked at.
        generator: as for `top_k_top_p_sampling_from_probs`, like seed and offset.
        seed: None, a number, or (1,) or (B,) int64 or uint64.
        offset: as `seed`.
    Returns:
        output_token_ids: (B, N+1) int32. Padded with -1.
        output_accepted_token_num: (B,). The tensor that was given, or a new one, int32.
        output_emitted_draft_token_num: (B,). Likewise.
    Raises:
        Refusal: a shape, a dtype or a device disagrees; a seed without an offset.

    Source: FlashInfer's chain_speculative_sampling; Chen et al. 2023, arXiv:2302.01318.
    """
    op = "chain_speculative_sampling"
    if draft_token_ids.dim() != 2 or draft_token_ids.dtype not in _COUNTS:
        raise wrong(op, "draft_token_ids", "(B, N) int32 or int64", draft_token_ids)
    batch, count = draft_token_ids.shape
    for name, probs, rows in (
        ("target_probs", target_probs, count + 1),
        ("draft_probs", draft_probs, count),
    ):
        shape = (batch, rows, target_probs.shape[-1])
        if probs.shape != shape or probs.dtype not in _FLOATS:
            raise wrong(op, name, f"(B={batch}, {rows}, V) float, V alike", probs)
    outputs = []
    for name, given in (
        ("maybe_output_accepted_token_num", maybe_output_accepted_token_num),
        ("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num),
    ):
        if given is not None and (given.shape != (batch,) or given.dtype not in _COUNTS):
            raise wrong(op, name, f"(B={batch},) int32 or int64", given)
        empty = draft_token_ids.new_zeros(batch, dtype=torch.int32)
        outputs.append(empty if given is None else given)

    numbers = _numbers(op, batch, count + 1, draft_token_ids.device, (generator, seed, offset))
    ids = draft_token_ids.long().clamp(0, target_probs.shape[-1] - 1)[..., None]
    drafts = draft_probs.float()
    proposed, wanted = drafts.gather(2, ids), target_probs[:, :count].float().gather(2, ids)
    # A draft that its own law has no mass for is kept there, if the target has some.
    drafts = drafts.scatter(2, ids, proposed.clamp(min=_LEAST_DRAFT)).log()
    logits = target_probs.float().log()
    verdict = verify([logits], draft_token_ids, numbers, Law(), draft_logits=drafts)
    emitted = verdict.num_accepted
    passed = (numbers[:, 1:, :1] * proposed < wanted)[..., 0] & (draft_token_ids >= 0)
    later = torch.arange(count, device=ids.device) >= emitted[:, None]
    outputs[0] += emitted + (passed & later).sum(1)
    outputs[1] += emitted
    return verdict.tokens.int(), outputs[0], outputs[1]


class _Draw:
    """One call that draws: its rows as logits, and its random numbers."""

    def __init__(
        self,
        op: str,
        given: Tensor,
        name: str,
        indices: Tensor | None,
        generator: torch.Generator | None,
        seed: Tensor | int | None,
        offset: Tensor | int | None,
    ) -> None:
        self.op, self.name, self.given = op, name, given
        _check_rows(op, name, given)
        if indices is not None and (indices.dim() != 1 or indices.dtype not in _COUNTS):
            raise wrong(op, "indices", "(B,) int32 or int64", indices)
        self.indices = indices
        self.logits = given if name == "logits" else given.float().log()
        batch = len(given) if indices is None else len(indices)
        self.numbers = _numbers(op, batch, 1, given.device, (generator, seed, offset))

    def filter(self, **filters: Any) -> None:
        """Drop what the filters do not keep."""
        law = _filtered(self.op, len(self.given), filters, None)
        self.logits = mix([_joined(self.logits)], law)[0][:, 0]

    def result(
        self, check_nan: bool, return_valid: bool, **filters: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What FlashInfer returns: tokens, and whether each row has a law if that is asked."""
        if check_nan and bool(torch.isnan(self.given).any()):
            raise Refusal(self.op, self.name, "numbers", "NaN")
        law = _filtered(self.op, len(self.given), filters, self.indices)
        rows = self.logits if self.indices is None else self.logits[self.indices]
        drawn = sample([_joined(rows)], self.numbers, law)
        dtype = torch.int32 if self.indices is None else self.indices.dtype
        tokens = drawn.tokens[:, 0].to(dtype)
        return (tokens, drawn.status[:, 0] == 0) if return_valid else tokens

    def tokens(self, check_nan: bool, **filters: Any) -> Tensor:
        """The tokens alone."""
        tokens = self.result(check_nan, return_valid=False, **filters)
        assert isinstance(tokens, Tensor)
        return tokens


def _law_of(op: str, probs: Tensor, **filters: Any) -> Tensor:
    law = _filtered(op, len(probs), filters, None)
    renormalised: Tensor = mix([_joined(probs.float().log())], law)[0][:, 0].exp_()
    return renormalised


def _filtered(op: str, rows: int, filters: dict[str, Any], indices: Tensor | None) -> Law:
    """The law of one member with these filters; tensors are of rows, and gathered by `indices`."""
    for name, value in filters.items():
        if isinstance(value, Tensor):
            _check_parameter(op, name, value, rows, floating=name != "top_k")
            value = value if indices is None else value[indices]
            filters[name] = torch.where(value == 0, 1, value) if name == "top_k" else value
        elif name == "top_k":
            if isinstance(value, bool) or not isinstance(value, int):
                raise Refusal(op, name, "a count or (rows,) int32 or int64", shown(value))
            # In a law 0 is off.
            filters[name] = 1 if value == 0 else max(value, 0)
    return Law(**filters)


def _numbers(
    op: str,
    batch: int,
    rows: int,
    device: torch.device,
    source: tuple[torch.Generator | None, Tensor | int | None, Tensor | int | None],
) -> Tensor:
    """(batch, rows, 4). The random numbers of a call, by its generator, seed and offset."""
    generator, seed, offset = source
    if (seed is None) != (offset is None):
        name, other = ("offset", "seed") if offset is None else ("seed", "offset")
        raise Refusal(op, name, f"a number or a tensor beside {other}", "None")
    if seed is None or offset is None:
        own = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        seed, offset = own, torch.zeros_like(own)
    both = [_words(op, name, value, batch, device) for name, value in _named(seed, offset)]
    own_rows = torch.arange(batch, device=device)[:, None] * _ROW
    positions = both[1][:, None] + own_rows + torch.arange(rows, device=device)
    return uniforms(both[0].expand(batch).contiguous(), positions, Stream.VERIFY)


def _named(seed: Tensor | int, offset: Tensor | int) -> tuple[tuple[str, Tensor | int], ...]:
    return ("seed", seed), ("offset", offset)


def _words(op: str, name: str, value: object, batch: int, device: torch.device) -> Tensor:
    """(1,) or (B,) int64 of a seed or an offset."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
            raise Refusal(op, name, "an integer in [0, 2^64) or a tensor", shown(value))
        signed = value - 2**64 if value >= 2**63 else value
        return torch.full((1,), signed, dtype=torch.int64, device=device)
    fits = value.dim() == 1 and len(value) in (1, batch) and value.device == device
    if not fits or value.dtype not in (torch.int64, torch.uint64):
        raise wrong(op, name, f"(1,) or (B={batch},) int64 or uint64 on {device}", value)
    return value.view(torch.int64)


def _joined(logits: Tensor) -> Tensor:
    """(B, 1, V), of rows that lie in one piece."""
    return (logits if logits.stride(1) == 1 else logits.contiguous())[:, None]


def _check_rows(op: str, name: str, given: object) -> None:
    if not isinstance(given, Tensor) or given.dim() != 2 or given.dtype not in _FLOATS:
        raise wrong(op, name, "(B, V) float32, float16 or bfloat16", given)


def _check_parameter(op: str, name: str, value: Tensor, rows: int, *, floating: bool) -> None:
    fits = value.dtype.is_floating_point if floating else value.dtype in _COUNTS
    if value.shape != (rows,) or not fits:
        kind = "float" if floating else "int32 or int64"
        raise wrong(op, name, f"a number or ({rows},) {kind}", value)


def _check_order(op: str, order: object) -> None:
    if order not in _ORDERS:
        raise Refusal.unknown(op, "filter_apply_order", order, _ORDERS)
