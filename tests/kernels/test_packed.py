# SPDX-License-Identifier: Apache-2.0
"""What an engine's own buffers ask of `verify` and `sample`: packed rows, counted drafts, `out`.

Laws are enumerated as in test_verify_law.py, through a call whose rows lie packed in an order of
their own. To add an argument: a `Case` that it changes the law of, a wrong line that the
enumeration sees, its refusals, and its place in `engine_call`.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import laws
import pytest
import torch
from laws import POINT, SEPARATE, Call, Case
from mutants import with_bug
from torch import Tensor

from specens_kernels import Acceptance, Law, reference, verify
from specens_kernels.call import Layout, VerifyCall

FINE, GRID = 2.0**-44, 2.0**-24
HALVES = (0.5, 0.5)
CHAIN_2, CHAIN_3 = (-1, 0, 1), (-1, 0, 1, 2)
FILTERS = {"temperature": 1.25, "top_k": 3, "top_p": 0.95, "min_p": 0.05}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)

CASES = [
    Case(
        "a separate draft without filters",
        5,
        CHAIN_2,
        (SEPARATE,) * 2,
        (1.0,),
        law=FILTERS,
        draft_filtered=False,
    ),
    Case(
        "members that drafted without filters",
        4,
        CHAIN_2,
        (0, 1),
        HALVES,
        law=FILTERS,
        draft_filtered=False,
    ),
    Case(
        "a member that drafted without filters of the mixture",
        4,
        CHAIN_2,
        (1, 0),
        HALVES,
        law={**FILTERS, "scope": "ensemble"},
        draft_filtered=False,
    ),
    Case(
        "a member at temperature 1 whose bare law is the mixture's part",
        4,
        CHAIN_2,
        (1, 0),
        HALVES,
        law={"top_k": 2, "scope": "ensemble"},
        draft_filtered=False,
    ),
    Case(
        "a product of members, drafted without filters",
        4,
        CHAIN_2,
        (1, SEPARATE),
        (0.7, 0.4),
        law={"temperature": 1.25, "top_k": 3, "ensemble": "product"},
        draft_filtered=False,
    ),
    Case(
        "probabilities, laws with holes",
        4,
        CHAIN_2,
        (SEPARATE,) * 2,
        HALVES,
        law=FILTERS,
        draft_space="probabilities",
        zeros=0.3,
    ),
    Case(
        "siblings from probabilities, a member and a point, without replacement",
        4,
        (-1, 0, 0, 0, 0),
        (SEPARATE, 1, SEPARATE, POINT),
        HALVES,
        points={4: 2},
        law={"temperature": (0.7, 1.2)},
        draft_space="probabilities",
        draws="without",
    ),
    Case(
        "probabilities under k_seq",
        4,
        (-1, 0, 0),
        (SEPARATE,) * 2,
        HALVES,
        acceptance="k_seq",
        draft_space="probabilities",
    ),
    Case(
        "a refused draft, then no bonus",
        4,
        CHAIN_3,
        (0, 1, 0),
        HALVES,
        refused=(2,),
        num_drafts=3,
        bonus=False,
    ),
    Case("the first draft is refused", 4, CHAIN_2, (0, 1), HALVES, refused=(1,), num_drafts=2),
    Case(
        "refused siblings, one of them alone",
        4,
        (-1, 0, 0, 1, 2),
        (0, 1, 0, POINT),
        HALVES,
        points={4: 1},
        refused=(1, 4),
        num_drafts=4,
        bonus=False,
    ),
    Case("drafts that end early, with a bonus", 4, CHAIN_3, (0, 1, 0), HALVES, num_drafts=1),
    Case("and without", 4, CHAIN_3, (0, 1, 0), HALVES, num_drafts=2, bonus=False),
    Case("no draft at all", 4, CHAIN_2, (0, 1), HALVES, num_drafts=0),
    Case(
        "a tree that ends early",
        4,
        (-1, 0, 0, 1, 0),
        (0, 1, 0, 0),
        HALVES,
        num_drafts=2,
    ),
    Case(
        "a rate for each position",
        3,
        CHAIN_3,
        (SEPARATE,) * 3,
        (1.0,),
        acceptance="synthetic",
        parameters={"rate": (0.9, 0.25)},
        law={"top_k": 2},
        draft_filtered=False,
    ),
    Case(
        "a rate for each depth of a tree",
        3,
        (-1, 0, 0, 1, 1),
        (0, 1, POINT, 0),
        HALVES,
        points={3: 1},
        acceptance="synthetic",
        parameters={"rate": (0.5, 0.25)},
    ),
    Case(
        "a rate at temperature 0",
        4,
        CHAIN_2,
        (SEPARATE,) * 2,
        HALVES,
        acceptance="synthetic",
        parameters={"rate": (0.75, 0.5)},
        law={"temperature": 0.0},
        draft_temperature=1.0,
    ),
]


def law_of(case: Case) -> Law:
    return Law(case.weights, vocab_size=case.vocab_size, **(case.law or {}))


def scattered(padded: Tensor, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, T, ...) as (L, ...), and where its rows lie there, among others that are of nobody."""
    batch, rows = padded.shape[:2]
    places = torch.randperm(batch * rows + 3, generator=dice)[: batch * rows].view(batch, rows)
    packed = torch.full((batch * rows + 3, *padded.shape[2:]), torch.nan, dtype=padded.dtype)
    packed[places] = padded
    return packed, places


