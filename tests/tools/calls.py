# SPDX-License-Identifier: Apache-2.0
"""Random calls of the ops, as hard as models and mistakes can make them, and how to compare them.

A call is a seed: the same seed gives the same arguments. What a backend returns is compared with
the reference: tokens, counts, paths and status exactly, numbers up to single precision. To cover a
new argument, draw it in `call`; of a new parameter of a rule, its default and the ends of its range
are drawn, and what lies between in `Dice.acceptance`.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import specens_kernels
from specens_kernels import ACCEPTANCE_RULES, ENSEMBLES, Acceptance, Law, mix, sample, verify
from specens_kernels.acceptance import Parameter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPS = {"mix": mix, "sample": sample, "verify": verify}
EXACT = {"mix": (1,), "sample": (0, 3), "verify": (0, 2, 3, 4)}  # the rest is rounded to float32
SMALL, TILES, REAL = (2, 3, 17, 100), (1023, 1024, 1025, 4096, 8193), (49152, 151936, 262144)


# Backends whose calls go to a CUDA device; conftest.py's --card names them.
ON_CARD: set[str] = set()


def on_card(value: Any) -> Any:
    """The same, every tensor in it on the card."""
    if isinstance(value, Tensor):  # with its strides and its offset, whatever they are
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        return whole.cuda().as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, Law):
        names = ("weights", "temperature", "top_k", "top_p", "min_p")
        moved = {name: on_card(getattr(value, name)) for name in names}
        rest = {name: getattr(value, name) for name in ("ensemble", "scope", "plausibility")}
        return Law(**moved, **rest, vocab_size=value.vocab_size)
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_card, value))
    return {key: on_card(item) for key, item in value.items()} if isinstance(value, dict) else value


class Call(NamedTuple):
    """One call of an op, and how a failure names it."""

    op: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    name: str

    def run(self, backend: str) -> tuple[Tensor, ...]:
        given: Any = (self.arguments, self.options)
        arguments, options = on_card(given) if backend in ON_CARD else given
        with specens_kernels.backend(backend):
            answer = OPS[self.op](*arguments, **options)
        return tuple(value.cpu() for value in answer) if backend in ON_CARD else tuple(answer)


def ordinary(parameter: Parameter) -> list[float]:
    """Its default, and the finite ends of its range that it may take."""
    low = [] if parameter.open_low else [parameter.low]
    high = [parameter.high] if math.isfinite(parameter.high) else []
    return [parameter.default, *low, *high]


class Dice(random.Random):
    """Random arguments; `seed` makes torch's generator, too."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def happens(self, probability: float) -> bool:
        return self.random() < probability

    def uniform_tensor(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def logits(self, batch: int, rows: int, vocab_size: int) -> Tensor:
        """Of any kind that a model or a mistake may produce, in rows with any gap between them."""
        width = vocab_size + self.choice([0, 0, 1, 7, 64])
        shape, dtype = (batch, rows, width), self.choice(DTYPES)
        scale = self.choice([0.05, 2.0, 3.0, 12.0])
        values = torch.randn(shape, generator=self.generator) * scale
        if self.happens(0.2):
            values = (values * 2).round() / 2
        if self.happens(0.2):
            values[..., self.randrange(vocab_size)] += 12
        broken = self.choice([None] * 12 + [-math.inf, -math.inf, math.nan, math.inf, "min", "row"])
        if broken == "row":
            values[self.randrange(batch)] = -math.inf
        elif broken is not None:
            value = torch.finfo(dtype).min if broken == "min" else broken
            common = value in (-math.inf, torch.finfo(dtype).min)
            values[self.uniform_tensor(*shape) < (0.5 if common else 2 / width)] = value
        values = values.to(dtype)
        if self.happens(0.3):
            wide = torch.full((batch + 1, rows + 2, width + 3), math.nan, dtype=dtype)
            wide[1:, 1:-1, 1:-2] = values
            values = wide[1:, 1:-1, 1:-2]
        return values

    def law(self, batch: int, rows: int, members: int, vocab_size: int) -> Law:
        ensemble, scope = self.choice(sorted(ENSEMBLES)), self.choice(["member", "ensemble"])
        shape = (*self.choice([(), (batch,), (batch, rows)]), members)
        weights = self.uniform_tensor(*shape) + 0.05
        if self.happens(0.2):
            weights[self.uniform_tensor(*shape) < 0.4] = 0.0
        if ensemble == "mixture":
            weights[..., self.randrange(members)] += 0.1
            weights /= weights.sum(-1, keepdim=True)
        elif self.happens(0.5):
            weights[..., -1] = -weights[..., -1]
        columns = self.choice([1, members if scope == "member" else 1])
        temperature = 0.2 + 1.5 * self.uniform_tensor(self.choice([1, batch]), columns)
        if self.happens(0.4):
            temperature[self.uniform_tensor(*temperature.shape) < 0.4] = 0.0
        options: dict[str, Any] = {"temperature": self.choice([1.0, 0.0, temperature, temperature])}
        if self.happens(0.3):
            counts = torch.randint(-1, 60, (batch,), generator=self.generator)
            options["top_k"] = self.choice([1, 5, 50, vocab_size // 2 + 1, vocab_size + 9, counts])
        if self.happens(0.3):
            options["top_p"] = self.choice([0.1, 0.9, 0.999, 1.1 * self.uniform_tensor(batch)])
        if self.happens(0.2):
            options["min_p"] = self.choice([0.01, 0.1, 0.6, 0.5 * self.uniform_tensor(batch)])
        if ensemble == "product" and self.happens(0.3):
            options["plausibility"] = self.choice([0.01, 0.1, 1.0])
        return Law(weights, ensemble, scope=scope, vocab_size=vocab_size, **options)

    def known(self, logits: Tensor, temperature: Tensor, vocab_size: int) -> Tensor:
        """(B, T) float32 log-sum-exps at a temperature of (B or 1,); some are not told."""
        wide = logits[..., :vocab_size].double().nan_to_num(-math.inf, math.inf, -math.inf)
        lse = (wide / temperature.double().reshape(-1, 1, 1)).logsumexp(-1).float()
        untold = self.choice([math.nan, math.inf, -math.inf])
        coarse = lse.abs() > 1e4  # no float32 is near enough
        return lse.masked_fill(coarse | (self.uniform_tensor(*lse.shape) < 0.2), untold)

    def numbers(self, *shape: int) -> Tensor:
        numbers = torch.randint(2**24, shape, generator=self.generator) * 2.0**-24
        if self.happens(0.2):
            numbers[self.uniform_tensor(*shape) < 0.3] = self.choice([0.0, 1 - 2.0**-24])
        return numbers

    def acceptance(self, rules: Sequence[str], vocab_size: int) -> Acceptance:
        """A rule, and parameters that neither always nor never keep a draft."""
        rule = ACCEPTANCE_RULES[self.choice(rules)]
        size = vocab_size // 2 + 1
        values = {
            "lenience": [1.0, 0.7, 0.05],
            "divergence": [0.0, 0.01, 0.3, 2.0],
            "alpha": [0.0, 0.01, 0.1, 0.5, 1.0, self.random()],
            "threshold": [0.0, 0.01, 0.1, 0.3, 0.6, self.random()],
            "top_k": [0, 0, 1, 2, 9, 50, size, vocab_size + 9],
            "epsilon": [0.0, 0.01, 0.1, self.random()],
            "delta": [0.0, 0.3, self.random()],
            "k": [1, 2, 3, 20, size],
            "smoothing": [0.0, 0.2, 1.0, self.random()],
            "target_entropy": [0.0, 0.3, self.random()],
            "draft_entropy": [0.0, 0.3, self.random()],
            "overlap": [0.0, 0.3, 0.8, 1.0],
            "top_n": [1, 2, 5, 40, size, vocab_size + 3],
        }
        if rule.name == "likelihood":
            values["threshold"] = [0.5, 2.0, 8.0, 4 * self.random()]
        drawn = {
            each.name: self.choice(values.get(each.name) or ordinary(each))
            for each in rule.parameters
        }
        return Acceptance(rule.name, **drawn)

    def drafts(self, sources: Tensor, vocab_size: int) -> Tensor:
        """Likely tokens of (B, N, V) logits; some are anything, some missing."""
        batch, nodes = sources.shape[:2]
        values = sources[..., :vocab_size].float().nan_to_num(-1e9, 1e9, -1e9)
        likely = values.topk(min(3, vocab_size), -1).indices
        tokens = likely[..., self.randrange(likely.shape[-1])] if nodes else likely[..., 0]
        any_token = torch.randint(-2, vocab_size + 2, tokens.shape, generator=self.generator)
        tokens = torch.where(self.uniform_tensor(batch, nodes) < 0.1, any_token, tokens)
        if self.happens(0.3):
            lengths = torch.randint(0, nodes + 1, (batch, 1), generator=self.generator)
            tokens = tokens.masked_fill(torch.arange(nodes) >= lengths, -1)
        return tokens.to(self.choice([torch.int32, torch.int64]))


def call(seed: int, sizes: tuple[int, ...], rules: Sequence[str] = ()) -> Call:
    """With `rules`, a call of `verify` under one of them."""
    dice = Dice(seed)
    vocab_size, batch = dice.choice(sizes), dice.choice([1, 1, 2, 3])
    nodes, members = dice.choice([0, 1, 2, 5]), dice.choice([1, 2, 2, 3, 4])
    op = dice.choice(["mix", "sample", "verify", "verify", "verify"])
    op = "verify" if rules else op
    bonus = nodes == 0 or dice.happens(0.8)
    rows = nodes + 1 if bonus or op != "verify" else nodes
    logits = [dice.logits(batch, rows, vocab_size) for _ in range(members)]
    law = dice.law(batch, rows, members, vocab_size)
    name = f"{op}, seed {seed}: {law}"
    if op == "mix":
        return Call(op, (logits, law), {}, name)
    if op == "sample":
        member = dice.choice([None, None, dice.randrange(members)])
        return Call(op, (logits, dice.numbers(batch, rows, 4), law), {"member": member}, name)
    rule, lenience = dice.choice(["greedy", "lenient", "rejection"]), dice.choice([1.0, 0.7])
    options: dict[str, Any] = {
        "acceptance": Acceptance("lenient", lenience=lenience) if rule == "lenient" else rule,
        "bonus": bonus,
    }
    if rules:
        chosen = dice.acceptance(rules, vocab_size)
        options["acceptance"] = chosen
        if chosen.rule.remembers and dice.happens(0.5):
            options["memory"] = dice.uniform_tensor(batch) * 3
        name += f", {chosen}"
    sources = logits[0][:, :nodes]
    proposal = dice.choice(["members", "logits", "points"])
    if proposal == "members":
        member = dice.randrange(members)
        proposers = torch.full((dice.choice([1, batch]), nodes), member)
        if dice.happens(0.3):
            proposers = torch.randint(-2, members + 1, (batch, nodes), generator=dice.generator)
        options["proposers"] = proposers.to(dice.choice([torch.int32, torch.int64]))
        sources = logits[member][:, :nodes]
    elif proposal == "logits":
        options["draft_logits"] = dice.logits(batch, nodes + 1, vocab_size)
        sources = options["draft_logits"][:, :nodes]
        temperatures = [None, torch.tensor(0.8), dice.uniform_tensor(batch)]
        options["draft_temperature"] = dice.choice(temperatures)
    if dice.happens(0.5) and not is_filtered(law):
        temperature = torch.as_tensor(law.temperature).expand(batch, members)
        if law.ensemble == "mixture" and law.scope == "member":
            rows_lse = [
                dice.known(one, temperature[:, m], vocab_size) for m, one in enumerate(logits)
            ]
            options["lse"] = torch.stack(rows_lse, -1)
        if proposal == "logits":
            own = options["draft_temperature"]
            own = temperature[:, 0] if own is None else own
            lost = dice.choice([0.0, 0.0, 0.3])  # of the draft's mass
            options["draft_lse"] = lost + dice.known(options["draft_logits"], own, vocab_size)
    tokens = dice.drafts(sources, vocab_size)
    arguments = (logits, tokens, dice.numbers(batch, nodes + 1, 4), law)
    return Call(op, arguments, options, name)


def is_filtered(law: Law) -> bool:
    """Whether the law has top-k, top-p or min-p."""
    off = ((law.top_k, 0), (law.top_p, 1.0), (law.min_p, 0.0))
    return any(isinstance(value, Tensor) or value != none for value, none in off)


def check(backend: str, one: Call) -> None:
    """The backend's results are the reference's."""
    expected, found = one.run("reference"), one.run(backend)
    for i, (right, ours) in enumerate(zip(expected, found, strict=True)):
        # A log-sum-exp that is not known is NaN.
        close = {} if i in EXACT[one.op] else {"atol": 1e-5, "rtol": 3e-6, "equal_nan": True}
        torch.testing.assert_close(
            ours, right, **(close or {"atol": 0, "rtol": 0}), msg=lambda m: f"{one.name}\n{m}"
        )


# Normalisers of single precision move a statistic by less than this.
NEAR = 1e-6
COUNTED = ("k", "top_k", "top_n")  # parameters that are whole numbers


def nearby(acceptance: Acceptance) -> Iterator[Acceptance]:
    """The rule with each of its real parameters moved by NEAR, within its range."""
    given = acceptance.rule.parameters
    values = {one.name: value for one, value in zip(given, acceptance.parameters, strict=True)}
    for one in given:
        for step in (-NEAR, NEAR):
            moved = min(max(values[one.name] + step, one.low), one.high)
            if one.name not in COUNTED and (moved > one.low or not one.open_low):
                yield Acceptance(acceptance.rule.name, **{**values, one.name: moved})


def is_near_a_threshold(one: Call) -> bool:
    """Whether the reference decides otherwise when a parameter of the rule moves by NEAR."""
    expected = one.run("reference")
    for moved in nearby(Acceptance.of(one.options["acceptance"])):
        found = one._replace(options={**one.options, "acceptance": moved}).run("reference")
        if any(not torch.equal(expected[i], found[i]) for i in EXACT[one.op]):
            return True
    return False


def check_but_near(backend: str, one: Call) -> bool:
    """`check`; False if they disagree where no backend can be asked to agree."""
    try:
        check(backend, one)
    except AssertionError:
        if is_near_a_threshold(one):
            return False
        raise
    return True
