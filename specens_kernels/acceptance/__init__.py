# SPDX-License-Identifier: Apache-2.0
"""Acceptance rules: how much of a draft law is kept, and what replaces the rest.

A rule judges a drafted token x at one position. From the target's law p and the law q that x was
drawn from it says two masses: `kept`, of which x keeps kept(x), and `left`, from which a token is
drawn where x is not kept. x is kept iff `uniform * q(x) < kept(x)`. Three families cover the field:

* `rules.py`: rules with a law of their own, h: kept = min(h, q), left = max(h - q, 0); the emitted
  token has exactly the law h, whatever q. h = p is `rejection`, and lossless. (`mentored.py` finds
  an h that takes a search.)
* `gates.py`: kept = q where the gate is open and 0 elsewhere, left = p: lossy, and how far is the
  gate's threshold.
* `blocks.py`: `block` and `k_seq` look at several tokens at once; they are lossless.

Laws are those that tokens are drawn from: warped by temperature and filters, or, where the
temperature is 0, bare. At temperature 0 the draft is a single token; it is kept iff it is the
target's most probable one or the rule trusts it.

This file has the facts of every rule and needs no torch. To add a rule, write it in one of the
files above and add its entry to `ACCEPTANCE_RULES`; for native speed, name it in csrc/, too.
tests/oracles/rules.py asks for its definition.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .. import arguments
from ..refusal import Refusal, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .rules import Judgement, Situation

    Judge = Callable[..., Judgement]

_INFINITY = float("inf")
_MOST = 2**31 - 1  # of what is counted


@dataclass(frozen=True)
class _Function:
    """A function of one of this package's files, which is imported when it is first called.

    name: of the function. leading: what it takes before the situation.
    """

    file: str
    name: str
    leading: tuple[Any, ...] = ()

    def __call__(self, at: "Situation", *parameters: float) -> "Judgement":
        function = getattr(import_module(f".{self.file}", __name__), self.name)
        judgement: Judgement = function(*self.leading, at, *parameters)
        return judgement


class Parameter(NamedTuple):
    """A finite number that a rule takes: its default, and the range [low, high] it must lie in.

    open_low: whether low itself is out of range. whole: whether it is a count. by_position: whether
        it may be several numbers, one for each draft of a path.
    """

    name: str
    default: float
    low: float
    high: float
    open_low: bool = False
    whole: bool = False
    by_position: bool = False

    def check(self, rule: str, value: object) -> float:
        """The value as a float, or a Refusal that says the range."""
        number = arguments.number(value)
        within = self.low < number if self.open_low else self.low <= number
        if not (within and number <= self.high and number < _INFINITY) or (
            self.whole and not number.is_integer()
        ):
            low = f"{'(' if self.open_low else '['}{self.low:g}"
            high = f"{self.high:g}{']' if self.high < _INFINITY else ')'}"
            expected = f"a {'whole ' * self.whole}number in {low}, {high} for {rule!r}"
            raise Refusal("acceptance", self.name, expected, shown(value))
        return number

    def several(self, rule: str, value: object) -> "Tensor | tuple[float, ...] | None":
        """A tensor, or numbers by position, as they are kept; None for what is one number."""
        most = 2 if self.by_position else 1
        if hasattr(value, "new_empty"):  # a tensor, without torch
            tensor: Any = value
            if not tensor.is_nested and tensor.dim() == 0:
                return None  # which is no number either
            if tensor.is_nested or tensor.dim() > most or tensor.is_complex():
                expected = "a number or a (B,) tensor" + " or (B, P)" * self.by_position
                raise Refusal("acceptance", self.name, f"{expected} for {rule!r}", shown(value))
            return cast("Tensor", tensor)
        if not self.by_position or not isinstance(value, (list, tuple)) or not value:
            return None
        return tuple(self.check(rule, number) for number in value)


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
    by_token: whether the masses that it keeps and leaves depend on the drafted token.
    by_coin: whether a draft's coin decides alone, at temperature 0, too.
    """

    name: str
    judge: "Judge"
    law: str
    source: str
    parameters: tuple[Parameter, ...] = ()
    needs_draft: bool = False
    greedy: bool = False
    independent: bool = False
    block: bool = False
    remembers: bool = False
    by_token: bool = False
    by_coin: bool = False

    @property
    def by_position(self) -> bool:
        """Whether its one parameter may be several numbers, one for each draft of a path."""
        return any(parameter.by_position for parameter in self.parameters)

    @property
    def lossless(self) -> bool:
        """Whether the emitted law is the target law, whatever the draft."""
        return self.law == "target"


_ALPHA = (Parameter("alpha", 0.2, 0.0, 1.0),)
_CASCADES = "Narasimhan et al. 2024, arXiv:2405.19261"
_FSD = "Holsman et al. 2025, arXiv:2502.20704"


