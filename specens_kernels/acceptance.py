# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules: how much of a draft law is kept, and what replaces the rest.

A rule judges a drafted token x at one position. From the target's law p and the law q that x was
drawn from it says two masses: `kept`, of which x keeps kept(x), and `left`, from which a token is
drawn where x is not kept. x is kept iff `uniform * q(x) < kept(x)`. Three families cover the field:

* rules with a law of their own, h: kept = min(h, q), left = max(h - q, 0); the emitted token has
  exactly the law h, whatever q. h = p is `rejection`, and lossless.
* gates: kept = q where the gate is open and 0 elsewhere, left = p: lossy, and how far is the
  gate's threshold.
* `block` and `k_seq` look at several tokens at once; they are lossless.

Laws are those that tokens are drawn from: warped by temperature and filters, or, where the
temperature is 0, bare. At temperature 0 the draft is a single token; it is kept iff it is the
target's most probable one or the rule trusts it.

To add a rule, add an entry to `ACCEPTANCE_RULES`; for native speed, name it in `csrc/rules.h`,
too. tests/test_acceptance.py asks for its law in closed form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Situation(NamedTuple):
    """What a rule is asked about.

    target, draft: (..., V) float. p and q, probabilities.
    token: (...,) int64. The drafted token x.
    memory: (...,) float. What `remember` made of the tokens before; 0 at the start of a text.
    candidates: how many tokens are drafted for this position, x included.
    """

    target: Tensor
    draft: Tensor
    token: Tensor
    memory: Tensor
    candidates: int = 1

    def of_token(self, values: Tensor) -> Tensor:
        """(..., 1): what (..., V) values say of x."""
        return values.gather(-1, self.token[..., None])

    def without_token(self, values: Tensor) -> Tensor:
        """(..., V) values with x's set to 0."""
        return values.scatter(-1, self.token[..., None], 0.0)


class Judgement(NamedTuple):
    """A rule's answer.

    kept: (..., V). Mass that a draft token keeps; only x's counts.
    left: (..., V). What replaces x, not normalised.
    trusted: (..., 1) bool or None. Whether x is kept at temperature 0 though it is not the target's
        most probable token.
    vetoed: (..., 1) bool or None. Whether x may not be emitted, not even at temperature 0.
    """

    kept: Tensor
    left: Tensor
    trusted: Tensor | None = None
    vetoed: Tensor | None = None


def _total(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)


def _entropy(law: Tensor) -> Tensor:
    """(..., 1) nats."""
    return -_total(torch.xlogy(law, law))


def _top(law: Tensor, count: float) -> Tensor:
    """(..., V) bool: the `count` most probable tokens, and those that tie with the last of them."""
    count = min(int(count), law.shape[-1])
    return law >= law.topk(count, -1).values[..., -1:]


# --- rules with a law of their own ----------------------------------------------------------------


def _emit(law: Tensor, at: Situation, trusted: Tensor | None = None) -> Judgement:
    return Judgement(torch.minimum(law, at.draft), (law - at.draft).clamp(min=0), trusted)


def _rejection(at: Situation) -> Judgement:
    return _emit(at.target, at)


def _lenient(at: Situation, lenience: float) -> Judgement:
    # Replaced as `rejection` does: no other residual is as near to the target for what it keeps.
    kept = torch.minimum(at.target / lenience, at.draft)
    return Judgement(kept, (at.target - at.draft).clamp(min=0))


def _greedy(at: Situation) -> Judgement:
    return Judgement(at.target, torch.zeros_like(at.target))


def _cascade(at: Situation, defers: Tensor) -> Judgement:
    """q where the row does not defer, p where it does."""
    return _emit(torch.where(defers, at.target, at.draft), at, ~defers)


def _cascade_chow(at: Situation, alpha: float) -> Judgement:
    return _cascade(at, at.draft.amax(-1, keepdim=True) < 1 - alpha)


def _cascade_diff(at: Situation, alpha: float) -> Judgement:
    best = at.target.amax(-1, keepdim=True)
    return _cascade(at, at.draft.amax(-1, keepdim=True) < best - alpha)


def _cascade_opt(at: Situation, alpha: float) -> Judgement:
    best = at.target.amax(-1, keepdim=True)
    distance = _total((at.target - at.draft).abs()) / 2
    return _cascade(at, at.draft.amax(-1, keepdim=True) < best - alpha * distance)


def _token_cascade(at: Situation, defers: Tensor) -> Judgement:
    """Mass of q on tokens that defer goes to p."""
    deferred = _total(at.draft * defers)
    law = torch.where(defers, 0.0, at.draft) + at.target * deferred
    return _emit(law, at, ~defers.gather(-1, at.token[..., None]))


