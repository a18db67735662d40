# SPDX-License-Identifier: Apache-2.0
"""Random calls of `verify` as an engine makes them: those of `calls.py`, packed.

Rows in an order of their own among rows of nobody, drafts in slots, drafts that end early or are to
be refused, proposals without filters or given as probabilities. To cover one more argument, draw
it in `engine_call`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from calls import Call, Dice, call
from draft_trees import CHAINS_ONLY, tree_call
from torch import Tensor

BEYOND = torch.tensor([-1, 10**8])  # indices of no row


def packed(dice: Dice, padded: Sequence[Tensor], spare: int = 3) -> tuple[list[Tensor], Tensor]:
    """Each (B, T, ...) as (L, ...), rows at distances of their own, and where a row lies in all."""
    batch, rows = padded[0].shape[:2]
    length = batch * rows + spare
    places = torch.randperm(length, generator=dice.generator)[: batch * rows].view(batch, rows)
    out = []
    for tensor in padded:
        width = tensor.shape[2] + dice.choice([0, 3])
        lying = torch.full((length, width, *tensor.shape[3:]), torch.nan, dtype=tensor.dtype)
        lying = lying[:, : tensor.shape[2]]
        lying[places] = tensor
        out.append(lying)
    return out, places.to(dice.choice([torch.int32, torch.int64]))


def in_slots(dice: Dice, draft: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, V) as (slots, steps, V), some slots of nobody, and slot * steps + step of each row."""
    batch, steps = draft.shape[:2]
    slots = torch.randperm(batch + 2, generator=dice.generator)[:batch]
    buffer = torch.full((batch + 2, *draft.shape[1:]), torch.nan, dtype=draft.dtype)
    buffer[slots] = draft
    return buffer, slots[:, None] * steps + torch.arange(steps)


def as_packed(dice: Dice, one: Call) -> Call:
    """The same call, all of whose rows lie packed."""
    logits, *rest = one.arguments
    options = dict(one.options)
    members, options["rows"] = packed(dice, logits)
    # Log-sum-exps lie as the logits do.
    lse = options.get("lse")
    if lse is not None:
        lying = torch.full((len(members[0]), lse.shape[2]), torch.nan)
        lying[options["rows"].long()] = lse
        options["lse"] = lying
    draft, draft_lse = options.get("draft_logits"), options.get("draft_lse")
    if draft is not None:
        options["draft_logits"], options["draft_rows"] = in_slots(dice, draft)
        if draft_lse is not None:
            lying = torch.full(options["draft_logits"].shape[:2], torch.nan)
            lying.view(-1)[options["draft_rows"]] = draft_lse
            options["draft_lse"] = lying
    return one._replace(arguments=(members, *rest), options=options, name=f"{one.name}, packed")


def engine_call(seed: int, sizes: tuple[int, ...], rules: Sequence[str]) -> Call:
    """A packed call under one of these rules, with what only engines ask for."""
    dice = Dice(7_000_000 + seed)
    on_trees = dice.happens(0.3)
    rules = sorted(set(rules) - CHAINS_ONLY) if on_trees else rules
    one = (tree_call if on_trees else call)(seed, sizes, rules)
    _, tokens, numbers, law = one.arguments
    options: dict[str, Any] = dict(one.options)
    batch, nodes = tokens.shape
    if options.get("draft_logits") is not None and dice.happens(0.5):
        draft = options["draft_logits"].float().softmax(-1).to(options["draft_logits"].dtype)
        odd = dice.uniform_tensor(*draft.shape) < (0.02 if dice.happens(0.2) else 0)
        draft = torch.where(odd, dice.choice([torch.nan, torch.inf, -1.0]), draft)
        options |= {"draft_logits": draft, "draft_space": "probabilities"}
        options |= {"draft_lse": None, "draft_temperature": None}
    options["draft_filtered"] = dice.happens(0.5)
    one = as_packed(dice, one._replace(options=options))
    options = one.options
    if dice.happens(0.6):
        counts = torch.randint(-1, nodes + 2, (batch,), generator=dice.generator)
        options["num_drafts"] = counts.to(dice.choice([torch.int32, torch.int64]))
        counts = counts.clamp(0, nodes)[:, None]
        for name, more in (("rows", int(options["bonus"])), ("draft_rows", 0)):
            if name in options:
                places = options[name]
                unseen = torch.arange(places.shape[1]) >= counts + more
                options[name] = torch.where(unseen, BEYOND[seed % 2].to(places.dtype), places)
        refused = dice.uniform_tensor(batch, nodes) < 0.15
        tokens = tokens.masked_fill(refused, -1)
    return one._replace(
        arguments=(one.arguments[0], tokens, numbers, law),
        name=f"{one.name}, {sorted(options)}, {options.get('num_drafts')}",
    )
