# SPDX-License-Identifier: Apache-2.0
"""`attend` is a write and `attention`: in rows, in pages, in graphs; a refusal writes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface
from trees import Problem, check, paged, problem
from zoo import build

from specens_kernels import Refusal, attend, tree


def new_states(one: Problem) -> tuple[Tensor, Tensor]:
    """Keys and values of the nodes, as models have them: transposed views."""
    nodes = one.query.shape[2]
    slots = one.lengths[:, None] + torch.arange(nodes)
    rows = torch.arange(len(slots))[:, None]
    keys, values = (cache.transpose(1, 2)[rows, slots] for cache in (one.keys, one.values))
    return keys.transpose(1, 2), values.transpose(1, 2)


class Written(Problem):
    """The same problem, of a cache that the nodes have yet to be written to."""

    def run(self) -> tuple[Tensor, Tensor]:
        options = dict(self.options)
        states = options.pop("states")
        arguments = (self.query, *states, self.keys, self.values, self.lengths, self.visible)
        return attend(*arguments, **options)


def unwritten(one: Problem, page: int = 0) -> Written:
    states = new_states(one)
    nodes = one.query.shape[2]
    before = one
    for cache in (before.keys, before.values):
        for row, length in zip(cache, before.lengths.tolist(), strict=True):
            row[:, length : length + nodes] = float("nan")
    if page:
        before = paged(before, page)
    return Written(*before._replace(options={**before.options, "states": states}))


CASES: dict[str, dict[str, Any]] = {
    "a chain of one": {"nodes": 1, "lengths": (7, 0, 64), "batch": 3},
    "trees": {"nodes": 6, "lengths": (30, 64, 0), "batch": 3, "room": 5},
    "half": {"nodes": 3, "lengths": (40,), "dtype": torch.bfloat16},
    "another size of values": {"nodes": 4, "lengths": (9, 20), "batch": 2, "sizes": (32, 16)},
    "window": {"nodes": 5, "lengths": (30, 2), "batch": 2, "window": 4},
    "softcap": {"nodes": 5, "lengths": (30,), "softcap": 3.0, "scale": 0.3},
}


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_written_is_attended_to(backend: str, case: dict[str, Any], page: int) -> None:
    torch.manual_seed(0)
    one = problem(**case)
    whole = one._replace(keys=one.keys.clone(), values=one.values.clone())
    written = unwritten(one, page)
    before = written.keys.clone(), written.values.clone()
    check(whole, written)
    nodes = one.query.shape[2]
    for cache, old, right in zip(
        (written.keys, written.values), before, (whole.keys, whole.values), strict=True
    ):
        # The nodes' slots, and no others.
        assert int((cache.isnan() != old.isnan()).sum()) == old.shape[1] * old.shape[3] * nodes * (
            len(one.lengths)
        )
        if not page:
            assert torch.equal(cache.nan_to_num(), right.nan_to_num())


def test_a_refusal_writes_nothing(backend: str) -> None:
    one = problem(nodes=3, lengths=(10,))
    keys, values = new_states(one)
    before = one.keys.clone()
    words = tree.visible(tree.chain(2))
    wrong = [
        ((keys[:, :, :2], values), one.lengths, r"^attend: new_keys: expected \(1, 2, 3, 64\) fl"),
        ((keys, values.double()), one.lengths, r"^attend: new_values: expected .*, got .* float64"),
        ((keys, values), one.lengths + 1, r"^attention: lengths: expected 0 to S - N - 1 = 10"),
        ((keys, values), one.lengths.int(), r"^attention: lengths: expected \(B=1,\) int64"),
    ]
    for states, lengths, message in wrong:
        with pytest.raises(Refusal, match=message):
            attend(one.query, *states, one.keys, one.values, lengths, words)
    with pytest.raises(Refusal, match=r"^attend: window: expected an integer >= 0, got -1"):
        attend(one.query, keys, values, one.keys, one.values, one.lengths, words, window=-1)
    assert torch.equal(one.keys, before)


def test_opcheck(backend: str) -> None:
    one = problem(nodes=3, lengths=(10, 4), batch=2, window=4, sizes=(8, 8))
    arguments = (one.query, *new_states(one), one.keys, one.values, one.lengths, one.visible)
    for optional in (
        (None, None, None, 0.3, 0.0, 0),
        (one.options["depths"], torch.ones(4), None, 0.3, 1.0, 4),
    ):
        op = torch.ops.specens.attend.default
        op(*arguments, *optional)  # skips what a backend has not
        torch.library.opcheck(op, (*arguments, *optional))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_sliding", "gemma2"])
def test_a_model_with_one_op_a_layer_is_one_graph_for_all_lengths(name: str) -> None:
    """No cache object, no mask, no length on the host; rows of several lengths, turn by turn."""
    model = build(name)
    heads, size, rows, room = 2, 16, 2, 64
    caches = [torch.zeros(2, rows, heads, room, size) for _ in range(4)]

    def layer(
        module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **options: Any
    ) -> Any:
        window, cache = options.get("sliding_window") or 0, caches[module.layer_idx]
        parents = tree.chain(query.shape[2] - 1)
        out, _ = attend(
            *(query, key, value, cache[0], cache[1], options["lengths"]),
            tree.visible(parents, window),
            scale=options["scaling"],
            softcap=options.get("softcap") or 0.0,
            window=window,
            depths=tree.depths(parents),
        )
        return out, None

    AttentionInterface.register("one_op", layer)
    text = torch.randint(3, 100, (rows, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
    model.set_attn_implementation("one_op")
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=False)
    def step(tokens: Tensor, lengths: Tensor) -> Tensor:
        places = lengths[:, None] + torch.arange(tokens.shape[1])
        return model(tokens, position_ids=places, lengths=lengths, use_cache=False).logits

    torch.compiler.reset()
    lengths = torch.tensor([0, 0])
    with torch.no_grad():
        for advanced in ((5, 3), (5, 5), (1, 2), (4, 5), (5, 5)):
            places = lengths[:, None] + torch.arange(5)
            logits = step(text.gather(1, places), lengths)
            for row, count in enumerate(advanced):
                right = expected[row, places[row, :count]]
                assert torch.allclose(logits[row, :count], right, atol=2e-4 * right.std())
            lengths = lengths + torch.tensor(advanced)
    assert counter.frame_count == 1
