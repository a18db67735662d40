# SPDX-License-Identifier: Apache-2.0
"""SGLang's functions: its documented walk in plain Python, laws by enumeration, and its plug-ins.

Probabilities are multiples of 1/16 where coins may meet them, so that every sum is exact.
"""

import itertools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trees import random_parents

from specens.engines import sglang
from specens_kernels import Refusal, layouts


class Call:
    """Arguments of one call, and the results that were written."""

    def __init__(self, parents: Tensor, tokens: Tensor, probs: Tensor, steps: int) -> None:
        batch, nodes = tokens.shape
        links = layouts.links(parents.expand(batch, -1) if parents.dim() == 2 else parents)
        self.given: dict[str, Any] = {
            "predicts": torch.full((batch * nodes,), -7, dtype=torch.int32),
            "accept_index": torch.full((batch, steps), -1, dtype=torch.int32),
            "accept_token_num": torch.full((batch,), -7, dtype=torch.int32),
            "candidates": tokens,
            "retrive_index": torch.arange(batch * nodes).view(batch, nodes),
            "retrive_next_token": links.next_token.expand(batch, -1),
            "retrive_next_sibling": links.next_sibling.expand(batch, -1),
        }
        self.sampled: dict[str, Any] = {
            "uniform_samples": torch.rand(batch, nodes),
            "uniform_samples_for_final_sampling": torch.rand(batch),
            "target_probs": probs,
            "draft_probs": torch.zeros_like(probs),
        }

    def sample(self, **options: float) -> None:
        arguments = self.given | self.sampled | options
        assert sglang.tree_speculative_sampling_target_only(**arguments) is None

    def greedy(self, target_predict: Tensor) -> None:
        assert sglang.verify_tree_greedy(**self.given, target_predict=target_predict) is None

    def texts(self) -> list[list[int]]:
        """The tokens that SGLang reads out of the results."""
        predicts, index = self.given["predicts"], self.given["accept_index"]
        count = self.given["accept_token_num"].tolist()
        return [predicts[row[: n + 1].long()].tolist() for row, n in zip(index, count, strict=True)]


def by_hand(call: Call, b: int, single: float, acc: float) -> tuple[list[int], list[int], Tensor]:
    """SGLang's documented walk of one request: tokens, accepted nodes, draft_probs."""
    given, sampled = call.given, call.sampled
    steps = given["accept_index"].shape[1]
    probs, drafts = (
        sampled["target_probs"][b].double(),
        torch.zeros_like(sampled["target_probs"][b]),
    )
    node, path, tokens = 0, [0], []
    while len(path) < steps:
        coin, total = float(sampled["uniform_samples"][b, node]), 0.0
        child = int(given["retrive_next_token"][b, node])
        while child != -1:
            token = int(given["candidates"][b, child])
            total += float(probs[node, token])
            if coin <= total / max(acc, 1e-9) or probs[node, token] >= single:
                break
            drafts[node, token] = probs[node, token]
            child = int(given["retrive_next_sibling"][b, child])
        if child == -1:
            break
        node = child
        path.append(child)
        tokens.append(token)
    left = probs[node] - (0 if len(path) == steps else drafts[node].double())
    left = left.clamp(min=0)
    threshold = float(sampled["uniform_samples_for_final_sampling"][b]) * float(left.sum())
    running, drawn = 0.0, None
    for token, mass in enumerate(left.tolist()):
        running += mass
        if running > threshold:
            drawn = token
            break
    if drawn is None:
        drawn = max((t for t, mass in enumerate(left.tolist()) if mass > 0), default=len(left) - 1)
    return [*tokens, drawn], path, drafts


