# SPDX-License-Identifier: Apache-2.0
"""How long everything takes: times measured while the models write a text as the decoder would.

Each model is the proposer in turn, with blocks of every size, so that all times are taken in the
loop and alternate. Where a text ends the models write on: how long a forward takes does not depend
on what is read. To time one thing more, add it to `Sweep`, and to `Profile`.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.loop.profile import Times
from specens.loop.run import Run
from specens.loop.schedule import Schedule, Verification
from specens.schedules import Speculative
from specens_kernels import Law

# Tokens of one forward that are timed.
SIZES = (1, 2, 4, 8)
# A size is timed as often before its median counts; near a text's end, others occur, too.
_ENOUGH = 3
# Where all texts end within fewer tokens than this, what is written beyond their ends counts, too.
_LEAST_READ = 16

_T = TypeVar("_T")


@dataclass
class Sweep(Schedule):
    """A schedule that writes the ensemble's text and times what it does, one row at a time.

    Each model is the proposer in turn, with each of `SIZES` less the token that verifies. No text
    ends before its last token.

    ends: tokens that would have ended it.
    forwards: model -> tokens -> seconds. draws: seconds.
    rest: drafts -> seconds of a turn without forwards and draws.
    law, member_law: of the run, the ensemble's and each member's.
    """

    name: ClassVar[str] = "sweep"
    ends: frozenset[int] = frozenset()
    forwards: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    draws: list[float] = field(default_factory=list)
    rest: dict[int, list[float]] = field(default_factory=dict)
    law: Law | None = None
    member_law: Law | None = None
    _turns: int = 0
    # Of the turn that has begun: the run, its start, seconds that are accounted for, drafts.
    _open: tuple[Run, float, float, int] | None = None

    @property
    def most_pending(self) -> int:
        """The longest forward's tokens."""
        return max(SIZES)

    @property
    def complete(self) -> bool:
        """Whether there are times of each model, of several sizes, and of the loop."""
        blocks = all(len(times) > 1 for times in self.forwards.values())
        return bool(self.draws) and bool(self.rest) and blocks

    def turn(self, run: Run) -> list[Verification]:
        """Propose with the next proposer, score with all models."""
        if self._open is not None and self._open[0] is run:
            _, began, known, drafts = self._open
            self.rest.setdefault(drafts, []).append(time.perf_counter() - began - known)
        began = time.perf_counter()
        self.law, self.member_law = run.law, run.member_law
        self.ends |= run.stopper.eos
        run.stopper.eos = frozenset()
        row, models = run.rows[0], range(len(run.members))
        # Every pair in turn, and soon several sizes of each model.
        again, at = divmod(self._turns, len(SIZES))
        wanted = SIZES[at] - 1
        proposer = models[(again + at) % len(models)]
        drafts = min(wanted, run.room(row) - 1)
        known = 0.0
        for _ in range(drafts):
            known += self._feed(run, proposer)
            spent, _log_probs = _timed(run, lambda: run.draw(proposer, run.rows))
            self.draws.append(spent)
            known += spent
        if len(models) == 1:  # it has read its own drafts one by one, as nobody's look-up is read
            run.members[0].rollback([row.length - 1])
        for model in models:
            known += self._feed(run, model)
        self._turns += 1
        self._open = run, began, known, drafts
        return [Verification(run.rows, [drafts], bonus=True)]

    def _feed(self, run: Run, model: int) -> float:
        count = run.rows[0].end - run.members[model].lengths[0]
        spent, _nothing = _timed(run, lambda: run.feed(model, run.rows))
        self.forwards.setdefault(model, {}).setdefault(count, []).append(spent)
        return spent


def _timed(run: Run, work: Callable[[], _T]) -> tuple[float, _T]:
    began = time.perf_counter()
    result = work()
    if run.device.type != "cpu":
        torch.accelerator.synchronize(run.device)
    return time.perf_counter() - began, result


@dataclass
class Endless(Schedule):
    """A schedule whose texts go on beyond their ends; ends: the tokens that would have been."""

    name: ClassVar[str] = "endless"
    schedule: Speculative
    ends: frozenset[int] = frozenset()

    @property
    def most_pending(self) -> int:
        """The schedule's own."""
        return self.schedule.most_pending

    def turn(self, run: Run) -> list[Verification]:
        """The schedule's own, and no end."""
        self.ends |= run.stopper.eos
        run.stopper.eos = frozenset()
        return self.schedule.turn(run)


def write_texts(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Tensor],
    options: Mapping[str, Any],
    *,
    seed: int,
    limit_s: float | None,
) -> list[tuple[Tensor, int]]:
    """(text, begin) of each prompt, until time is up; `options` as `SpeculativeDecoder.generate`'s.

    text: (1, S) int64. begin: tokens of the prompt.
    """
    began = time.perf_counter()
    limit = None if limit_s is None else limit_s / 2
    texts = []
    for i, prompt in enumerate(prompts):
        mask = torch.ones_like(prompt)
        text = decoder.generate(
            prompt, attention_mask=mask, seed=seed + i, **{**options, "max_time": limit}
        )
        texts.append((text, prompt.shape[1]))
        if limit_s is not None and time.perf_counter() - began > limit_s:
            break
    return texts


def count_tokens(texts: Sequence[tuple[Tensor, int]]) -> int:
    """How many were written after the prompts."""
    return sum(text.shape[1] - begin for text, begin in texts)


def up_to_ends(
    texts: Sequence[tuple[Tensor, int]], ends: frozenset[int]
) -> list[tuple[Tensor, int]]:
    """(text, begin) without what was written beyond a text's end, if enough is left to read."""
    cut = []
    for text, begin in texts:
        tokens = text[0, begin:].tolist()
        size = next((at for at, token in enumerate(tokens, 1) if token in ends), len(tokens))
        cut.append((text[:, : begin + size], begin))
    return cut if count_tokens(cut) >= _LEAST_READ else list(texts)


def medians(times: Mapping[int, Sequence[float]]) -> Times:
    """Of the sizes that were timed as often as was meant; more tokens never take less time.

    Where time was short, two sizes that were timed less often tell more than one.
    """
    rising: list[tuple[int, float]] = []
    enough = min(_ENOUGH, *sorted(map(len, times.values()))[-2:])
    for count in sorted(times):
        if len(times[count]) >= enough:
            least = rising[-1][1] if rising else 0.0
            rising.append((count, max(statistics.median(times[count]), least)))
    return tuple(rising)
