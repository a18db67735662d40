# SPDX-License-Identifier: Apache-2.0
"""Methods by the names they were published under: which schedule, which rule, which models.

A method is nothing but arguments of `SpeculativeDecoder`, written as text, so everything it does
stands elsewhere: schedules in `schedules/`, acceptance rules in `specens_kernels.ACCEPTANCE_RULES`.
`build` makes the decoder; `specens generate --method NAME` and benchmarks/bench_methods.py go
through it. To add a method, add an entry to `METHODS`. Reading the table needs no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from specens import family
from specens_kernels import ACCEPTANCE_RULES, Refusal
from specens_kernels.arguments import number
from specens_kernels.refusal import shown

if TYPE_CHECKING:
    from specens.decoder import SpeculativeDecoder
    from specens.members.weight_head import WeightHead

# The share of a draft that joins the ensemble, where none is asked for.
_DRAFT_WEIGHT = 0.3


@dataclass(frozen=True)
class Method:
    """One published way of decoding.

    name: what it is called here.
    own_law: the law of the text: "ensemble" or "target" where it is exact; else what it is
        instead. Empty is what the rule says.
    needs: what it is made of, in words.
    use: when to use it.
    source: who published it.
    schedule: as text. acceptance: rules as text, one for each level that checks.
    draft_vocabulary: as for the decoder.
    models: of the family that ships, the ensemble's. drafts: the drafts, the smallest first.
    deep: whether it takes any number of drafts, one at least.
    joins: whether the draft is a member of the ensemble, its first.
    samples: whether it cannot decode greedily.
    prepare: (models, drafts) -> drafts, where drafts are made of the models.
    """

    name: str
    own_law: str
    needs: str
    use: str
    source: str
    schedule: str
    acceptance: tuple[str, ...] = ("rejection",)
    draft_vocabulary: str = "same"
    models: tuple[str, ...] = ("code",)
    drafts: tuple[str, ...] = ("draft",)
    deep: bool = False
    joins: bool = False
    samples: bool = False
    prepare: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]] | None = None

    @property
    def law(self) -> str:
        """The law of the text: "ensemble" or "target" where it is exact."""
        return self.own_law or ACCEPTANCE_RULES[self.acceptance[-1].partition(":")[0]].law

    @property
    def lossless(self) -> bool:
        """Whether the text has exactly the law that was asked for."""
        return self.law in ("ensemble", "target")


_PAIR = "a draft and a target"
_MEMBERS = ("code", "prose")
_CASCADES = "Narasimhan et al. 2024, arXiv:2405.19261"
_SE = "Fu et al. 2025, arXiv:2502.01662"
_DIVERSED = "DIVERSED 2026, arXiv:2604.07622"
_PYRAMID = "PyramidSD 2025, arXiv:2510.12966"


def _two_thirds(model: Any) -> Any:
    """The model with two thirds of its layers."""
    from specens.members.drafts import layer_skip

    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return layer_skip(model, max(2 * layers // 3, 1))


def _quantised(model: Any) -> Any:
    from specens.members.drafts import quantised

    return quantised(model)


# Name, rule, when to use it, source: one draft, one target, judged by a lossy rule.
def _relaxed(name: str, rule: str, use: str, source: str) -> Method:
    """One draft and one target, judged by a lossy rule."""
    return Method(name, "", _PAIR, use, source, "speculative", (rule,))


_METHODS = (
    Method(
        "plain",
        "ensemble",
        "members",
        "the baseline: every member reads every token",
        "-",
        "plain",
        models=_MEMBERS,
        drafts=(),
    ),
    Method(
        "alternating",
        "ensemble",
        "members",
        "members of similar cost; any ensemble, greedy or sampled",
        f"Speculative Ensemble, {_SE}",
        "alternating",
        models=_MEMBERS,
        drafts=(),
    ),
    Method(
        "component",
        "ensemble",
        "members, sampled mixture",
        "sampling from a mixture of members of one cost",
        "Mixture-model-like ensemble, arXiv:2605.00419",
        "component",
        models=_MEMBERS,
        drafts=(),
        samples=True,
    ),
    Method(
        "lookahead",
        "ensemble",
        "members, sampled mixture",
        "sampling from a mixture of which one member is much cheaper",
        "here",
        "lookahead",
        drafts=("draft",),
        joins=True,
        samples=True,
    ),
    Method(
        "speculative_ensemble",
        "ensemble",
        "a draft and members",
        "a draft much cheaper than the members",
        f"SD of an ensemble, {_SE}",
        "speculative",
        models=_MEMBERS,
    ),
    Method(
        "speculative",
        "target",
        _PAIR,
        "a draft that often agrees",
        "Leviathan et al. 2023, arXiv:2211.17192",
        "speculative",
    ),
    Method(
        "block",
        "target",
        _PAIR,
        "as speculative, longer drafts: keeps no fewer tokens on average",
        "Sun et al. 2024, arXiv:2403.10444",
        "speculative:tokens=6",
        ("block",),
    ),
    Method(
        "lookup",
        "target",
        "nothing but the target",
        "text that repeats its prompt: editing, summaries, code",
        "Prompt lookup, Saxena 2023",
        "lookup",
        drafts=(),
    ),
    Method(
        "confidence",
        "target",
        _PAIR,
        "a draft whose agreement varies along the text",
        "transformers' assistant_confidence_threshold; cf. DISCO, arXiv:2405.04304",
        "speculative:tokens=8,stop=confidence",
    ),
    Method(
        "adaedl",
        "target",
        _PAIR,
        "a draft whose certainty varies along the text; asks nothing of the token drawn",
        "AdaEDL, arXiv:2410.18351",
        "speculative:tokens=8,stop=entropy",
    ),
    Method(
        "layer_skip",
        "target",
        "nothing but the target",
        "no draft at hand; deep targets",
        "Self-speculative decoding, arXiv:2309.08168",
        "speculative",
        drafts=(),
        prepare=lambda models, _: [_two_thirds(models[0])],
    ),
    Method(
        "quantised",
        "target",
        "nothing but the target; torchao",
        "no draft at hand; a machine where int8 weights are faster",
        "cf. ML-SpecQD, arXiv:2503.13565",
        "speculative",
        drafts=(),
        prepare=lambda models, _: [_quantised(models[0])],
    ),
    Method(
        "mlspecqd",
        "target",
        f"{_PAIR}; torchao",
        "a draft, and int8 weights that are faster, between draft and target",
        "ML-SpecQD, arXiv:2503.13565",
        "hierarchy:tokens=3,5",
        ("rejection", "rejection"),
        prepare=lambda models, drafts: [*drafts, _quantised(models[0])],
    ),
    Method(
        "shared_vocabulary",
        "target",
        "a draft of another tokenizer, and a target",
        "no draft with the target's tokenizer",
        "TLI, Timor et al. 2025, arXiv:2502.05202",
        "speculative",
        draft_vocabulary="shared",
    ),
    Method(
        "companion",
        "target",
        "a draft, a companion of its size, and a target",
        "large batches, where verifying in vain is dear",
        "Speculative verification, arXiv:2509.24328",
        "companion",
        drafts=("draft", "prose"),
    ),
    Method(
        "companion_token",
        "target",
        "a draft, a companion of its size, and a target; no filters",
        "as companion, where tokens of one law differ in what the companion thinks of them",
        "Speculative verification, arXiv:2509.24328, made exact",
        "companion:cut=token",
        drafts=("draft", "prose"),
    ),
    Method(
        "hierarchy",
        "ensemble",
        "drafts of rising size, one or more, and a target",
        "a mid-sized model between draft and target",
        "HSD, arXiv:2510.19705",
        "hierarchy",
        models=_MEMBERS,
        drafts=("draft", "code"),
        deep=True,
    ),
    Method(
        "static",
        "draft_weight of the draft, the rest of the target",
        _PAIR,
        "trading the target's law for speed by one number",
        f"static ensemble, {_DIVERSED}",
        "speculative:proposer=0",
        joins=True,
    ),
    Method(
        "diversed",
        "a learned mixture of draft and target at each position",
        f"{_PAIR}, a trained head",
        "trading the target's law for speed, where a task says what matters",
        _DIVERSED,
        "speculative:proposer=0",
        joins=True,
    ),
    Method(
        "pyramid_fuzzy",
        "each level's where it is near the level above, else the latter's",
        "two drafts and a target",
        "most speed, least control",
        f"PyramidSD-F, {_PYRAMID}",
        "hierarchy:tokens=3,5",
        ("js_fsd:threshold=0.4", "js_fsd:threshold=0.5"),
        models=_MEMBERS,
        drafts=("draft", "code"),
    ),
    Method(
        "pyramid_assisted",
        "the qualifier's where it is near the target, else the target's",
        "two drafts and a target",
        "as fuzzy, but nothing below the qualifier's quality",
        f"PyramidSD-A, {_PYRAMID}",
        "hierarchy:tokens=3,5",
        ("rejection", "js_fsd:threshold=0.5"),
        models=_MEMBERS,
        drafts=("draft", "code"),
    ),
    _relaxed(
        "fsd",
        "js_fsd:threshold=0.4",
        "drafts whose laws are near the target's, in nats of JS",
        "arXiv:2502.20704",
    ),
    _relaxed(
        "js",
        "js:threshold=0.2",
        "drafts whose laws are near the target's, at most ln 2 apart",
        "cf. arXiv:2502.20704",
    ),
    _relaxed(
        "kl",
        "kl:threshold=0.5",
        "drafts that cover what the target may say",
        "cf. arXiv:2502.20704",
    ),
    _relaxed(
        "reverse_kl",
        "reverse_kl:threshold=0.5",
        "drafts that say nothing the target would not",
        "arXiv:2601.04766",
    ),
    _relaxed(
        "tv", "tv:threshold=0.4", "drafts that would often be kept anyway", "cf. arXiv:2502.20704"
    ),
    _relaxed(
        "lenient",
        "lenient:lenience=0.5",
        "a little bias, bounded for each token",
        "arXiv:2211.17192",
    ),
    _relaxed(
        "mentored",
        "mentored:divergence=0.15",
        "a bound on the KL divergence at each position",
        "Tran-Thien 2023",
    ),
    _relaxed(
        "cactus",
        "cactus:divergence=0.75",
        "a bound on the KL divergence for each token",
        "ICLR 2026",
    ),
    _relaxed(
        "cascade_chow", "cascade_chow:alpha=0.3", "drafts that are sure of themselves", _CASCADES
    ),
    _relaxed(
        "cascade_diff", "cascade_diff:alpha=0.1", "drafts that are as sure as the target", _CASCADES
    ),
    _relaxed(
        "cascade_opt",
        "cascade_opt:alpha=0.3",
        "drafts as sure as the target, weighed by their distance",
        _CASCADES,
    ),
    _relaxed(
        "cascade_v1",
        "cascade_v1:alpha=0.2",
        "tokens that the draft finds as likely as the target's best",
        _CASCADES,
    ),
    _relaxed(
        "cascade_v2",
        "cascade_v2:alpha=0.3",
        "tokens that the target finds nearly its best",
        _CASCADES,
    ),
    _relaxed(
        "cascade_v3",
        "cascade_v3:alpha=0.8",
        "tokens that the target finds a share of its best",
        _CASCADES,
    ),
    _relaxed(
        "typical",
        "typical",
        "tokens that are plausible for how sure the target is",
        "Medusa, arXiv:2401.10774",
    ),
    _relaxed("top_k", "top_k:k=3", "tokens among the target's best", "cf. arXiv:2211.17192"),
    _relaxed(
        "consultant",
        "likelihood",
        "drafts that the target finds likely on the whole",
        "arXiv:2506.02391",
    ),
    _relaxed(
        "bild",
        "likelihood:smoothing=0.0",
        "tokens that the target finds likely",
        "arXiv:2302.07863",
    ),
    _relaxed("easd", "entropy_veto", "text other than what both prefer", "arXiv:2512.23765"),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _METHODS})


def method_named(name: str) -> Method:
    """The entry of `METHODS`; raises ValueError."""
    if name not in METHODS:
        raise Refusal.unknown("method", "method", name, METHODS)
    return METHODS[name]


def check_counts(method: Method, num_models: int, num_drafts: int) -> None:
    """Raise Refusal where the method takes another number of models or drafts."""
    wanted = len(method.drafts)
    if num_drafts == 0 if method.deep else num_drafts != wanted:
        expected = "one or more" if method.deep else f"{wanted}"
        raise Refusal("method", "drafts", f"{expected} for {method.name!r}", num_drafts)
    if method.joins and num_models != 1:
        raise Refusal("method", "models", f"one target for {method.name!r}", num_models)


def build(
    method: "Method | str",
    models: Sequence[Any],
    drafts: Sequence[Any] | None = (),
    tokenizers: Sequence[Any] | None = None,
    *,
    draft_weight: float | None = None,
    head: "WeightHead | str | None" = None,
    **overrides: Any,
) -> "SpeculativeDecoder":
    """The decoder of a method.

    Args:
        method: what to build, or its name in `METHODS`.
        models: the ensemble's, or the one target.
        drafts: the smallest first. None is none.
        tokenizers: of the models, then of the drafts.
        draft_weight: "static", "lookahead": the draft's share of the mixture, [0, 1]. None is 0.3.
        head: "diversed": the trained head, or its folder; None is the family's own.
        overrides: arguments of `SpeculativeDecoder` in place of the method's.
    Raises:
        ValueError: the models do not fit the method, or an argument is out of range.
    """
    from specens.arguments import tokenizers_of
    from specens.decoder import SpeculativeDecoder
    from specens.members.weight_head import WeightHead
    from specens_kernels import Acceptance

    method = method_named(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise Refusal("method", "method", "a Method or its name", shown(method))
    drafts = () if drafts is None else drafts
    _check_models("models", models)
    _check_models("drafts", drafts)
    check_counts(method, len(models), len(drafts))
    tokenizers = tokenizers_of(tokenizers)
    if tokenizers is not None and len(tokenizers) != len(models) + len(drafts):
        expected = f"{len(models) + len(drafts)}, one per model"
        raise Refusal("method", "tokenizers", expected, len(tokenizers))
    if draft_weight is not None and not 0.0 <= number(draft_weight) <= 1.0:
        raise Refusal("method", "draft_weight", "a number in [0, 1]", shown(draft_weight))
    if not isinstance(head, WeightHead | str | PathLike | None):
        raise Refusal("method", "head", "a WeightHead, its folder or None", shown(head))
    _check_unused(method, {"draft_weight": draft_weight, "head": head, **overrides})
    if method.prepare is not None:
        drafts = method.prepare(models, drafts)
        if tokenizers is not None:  # those made of the target come last
            tokenizers = [*tokenizers, tokenizers[0]]
    options: dict[str, Any] = {
        "schedule": method.schedule,
        "acceptance": [Acceptance.parse(rule) for rule in method.acceptance],
        "draft_vocabulary": method.draft_vocabulary,
    }
    if len(method.acceptance) == 1:
        options["acceptance"] = options["acceptance"][0]
    options |= overrides
    if method.deep and "schedule" not in overrides:
        tokens = ",".join(str(3 + 2 * i) for i in range(len(drafts)))
        options["schedule"] = f"{method.schedule}:tokens={tokens}"
    if method.joins:
        if "weights" in overrides:
            expected = f"None and draft_weight= for {method.name!r}"
            raise Refusal("method", "weights", expected, "numbers")
        options["weights"] = weights = _weights(method, draft_weight, head)
        if isinstance(weights, WeightHead):
            if not weights.is_for(overrides.get("ensemble", weights.ensemble)):
                raise Refusal(
                    "method",
                    "ensemble",
                    f"{weights.ensemble!r}, which the head is for",
                    shown(overrides["ensemble"]),
                )
            options["ensemble"] = weights.ensemble
        models, drafts = [*drafts, *models], []
        tokenizers = None if tokenizers is None else [tokenizers[-1], *tokenizers[:-1]]
    options["draft"] = list(drafts) or None
    return SpeculativeDecoder(models, tokenizers=tokenizers, **options)


def _check_models(argument: str, given: Any) -> None:
    """Refuse what is no list of causal LMs; an empty one is for `check_counts`."""
    from specens.members.facts import check_causal_lm

    if isinstance(given, str) or not isinstance(given, Sequence):
        got = shown(given) if isinstance(given, str) else type(given).__name__
        raise Refusal("method", argument, "a list of models", got)
    for i, model in enumerate(given):
        check_causal_lm(model, "method", f"{argument}[{i}]")


def _check_unused(method: Method, given: dict[str, Any]) -> None:
    """Refuse what would be ignored."""
    if given.get("draft") is not None:
        raise Refusal("method", "draft", f"drafts= for {method.name!r}", shown(given["draft"]))
    learned = method.name == "diversed"
    for name, used in (("head", learned), ("draft_weight", method.joins and not learned)):
        if given[name] is not None and not used:
            raise Refusal("method", name, f"None for {method.name!r}", shown(given[name]))


def _weights(
    method: Method, draft_weight: float | None, head: "WeightHead | str | None"
) -> "WeightHead | tuple[float, float]":
    from specens.members.weight_head import WeightHead

    if method.name == "diversed":
        if isinstance(head, WeightHead):
            return head
        return WeightHead.load(family.head_path() if head is None else head)
    share = _DRAFT_WEIGHT if draft_weight is None else draft_weight
    return (share, 1 - share)