@pytest.mark.parametrize(("single", "acc"), [(1.0, 1.0), (0.4, 1.0), (1.0, 0.5), (0.3, 0.0)])
@pytest.mark.parametrize(("nodes", "vocab_size"), [(1, 11), (2, 11), (7, 11), (24, 11), (7, 2500)])
def test_the_walk_is_the_documented_one(
    nodes: int, vocab_size: int, single: float, acc: float
) -> None:
    torch.manual_seed(nodes)
    parents = random_parents(nodes, batch=40)
    probs = torch.randn(40, nodes, vocab_size).mul(3).softmax(-1)
    tokens = torch.randint(11, (40, nodes))
    call = Call(parents, tokens, probs, steps=min(nodes, 4))
    call.sample(threshold_single=single, threshold_acc=acc)
    for b, text in enumerate(call.texts()):
        wanted, path, drafts = by_hand(call, b, single, acc)
        assert text == wanted
        rows = [b * nodes + node for node in path]
        padded = rows + [-1] * (call.given["accept_index"].shape[1] - len(rows))
        assert call.given["accept_index"][b].tolist() == padded
        assert torch.equal(call.sampled["draft_probs"][b], drafts)
        # What SGLang leaves alone is left alone.
        others = [row for row in range(b * nodes, b * nodes + nodes) if row not in rows]
        assert call.given["predicts"][others].tolist() == [-7] * len(others)


# Every row is a permutation of (8, 4, 2, 2) / 16; the children are a node's likeliest tokens.
ROWS = torch.tensor([[8, 4, 2, 2], [2, 8, 2, 4], [4, 2, 8, 2], [2, 2, 4, 8], [8, 2, 2, 4]]) / 16
PARENTS = torch.tensor([-1, 0, 0, 1, 2])
TOKENS = torch.tensor([[3, 0, 1, 1, 2]])


def enumerated(**options: float) -> tuple[dict[tuple[int, ...], float], int]:
    """The joint law of the first two tokens, over all coins; and how many texts were shorter."""
    coins = (torch.arange(16) + 0.5) / 16
    final = (torch.arange(8) + 0.5) / 8
    grid = list(itertools.product(coins.tolist(), coins.tolist(), final.tolist()))
    call = Call(PARENTS, TOKENS.repeat(len(grid), 1), ROWS.repeat(len(grid), 1, 1), steps=3)
    root, child, last = torch.tensor(grid).T
    call.sampled["uniform_samples"][:] = child[:, None]
    call.sampled["uniform_samples"][:, 0] = root
    call.sampled["uniform_samples_for_final_sampling"] = last
    call.sample(**options)
    law: dict[tuple[int, ...], float] = {}
    for text in call.texts():
        law[tuple(text[:2])] = law.get(tuple(text[:2]), 0) + 1 / len(grid)
    return law, len(grid)


def of_first(law: dict[tuple[int, ...], float], token: int) -> float:
    return sum(mass for text, mass in law.items() if text[0] == token)


def test_the_emitted_law_is_the_targets() -> None:
    law, _ = enumerated()
    assert [of_first(law, token) for token in range(4)] == ROWS[0].tolist()
    # After token 0 or 1, an accepted child, comes a token of the child's own row.
    for token, node in ((0, 1), (1, 2)):
        rest = [law.get((token, after), 0) / of_first(law, token) for after in range(4)]
        assert rest == ROWS[node].tolist()


@pytest.mark.parametrize("options", [{"threshold_acc": 0.5}, {"threshold_single": 0.5}])
def test_thresholds_below_one_bend_the_law(options: dict[str, float]) -> None:
    law, _ = enumerated(**options)
    assert [of_first(law, token) for token in range(4)] != ROWS[0].tolist()


def chain_call(row: list[float], token: int, coin: float, final: float) -> Call:
    probs = torch.tensor([row, row]).repeat(1, 1, 1)
    call = Call(torch.tensor([-1, 0]), torch.tensor([[0, token]]), probs, steps=2)
    call.sampled["uniform_samples"].fill_(coin)
    call.sampled["uniform_samples_for_final_sampling"].fill_(final)
    call.sample()
    return call


def test_a_coin_that_meets_the_chance_accepts() -> None:
    assert chain_call([0.5, 0.25, 0.25], 1, 0.25, 0.0).texts() == [[1, 0]]
    above = float(torch.nextafter(torch.tensor(0.25), torch.tensor(1.0)))
    assert chain_call([0.5, 0.25, 0.25], 1, above, 0.9).texts() == [[2]]


def test_a_coin_of_zero_accepts_what_has_no_mass() -> None:
    assert chain_call([1.0, 0.0, 0.0], 1, 0.0, 0.5).texts() == [[1, 0]]


