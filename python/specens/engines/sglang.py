# SPDX-License-Identifier: Apache-2.0
"""SGLang's two functions that verify draft trees, for any device, and a plug-in for SGLang.

Names, arguments, layouts, coins and what is written in place are SGLang's: the same coins give the
same tokens, but that sums are kept in float64. All is tensor code without a look at the host, but
for the check of links, which a CPU makes. What SGLang calls by these names on CUDA alone runs
anywhere. To stand in for another of its functions, write it here and name its places in `PLACES`.
"""

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from specens.engines import flashinfer
from specens_kernels import Refusal, layouts
from specens_kernels.storage import wrong

_logger = logging.getLogger("specens")

# Tokens of a running sum's first step.
_BLOCK = 1024
# What SGLang's kernel takes for a threshold that is smaller.
_LEAST_THRESHOLD = 1e-9
_INT64 = ("candidates", "retrive_index", "retrive_next_token", "retrive_next_sibling")
_INT32 = ("predicts", "accept_index", "accept_token_num")

# Where SGLang 0.5.23 keeps each function; None stands there for a device that has none.
PLACES = {
    "verify_tree_greedy": "sglang.kernels.ops.speculative.tree",
    "tree_speculative_sampling_target_only": "sglang.kernels.ops.speculative.verify_sampling",
    "top_k_renorm_prob": "sglang.kernels.ops.sampling.renorm",
    "top_p_renorm_prob": "sglang.kernels.ops.sampling.renorm",
}
# What calls them, and chooses between greedy and sampled by the device.
_USER, _CHOICE = "sglang.srt.speculative.eagle_utils", "_verify_uses_greedy"


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Walk draft trees by their target's law, and draw one token more, as SGLang does.

    From the root down: the children of a node share one coin, the node's own. A child is accepted
    iff `coin <= p / threshold_acc`, p the sum of its probability and its earlier siblings', or its
    own is at least `threshold_single`. After the last node the token is drawn from what is left of
    its row, less the rejected children: the first id whose running sum exceeds the final coin times
    the whole; if there is none, the last id with mass, else V - 1. With thresholds of 1 the text
    has the target's law, however the drafts were chosen, if siblings differ and no coin is 0.

    Unlike `specens_kernels.verify`: a coin is shared by siblings and is its parent's; `<=` takes a
    draft without mass if the coin is 0; duplicate siblings count twice; one number draws, and in
    the order of ids. At the deepest level nothing is subtracted.

    Args:
        predicts: (rows,) int32, written. At the row of each accepted node, the token after it.
        accept_index: (B, S) int32, written up to the last accepted node. Their rows, from the root.
            S - 1 drafts are accepted at most.
        accept_token_num: (B,) int32, written. Drafts accepted, neither root nor last token counted.
        candidates: (B, D) int64. Token of each node; node 0 is the root.
        retrive_index: (B, D) int64. Row of each node in `predicts`.
        retrive_next_token: (B, D) int64. First child of each node, a higher node, or -1.
        retrive_next_sibling: (B, D) int64. The next child of its parent, a higher node, or -1.
        uniform_samples: (B, D) float32 in [0, 1). A node's coin, which its children share.
        uniform_samples_for_final_sampling: (B,) float32 in [0, 1). Draws the last token.
        target_probs: (B, D, V) float32. The law after each node, filters applied.
        draft_probs: (B, D, V) float32, written: zeros, which get the target's probability of
            rejected children.
        threshold_single: a child whose probability is at least this is accepted.
        threshold_acc: below 1, more is accepted than the target's law allows.
        deterministic: not looked at; results never depend on timing.
    Raises:
        Refusal: a shape, a dtype or a device disagrees; on a CPU, links that make no tree.

    Source: SGLang's TreeSpeculativeSamplingTargetOnly.
    """
    op = "tree_speculative_sampling_target_only"
    _check_tree(op, locals())
    batch, nodes = candidates.shape
    _check(op, "target_probs", target_probs, (batch, nodes, -1), torch.float32, candidates.device)
    shape, device = tuple(target_probs.shape), candidates.device
    _check(op, "draft_probs", draft_probs, shape, torch.float32, device)
    if not draft_probs.is_contiguous():
        raise wrong(op, "draft_probs", "a contiguous tensor", draft_probs)
    _check(op, "uniform_samples", uniform_samples, (batch, nodes), torch.float32, device)
    final = uniform_samples_for_final_sampling
    _check(op, "uniform_samples_for_final_sampling", final, (batch,), torch.float32, device)

    parents = layouts.parents_of_links(retrive_next_token, retrive_next_sibling)
    above = parents.clamp(min=0)
    # Where in a request's (D, V) probabilities a child's own stands.
    places = above * shape[2] + candidates
    chances = target_probs.reshape(batch, -1).gather(1, places).double()
    ids = torch.arange(nodes, device=device)
    siblings = (parents[:, :, None] == parents[:, None, :]) & (ids <= ids[:, None])
    sums = torch.where(siblings, chances[:, None, :], 0.0).sum(-1)
    coins = uniform_samples.gather(1, above).double()
    accepted = coins <= sums / max(threshold_acc, _LEAST_THRESHOLD)
    accepted |= chances >= threshold_single
    walk = _walk(parents, accepted, accept_index.shape[1])

    # What was rejected is noted, as SGLang notes it. A maximum leaves the rest as it is.
    rejected = torch.where(walk.rejected, chances, -torch.inf).float()
    draft_probs.view(batch, -1).scatter_reduce_(1, places, rejected, "amax")
    tokens = _drawn(target_probs, draft_probs, walk, final)
    _write(predicts, accept_index, accept_token_num, candidates, retrive_index, walk, tokens)


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Walk draft trees along the target's most probable tokens, as SGLang does.

    Args:
        predicts: as for `tree_speculative_sampling_target_only`, like all but the last.
        accept_index: (B, S) int32, written.
        accept_token_num: (B,) int32, written.
        candidates: (B, D) int64.
        retrive_index: (B, D) int64.
        retrive_next_token: (B, D) int64.
        retrive_next_sibling: (B, D) int64.
        target_predict: (B, D) int64. The most probable token after each node; read as one list, at
            the rows that `retrive_index` says.
    Raises:
        Refusal: a shape, a dtype or a device disagrees; on a CPU, links that make no tree.

    Source: SGLang's VerifyTreeGreedy.
    """
    op = "verify_tree_greedy"
    _check_tree(op, locals())
    shape, device = tuple(candidates.shape), candidates.device
    _check(op, "target_predict", target_predict, shape, torch.int64, device)
    parents = layouts.parents_of_links(retrive_next_token, retrive_next_sibling)
    best = target_predict.flatten()[retrive_index]
    accepted = candidates == best.gather(1, parents.clamp(min=0))
    walk = _walk(parents, accepted, accept_index.shape[1])
    tokens = best.gather(1, walk.last[:, None])[:, 0]
    _write(predicts, accept_index, accept_token_num, candidates, retrive_index, walk, tokens)


