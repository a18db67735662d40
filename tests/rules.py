# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules once more, by their definitions, with nothing shared with the implementation.

`CLOSED[name](p, q, x, memory, **parameters)` says with which probability a drafted token x is kept,
and the mass that replaces it, from the laws p and q as lists of numbers. `LAWS[name]` is the law
that a rule claims to emit, where it claims one. `PARAMETERS[name]` lists parameters to test with.
To add a rule, add its closed form here; test_acceptance.py and test_verify_law.py ask for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from scipy.optimize import brentq

Numbers = list[float]
Kept = tuple[float, Numbers]


def entropy(law: Numbers) -> float:
    return -sum(a * math.log(a) for a in law if a > 0)


def kl(p: Numbers, q: Numbers) -> float:
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def tv(p: Numbers, q: Numbers) -> float:
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def mean(p: Numbers, q: Numbers) -> Numbers:
    return [(a + b) / 2 for a, b in zip(p, q, strict=True)]


DIVERGENCES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "tv": tv,
    "js": lambda p, q: (kl(p, mean(p, q)) + kl(q, mean(p, q))) / 2,
    "js_fsd": lambda p, q: (kl(mean(p, q), p) + kl(mean(p, q), q)) / 2,
}


def with_law(law: Callable[..., Numbers]) -> Callable[..., Kept]:
    """Rejection sampling for a law of its own."""

    def closed(p: Numbers, q: Numbers, x: int, memory: float, **parameters: float) -> Kept:
        h = law(p, q, **parameters)
        keep = min(1.0, h[x] / q[x]) if q[x] > 0 else 0.0
        return keep, [max(a - b, 0.0) for a, b in zip(h, q, strict=True)]

    return closed


def gated(opens: Callable[..., bool]) -> Callable[..., Kept]:
    def closed(p: Numbers, q: Numbers, x: int, memory: float, **parameters: float) -> Kept:
        return float(opens(p, q, x, memory, **parameters)), p

    return closed


def divergence_gate(name: str) -> Callable[..., Kept]:
    def opens(
        p: Numbers, q: Numbers, x: int, memory: float, threshold: float, top_k: float = 0
    ) -> bool:
        if top_k:
            best = sorted(range(len(p)), key=lambda v: -p[v])[: int(top_k)]
            p = [p[v] for v in best] + [1 - sum(p[v] for v in best)]
            q = [q[v] for v in best] + [1 - sum(q[v] for v in best)]
        return DIVERGENCES[name](p, q) <= threshold

    return gated(opens)


def cascade(defers: Callable[[Numbers, Numbers, float], bool]) -> Callable[..., Numbers]:
    return lambda p, q, alpha: p if defers(p, q, alpha) else q


def token_cascade(defers: Callable[[Numbers, Numbers, int, float], bool]) -> Callable[..., Numbers]:
    def law(p: Numbers, q: Numbers, alpha: float) -> Numbers:
        moved = sum(q[v] for v in range(len(p)) if defers(p, q, v, alpha))
        return [p[v] * moved + (0.0 if defers(p, q, v, alpha) else q[v]) for v in range(len(p))]

    return law


def mentored(p: Numbers, q: Numbers, divergence: float) -> Numbers:
    if kl(p, q) <= divergence:
        return q

    def law(a: float) -> Numbers:
        def at(inverse_b: float) -> Numbers:
            return [sorted((v * inverse_b, w, v / a))[1] for v, w in zip(p, q, strict=True)]

        def excess(inverse_b: float) -> float:
            return sum(at(inverse_b)) - 1

        if excess(0) >= 0:
            return at(0.0)
        return at(brentq(excess, 0, 1, xtol=1e-16) if excess(1) > 0 else 1.0)

    least = min([v / w for v, w in zip(p, q, strict=True) if v > 0 and w > 0] + [1.0])
    if kl(p, law(least)) <= divergence:
        return law(least)
    log_a = brentq(lambda s: kl(p, law(math.exp(s))) - divergence, math.log(least), 0, xtol=1e-15)
    return law(math.exp(log_a))


def cactus(p: Numbers, q: Numbers, x: int, memory: float, divergence: float) -> Kept:
    raised = min(1.0, p[x] + math.sqrt(2 * divergence * p[x] * (1 - p[x])))
    h = [v * (1 - raised) / (1 - p[x]) if p[x] < 1 else 0.0 for v in p]
    h[x] = raised
    keep = min(1.0, raised / q[x]) if q[x] > 0 else 0.0
    return keep, [
        max(a - b, 0.0) if v != x else 0.0 for v, (a, b) in enumerate(zip(h, q, strict=True))
    ]


def vetoes(
    p: Numbers,
    q: Numbers,
    x: int,
    memory: float,
    target_entropy: float,
    draft_entropy: float,
    overlap: float,
    top_n: float,
) -> bool:
    def best(law: Numbers) -> set[int]:
        return set(sorted(range(len(law)), key=lambda v: -law[v])[: int(top_n)])

    unsure = entropy(p) > target_entropy and entropy(q) > draft_entropy
    alike = len(best(p) & best(q)) >= overlap * min(int(top_n), len(p))
    return unsure and alike and p[x] < 1


def entropy_veto(p: Numbers, q: Numbers, x: int, memory: float, **parameters: float) -> Kept:
    if vetoes(p, q, x, memory, **parameters):
        return 0.0, [0.0 if v == x else a for v, a in enumerate(p)]
    return CLOSED["rejection"](p, q, x, memory)


def never(*_: Any, **__: Any) -> bool:
    return False


