# SPDX-License-Identifier: Apache-2.0
"""Texts of a schedule and the law that they must have: a `Case`, and how the two are compared.

Thousands of rows write a few tokens after one prompt; every window of two or three neighbouring
tokens is compared with the law that enumeration gives. The windows hold bonus tokens, tokens after
a block kept whole and tokens after a replacement. To test another law, add it to LAWS.
"""

import dataclasses
import math
from typing import Any

import torch
from folds import FOLDS
from laws import chi_square
from torch import Tensor
from toys import noisy, prompts, sequence_law, toy

from specens import SpeculativeDecoder
from specens.loop.schedule import Schedule

VOCAB_SIZE = 5
LENGTH = 4  # tokens whose law is compared; more are written, so that the end changes nothing
ROWS = 2000

# With a fixed seed a test passes or fails for good. 45 cases of 5 windows: by chance alone the
# least of 225 p-values is below 1e-4 in one choice of seeds out of forty.
HONEST = 1e-4
# A wrong decoder must be told from a right one by far, not by luck.
WRONG = 1e-7


def disagreeing() -> list[Any]:
    """Four members and a draft: two that disagree, and copies of each that nearly agree with it."""
    first, second = toy(0, VOCAB_SIZE), toy(1, VOCAB_SIZE)
    copies = [noisy(first, 1.0), noisy(second, 1.0), noisy(first, 2.0)]
    return [first, second, *copies]


LAWS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "warped": {"temperature": 0.7, "top_p": 0.9},
    "warped together": {"temperature": 0.7, "top_p": 0.9, "scope": "ensemble"},
    "product": {"ensemble": "product"},
    # A product of nuclei that share no token would be empty.
    "warped product": {"ensemble": "product", "temperature": 1.3, "top_p": 0.97},
    "contrastive": {"ensemble": "product", "temperature": 0.7, "plausibility": 0.05},
    "maximum": {"ensemble": "maximum", "temperature": 0.7, "top_p": 0.9},
    "highest logit": {"ensemble": "highest_logit", "scope": "ensemble", "temperature": 0.8},
    "warped product together": {
        "ensemble": "product",
        "temperature": 0.7,
        "top_p": 0.9,
        "scope": "ensemble",
    },
}
WEIGHTS = {
    "mixture": [[1.0], [0.4, 0.6], [0.5, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]],
    "product": [[1.0], [0.7, 0.6], [0.6, 0.5, 0.3], [0.5, 0.4, 0.3, 0.2]],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule, how many members it has, and an entry of LAWS."""

    law: str
    members: int
    schedule: Schedule
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    drafts: int = 0

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.schedule} {self.members} {self.law} {options}".replace(" ", "_")

    @property
    def weights(self) -> list[float]:
        if self.law == "contrastive":
            return [1.4, -0.4]
        ensemble = LAWS[self.law].get("ensemble", "mixture")
        return WEIGHTS.get(ensemble, WEIGHTS["mixture"])[self.members - 1]

    def decoder(self, models: list[Any]) -> SpeculativeDecoder:
        law = LAWS[self.law]
        names = [name for name in ("ensemble", "scope", "plausibility") if name in law]
        return SpeculativeDecoder(
            models[: self.members],
            weights=self.weights,
            schedule=self.schedule,
            draft=models[-1 : -1 - self.drafts : -1] or None,
            **{name: FOLDS.get(law[name], law[name]) for name in names},
            **self.options,
        )

    def texts(self, models: list[Any], rows: int = ROWS) -> Tensor:
        """(rows, LENGTH) tokens written after the prompt, one seed a row."""
        decoder = self.decoder(models)
        prompt = prompts([3], VOCAB_SIZE)["input_ids"]
        law = LAWS[self.law]
        warpers = {name: law[name] for name in ("temperature", "top_p") if name in law}
        texts = [
            decoder.generate(
                prompt.expand(1000, -1),
                attention_mask=torch.ones(1000, 3, dtype=torch.int64),
                max_new_tokens=LENGTH + 2,
                do_sample=True,
                top_k=0,
                seed=seed,
                **warpers,
            )
            for seed in range(0, rows, 1000)
        ]
        return torch.cat(texts)[:, 3 : 3 + LENGTH]

    def joint(self, models: list[Any]) -> Tensor:
        """(V,) * LENGTH: the law those tokens must have."""
        prompt = prompts([3], VOCAB_SIZE)["input_ids"]
        members = models[: self.members]
        return sequence_law(members, prompt, LENGTH, weights=self.weights, **LAWS[self.law])


def lumped(counts: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and law with the rarest tokens in one cell, so that 5 are expected in each."""
    impossible = law == 0
    order = law.masked_fill(impossible, math.inf).argsort()[: int((~impossible).sum())]
    expected = law[order] * counts.sum()
    few = int((expected < 5).sum())
    while few and expected[:few].sum() < 5:
        few += 1
    rare, rest = order[:few], order[few:]

    def in_cells(values: Tensor) -> Tensor:
        rarest = values[rare].sum()[None][: min(few, 1)]
        return torch.cat([values[impossible].sum()[None], rarest, values[rest]])

    return in_cells(counts), in_cells(law)


def p_values(texts: Tensor, joint: Tensor) -> dict[tuple[int, int], float]:
    """The p-value of every window of two or three neighbouring tokens, (first, last)."""
    length = joint.dim()
    windows = [range(at, at + n) for n in (2, 3) for at in range(length - n + 1)]
    values = {}
    for window in windows:
        others = [at for at in range(length) if at not in window]
        law = joint.sum(others).flatten()
        cell = torch.zeros(len(texts), dtype=torch.int64)
        for at in window:
            cell = cell * VOCAB_SIZE + texts[:, at]
        counts = torch.bincount(cell, minlength=len(law))
        values[window[0], window[-1]] = chi_square(*lumped(counts, law)).p_value
    return values


def write(decoder: SpeculativeDecoder, lengths: tuple[int, ...] = (3,), **options: Any) -> Tensor:
    settings = {"max_new_tokens": 60, "do_sample": True, "top_k": 0, "seed": 0}
    return decoder.generate(**prompts(lengths, VOCAB_SIZE), **{**settings, **options})


def check_alone(decoder: SpeculativeDecoder, lengths: tuple[int, ...], together: Tensor) -> None:
    """Each row of what `write` wrote with seed 0 is what it is without the others."""
    inputs, width = prompts(lengths, VOCAB_SIZE)["input_ids"], max(lengths)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": together.shape[1] - width}
    for row, length in enumerate(lengths):
        prompt = inputs[row : row + 1, width - length :]
        alone = decoder.generate(prompt, **options, seed=row, attention_mask=prompt >= 0)
        assert torch.equal(together[row, width:], alone[0, length:])
