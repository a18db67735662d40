# SPDX-License-Identifier: Apache-2.0
"""Random calls of `verify` on trees, as hard as builders and mistakes can make them.

Ragged trees of other shapes in one batch, siblings of members, drafts and points in one tree, with
and without replacement, tokens that come twice, holes and lost nodes. A call is a seed, as in
`calls.py`, which compares it. To cover one more argument, draw it in `tree_call`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from calls import Call, Dice, is_filtered
from torch import Tensor

from specens_kernels import ACCEPTANCE_RULES

NODES = (1, 2, 3, 4, 5, 6, 8, 12, 20, 70)
# Not for trees.
CHAINS_ONLY = {name for name, rule in ACCEPTANCE_RULES.items() if rule.block}


def random_parents(dice: Dice, rows: int, nodes: int) -> Tensor:
    """(B or 1, N+1). From chains to stars; a few have nodes that hang nowhere."""
    span = dice.choice([1, 2, 3, nodes + 1])
    trees = [
        [-1, *(dice.randrange(max(0, node - span), node) for node in range(1, nodes + 1))]
        for _ in range(rows)
    ]
    if dice.happens(0.1):
        tree, node = dice.choice(trees), dice.randrange(1, nodes + 1)
        tree[node] = dice.choice([-1, -2, node, node + 1, 2**31 - 1])
    return torch.tensor(trees, dtype=dice.choice([torch.int32, torch.int64]))


def siblings_before(parents: Sequence[int], node: int) -> int:
    return sum(parent == parents[node] for parent in parents[1:node])


def drafted(dice: Dice, sources: Sequence[Tensor], proposers: Tensor, parents: Tensor) -> Tensor:
    """(B, N) tokens that their sources find likely, siblings' one after another; some anything."""
    batch, _, vocab_size = sources[0].shape
    nodes = parents.shape[1] - 1
    tokens = torch.full((batch, nodes), -1)
    best = [
        source.float().nan_to_num(-1e9, 1e9, -1e9).argsort(-1, True)[..., :8] for source in sources
    ]
    lengths = [nodes] * batch
    if dice.happens(0.4):
        lengths = [dice.randrange(nodes + 1) for _ in range(batch)]
    for b in range(batch):
        tree = parents[b % len(parents)].tolist()
        for node in range(1, lengths[b] + 1):
            proposer = int(proposers[b % len(proposers), node - 1])
            row = min(max(tree[node], 0), nodes - 1)
            ranked = best[proposer if 0 <= proposer < len(best) else 0][b, row]
            place = siblings_before(tree, node) if dice.happens(0.8) else dice.randrange(8)
            tokens[b, node - 1] = ranked[place % len(ranked)]
            if dice.happens(0.05):
                tokens[b, node - 1] = dice.choice(
                    [-1, -1, -2, vocab_size, dice.randrange(vocab_size)]
                )
    return tokens


def tree_call(seed: int, sizes: tuple[int, ...], rules: Sequence[str]) -> Call:
    """A call of `verify` on trees under one of these rules."""
    dice = Dice(seed)
    vocab_size, batch = dice.choice(sizes), dice.choice([1, 1, 2, 3])
    nodes, members = dice.choice(NODES), dice.choice([1, 2, 2, 3, 4])
    bonus = dice.happens(0.8)
    rows = nodes + 1 if bonus else nodes
    logits = [dice.logits(batch, rows, vocab_size) for _ in range(members)]
    law = dice.law(batch, rows, members, vocab_size)
    chosen = dice.acceptance(sorted(set(rules) - CHAINS_ONLY), vocab_size)
    divergence = any(each.name == "threshold" for each in chosen.rule.parameters)
    # A proposer that is the target, or nearly so; its divergence would be rounding.
    if not divergence and dice.happens(0.3):
        logits[-1] = logits[0] + dice.choice([0.0, 0.0, 1e-3])
    draws = "with" if chosen.rule.independent else dice.choice(["with", "without"])
    parents = random_parents(dice, dice.choice([1, batch]), nodes)
    options: dict[str, Any] = {
        "parents": parents,
        "acceptance": chosen,
        "bonus": bonus,
        "draws": draws,
    }
    if chosen.rule.remembers and dice.happens(0.5):
        options["memory"] = dice.uniform_tensor(batch) * 3
    shape = (dice.choice([1, batch]), nodes)
    kind = dice.choice(["member", "members", "members", "logits", "all", "points"])
    proposers = torch.full(shape, dice.randrange(members) if kind == "member" else -1)
    sources = [each[..., :vocab_size] for each in logits]
    if kind == "members":
        proposers = torch.randint(-1, members, shape, generator=dice.generator)
        if dice.happens(0.1):
            proposers = torch.randint(-2, members + 1, shape, generator=dice.generator)
    if kind in ("logits", "all"):
        options["draft_logits"] = dice.logits(batch, nodes + 1, vocab_size)
        temperatures = [None, torch.tensor(0.8), dice.uniform_tensor(batch)]
        options["draft_temperature"] = dice.choice(temperatures)
        drafts = options["draft_logits"][..., :vocab_size]
        sources = [*sources, drafts] if kind == "all" else [drafts]
    if kind == "all":
        proposers = torch.randint(-1, members + 1, shape, generator=dice.generator)
    if kind in ("member", "members", "all"):
        options["proposers"] = proposers.to(dice.choice([torch.int32, torch.int64]))
    if dice.happens(0.3) and not is_filtered(law):
        tell(dice, options, logits, law, vocab_size)
    tokens = drafted(dice, sources, proposers, parents).to(dice.choice([torch.int32, torch.int64]))
    numbers = dice.numbers(batch, nodes + 1, 4)
    if dice.happens(0.5):  # late siblings are reached
        numbers[..., 0] = (1 - numbers[..., 0] ** 2).clamp(max=1 - 2.0**-24)
    name = f"tree, seed {seed}: {law}, {chosen}, {draws} replacement, {kind}, {nodes} nodes"
    return Call("verify", (logits, tokens, numbers, law), options, name)


def tell(
    dice: Dice, options: dict[str, Any], logits: list[Tensor], law: Any, vocab_size: int
) -> None:
    """Add the log-sum-exps that are known."""
    batch = len(logits[0])
    temperature = torch.as_tensor(law.temperature).expand(batch, len(logits))
    if law.ensemble == "mixture" and law.scope == "member":
        rows = [dice.known(one, temperature[:, m], vocab_size) for m, one in enumerate(logits)]
        options["lse"] = torch.stack(rows, -1)
    if "draft_logits" in options:
        own = options["draft_temperature"]
        own = temperature[:, 0] if own is None else own
        lost = dice.choice([0.0, 0.0, 0.3])  # of the draft's mass
        options["draft_lse"] = lost + dice.known(options["draft_logits"], own, vocab_size)


def chained(one: Call) -> Call:
    """The same call on the chain of its nodes, said as a tree of width 1."""
    nodes = one.arguments[1].shape[1]
    return one._replace(options={**one.options, "parents": torch.arange(-1, nodes)})


def without_parents(one: Call) -> Call:
    return one._replace(options={k: v for k, v in one.options.items() if k != "parents"})