def _cascade_v1(at: Situation, alpha: float) -> Judgement:
    return _token_cascade(at, at.draft < at.target.amax(-1, keepdim=True) - alpha)


def _cascade_v2(at: Situation, alpha: float) -> Judgement:
    return _token_cascade(at, at.target < at.target.amax(-1, keepdim=True) - alpha)


def _cascade_v3(at: Situation, alpha: float) -> Judgement:
    return _token_cascade(at, at.target < (1 - alpha) * at.target.amax(-1, keepdim=True))


_MOST_B = 2.0**42


def mentored_law(target: Tensor, draft: Tensor, divergence: float) -> Tensor:
    """(V,): the law h nearest to q with KL(p || h) <= divergence, as Mentored decoding has it.

    h = median(p / b, q, p / a) with a <= 1 <= b: b makes it sum to what q sums to, if to anything,
    and a is as small as the divergence allows. Where KL(p || q) <= divergence, h = q; where the
    divergence is 0, h = p.
    """
    if divergence == 0:
        return target
    if _total(_kl(target, draft)) <= divergence:
        return draft
    ratio = torch.where(target > 0, target / draft, 0.0)  # +inf where q alone is 0
    ratio, order = ratio.sort()

    def upto(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values[order].cumsum(0), (1, 0))

    p, q = upto(target), upto(draft)
    nats = upto(torch.where(target / draft < torch.inf, _kl(target, draft), 0.0))

    # A draft that may be withdrawn sums to less; what is nearer to 1 than this is rounding.
    is_less = (q[-1] > 0) & ((q[-1] - 1).abs() > 2.0**-40)
    whole = torch.where(is_less, q[-1], 1.0)

    def bounds(a: Tensor) -> tuple[Tensor, Tensor]:
        """b, and KL(p || h), for this a."""
        i = int(torch.searchsorted(ratio, a, right=True))
        room = whole - p[i] / a + q[i]
        # Were b the ratio at j or above: how much the law would sum to.
        sums = q[i:-1] + (p[-1] - p[i:-1]) / ratio[i:]
        sums = sums.where(ratio[i:] < torch.inf, 0.0)
        j = i + int((sums > room).sum())
        rest = p[-1] - p[j]
        # What a larger b puts above q is less than any residual.
        b = torch.full_like(a, _MOST_B)
        if rest > 0:
            b = (rest / (room - q[j]).clamp(min=0)).clamp(1, _MOST_B)
        return b, p[i] * a.log() + nats[j] - nats[i] + rest * b.log()

    if not bool(ratio[-1] > 0):  # nothing can be made of such a target
        return target
    low, high = ratio[ratio > 0][0].log().clamp(max=0), torch.zeros_like(p[0])  # of a
    for _ in range(60):
        middle = (low + high) / 2
        far = bounds(middle.exp())[1] > divergence
        low, high = (middle, high) if far else (low, middle)
    a = high.exp()
    return torch.maximum(torch.minimum(draft, target / a), target / bounds(a)[0])


def _mentored(at: Situation, divergence: float) -> Judgement:
    vocab_size = at.target.shape[-1]
    rows = zip(at.target.reshape(-1, vocab_size), at.draft.reshape(-1, vocab_size), strict=True)
    law = torch.stack([mentored_law(p, q, divergence) for p, q in rows])
    return _emit(law.reshape(at.target.shape), at)


def _cactus(at: Situation, divergence: float) -> Judgement:
    """Raises x's own probability, to the same KL to first order, and lowers the others'."""
    p = at.of_token(at.target)
    spread = (p * (1 - p)).clamp(min=0)
    variance = torch.where(spread > 0, 2 * divergence * spread, 0.0)
    raised = (p + variance.sqrt()).clamp(max=1)
    others = at.target * ((1 - raised) / (1 - p).clamp(min=torch.finfo(p.dtype).tiny))
    kept = torch.minimum(raised, at.draft)
    return Judgement(kept, at.without_token((others - at.draft).clamp(min=0)))


# --- gates ----------------------------------------------------------------------------------------


def _gate(at: Situation, is_open: Tensor) -> Judgement:
    """Keeps every draft token where the gate is open; else the target is drawn from afresh."""
    return Judgement(torch.where(is_open, at.draft, 0.0), at.target, is_open)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, torch.xlogy(p, p / q), 0.0)