def engine_call(case: Case, call: Call) -> tuple[list[Tensor], dict[str, Any]]:
    """The members' packed logits, and the options of the call."""
    dice = torch.Generator().manual_seed(len(call.draft_tokens))
    packed, rows = scattered(torch.stack(call.logits, -1), dice)
    options: dict[str, Any] = {"rows": rows, "draft_filtered": case.draft_filtered}
    options |= {"parents": call.parents, "proposers": call.proposers}
    if call.draft_logits is not None:
        draft = call.draft_logits
        if case.draft_space == "probabilities":
            draft = draft.softmax(-1)
        options["draft_logits"], options["draft_rows"] = scattered(draft, dice)
        options["draft_rows"] = options["draft_rows"].int()
        options["draft_space"] = case.draft_space
    if case.num_drafts is not None:
        options["num_drafts"] = torch.full((len(rows),), case.num_drafts)
        # What lies beyond a request's drafts is not looked at.
        rows[:, case.num_drafts + case.bonus :] = -7
        if "draft_rows" in options:
            options["draft_rows"][:, case.num_drafts :] = 10**9
    return [member.contiguous() for member in packed.unbind(-1)], options


def in_float64(case: Case, module: ModuleType = reference) -> Callable:
    chosen = Acceptance(case.acceptance, **(case.parameters or {}))
    several = chosen.of_requests(torch.device("cpu")) if chosen.given else None

    def run(call: Call) -> tuple[Tensor, Tensor]:
        logits, options = engine_call(case, call)
        layout = {name: options.pop(name) for name in Layout._fields if name in options}
        temperature = case.draft_temperature
        verdict = module.verify(
            VerifyCall(
                logits,
                call.draft_tokens,
                call.uniforms,
                law_of(case).tensors("verify", torch.device("cpu"), case.vocab_size),
                draft_temperature=None if temperature is None else torch.tensor([temperature]),
                acceptance=chosen.rule.name,
                parameters=chosen.numbers,
                bonus=case.bonus,
                draws=case.draws,
                layout=Layout(**layout, request_parameters=several),
                **options,
            )
        )
        return verdict[0], verdict[3]

    return run


def through_the_op(case: Case, **changes: Any) -> Callable:
    def run(call: Call) -> tuple[Tensor, Tensor]:
        logits, options = engine_call(case, call)
        temperature = case.draft_temperature
        if "draft_logits" in options:
            options["draft_logits"] = options["draft_logits"].float()
        verdict = verify(
            [tensor.float() for tensor in logits],
            call.draft_tokens.int(),
            call.uniforms.float(),
            law_of(case),
            draft_temperature=None if temperature is None else torch.tensor(temperature),
            acceptance=Acceptance(case.acceptance, **(case.parameters or {})),
            bonus=case.bonus,
            draws=case.draws,
            **{**options, **changes},
        )
        return verdict.tokens, verdict.path

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_emitted_law_is_what_the_closed_form_says(case: Case) -> None:
    law, surprise = laws.observed_law(case, in_float64(case), FINE)
    expected = laws.emitted_law(case, lambda question: laws.predicted(case, question))
    assert laws.total_variation(law, expected) < 1e-12
    assert surprise <= FINE
    if case.acceptance != "synthetic":
        assert laws.joint_distance(case, law) < 1e-12


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_public_op_decides_where_the_closed_form_says(backend: str, case: Case) -> None:
    law, _ = laws.observed_law(case, through_the_op(case), GRID)
    expected = laws.emitted_law(case, lambda question: laws.predicted(case, question))
    assert laws.total_variation(law, expected) < 1e-6


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@BACKENDS
def test_unfiltered_drafts_that_are_said_to_be_filtered_have_a_wrong_law(backend: str) -> None:
    """What an engine's drafts did silently: the target keeps its filters, the draft had none."""
    case = case_named("a separate draft without filters")
    law, _ = laws.observed_law(case, through_the_op(case, draft_filtered=True), GRID)
    assert laws.joint_distance(case, law) > 1e-3


# (case, a line of the specification, what stands there instead).
BUGS = {
    "unfiltered drafts are filtered": (
        "a separate draft without filters",
        "            self.draft_filtered,\n",
        "            True,\n",
    ),
    "probabilities are warped as logits are": (
        "probabilities, laws with holes",
        'if self.draft_space == "probabilities":',
        'if self.draft_space == "neither":',
    ),
    "a refused draft ends a text": (
        "a refused draft, then no bonus",
        "if not children and not bonus and not self.refuses(row):",
        "if not children and not bonus:",
    ),
    "the count of drafts is not looked at": (
        "drafts that end early, with a bonus",
        "return tokens[:end] + [PADDING] * (len(tokens) - end)",
        "return tokens",
    ),
    "the rate of the first position is everyone's": (
        "a rate for each position",
        "self.parameters[min(depth, len(self.parameters) - 1)]",
        "self.parameters[0]",
    ),
    "a coin does not decide at temperature 0": (
        "a rate at temperature 0",
        "if not target.greedy or self.rule.by_coin:",
        "if not target.greedy:",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_enumeration_sees_a_wrong_line(bug: str, tmp_path: Path) -> None:
    name, line, instead = BUGS[bug]
    case = case_named(name)
    expected = laws.emitted_law(case, lambda question: laws.predicted(case, question))
    with with_bug(line, instead, tmp_path) as module:
        law, _ = laws.observed_law(case, in_float64(case, module), 2.0**-12)
    assert laws.total_variation(law, expected) > 1e-3