def _gated_by(divergence: str, threshold: float, highest: float) -> AcceptanceRule:
    return AcceptanceRule(
        divergence,
        _Function("gates", "by_divergence", (divergence,)),
        f"the draft's where {divergence}(target, draft) <= threshold, else the target's",
        _FSD,
        (
            Parameter("threshold", threshold, 0.0, highest),
            # 0 is all tokens; else those most probable to the target, and one for the rest.
            Parameter("top_k", 0, 0, _MOST, whole=True),
        ),
        needs_draft=True,
    )


_RULES = (
    AcceptanceRule(
        "rejection",
        _Function("rules", "rejection"),
        "target",
        "Leviathan et al. 2023, arXiv:2211.17192",
    ),
    # At least as many tokens as `rejection` keeps, on average, for any draft.
    AcceptanceRule(
        "block",
        _Function("rules", "rejection"),
        "target",
        "Sun et al. 2024, arXiv:2403.10444",
        block=True,
    ),
    # For k tokens drawn independently from one draft law; for one it is `rejection`.
    AcceptanceRule(
        "k_seq",
        _Function("blocks", "k_seq"),
        "target",
        "Sun et al. 2023, arXiv:2310.15141",
        independent=True,
    ),
    AcceptanceRule(
        "greedy",
        _Function("rules", "greedy"),
        "the one-point law on the target's most probable token",
        "Stern et al. 2018, arXiv:1811.03115",
        greedy=True,
    ),
    # 1 is `rejection`; smaller keeps drafts up to 1 / lenience too probable.
    AcceptanceRule(
        "lenient",
        _Function("rules", "lenient"),
        "at most target / lenience",
        "Leviathan et al. 2023, arXiv:2211.17192, A.5",
        (Parameter("lenience", 0.5, 0.0, 1.0, open_low=True),),
    ),
    AcceptanceRule(
        "mentored",
        _Function("mentored", "mentored"),
        "the law h nearest to the draft's with KL(target || h) <= divergence",
        "Tran-Thien 2023, github.com/vivien000/mentored_decoding; cf. arXiv:2211.17192",
        (Parameter("divergence", 0.15, 0.0, _INFINITY),),
    ),
    AcceptanceRule(
        "cactus",
        _Function("rules", "cactus"),
        "the target's with each token's own probability raised by at most sqrt(2 divergence) / 2",
        "Cactus, ICLR 2026, cf. arXiv:2211.17192",
        (Parameter("divergence", 0.75, 0.0, _INFINITY),),
        by_token=True,
    ),
    AcceptanceRule(
        "cascade_chow",
        _Function("rules", "cascade_chow"),
        "h: the draft's where its best token has at least 1 - alpha, else the target's",
        _CASCADES,
        _ALPHA,
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_diff",
        _Function("rules", "cascade_diff"),
        "h: the draft's where its best is at most alpha below the target's best, else the target's",
        _CASCADES,
        _ALPHA,
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_opt",
        _Function("rules", "cascade_opt"),
        "h: as cascade_diff, with alpha TV(target, draft) for alpha",
        _CASCADES,
        (Parameter("alpha", 0.5, 0.0, _INFINITY),),
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_v1",
        _Function("rules", "cascade_v1"),
        "h: the draft's on tokens it finds at most alpha below the target's best, the rest target",
        _CASCADES,
        _ALPHA,
        needs_draft=True,
    ),
    AcceptanceRule(
        "cascade_v2",
        _Function("rules", "cascade_v2"),
        "h: the draft's on tokens the target finds at most alpha below its best, the rest target",
        _CASCADES,
        _ALPHA,
    ),
    AcceptanceRule(
        "cascade_v3",
        _Function("rules", "cascade_v3"),
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
        _Function("gates", "typical"),
        "the draft's on tokens with p > min(epsilon, delta exp(-H(target))), else the target's",
        "Cai et al. 2024 (Medusa), arXiv:2401.10774",
        (Parameter("epsilon", 0.09, 0.0, 1.0), Parameter("delta", 0.3, 0.0, 1.0)),
        by_token=True,
    ),
    AcceptanceRule(
        "top_k",
        _Function("gates", "top_k"),
        "the draft's on the target's k most probable tokens, else the target's",
        "Cactus, ICLR 2026, cf. arXiv:2211.17192",
        (Parameter("k", 3, 1, _MOST, whole=True),),
        by_token=True,
    ),
    # Smoothing 0 is BiLD's rollback rule (arXiv:2302.07863).
    AcceptanceRule(
        "likelihood",
        _Function("gates", "likelihood"),
        "the draft's while a moving average of -log p(x) is at most threshold, else the target's",
        "Consultant decoding 2025, arXiv:2506.02391",
        (Parameter("threshold", 2.0, 0.0, _INFINITY), Parameter("smoothing", 0.2, 0.0, 1.0)),
        remembers=True,
        by_token=True,
    ),
    AcceptanceRule(
        "entropy_veto",
        _Function("gates", "entropy_veto"),
        "the target's, but without the drafted token where both are unsure of the same tokens",
        "EASD 2025, arXiv:2512.23765",
        (
            Parameter("target_entropy", 2.0, 0.0, _INFINITY),
            Parameter("draft_entropy", 2.0, 0.0, _INFINITY),
            Parameter("overlap", 0.8, 0.0, 1.0),
            Parameter("top_n", 10, 1, _MOST, whole=True),
        ),
        needs_draft=True,
        by_token=True,
    ),
    # For benchmarks, whose drafts are then kept at a rate that does not depend on the models.
    AcceptanceRule(
        "synthetic",
        _Function("rules", "synthetic"),
        "none that a model has: a draft is kept at a rate that is given, whatever the target",
        "vLLM 2026 (0.32), github.com/vllm-project/vllm; SGLang and TensorRT-LLM have it, too",
        (Parameter("rate", 0.7, 0.0, 1.0, by_position=True),),
        by_coin=True,
    ),
)
ACCEPTANCE_RULES: Mapping[str, AcceptanceRule] = MappingProxyType({r.name: r for r in _RULES})