def _js(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _js_fsd(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return (_kl(middle, p) + _kl(middle, q)) / 2


# Terms that sum to a divergence, in nats; p is the target, q the draft.
DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "js_fsd": _js_fsd,
        "js": _js,
        "kl": _kl,
        "reverse_kl": lambda p, q: _kl(q, p),
        "tv": lambda p, q: (p - q).abs() / 2,
    }
)


def _divergence_gate(name: str) -> "Judge":
    terms = DIVERGENCES[name]

    def judge(at: Situation, threshold: float, top_k: float) -> Judgement:
        p, q = at.target, at.draft
        if 0 < top_k < p.shape[-1]:
            inside = _top(p, top_k)
            rest = [_total(torch.where(inside, 0.0, law)) for law in (p, q)]
            found = _total(torch.where(inside, terms(p, q), 0.0)) + terms(rest[0], rest[1])
        else:
            found = _total(terms(p, q))
        return _gate(at, found <= threshold)

    return judge


def _typical(at: Situation, epsilon: float, delta: float) -> Judgement:
    least = torch.exp(-_entropy(at.target)).mul(delta).clamp(max=epsilon)
    return _gate(at, at.of_token(at.target) > least)


def _top_k(at: Situation, k: float) -> Judgement:
    return _gate(at, _total((at.target > at.of_token(at.target)).to(at.target.dtype)) < k)


def _likelihood(at: Situation, threshold: float, smoothing: float) -> Judgement:
    surprise = remember(at.memory[..., None], at.of_token(at.target).log(), smoothing)
    return _gate(at, surprise <= threshold)


_Number = TypeVar("_Number", float, Tensor)


def remember(memory: _Number, log_prob: _Number, smoothing: float) -> _Number:
    """The memory of `likelihood`, a moving average in nats, after one more emitted token."""
    return smoothing * memory - (1 - smoothing) * log_prob


def _entropy_veto(
    at: Situation, target_entropy: float, draft_entropy: float, overlap: float, top_n: float
) -> Judgement:
    """Both unsure, and of the same tokens: whatever the draft says, the target says another."""
    common = _total((_top(at.target, top_n) & _top(at.draft, top_n)).to(at.target.dtype))
    vetoed = (
        (_entropy(at.target) > target_entropy)
        & (_entropy(at.draft) > draft_entropy)
        & (common >= overlap * min(int(top_n), at.target.shape[-1]))
        & (at.of_token(at.target) < 1)
    )
    plain = _rejection(at)
    return Judgement(
        torch.where(vetoed, 0.0, plain.kept),
        torch.where(vetoed, at.without_token(at.target), plain.left),
        vetoed=vetoed,
    )


# --- several tokens at once -----------------------------------------------------------------------


def block_step(reach: float, ratio: float) -> float:
    """How much of the path so far is kept, capped: c_i = min(1, c_{i-1} p(x_i) / q(x_i))."""
    return min(1.0, reach * ratio)


def block_threshold(reach: float, mass_left: float) -> float:
    """Chance that a block ends no earlier than here; `mass_left` = sum max(reach p - q, 0)."""
    return mass_left / (mass_left + (1 - reach)) if mass_left > 0 else float(reach >= 1)


def _k_seq(at: Situation) -> Judgement:
    """Keeps min(p / rho, q) of each of k tokens drawn from q; rho balances what is kept."""
    k = at.candidates
    low, high = torch.ones_like(at.target[..., :1]), torch.full_like(at.target[..., :1], float(k))
    for _ in range(60):
        rho = (low + high) / 2
        once = _total(torch.minimum(at.target / rho, at.draft))
        short = 1 - (1 - once) ** k >= rho * once
        low, high = torch.where(short, rho, low), torch.where(short, high, rho)
    # A token is kept rho times on average: rho min(p / rho, q) of it is accounted for.
    kept = torch.minimum(at.target / high, at.draft)
    return Judgement(kept, (at.target - high * at.draft).clamp(min=0))


# --- the registry ---------------------------------------------------------------------------------

Judge = Callable[..., Judgement]


class Parameter(NamedTuple):
    """A number that a rule takes: its default, and the range [low, high] it must lie in.

    open_low: whether low itself is out of range.
    """

    name: str
    default: float
    low: float
    high: float
    open_low: bool = False

    def check(self, rule: str, value: object) -> float:
        """The value as a float, or a ValueError that says the range."""
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = float("nan")
        if not self.low <= number <= self.high or (self.open_low and number == self.low):
            interval = f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"
            raise ValueError(
                f"acceptance: {self.name}: expected a number in {interval} for {rule!r}, "
                f"got {value}"
            )
        return number


