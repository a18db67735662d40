# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules once more, by their definitions, with nothing shared with the implementation.

To add a rule, add its `Definition` to `DEFINITIONS`, from the laws p and q as lists of numbers;
test_acceptance.py and test_verify_law.py ask for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from scipy.optimize import brentq

Numbers = list[float]
Kept = tuple[float, Numbers]


def never(*_: Any, **__: Any) -> bool:
    return False


class Definition(NamedTuple):
    """One rule. Its functions take (p, q, x, memory, **parameters), but for `law`.

    closed: with which probability a drafted token x is kept, and the mass that replaces it. None
        for rules that do not judge a token by itself, whose law test_verify_law.py enumerates.
    parameters: such as both outcomes are seen with; each is tested.
    trusts: whether, at temperature 0, a token is kept that is not the target's most probable one,
        by the laws at temperature 1.
    vetoes: whether a token is refused, at any temperature.
    law: (p, q, **parameters) -> the law that the rule claims to emit, where it claims one.
    by_coin: whether `closed` says with which probability a token is kept at temperature 0, too.
    """

    closed: Callable[..., Kept] | None
    parameters: Sequence[dict[str, Any]] = ({},)
    trusts: Callable[..., bool] = never
    vetoes: Callable[..., bool] = never
    law: Callable[..., Numbers] | None = None
    by_coin: bool = False


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


def itself(p: Numbers, q: Numbers) -> Numbers:
    return p


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


def both_unsure(
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
    if both_unsure(p, q, x, memory, **parameters):
        return 0.0, [0.0 if v == x else a for v, a in enumerate(p)]
    return with_law(itself)(p, q, x, memory)


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


def lenient(p: Numbers, q: Numbers, x: int, memory: float, lenience: float) -> Kept:
    keep = min(1.0, p[x] / lenience / q[x]) if q[x] > 0 else 0.0
    return keep, [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]


def synthetic(p: Numbers, q: Numbers, x: int, memory: float, rate: float) -> Kept:
    return rate, [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]


def typical(p: Numbers, q: Numbers, x: int, memory: float, epsilon: float, delta: float) -> bool:
    return p[x] > min(epsilon, delta * math.exp(-entropy(p)))


def likely(
    p: Numbers, q: Numbers, x: int, memory: float, threshold: float, smoothing: float
) -> bool:
    return p[x] > 0 and smoothing * memory - (1 - smoothing) * math.log(p[x]) <= threshold


def _with_law(law: Callable[..., Numbers], *parameters: dict[str, Any], **rest: Any) -> Definition:
    return Definition(with_law(law), parameters or ({},), law=law, **rest)


def _gate(closed: Callable[..., Kept], *parameters: dict[str, Any]) -> Definition:
    """A gate trusts what it keeps."""
    return Definition(closed, parameters, trusts=lambda *at, **given: closed(*at, **given)[0] == 1)


def parameters(name: str) -> Sequence[dict[str, Any]]:
    """With which a rule is tested; none where its definition is missing, which has its own test."""
    return DEFINITIONS[name].parameters if name in DEFINITIONS else ()


DEFINITIONS: dict[str, Definition] = {
    "rejection": _with_law(itself),
    "block": Definition(None),
    "greedy": Definition(None),
    "k_seq": Definition(k_seq),
    "lenient": Definition(lenient, [{"lenience": 0.6}, {"lenience": 1.0}]),
    "mentored": _with_law(mentored, {"divergence": 0.05}, {"divergence": 0.3}),
    "cactus": Definition(cactus, [{"divergence": 0.2}, {"divergence": 1.0}]),
    "cascade_chow": _with_law(
        cascade(lambda p, q, a: max(q) < 1 - a),
        {"alpha": 0.5},
        {"alpha": 0.3},
        trusts=lambda p, q, x, m, alpha: max(q) >= 1 - alpha,
    ),
    "cascade_diff": _with_law(
        cascade(lambda p, q, a: max(q) < max(p) - a),
        {"alpha": 0.0},
        {"alpha": 0.2},
        trusts=lambda p, q, x, m, alpha: max(q) >= max(p) - alpha,
    ),
    "cascade_opt": _with_law(
        cascade(lambda p, q, a: max(q) < max(p) - a * tv(p, q)),
        {"alpha": 0.3},
        trusts=lambda p, q, x, m, alpha: max(q) >= max(p) - alpha * tv(p, q),
    ),
    "cascade_v1": _with_law(
        token_cascade(lambda p, q, v, a: q[v] < max(p) - a),
        {"alpha": 0.1},
        {"alpha": 0.4},
        trusts=lambda p, q, x, m, alpha: q[x] >= max(p) - alpha,
    ),
    "cascade_v2": _with_law(
        token_cascade(lambda p, q, v, a: p[v] < max(p) - a),
        {"alpha": 0.2},
        trusts=lambda p, q, x, m, alpha: p[x] >= max(p) - alpha,
    ),
    "cascade_v3": _with_law(
        token_cascade(lambda p, q, v, a: p[v] < (1 - a) * max(p)),
        {"alpha": 0.5},
        trusts=lambda p, q, x, m, alpha: p[x] >= (1 - alpha) * max(p),
    ),
    "js_fsd": _gate(divergence_gate("js_fsd"), {"threshold": 0.15}, {"threshold": 0.1, "top_k": 2}),
    "js": _gate(divergence_gate("js"), {"threshold": 0.1}, {"threshold": 0.05, "top_k": 2}),
    "kl": _gate(divergence_gate("kl"), {"threshold": 0.4}, {"threshold": 0.2, "top_k": 2}),
    "reverse_kl": _gate(
        divergence_gate("reverse_kl"), {"threshold": 0.4}, {"threshold": 0.2, "top_k": 2}
    ),
    "tv": _gate(divergence_gate("tv"), {"threshold": 0.4}, {"threshold": 0.3, "top_k": 2}),
    "typical": _gate(gated(typical), {"epsilon": 0.3, "delta": 0.6}),
    "top_k": _gate(gated(lambda p, q, x, m, k: sum(v > p[x] for v in p) < k), {"k": 1}, {"k": 2}),
    "likelihood": _gate(
        gated(likely),
        {"threshold": 1.0, "smoothing": 0.0},
        {"threshold": 1.0, "smoothing": 0.4},
    ),
    "entropy_veto": Definition(
        entropy_veto,
        [
            {"target_entropy": 0.5, "draft_entropy": 0.5, "overlap": 0.5, "top_n": 2},
            {"target_entropy": 1.1, "draft_entropy": 0.2, "overlap": 0.6, "top_n": 3},
        ],
        vetoes=both_unsure,
    ),
    "synthetic": Definition(synthetic, [{"rate": 0.3}, {"rate": 0.8}], by_coin=True),
}