class Acceptance:
    """A rule and its parameters, checked: `Acceptance("js", threshold=0.3)`.

    A parameter may also be a (B,) tensor of numbers, one for each request, which is read at every
    call; its values are not checked, and one beyond the range counts as the end of it. The rate of
    `synthetic` may be several numbers, or a (B, P) tensor: one for each draft of a path, the last
    one for those beyond. Only `verify` takes either.

    rule: the entry of `ACCEPTANCE_RULES`.
    numbers: its numbers in the registry's order; those not given are the defaults, and so are those
        that are several.
    given: by name, what is several numbers.
    """

    def __init__(self, name: str = "rejection", /, **parameters: Any) -> None:
        """Check the name, the parameters' names and their ranges; raises Refusal."""
        self.rule = arguments.entry("acceptance", "name", name, ACCEPTANCE_RULES)
        known = [parameter.name for parameter in self.rule.parameters]
        for given in parameters:
            if given not in known:
                expected = f"{', '.join(known) or 'no parameter'} for {name!r}"
                raise Refusal("acceptance", given, expected, given)
        self.given: dict[str, Tensor | tuple[float, ...]] = {}
        numbers = []
        for parameter in self.rule.parameters:
            value = parameters.get(parameter.name, parameter.default)
            several = parameter.several(name, value)
            if several is not None:
                self.given[parameter.name] = several
                value = parameter.default
            numbers.append(parameter.check(name, value))
        self.numbers = tuple(numbers)

    @property
    def parameters(self) -> tuple[float, ...]:
        """Its numbers in the registry's order; refused where one is several."""
        for parameter in self.given:
            raise Refusal("acceptance", parameter, "one number here", "several")
        return self.numbers

    def of_requests(self, device: "torch.device") -> "Tensor":
        """(B or 1, P) float64: all parameters, of which some are several numbers."""
        from .requests import of_requests

        return of_requests(self, device)

    @staticmethod
    def of(given: "Acceptance | str") -> "Acceptance":
        """The rule itself, or what its text says: "js", "js:threshold=0.3"."""
        if isinstance(given, Acceptance):
            return given
        if isinstance(given, str) and ":" in given:
            return Acceptance.parse(given)
        return arguments.entry("acceptance", "name", given, _DEFAULTS)

    @staticmethod
    def parse(text: str) -> "Acceptance":
        """A rule as it is written on a command line: "js" or "js:threshold=0.3,top_k=50"."""
        if not isinstance(text, str):
            raise Refusal("acceptance", "text", "a string", shown(text))
        name, _, rest = text.partition(":")
        parameters: dict[str, float | str] = {}
        for part in rest.split(",") if rest else []:
            key, equals, value = part.partition("=")
            if not equals or key.strip() in parameters:
                raise Refusal("acceptance", name, "name=number, each name once", shown(part))
            try:
                parameters[key.strip()] = float(value)
            except ValueError:
                parameters[key.strip()] = value.strip()  # no parameter may be that
        return Acceptance(name, **parameters)

    def __repr__(self) -> str:
        """As it is written in Python."""
        names = [parameter.name for parameter in self.rule.parameters]
        values = {n: f"{v:g}" for n, v in zip(names, self.numbers, strict=True)}
        values |= {name: shown(several) for name, several in self.given.items()}
        numbers = "".join(f", {name}={value}" for name, value in values.items())
        return f"Acceptance({self.rule.name!r}{numbers})"


_DEFAULTS = {name: Acceptance(name) for name in ACCEPTANCE_RULES}