class _Walk(NamedTuple):
    """How trees were walked.

    path: (B, S) int64. Accepted nodes from the root down; the last one is repeated.
    num_accepted: (B,) int64. How many, the root not counted.
    last: (B,) int64. The last of them.
    full: (B,) bool. Whether S - 1 were accepted, so that children of the last were not tried.
    rejected: (B, D) bool. Nodes that were tried in vain.
    """

    path: Tensor
    num_accepted: Tensor
    last: Tensor
    full: Tensor
    rejected: Tensor


def _walk(parents: Tensor, accepted: Tensor, steps: int) -> _Walk:
    """The walk from the root to the first accepted child, and on; at most steps - 1 of them."""
    batch, nodes = parents.shape
    ids = torch.arange(nodes, device=parents.device).expand(batch, -1)
    # One column more takes what has no parent, or was not accepted.
    taker = torch.where(accepted & (parents >= 0), parents, nodes)
    first = parents.new_full((batch, nodes + 1), nodes).scatter_reduce(1, taker, ids, "amin")
    first[:, nodes] = nodes
    at = parents.new_zeros((batch, 1))
    path, tries = [at], parents.new_zeros((batch, nodes + 1), dtype=torch.bool)
    for _ in range(steps - 1):
        tries.scatter_(1, path[-1], True)
        path.append(first.gather(1, path[-1]))
    line = torch.cat(path, 1)
    count = (line < nodes).sum(1) - 1
    last = line.gather(1, count[:, None])
    tried = tries.gather(1, torch.where(parents >= 0, parents, nodes)) & (parents >= 0)
    rejected = tried & (ids < first.gather(1, parents.clamp(min=0)))
    path_of_nodes = torch.where(line < nodes, line, last)
    return _Walk(path_of_nodes, count, last[:, 0], count == steps - 1, rejected)