def test_where_no_sum_exceeds_the_coin_the_last_id_with_mass_is_drawn() -> None:
    assert chain_call([0.5, 0.5, 0.0], 2, 0.5, 1.0).texts() == [[1]]
    assert chain_call([0.0, 0.0, 0.0], 2, 0.5, 0.5).texts() == [[2]]
    # The same in several blocks of the running sum.
    for row, wanted in (([0.5, 0.5, *[0.0] * 3000], 1), ([0.0] * 3000, 2999)):
        assert chain_call(row, 2, 0.5, 1.0).texts() == [[wanted]]


def test_greedy_takes_the_first_child_that_is_predicted() -> None:
    torch.manual_seed(0)
    nodes, batch = 20, 60
    parents, tokens = random_parents(nodes, batch=batch), torch.randint(3, (batch, nodes))
    best = torch.randint(3, (batch, nodes))
    call = Call(parents, tokens, torch.zeros(batch, nodes, 3), steps=4)
    call.greedy(best)
    for b, text in enumerate(call.texts()):
        node, wanted = 0, []
        while len(wanted) < 3:
            children = [c for c in range(1, nodes) if parents[b, c] == node]
            kept = [c for c in children if tokens[b, c] == best[b, node]]
            if not kept:
                break
            node = kept[0]
            wanted.append(int(tokens[b, node]))
        assert text == [*wanted, int(best[b, node])]


