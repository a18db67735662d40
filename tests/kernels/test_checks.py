# SPDX-License-Identifier: Apache-2.0
"""What does not fit reaches no kernel, whoever calls, and is answered in one form.

Graphs and other callers of `torch.ops.specens` pass the public functions by; memory may be gone
though the shape is there; and Python hands over anything. tests/native/fuzz.py asks the same of
random calls under sanitizers. To add a wrong argument, add its line to a list.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from specens_kernels import (
    Acceptance,
    Ensemble,
    Law,
    Refusal,
    Status,
    Stream,
    arguments,
    divergence,
    mix,
    sample,
    uniforms,
    verify,
)
from specens_kernels.call import VerifyCall
from specens_kernels.dispatch import flattened
from specens_kernels.law import LawTensors

OPS = torch.ops.specens
B, N, V = 2, 2, 8


def floats(*shape: int) -> Tensor:
    return torch.rand(shape)


def law_tensors(**changes: Any) -> LawTensors:
    values = (floats(2).softmax(0), floats(1, 1) + 0.5, None, None, None)
    return LawTensors(*values, "probabilities", "", "member", 0.0, V)._replace(**changes)


def verify_call(**changes: Any) -> VerifyCall:
    logits = [floats(B, N + 1, V) for _ in range(2)]
    tokens = torch.randint(0, V, (B, N))
    call = VerifyCall(logits, tokens, floats(B, N + 1, 4), law_tensors())
    return call._replace(**changes)


def raw_mix(logits: list[Tensor] | None = None, **changes: Any) -> Any:
    logits = [floats(B, N + 1, V) for _ in range(2)] if logits is None else logits
    return OPS.mix(*flattened((logits, law_tensors(**changes))))


def raw_sample(numbers: Tensor | None = None, member: int = -1, **changes: Any) -> Any:
    logits = [floats(B, N + 1, V) for _ in range(2)]
    numbers = floats(B, N + 1, 4) if numbers is None else numbers
    return OPS.sample(*flattened((logits, numbers, law_tensors(**changes), member, None)))


def raw_verify(**changes: Any) -> Any:
    return OPS.verify(*flattened((verify_call(**changes),)))


SEEDS, POSITIONS = torch.tensor([1, 2]), torch.arange(3)[None]
ROWS, WIDE = floats(B, N + 1, V), floats(B, N + 1, 2 * V)
THREE = torch.ones(3)

# What a graph that was traced with other shapes, or a caller of the op, hands over.
RAW: list[tuple[Callable[[], Any], str]] = [
    (lambda: raw_mix([ROWS, ROWS[..., :-1]]), r"mix: logits\[1\]: expected .* V >= 8\) .*, got"),
    (lambda: raw_mix([ROWS, ROWS[:1]]), r"mix: logits\[1\]: expected .*, got \(1, 3, 8\)"),
    (lambda: raw_mix([ROWS, ROWS[:, :1]]), r"mix: logits\[1\]: expected .*, got \(2, 1, 8\)"),
    (lambda: raw_mix([ROWS, ROWS.int()]), r"mix: logits\[1\]: expected .*, got .* int32 on cpu"),
    (lambda: raw_mix([ROWS, ROWS[0]]), r"mix: logits\[1\]: expected .*, got \(3, 8\)"),
    (lambda: raw_mix([ROWS, WIDE[..., ::2]]), r"mix: logits\[1\]: expected contiguous rows, got"),
    (
        lambda: raw_mix([ROWS, ROWS[..., :1].expand(B, N + 1, V)]),
        r"mix: logits\[1\]: expected contiguous rows, got",
    ),
    (lambda: raw_mix([ROWS]), r"mix: weights: expected \(M=1,\), .*, got \(2,\)"),
    (lambda: raw_mix(weights=torch.ones(())), r"mix: weights: expected .*, got \(\)"),
    (lambda: raw_mix(weights=torch.ones(2).double()), "mix: weights: expected float32 on cpu, got"),
    (lambda: raw_mix(temperature=THREE), r"mix: temperature: expected .*, got \(3,\)"),
    (lambda: raw_mix(temperature=torch.ones(2, 3)), r"mix: temperature: expected .*, got \(2, 3\)"),
    (lambda: raw_mix(top_k=torch.ones(2, dtype=torch.int64)), "mix: top_k: expected int32 on cpu"),
    (lambda: raw_mix(top_p=THREE), r"mix: top_p: expected \(B=2,\), got \(3,\)"),
    (lambda: raw_mix(min_p=THREE.double()), "mix: min_p: expected float32 on cpu, got"),
    (lambda: raw_mix(vocab_size=0), "mix: vocab_size: expected a count >= 1, got 0"),
    (lambda: raw_mix(vocab_size=V + 1), r"mix: logits\[0\]: expected .* V >= 9\)"),
    (lambda: raw_mix(space="probs"), "mix: space: expected one of probabilities, logits, got 'pr"),
    (lambda: raw_mix(scope="row"), "mix: scope: expected one of member, ensemble, got 'row'"),
    (lambda: raw_mix(plausibility=0.5), "mix: plausibility: expected 0, or .*, got 0.5"),
    (lambda: raw_mix(plausibility=math.nan), "mix: plausibility: expected .*, got nan"),
    (lambda: raw_mix(fold="lost@1"), "ensemble: key: expected .*, got 'lost@1'"),
    (lambda: raw_sample(floats(B, N, 4)), r"sample: uniforms: expected \(B=2, 3, 4\) float32"),
    (lambda: raw_sample(floats(B, N + 1, 4).double()), "sample: uniforms: expected .*, got"),
    (lambda: raw_sample(member=2), "sample: member: expected None or 0 to 1, got 2"),
    (lambda: raw_sample(member=-2), "sample: member: expected None or 0 to 1, got -2"),
    (lambda: raw_verify(draft_tokens=floats(B, N)), "verify: draft_tokens: expected .* int64, got"),
    (lambda: raw_verify(draft_tokens=torch.zeros(B, 3).long()), r"verify: logits\[0\]: expected"),
    (lambda: raw_verify(bonus=False), r"verify: logits\[0\]: expected \(B=2, 2, V\) on cpu, got"),
    (lambda: raw_verify(uniforms=floats(1, N + 1, 4)), "verify: uniforms: expected .*, got"),
    (
        lambda: raw_verify(proposers=torch.zeros(1, 1).long()),
        r"verify: proposers: expected \(B=2 or 1, 2\) int32 or int64 on cpu, got",
    ),
    (lambda: raw_verify(parents=torch.zeros(3).long()), "verify: parents: expected .*, got"),
    (lambda: raw_verify(draft_logits=ROWS[..., 1:]), "verify: draft_logits: expected .*, got"),
    (
        lambda: raw_verify(draft_logits=WIDE[..., ::2]),
        "verify: draft_logits: expected contiguous rows, got",
    ),
    (
        lambda: raw_verify(draft_logits=ROWS, draft_temperature=torch.ones(2).double()),
        r"verify: draft_temperature: expected \(\) or \(B=2,\) float on cpu, got \(2,\) float64",
    ),
    (lambda: raw_verify(lse=floats(B, N + 1, 1)), r"verify: lse: expected \(2, 3, 2\) float32"),
    (lambda: raw_verify(draft_lse=floats(B, N)), "verify: draft_lse: expected None without"),
    (
        lambda: raw_verify(acceptance="likelihood", parameters=[2.0, 0.2], memory=torch.zeros(2)),
        r"verify: memory: expected \(B=2,\) float on cpu, got \(2,\) float32",
    ),
    (lambda: raw_verify(acceptance="typcal"), "verify: acceptance: expected one of block, .*, got"),
    (
        lambda: raw_verify(acceptance="lenient"),
        r"verify: parameters: expected 1 numbers for acceptance 'lenient', got \[\]",
    ),
    (
        lambda: raw_verify(parameters=[0.5] * 9),
        r"verify: parameters: expected 0 numbers for acceptance 'rejection', got \[0.5",
    ),
    (
        lambda: raw_verify(acceptance="lenient", parameters=[math.nan]),
        r"acceptance: lenience: expected a number in \(0, 1\] for 'lenient', got nan",
    ),
    (lambda: OPS.uniforms(SEEDS[None], POSITIONS, 0, 0), r"uniforms: seeds: expected \(B,\) int64"),
    (lambda: OPS.uniforms(SEEDS, POSITIONS[0], 0, 0), r"uniforms: positions: expected \(B, T\)"),
    (lambda: OPS.uniforms(SEEDS, POSITIONS.expand(3, 3), 0, 0), "uniforms: positions: expected"),
    (lambda: OPS.uniforms(SEEDS, POSITIONS, -1, 0), r"uniforms: stream: expected .*, got -1"),
    (lambda: OPS.uniforms(SEEDS, POSITIONS, 0, 2**32), "uniforms: index: expected .*, got 429496"),
]


@pytest.mark.parametrize(("wrong", "message"), RAW, ids=[message for _, message in RAW])
def test_a_wrong_argument_of_a_raw_op_is_refused(
    backend: str, wrong: Callable[[], Any], message: str
) -> None:
    with pytest.raises(Refusal, match=f"^{message}"):
        wrong()


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


def misaligned(tensor: Tensor) -> Tensor:
    memory = bytearray(tensor.nbytes + 1)
    tensor = tensor.contiguous()
    memory[1:] = bytes(tensor.view(torch.uint8).flatten().tolist())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


def calls_with(gone: Callable[[Tensor], Tensor]) -> dict[str, tuple[Callable[[], Any], ...]]:
    """By the argument whose memory is gone: a raw call, and a public one where there is one."""
    logits, tokens, numbers = [ROWS, ROWS.clone()], torch.zeros(B, N).long(), floats(B, N + 1, 4)
    draft, lse = floats(B, N, V), floats(B, N + 1, 2)
    law, halves = Law((0.5, 0.5)), torch.full((2,), 0.5)
    ones = torch.ones(B)
    apart: dict[str, Any] = {"draft_logits": draft, "draft_temperature": ones}
    remembers: dict[str, Any] = {"acceptance": "likelihood", "memory": gone(ones.double())}

    def both(options: dict[str, Any], **raw: Any) -> tuple[Callable[[], Any], ...]:
        return (
            lambda: verify(logits, tokens, numbers, law, **options),
            lambda: raw_verify(**{**options, **raw}),
        )

    nodes = torch.zeros(1, N + 1).long()
    return {
        "uniforms: seeds": (lambda: uniforms(gone(SEEDS), POSITIONS, 0),),
        "uniforms: positions": (lambda: OPS.uniforms(SEEDS, gone(POSITIONS), 0, 0),),
        "mix: logits[1]": (
            lambda: mix([ROWS, gone(ROWS)], law),
            lambda: raw_mix([ROWS, gone(ROWS)]),
        ),
        "mix: weights": (
            lambda: mix(logits, Law(gone(halves))),
            lambda: raw_mix(weights=gone(halves)),
        ),
        "mix: temperature": (lambda: raw_mix(temperature=gone(torch.ones(1, 1))),),
        "mix: top_k": (lambda: mix(logits, Law((0.5, 0.5), top_k=gone(torch.ones(2).int()))),),
        "mix: top_p": (lambda: raw_mix(top_p=gone(ones)),),
        "mix: min_p": (lambda: mix(logits, Law((0.5, 0.5), min_p=gone(ones))),),
        "sample: uniforms": (
            lambda: sample(logits, gone(numbers), law),
            lambda: raw_sample(gone(numbers)),
        ),
        "verify: draft_tokens": (
            lambda: verify(logits, gone(tokens), numbers, law),
            lambda: raw_verify(draft_tokens=gone(tokens)),
        ),
        "verify: proposers": both({"proposers": gone(nodes[:, 1:])}),
        "verify: parents": both({"parents": gone(nodes)}),
        "verify: draft_logits": both(apart | {"draft_logits": gone(draft)}),
        "verify: draft_temperature": both(apart | {"draft_temperature": gone(ones)}),
        "verify: lse": both({"lse": gone(lse)}),
        "verify: draft_lse": both(apart | {"draft_lse": gone(draft[..., 0].contiguous())}),
        "verify: memory": both(remembers, parameters=[2.0, 0.2]),
    }


@pytest.mark.parametrize("gone", [freed, cut, misaligned])
@pytest.mark.parametrize("argument", calls_with(torch.clone))
def test_a_tensor_whose_memory_is_gone_is_named(
    backend: str, argument: str, gone: Callable[[Tensor], Tensor]
) -> None:
    for call in calls_with(gone)[argument]:
        message = (
            f"^{re.escape(argument)}: expected a dense tensor that holds its memory, aligned, got "
        )
        with pytest.raises(Refusal, match=message):
            call()


def test_a_tensor_without_strides_is_refused() -> None:
    for tensor in (ROWS.to_sparse(), ROWS.to_sparse(1)):
        for call in (lambda t=tensor: mix([t], Law()), lambda t=tensor: raw_mix([ROWS, t])):
            with pytest.raises(Refusal, match=r"logits\[.\]: expected a dense tensor that holds"):
                call()


def test_a_view_of_memory_that_was_cut_behind_it_is_taken(backend: str) -> None:
    memory = torch.rand(B * (N + 1) * V + 5)
    view = memory[: B * (N + 1) * V].view(B, N + 1, V)
    expected = mix([view], Law())[0]
    memory.untyped_storage().resize_(view.numel() * 4)
    assert torch.equal(mix([view], Law())[0], expected)


def test_a_tensor_of_zeros_without_memory_is_zeros(backend: str) -> None:
    """Torch would hand kernels one number, expanded."""
    zeros = torch._efficientzerotensor((B, N + 1, V))
    tokens = torch.zeros(B, N, dtype=torch.int64)
    numbers = floats(B, N + 1, 4)
    for law in (Law((0.5, 0.5)), Law(torch.tensor([0.5, 0.5]), top_k=3)):
        expected = mix([torch.zeros(B, N + 1, V), ROWS], law)
        for one, other in zip(mix([zeros, ROWS], law), expected, strict=True):
            assert torch.equal(one, other)
        found = verify([ROWS, ROWS], tokens, numbers, law, draft_logits=zeros)
        right = verify([ROWS, ROWS], tokens, numbers, law, draft_logits=torch.zeros(B, N, V))
        assert torch.equal(found.tokens, right.tokens)
    law_of_zeros = law_tensors()
    found = OPS.mix(*flattened(([zeros, ROWS], law_of_zeros)))
    right = OPS.mix(*flattened(([torch.zeros(B, N + 1, V), ROWS], law_of_zeros)))
    assert torch.equal(found[0], right[0])


def turn(first: Tensor, second: Tensor, tokens: Tensor, numbers: Tensor) -> Tensor:
    return verify([first, second], tokens, numbers, Law((0.5, 0.5), top_k=5)).tokens


def turn_inputs(width: int = V) -> tuple[Tensor, ...]:
    logits = [floats(B, N + 1, width) for _ in range(2)]
    return (*logits, torch.randint(0, width, (B, N)), floats(B, N + 1, 4))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "make_fx", "export"])
def test_a_replay_with_other_shapes_reads_nothing_beyond_them(backend: str, how: str) -> None:
    if how == "trace":
        replay: Any = torch.jit.trace(turn, turn_inputs(), check_trace=False)
    elif how == "make_fx":
        replay = make_fx(turn)(*turn_inputs())
    else:

        class Turn(torch.nn.Module):
            def forward(
                self, first: Tensor, second: Tensor, tokens: Tensor, numbers: Tensor
            ) -> Tensor:
                return turn(first, second, tokens, numbers)

        # As who lowers it would run it: without the module that checks the shapes of its inputs.
        replay = torch.fx.Interpreter(
            torch.export.export(Turn(), turn_inputs()).module(check_guards=False)
        ).run
    first, second, tokens, numbers = turn_inputs()
    assert torch.equal(torch.as_tensor(_only(replay(first, second, tokens, numbers))),
                       turn(first, second, tokens, numbers))  # fmt: skip
    wide = floats(B, N + 1, 2 * V)
    for wrong in (second[..., :3], wide[..., ::2], second[..., :1].expand_as(second)):
        with pytest.raises((Refusal, RuntimeError), match=r"verify: logits\[1\]: expected"):
            replay(first, wrong, tokens, numbers)
    with pytest.raises((Refusal, RuntimeError), match="verify: uniforms: expected"):
        replay(first, second, tokens, numbers[:, :1])


def _only(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) else result


TOKENS, NUMBERS, HALVES = torch.zeros(B, N, dtype=torch.int64), floats(B, N + 1, 4), Law((0.5, 0.5))
PAIR = [ROWS, ROWS]
# A tensor's place and what may stand there by mistake.
TENSORS = [
    "seeds",
    "positions",
    "uniforms",
    "draft_tokens",
    *("parents", "proposers", "draft_logits", "draft_temperature", "lse", "draft_lse", "memory"),
]


NESTED = torch.nested.nested_tensor([[0.0], [0.0, 1.0]], layout=torch.jagged)


def with_tensor(argument: str, value: Any) -> Any:
    if argument == "seeds":
        return uniforms(value, POSITIONS, 0)
    if argument == "positions":
        return uniforms(SEEDS, value, 0)
    if argument == "draft_tokens":
        return verify(PAIR, value, NUMBERS, HALVES)
    if argument == "uniforms":
        return verify(PAIR, TOKENS, value, HALVES)
    return verify(PAIR, TOKENS, NUMBERS, HALVES, **{argument: value})


@pytest.mark.parametrize("argument", TENSORS)
def test_what_is_no_tensor_is_no_tensor(argument: str) -> None:
    for value in ([0, 0], (0.5,), "ab", 1, 2**80, 0.5, True, np.zeros((2, 2)), {}, Law(), NESTED):
        with pytest.raises(
            Refusal, match=f"^[a-z]+: {argument}: expected a tensor( or None)?, got "
        ):
            with_tensor(argument, value)
    if argument in TENSORS[:4]:
        with pytest.raises(Refusal, match=f"^[a-z]+: {argument}: expected a tensor, got None$"):
            with_tensor(argument, None)


TYPES: list[tuple[Callable[[Any], Any], list[Any], str]] = [
    (
        lambda logits: mix(logits, HALVES),
        [None, ROWS, "ab", {0: ROWS}, 1.0, iter(PAIR), np.zeros((2, 1, 1, 8))],
        "mix: logits: expected a list of M >= 1 tensors, got a ",
    ),
    (
        lambda logits: mix(logits, HALVES),
        [[ROWS, None], [ROWS, ROWS.tolist()], [ROWS, np.zeros((2, 3, 8))]],
        r"mix: logits\[1\]: expected a tensor, got ",
    ),
    (
        lambda law: sample(PAIR, NUMBERS, law),
        [None, "mixture", (0.5, 0.5), HALVES.tensors("mix", ROWS.device, V)],
        "sample: law: expected a Law, got ",
    ),
    (
        lambda member: sample(PAIR, NUMBERS, HALVES, member=member),
        [True, 0.0, "0", [0], np.float64(0), torch.tensor(0), 2**80],
        "sample: member: expected None or 0 to 1, got ",
    ),
    (
        lambda bonus: verify(PAIR, TOKENS, NUMBERS, HALVES, bonus=bonus),
        [None, 1, 0, "yes", np.True_, torch.tensor(True), [True]],
        "verify: bonus: expected True or False, got ",
    ),
    (
        lambda acceptance: verify(PAIR, TOKENS, NUMBERS, HALVES, acceptance=acceptance),
        [None, 3, ["js"], {"js": 1}, torch.zeros(3), Acceptance],
        "acceptance: name: expected one of block, ",
    ),
    (
        lambda stream: uniforms(SEEDS, POSITIONS, stream),
        [None, 1.5, 1.0, "0", True, [0], torch.tensor(0), 2**80, -1],
        r"uniforms: stream: expected an integer in \[0, 2\^32\), got ",
    ),
    (
        lambda index: uniforms(SEEDS, POSITIONS, Stream.DRAFT, index=index),
        [None, 1.5, True, 2**32],
        r"uniforms: index: expected an integer in \[0, 2\^32\), got ",
    ),
    (
        lambda threshold: Acceptance("js", threshold=threshold),
        [None, "0.3", True, [0.3], 1j, 1e999, torch.tensor(0.3), math.inf, math.nan, 10**400],
        r"acceptance: threshold: expected a number in \[0, inf\) for 'js', got ",
    ),
    (
        lambda top_k: Acceptance("js", top_k=top_k),
        [1.5, -1, 2**31, math.inf, True, "5"],
        r"acceptance: top_k: expected a whole number in \[0, 2.14748e\+09\] for 'js', got ",
    ),
    (
        lambda name: Ensemble(name, "logits"),
        ["", " ", "a b", "a:b", "a@b", "a,b", "a\n", None, 3, ["a"]],
        "ensemble: name: expected a word of letters, digits, '_', '-' and '.', got ",
    ),
    (
        lambda space: Ensemble("mine", space),
        [None, ["logits"], 1, torch.zeros(2)],
        "ensemble: space: expected one of probabilities, logits, got ",
    ),
    (lambda source: Ensemble("mine", "logits", source), [None, 3], "ensemble: source: expected a "),
    (
        lambda kind: divergence(ROWS, ROWS, kind),
        [None, ["kl"], "kL", 3],
        "divergence: kind: expected one of js, ",
    ),
    (
        lambda target: divergence(target, ROWS),
        [None, ROWS.tolist(), ROWS.long(), np.zeros((2, 3, 8))],
        r"divergence: target_logits: expected \(..., V\) float, got ",
    ),
]


@pytest.mark.parametrize(("call", "values", "message"), TYPES, ids=[one[2] for one in TYPES])
def test_a_value_of_a_wrong_type_is_refused_in_one_line(
    call: Callable[[Any], Any], values: list[Any], message: str
) -> None:
    for value in values:
        with pytest.raises(Refusal, match=f"^{message}") as raised:
            call(value)
        assert "\n" not in str(raised.value)


def test_what_numpy_calls_an_integer_is_one(backend: str) -> None:
    drawn = sample(PAIR, NUMBERS, HALVES, member=np.int64(1))
    assert torch.equal(drawn.tokens, sample(PAIR, NUMBERS, HALVES, member=1).tokens)
    numbers = uniforms(SEEDS, POSITIONS, np.uint32(7), index=np.int8(3))
    assert torch.equal(numbers, uniforms(SEEDS, POSITIONS, 7, index=3))


@pytest.mark.parametrize("parents", [[-1, 2, 1], [-1, 1, 0], [-1, 0, 2], [-1, -1, 0], [-1, 0, 9]])
def test_a_draft_that_hangs_off_no_earlier_node_is_reported(parents: list[int]) -> None:
    logits = [torch.zeros(1, 3, V)]
    tokens, numbers = torch.tensor([[1, 2]]), torch.zeros(1, 3, 4)
    tree = torch.tensor(parents)
    verdict = verify(logits, tokens, numbers, Law(), parents=tree)
    assert verdict.status.item() == Status.INVALID_DRAFT
    lost = [node - 1 for node in (1, 2) if not 0 <= parents[node] < node]
    assert all(node + 1 not in verdict.path[0].tolist() for node in lost)
    tokens[0, lost] = -1  # none is there: nothing is wrong
    assert verify(logits, tokens, numbers, Law(), parents=tree).status.item() == 0


def held_by_none(laws: Tensor, weights: Tensor) -> Tensor:
    return freed(laws[0].clone())


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "a rule's text with a name of Python's": (
        lambda: Acceptance.parse("js:name=3"),
        "acceptance: name: expected threshold, top_k for 'js', got name",
    ),
    "a rule's text that is none": (
        lambda: Acceptance.parse(None),  # type: ignore[arg-type]
        "acceptance: text: expected a string, got None",
    ),
    "a fold whose result has no memory": (
        lambda: mix([floats(1, 2, 5)], Law(ensemble=Ensemble("e", "logits", fold=held_by_none))),
        "e: fold: expected a dense tensor that holds its memory, aligned, got (1, 2, 5) float64",
    ),
    "a fold whose result is sparse": (
        lambda: mix(
            [floats(1, 2, 5)],
            Law(ensemble=Ensemble("e", "logits", fold=lambda laws, weights: laws[0].to_sparse())),
        ),
        "e: fold: expected a dense tensor that holds its memory, aligned, got (1, 2, 5) float64",
    ),
    "a sparse temperature": (
        lambda: mix([floats(2, 2, 5)], Law(temperature=torch.ones(2).to_sparse())),
        "mix: temperature: expected a dense tensor that holds its memory, aligned, got (2,)",
    ),
    "an integer of more digits than Python writes": (
        lambda: Law(top_k=10**5000),
        "law: top_k: expected a count in [0, 2^31), got a int",
    ),
    "a vocabulary of more than 31 bits": (
        lambda: Law(vocab_size=2**31),
        "law: vocab_size: expected a count in [1, 2^31), got 2147483648",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.filterwarnings("ignore:.*beta state:UserWarning")
def test_what_a_value_holds_is_looked_at_before_it_is_used(what: str) -> None:
    asked, expected = OTHERS[what]
    with pytest.raises(Refusal, match=f"^{re.escape(expected)}"):
        asked()


def test_single_precision_is_what_numpy_says() -> None:
    dice = np.random.default_rng(0)
    values = dice.uniform(-1, 1, 500) * 10.0 ** dice.integers(-330, 309, 500)
    edges = [0.0, math.inf, -math.inf, 16777217.0, 16777219.0, 3.4028235677973366e38, 1e-45, 5e-324]
    for value in [*values.tolist(), *edges]:
        with np.errstate(over="ignore", under="ignore"):
            assert arguments.single(value) == float(np.float32(value))
    assert math.isnan(arguments.single(math.nan))


def test_a_law_is_made_inside_of_a_compiled_function() -> None:
    def program(logits: Tensor) -> Tensor:
        return mix([logits, logits], Law((0.3, 0.7), temperature=0.5, top_k=4))[0]

    logits = floats(1, 2, 9)
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits), program(logits))