def _drawn(target_probs: Tensor, draft_probs: Tensor, walk: _Walk, coins: Tensor) -> Tensor:
    """(B,) int64. A token of what is left of the last node's row."""
    batch, nodes, vocab_size = target_probs.shape
    rows = torch.arange(batch, device=coins.device) * nodes + walk.last
    left = target_probs.reshape(-1, vocab_size).index_select(0, rows)
    less = draft_probs.view(-1, vocab_size).index_select(0, rows)
    left.sub_(less.masked_fill_(walk.full[:, None], 0)).clamp_(min=0)
    # The running sum of one row, in two steps: of blocks, and within the block that is met.
    blocks = pad(left, (0, -vocab_size % _BLOCK)).view(batch, -1, _BLOCK)
    heights = blocks.sum(-1, dtype=torch.float64)
    sums = heights.cumsum(1)
    threshold = coins[:, None].double() * sums[:, -1:]
    block = torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
    before = pad(sums, (1, 0)).gather(1, block)
    own = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0]
    within = torch.searchsorted(own.cumsum(1, dtype=torch.float64) + before, threshold, right=True)
    # Within the block, sums are rounded in another order: what has no mass is not drawn for that.
    within = torch.minimum(within, _last_with_mass(own).clamp(min=0)[:, None])
    token = (block * _BLOCK + within)[:, 0]
    fallback = _fallback(heights, blocks, vocab_size)
    return torch.where((threshold < sums[:, -1:])[:, 0], token, fallback)


def _fallback(heights: Tensor, blocks: Tensor, vocab_size: int) -> Tensor:
    """(B,) int64. The last id with mass, or else the last id."""
    block = _last_with_mass(heights)
    place = block.clamp(min=0)[:, None, None].expand(-1, -1, _BLOCK)
    within = _last_with_mass(blocks.gather(1, place)[:, 0])
    return torch.where(block >= 0, block * _BLOCK + within, vocab_size - 1)


def _last_with_mass(masses: Tensor) -> Tensor:
    """(B,) int64. The last column with mass; -1 if none has any."""
    columns = torch.arange(masses.shape[1], device=masses.device)
    return torch.where(masses > 0, columns, -1).amax(1)


def _write(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    walk: _Walk,
    tokens: Tensor,
) -> None:
    """The results, into the caller's tensors."""
    steps = torch.arange(accept_index.shape[1], device=candidates.device)
    rows = retrive_index.gather(1, walk.path)
    accept_index.copy_(torch.where(steps <= walk.num_accepted[:, None], rows, accept_index))
    accept_token_num.copy_(walk.num_accepted)
    # After each accepted node comes the next one's token; from the last on, the drawn token.
    after = torch.cat((candidates.gather(1, walk.path)[:, 1:], tokens[:, None]), 1)
    after = torch.where(steps < walk.num_accepted[:, None], after, tokens[:, None])
    predicts.scatter_(0, rows.flatten(), after.to(torch.int32).flatten())