@dataclass(frozen=True)
class AcceptanceRule:
    """One way of judging drafts.

    name: what users and kernels call it.
    judge: (situation, *parameters) -> Judgement.
    law: the law of the emitted token: "target", or in which sense it is another.
    source: the paper that defines it.
    parameters: numbers it takes, in order.
    needs_draft: whether it looks at the draft's law even at temperature 0.
    greedy: whether the target first collapses onto its most probable token (lowest id on ties). The
        residual is then empty, which means that the target itself is emitted.
    independent: whether several tokens drafted for one position are all judged by the target, and
        not each by what those before it have left.
    block: whether a chain is judged as a whole; `judge` is then not asked.
    remembers: whether it depends on the tokens before, by `Situation.memory`.
    """

    name: str
    judge: Judge
    law: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    needs_draft: bool = False
    greedy: bool = False
    independent: bool = False
    block: bool = False
    remembers: bool = False

    @property
    def lossless(self) -> bool:
        """Whether the emitted law is the target law, whatever the draft."""
        return self.law == "target"


_INFINITY = float("inf")
_ALPHA = (Parameter("alpha", 0.2, 0.0, 1.0),)
_CASCADES = "Narasimhan et al. 2024, arXiv:2405.19261"
_FSD = "Holsman et al. 2025, arXiv:2502.20704"


def _gated_by(divergence: str, threshold: float, highest: float) -> AcceptanceRule:
    return AcceptanceRule(
        divergence,
        _divergence_gate(divergence),
        f"the draft's where {divergence}(target, draft) <= threshold, else the target's",
        _FSD,
        (
            Parameter("threshold", threshold, 0.0, highest),
            # 0 is all tokens; else those most probable to the target, and one for the rest.
            Parameter("top_k", 0, 0, 2**31 - 1),
        ),
        needs_draft=True,
    )


_RULES = (
    AcceptanceRule("rejection", _rejection, "target", "Leviathan et al. 2023, arXiv:2211.17192"),
    # At least as many tokens as `rejection` keeps, on average, for any draft.
    AcceptanceRule("block", _rejection, "target", "Sun et al. 2024, arXiv:2403.10444", block=True),
    # For k tokens drawn independently from one draft law; for one it is `rejection`.
    AcceptanceRule(
        "k_seq", _k_seq, "target", "Sun et al. 2023, arXiv:2310.15141", independent=True
    ),
    AcceptanceRule(
        "greedy",
        _greedy,
        "the one-point law on the target's most probable token",
        "Stern et al. 2018, arXiv:1811.03115",
        greedy=True,
    ),
    # 1 is `rejection`; smaller keeps drafts up to 1 / lenience too probable.
    AcceptanceRule(
        "lenient",
        _lenient,
        "at most target / lenience",
        "Leviathan et al. 2023, arXiv:2211.17192, A.5",
        (Parameter("lenience", 0.5, 0.0, 1.0, open_low=True),),
    ),
    AcceptanceRule(
        "mentored",
        _mentored,
        "the law h nearest to the draft's with KL(target || h) <= divergence",
        "Tran-Thien 2023, github.com/vivien000/mentored_decoding; cf. arXiv:2211.17192",
        (Parameter("divergence", 0.15, 0.0, _INFINITY),),
    ),
    AcceptanceRule(
        "cactus",
        _cactus,
        "the target's with each token's own probability raised by at most sqrt(2 divergence) / 2",
        "Cactus, ICLR 2026, cf. arXiv:2211.17192",
        (Parameter("divergence", 0.75, 0.0, _INFINITY),),
    ),
    AcceptanceRule(
        "cascade_chow",
        _cascade_chow,
        "h: the draft's where its best token has at least 1 - alpha, else the target's",
        _CASCADES,
        _ALPHA,
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_diff",
        _cascade_diff,
        "h: the draft's where its best is at most alpha below the target's best, else the target's",
        _CASCADES,
        _ALPHA,
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_opt",
        _cascade_opt,
        "h: as cascade_diff, with alpha TV(target, draft) for alpha",
        _CASCADES,
        (Parameter("alpha", 0.5, 0.0, _INFINITY),),
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_v1",
        _cascade_v1,
        "h: the draft's on tokens it finds at most alpha below the target's best, the rest target",
        _CASCADES,
        _ALPHA,
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_v2",
        _cascade_v2,
        "h: the draft's on tokens the target finds at most alpha below its best, the rest target",
        _CASCADES,
        _ALPHA,
    ),
    AcceptanceRule(
        "cascade_v3",
        _cascade_v3,
        "h: the draft's on tokens the target finds at least 1 - alpha of its best, the rest target",
        _CASCADES,
        _ALPHA,
    ),
    # js_fsd is half KL(m || target) plus half KL(m || draft) with their mean m, as published: it
    # has no bound, where js, the Jensen-Shannon divergence, is at most ln 2.
    _gated_by("js_fsd", 0.4, _INFINITY),
    _gated_by("js", 0.2, _INFINITY),
    _gated_by("kl", 0.5, _INFINITY),
    _gated_by("reverse_kl", 0.5, _INFINITY),
    _gated_by("tv", 0.4, 1.0),
    AcceptanceRule(
        "typical",
        _typical,
        "the draft's on tokens with p > min(epsilon, delta exp(-H(target))), else the target's",
        "Cai et al. 2024 (Medusa), arXiv:2401.10774",
        (Parameter("epsilon", 0.09, 0.0, 1.0), Parameter("delta", 0.3, 0.0, 1.0)),
    ),
    AcceptanceRule(
        "top_k",
        _top_k,
        "the draft's on the target's k most probable tokens, else the target's",
        "Cactus, ICLR 2026, cf. arXiv:2211.17192",
        (Parameter("k", 3, 1, 2**31 - 1),),
    ),
    # Smoothing 0 is BiLD's rollback rule (arXiv:2302.07863).
    AcceptanceRule(
        "likelihood",
        _likelihood,
        "the draft's while a moving average of -log p(x) is at most threshold, else the target's",
        "Consultant decoding 2025, arXiv:2506.02391",
        (Parameter("threshold", 2.0, 0.0, _INFINITY), Parameter("smoothing", 0.2, 0.0, 1.0)),
        remembers=True,
    ),
    AcceptanceRule(
        "entropy_veto",
        _entropy_veto,
        "the target's, but without the drafted token where both are unsure of the same tokens",
        "EASD 2025, arXiv:2512.23765",
        (
            Parameter("target_entropy", 2.0, 0.0, _INFINITY),
            Parameter("draft_entropy", 2.0, 0.0, _INFINITY),
            Parameter("overlap", 0.8, 0.0, 1.0),
            Parameter("top_n", 10, 1, 2**31 - 1),
        ),
        needs_draft=True,
    ),
)
ACCEPTANCE_RULES: Mapping[str, AcceptanceRule] = MappingProxyType({r.name: r for r in _RULES})