def test_sglangs_own_example_of_greedy_verification() -> None:
    """Two requests of six nodes, as in SGLang's test of the kernel."""
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]])
    first = torch.tensor([[1, 2, -1, 4, 5, -1], [4, 2, 3, -1, 5, -1]])
    sibling = torch.tensor([[-1, 3, -1, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])
    best = torch.zeros(2, 6, dtype=torch.int64)
    best[0, [0, 3, 4, 5]] = torch.tensor([3, 4, 5, 18])
    best[1, [0, 4, 5]] = torch.tensor([11, 12, 18])
    call = Call(torch.tensor([-1, 0, 1, 2, 3, 4]), tokens, torch.zeros(2, 6, 3), steps=4)
    call.given |= {"retrive_next_token": first, "retrive_next_sibling": sibling}
    call.greedy(best)
    assert call.given["predicts"].tolist() == [3, -7, -7, 4, 5, 18, 11, -7, -7, -7, 12, 18]
    assert call.given["accept_index"].tolist() == [[0, 3, 4, 5], [6, 10, 11, -1]]
    assert call.given["accept_token_num"].tolist() == [3, 2]


WRONG: list[tuple[str, Any]] = [
    ("candidates", torch.zeros(1, 5, dtype=torch.int32)),
    ("predicts", torch.zeros(4, dtype=torch.int32)),
    ("predicts", torch.zeros(5, dtype=torch.int64)),
    ("accept_index", torch.zeros(1, 0, dtype=torch.int32)),
    ("accept_token_num", torch.zeros(2, dtype=torch.int32)),
    ("retrive_index", torch.zeros(1, 4, dtype=torch.int64)),
    ("retrive_next_sibling", [1]),
    ("uniform_samples", torch.zeros(1, 4)),
    ("uniform_samples_for_final_sampling", torch.zeros(1, 1)),
    ("target_probs", torch.zeros(1, 4, 4)),
    ("target_probs", torch.zeros(1, 5, 4).half()),
    ("draft_probs", torch.zeros(1, 5, 3)),
    ("draft_probs", torch.zeros(1, 4, 5).transpose(1, 2)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_what_does_not_fit_is_refused_by_name(name: str, value: Any) -> None:
    call = Call(PARENTS, TOKENS, ROWS[None], steps=3)
    with pytest.raises(Refusal, match=f"tree_speculative_sampling_target_only: {name}: expected"):
        call.sample(**{name: value})


def test_links_that_make_no_tree_are_refused() -> None:
    call = Call(PARENTS, TOKENS, ROWS[None], steps=3)
    call.given["retrive_next_token"] = torch.tensor([[1, 0, -1, -1, -1]])
    with pytest.raises(Refusal, match="next_token: expected a higher node"):
        call.sample()


class Registry:
    """SGLang's registry of hooks, as far as plug-ins see it."""

    def __init__(self) -> None:
        self.hooks: dict[str, Any] = {}

    def register(self, target: str, hook: Any, hook_type: str) -> None:
        assert hook_type == "replace"
        module, _, name = target.rpartition(".")
        # It would replace all that is None, in every module.
        assert getattr(sys.modules[module], name) is not None
        self.hooks[target] = hook


KERNELS, USER = "sglang.kernels.ops", "sglang.srt.speculative.eagle_utils"
SAMPLES = "tree_speculative_sampling_target_only"
RENORMALISE = ("top_k_renorm_prob", "top_p_renorm_prob")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The modules of SGLang 0.5.23 on a CPU, as far as the plug-in sees them."""
    monkeypatch.setenv("SGLANG_PLUGINS", "other, specens")
    names = {
        f"{KERNELS}.speculative.tree": {"verify_tree_greedy": print},
        f"{KERNELS}.speculative.verify_sampling": {SAMPLES: None},
        f"{KERNELS}.sampling.renorm": dict.fromkeys(RENORMALISE),
        USER: {"_verify_uses_greedy": any, **dict.fromkeys((SAMPLES, *RENORMALISE))},
    }
    hooks = Registry()
    modules = {name: SimpleNamespace(**held) for name, held in names.items()}
    modules["sglang.srt.plugins.hook_registry"] = SimpleNamespace(
        HookRegistry=hooks, HookType=SimpleNamespace(REPLACE="replace")
    )
    for name, module in modules.items():
        for parent in itertools.accumulate(name.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    return hooks


def test_without_cuda_the_gaps_are_filled_and_the_choice_is_replaced(registry: Registry) -> None:
    sglang.plug_in()
    uses_greedy = registry.hooks.pop(f"{USER}._verify_uses_greedy")
    assert registry.hooks == {
        f"{KERNELS}.speculative.tree.verify_tree_greedy": sglang.verify_tree_greedy
    }
    here = {"is_cpu": True, "is_hip": False, "is_xpu": False}
    assert not uses_greedy(is_all_greedy=False, use_rejection_sampling=False, **here)
    assert uses_greedy(is_all_greedy=True, use_rejection_sampling=False, **here)
    assert uses_greedy(is_all_greedy=False, use_rejection_sampling=True, **here)
    samples = sglang.tree_speculative_sampling_target_only
    for module in (f"{KERNELS}.speculative.verify_sampling", USER):
        assert getattr(sys.modules[module], SAMPLES) is samples
    for module in (f"{KERNELS}.sampling.renorm", USER):
        for name in RENORMALISE:
            law = getattr(sys.modules[module], name)(torch.tensor([[0.5, 0.25, 0.25]]), 0)
            assert law.tolist() == [[1, 0, 0]]


def test_on_cuda_the_two_functions_are_replaced(registry: Registry) -> None:
    user, renorm = sys.modules[USER], sys.modules[f"{KERNELS}.sampling.renorm"]
    for module in (user, sys.modules[f"{KERNELS}.speculative.verify_sampling"]):
        setattr(module, SAMPLES, max)
    for name in RENORMALISE:
        setattr(user, name, min)
        setattr(renorm, name, min)
    sglang.plug_in()
    assert registry.hooks == {
        f"{KERNELS}.speculative.tree.verify_tree_greedy": sglang.verify_tree_greedy,
        f"{KERNELS}.speculative.verify_sampling.{SAMPLES}": getattr(sglang, SAMPLES),
    }
    assert {getattr(module, name) for module in (user, renorm) for name in RENORMALISE} == {min}


@pytest.mark.parametrize("plugins", [None, "", "other"])
def test_the_plug_in_does_nothing_where_it_is_not_asked_for(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, plugins: str | None
) -> None:
    monkeypatch.delenv("SGLANG_PLUGINS")
    if plugins is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    sglang.plug_in()
    assert registry.hooks == {}
    assert getattr(sys.modules[USER], SAMPLES) is None


def test_an_unknown_sglang_stays_as_it_is_and_the_log_says_so(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(sys.modules[USER], "_verify_uses_greedy")
    sglang.plug_in()
    assert registry.hooks == {}
    assert getattr(sys.modules[USER], SAMPLES) is None
    assert f"without {USER}._verify_uses_greedy, stays as it is" in caplog.text


def test_the_entry_point_names_the_plug_in() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    group = project.partition('[project.entry-points."sglang.srt.plugins"]\n')[2]
    assert group.splitlines()[0] == 'specens = "specens.engines.sglang:plug_in"'