def _check_tree(op: str, given: dict[str, Any]) -> None:
    """What both functions take."""
    for name in (*_INT32, *_INT64):
        if not isinstance(given[name], Tensor):
            raise Refusal(op, name, "a tensor", type(given[name]).__name__)
    candidates = given["candidates"]
    if candidates.dim() != 2 or 0 in candidates.shape:
        raise wrong(op, "candidates", "(B, D) int64", candidates)
    batch, nodes = candidates.shape
    device = candidates.device
    shapes = {"predicts": (-1,), "accept_index": (batch, -1), "accept_token_num": (batch,)}
    for name, shape in shapes.items():
        _check(op, name, given[name], shape, torch.int32, device)
    for name in _INT64:
        _check(op, name, given[name], (batch, nodes), torch.int64, device)
    if given["accept_index"].shape[1] < 1:
        raise wrong(op, "accept_index", f"(B={batch}, S >= 1) int32", given["accept_index"])
    if len(given["predicts"]) < batch * nodes:
        raise wrong(op, "predicts", f"(B * D = {batch * nodes},) int32", given["predicts"])


def _check(
    op: str,
    name: str,
    given: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse another shape (-1 is any size), dtype or device."""
    if not isinstance(given, Tensor):
        raise Refusal(op, name, "a tensor", type(given).__name__)
    alike = len(given.shape) == len(shape) and all(
        wanted in (-1, size) for wanted, size in zip(shape, given.shape, strict=True)
    )
    if not alike or given.dtype != dtype or given.device != device:
        sizes = ", ".join("any" if size < 0 else str(size) for size in shape)
        kind = str(dtype).removeprefix("torch.")
        raise wrong(op, name, f"({sizes}{',' * (len(shape) == 1)}) {kind} on {device}", given)


def plug_in() -> None:
    """Hand the functions to SGLang, if the environment's SGLANG_PLUGINS names "specens".

    The entry point of SGLang's group `sglang.srt.plugins`. SGLang runs every plug-in that is
    installed where that variable is not set; this one then does nothing. Where SGLang has no
    function that samples (a CPU, XPU, ROCm), EAGLE's trees are verified greedily whatever the
    temperature: there the gaps are filled and the choice is replaced, so that requests that sample
    are sampled. In an SGLang that lacks one of the names nothing is touched, and the log says so.
    """
    asked = os.environ.get("SGLANG_PLUGINS", "").split(",")
    if "specens" not in (name.strip() for name in asked):
        return
    wanted = [*((place, name) for name, place in PLACES.items()), (_USER, _CHOICE)]
    missing = [f"{place}.{name}" for place, name in wanted if not _has(place, name)]
    if missing:
        _logger.warning("specens: an unknown SGLang, without %s, stays as it is", missing[0])
        return
    ours: dict[str, Callable[..., Any]] = {
        "verify_tree_greedy": verify_tree_greedy,
        "tree_speculative_sampling_target_only": tree_speculative_sampling_target_only,
        "top_k_renorm_prob": flashinfer.top_k_renorm_probs,
        "top_p_renorm_prob": flashinfer.top_p_renorm_probs,
    }
    gaps = [name for name, place in PLACES.items() if getattr(_module(place), name) is None]
    # Not by SGLang's registry, which replaces whatever is the same object anywhere: None, too.
    for name in gaps:
        setattr(_module(PLACES[name]), name, ours[name])
        setattr(_module(_USER), name, ours[name])
    hooks = _module("sglang.srt.plugins.hook_registry")
    samples = "tree_speculative_sampling_target_only"
    replaced = {f"{PLACES[name]}.{name}": ours[name] for name in ("verify_tree_greedy", samples)}
    if samples in gaps:
        del replaced[f"{PLACES[samples]}.{samples}"]
        replaced[f"{_USER}.{_CHOICE}"] = _uses_greedy
    for target, function in replaced.items():
        hooks.HookRegistry.register(target, function, hooks.HookType.REPLACE)


def _uses_greedy(
    *, is_all_greedy: bool, is_cpu: bool, is_hip: bool, is_xpu: bool, use_rejection_sampling: bool
) -> bool:
    """Whether no request samples, or a function would that a CPU and XPU do not have."""
    return is_all_greedy or ((is_cpu or is_xpu) and use_rejection_sampling)


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _has(module: str, name: str) -> bool:
    try:
        return hasattr(_module(module), name)
    except ImportError:
        return False