def k_seq(p: Numbers, q: Numbers, x: int, memory: float, k: int = 1) -> Kept:
    def once(rho: float) -> float:
        return sum(min(a / rho, b) for a, b in zip(p, q, strict=True))

    def excess(rho: float) -> float:
        return 1 - (1 - once(rho)) ** k - rho * once(rho)

    rho = brentq(excess, 1, k, xtol=1e-15) if k > 1 and excess(1) > 0 else 1.0
    kept = [min(a / rho, b) for a, b in zip(p, q, strict=True)]
    share = (1 - (1 - once(rho)) ** k) / once(rho)
    keep = kept[x] / q[x] if q[x] > 0 else 0.0
    return keep, [max(a - b * share, 0.0) for a, b in zip(p, kept, strict=True)]


LAWS: dict[str, Callable[..., Numbers]] = {
    "rejection": lambda p, q: p,
    "mentored": mentored,
    "cascade_chow": cascade(lambda p, q, a: max(q) < 1 - a),
    "cascade_diff": cascade(lambda p, q, a: max(q) < max(p) - a),
    "cascade_opt": cascade(lambda p, q, a: max(q) < max(p) - a * tv(p, q)),
    "cascade_v1": token_cascade(lambda p, q, v, a: q[v] < max(p) - a),
    "cascade_v2": token_cascade(lambda p, q, v, a: p[v] < max(p) - a),
    "cascade_v3": token_cascade(lambda p, q, v, a: p[v] < (1 - a) * max(p)),
}

CLOSED: dict[str, Callable[..., Kept]] = {
    **{name: with_law(law) for name, law in LAWS.items()},
    **{name: divergence_gate(name) for name in DIVERGENCES},
    "lenient": lambda p, q, x, m, lenience: (
        min(1.0, p[x] / lenience / q[x]) if q[x] > 0 else 0.0,
        [max(a - b, 0.0) for a, b in zip(p, q, strict=True)],
    ),
    "cactus": cactus,
    "k_seq": k_seq,
    "typical": gated(
        lambda p, q, x, m, epsilon, delta: p[x] > min(epsilon, delta * math.exp(-entropy(p)))
    ),
    "top_k": gated(lambda p, q, x, m, k: sum(v > p[x] for v in p) < k),
    "likelihood": gated(
        lambda p, q, x, m, threshold, smoothing: (
            p[x] > 0 and smoothing * m - (1 - smoothing) * math.log(p[x]) <= threshold
        )
    ),
    "entropy_veto": entropy_veto,
}

# At temperature 0: whether a rule keeps a token that is not the target's most probable one, by the
# laws at temperature 1.
TRUSTS: dict[str, Callable[..., bool]] = {
    **{
        name: lambda p, q, x, m, closed=CLOSED[name], **parameters: (
            closed(p, q, x, m, **parameters)[0] == 1
        )
        for name in (*DIVERGENCES, "typical", "top_k", "likelihood")
    },
    "cascade_chow": lambda p, q, x, m, alpha: max(q) >= 1 - alpha,
    "cascade_diff": lambda p, q, x, m, alpha: max(q) >= max(p) - alpha,
    "cascade_opt": lambda p, q, x, m, alpha: max(q) >= max(p) - alpha * tv(p, q),
    "cascade_v1": lambda p, q, x, m, alpha: q[x] >= max(p) - alpha,
    "cascade_v2": lambda p, q, x, m, alpha: p[x] >= max(p) - alpha,
    "cascade_v3": lambda p, q, x, m, alpha: p[x] >= (1 - alpha) * max(p),
}

# Whether a rule refuses a token, at any temperature.
VETOES: dict[str, Callable[..., bool]] = {"entropy_veto": vetoes}

PARAMETERS: dict[str, Sequence[dict[str, Any]]] = {
    "lenient": [{"lenience": 0.6}, {"lenience": 1.0}],
    "mentored": [{"divergence": 0.05}, {"divergence": 0.3}],
    "cactus": [{"divergence": 0.2}, {"divergence": 1.0}],
    "cascade_chow": [{"alpha": 0.5}, {"alpha": 0.3}],
    "cascade_diff": [{"alpha": 0.0}, {"alpha": 0.2}],
    "cascade_opt": [{"alpha": 0.3}],
    "cascade_v1": [{"alpha": 0.1}, {"alpha": 0.4}],
    "cascade_v2": [{"alpha": 0.2}],
    "cascade_v3": [{"alpha": 0.5}],
    "js_fsd": [{"threshold": 0.15}, {"threshold": 0.1, "top_k": 2}],
    "js": [{"threshold": 0.1}, {"threshold": 0.05, "top_k": 2}],
    "kl": [{"threshold": 0.4}, {"threshold": 0.2, "top_k": 2}],
    "reverse_kl": [{"threshold": 0.4}, {"threshold": 0.2, "top_k": 2}],
    "tv": [{"threshold": 0.4}, {"threshold": 0.3, "top_k": 2}],
    "typical": [{"epsilon": 0.3, "delta": 0.6}],
    "top_k": [{"k": 1}, {"k": 2}],
    "likelihood": [{"threshold": 1.0, "smoothing": 0.0}, {"threshold": 1.0, "smoothing": 0.4}],
    "entropy_veto": [
        {"target_entropy": 0.5, "draft_entropy": 0.5, "overlap": 0.5, "top_n": 2},
        {"target_entropy": 1.1, "draft_entropy": 0.2, "overlap": 0.6, "top_n": 3},
    ],
}
