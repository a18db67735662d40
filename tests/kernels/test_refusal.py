# SPDX-License-Identifier: Apache-2.0
"""`Refusal`: one form of sentence, its facts, and that neither needs torch."""

import copy
import pickle
import subprocess
import sys

import pytest

import specens_kernels
from specens_kernels import Refusal, Unsupported


def test_a_refusal_is_facts_and_a_sentence() -> None:
    refusal = Refusal("verify", "memory", "(B=2,) float", None)
    assert str(refusal) == "verify: memory: expected (B=2,) float, got None"
    assert (refusal.op, refusal.argument) == ("verify", "memory")
    assert (refusal.expected, refusal.got) == ("(B=2,) float", "None")
    assert isinstance(refusal, ValueError)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    refusal = Refusal.unknown("law", "scope", "row", ("member", "ensemble"))
    assert str(refusal) == "law: scope: expected one of member, ensemble, got 'row'"


@pytest.mark.parametrize("copied", [copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_says_the_same(copied) -> None:  # type: ignore[no-untyped-def]
    refusal = Refusal("law", "top_k", "a count", -1)
    assert str(copied(refusal)) == str(refusal)
    assert copied(refusal).argument == "top_k"


def test_a_refusal_needs_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from specens_kernels import Refusal; "
        "print(Refusal('law', 'top_k', 'a count', -1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "law: top_k: expected a count, got -1\n", done.stderr


def test_every_public_name_is_found_and_listed() -> None:
    for name in specens_kernels.__all__:
        assert getattr(specens_kernels, name) is not None
    assert {*specens_kernels.__all__} <= {*dir(specens_kernels)}
    with pytest.raises(AttributeError, match="has no attribute 'verifyy'"):
        _ = specens_kernels.verifyy


def test_what_one_backend_does_not_take_is_a_refusal_and_not_implemented() -> None:
    refusal = Unsupported.unknown("native", "acceptance", "mine", ("block", "greedy"))
    assert str(refusal) == "native: acceptance: expected one of block, greedy, got 'mine'"
    assert isinstance(refusal, Unsupported)
    assert isinstance(refusal, Refusal)
    assert isinstance(refusal, NotImplementedError)
