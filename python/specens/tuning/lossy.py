# SPDX-License-Identifier: Apache-2.0
"""Which acceptance rules `specens tune` can measure, and how they are written. Needs no torch."""

from specens_kernels import Acceptance, Refusal


def check_lossy(acceptance: Acceptance) -> Acceptance:
    """The rule itself.

    Raises:
        Refusal: the rule is exact, does not judge a token by itself, or asks no model.
    """
    rule = acceptance.rule
    if rule.lossless or rule.greedy or rule.block or rule.remembers or rule.by_coin:
        expected = "a lossy rule that judges each token by itself"
        raise Refusal("tune", "acceptance", expected, repr(rule.name))
    return acceptance


def spelled(acceptance: Acceptance) -> str:
    """As `Acceptance.parse` reads it: the first parameter, and others that are not the default."""
    pairs = enumerate(zip(acceptance.rule.parameters, acceptance.parameters, strict=True))
    numbers = ",".join(
        f"{parameter.name}={value:.12g}"
        for i, (parameter, value) in pairs
        if i == 0 or value != parameter.default
    )
    return f"{acceptance.rule.name}:{numbers}" if numbers else acceptance.rule.name