class Acceptance:
    """A rule and its parameters, checked: `Acceptance("js", threshold=0.3)`.

    rule: the entry of `ACCEPTANCE_RULES`.
    parameters: its numbers in the registry's order; those not given are the defaults.
    """

    def __init__(self, name: str = "rejection", **parameters: Any) -> None:
        """Check the name, the parameters' names and their ranges; raises ValueError."""
        if name not in ACCEPTANCE_RULES:
            raise ValueError(
                f"acceptance: name: unknown rule {name!r}; known rules: "
                + ", ".join(sorted(ACCEPTANCE_RULES))
            )
        self.rule = ACCEPTANCE_RULES[name]
        known = [parameter.name for parameter in self.rule.parameters]
        for given in parameters:
            if given not in known:
                expected = ", ".join(known) or "no parameter"
                raise ValueError(
                    f"acceptance: {given}: expected {expected} for {name!r}, got {given}"
                )
        self.parameters = tuple(
            parameter.check(name, parameters.get(parameter.name, parameter.default))
            for parameter in self.rule.parameters
        )

    @staticmethod
    def of(given: "Acceptance | str") -> "Acceptance":
        """The rule itself, or the one of that name with its defaults."""
        return given if isinstance(given, Acceptance) else _DEFAULTS.get(given) or Acceptance(given)

    @staticmethod
    def parse(text: str) -> "Acceptance":
        """A rule as it is written on a command line: "js" or "js:threshold=0.3,top_k=50"."""
        name, _, rest = text.partition(":")
        parameters = {}
        for part in rest.split(",") if rest else []:
            key, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"acceptance: {name}: expected name=number, got {part!r}")
            parameters[key.strip()] = value
        return Acceptance(name, **parameters)

    def __repr__(self) -> str:
        """As it is written in Python."""
        names = [parameter.name for parameter in self.rule.parameters]
        numbers = "".join(f", {n}={v:g}" for n, v in zip(names, self.parameters, strict=True))
        return f"Acceptance({self.rule.name!r}{numbers})"


_DEFAULTS = {name: Acceptance(name) for name in ACCEPTANCE_RULES}
