# SPDX-License-Identifier: Apache-2.0
"""How often drafts are kept: every model's law beside the ensemble's, position by position.

The models read texts that were written before, and each law is compared with the ensemble's and
with every other. Chances at positions become chances of whole blocks, weighted by where blocks
begin. To measure one thing more, collect it in `read`, and add it to `Profile`.
"""

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.loop.profile import Kept, Stopped
from specens.members.evaluation import evaluating
from specens.members.member import Member
from specens.schedules import STOPS, LearnedStop
from specens.tuning.lookups import LookUps
from specens.tuning.measure import Sweep
from specens.tuning.stops import READY, Drawn, asking_times, draw, fit_stop
from specens_kernels import Law, mix

# Positions read at a time, of which every model's laws are held.
_CHUNK = 32


class Agreement:
    """What is collected of every pair of laws, position by position.

    overlaps: overlaps[m][v]: per text, (T,) sums of min(p, q) of models m and v; the last v is the
        ensemble.
    drawn: per model and text, drafts at each position.
    asking: per kind of stop, seconds to ask it about one.
    look_ups: per text. looking: seconds of each.
    """

    def __init__(self, num_models: int, num_members: int, most: int) -> None:
        self.overlaps: list[list[list[Tensor]]] = [
            [[] for _ in range(num_models + 1)] for _ in range(num_models)
        ]
        self.drawn: list[list[Drawn]] = [[] for _ in range(num_models)]
        self.asking: dict[str, list[float]] = {kind: [] for kind in STOPS}
        self.look_ups: list[LookUps] = []
        self.looking: list[float] = []
        self.most = most
        # One member alone has nobody to propose to.
        self.proposers = range(0 if num_members > 1 else 1, num_models)

    def kept(self) -> tuple[tuple[Kept, ...], ...]:
        """As in `Profile`."""
        return tuple(
            tuple(curve(texts, self.most) for texts in verifiers) for verifiers in self.overlaps
        )

    def blocks(self) -> tuple[tuple[Kept, ...], ...]:
        """As in `Profile`."""
        return tuple(curves(verifiers[-1], self.most) for verifiers in self.overlaps)

    def fitted(self, model: int) -> tuple[float, float, float, float]:
        """Coefficients of the model's `LearnedStop`."""
        texts = self.drawn[model]
        return fit_stop(
            torch.cat([text.features.flatten(0, 1) for text in texts]),
            torch.cat([text.chances.flatten() for text in texts]),
        )

    def stopped(self, learned: Sequence[LearnedStop]) -> tuple[Stopped, ...]:
        """As in `Profile`: each kind of stop, of every model that may propose."""
        listed = []
        for m in self.proposers:
            texts = self.drawn[m]
            for kind, stop in {**READY, LearnedStop.name: learned[m]}.items():
                chances = [text.chances.mean(-1) for text in texts]
                goes = [~text.asked(kind, stop) for text in texts]
                both = [(text.chances * go).mean(-1) for text, go in zip(texts, goes, strict=True)]
                going = [go.double().mean(-1) for go in goes]
                kept, on = _stopped_curves(chances, both, going, self.most)
                listed.append(Stopped(m, stop, on, kept, statistics.median(self.asking[kind])))
        return tuple(listed)


def read(
    decoder: SpeculativeDecoder, sweep: Sweep, agreement: Agreement, text: Tensor, begin: int
) -> None:
    """Let every model read a text (1, S) and compare their laws from the token at `begin` on."""
    assert sweep.law is not None
    law, size = sweep.law, decoder.num_ensemble
    greedy = bool(law.temperature == 0)
    length = text.shape[1] - 1  # the last token leads to no law
    overlaps: dict[tuple[int, int], list[Tensor]] = {}
    drawn: list[list[Drawn]] = [[] for _ in decoder.members]
    look_ups = LookUps(text[0].tolist(), begin, agreement.most)
    place = 0
    for logits in chunks(decoder.members, text[:, :length], begin - 1):
        assert sweep.member_law is not None
        bare = [law_of([rows], sweep.member_law) for rows in logits]
        bare.append(law_of(logits[:size], law))
        laws = [_collapsed(masses) for masses in bare] if greedy else bare
        for m in range(len(logits)):
            for v, other in enumerate(laws):
                overlap = torch.minimum(laws[m], other).sum(-1).clamp(max=1)
                overlaps.setdefault((m, v), []).append(overlap.double().cpu())
            columns = logits[m][0, :, : laws[m].shape[-1]]
            drawn[m].append(draw(columns, laws[m], laws[-1], greedy))
        for kind, seconds in asking_times(logits[0][0, :1, : laws[0].shape[-1]]).items():
            agreement.asking[kind].append(seconds)
        for masses in laws[-1].cpu():
            look_ups.read(place, masses)
            place += 1
    for (m, v), pieces in overlaps.items():
        agreement.overlaps[m][v].append(torch.cat(pieces))
    for m, parts in enumerate(drawn):
        agreement.drawn[m].append(Drawn.joined(parts))
    agreement.look_ups.append(look_ups)
    agreement.looking += look_ups.seconds


def chunks(members: Sequence[Member], text: Tensor, skip: int) -> Iterator[list[Tensor]]:
    """Every model's logits (1, T, V) at some positions after another, from `skip` on."""
    length = text.shape[1]
    with evaluating([member.model for member in members]):
        try:
            for member in members:
                member.start(1, length)
                if skip > 0:
                    member.forward(text[:, :skip], [skip], keep_last=1)
            for first in range(skip, length, _CHUNK):
                tokens = text[:, first : first + _CHUNK]
                count = tokens.shape[1]
                yield [member.forward(tokens, [count]).to(text.device) for member in members]
        finally:
            for member in members:
                member.release()


def law_of(logits: Sequence[Tensor], law: Law) -> Tensor:
    """(T, V) probabilities of the next tokens; bare at temperature 0."""
    return mix(logits, law)[0][0].exp()


def _collapsed(law: Tensor) -> Tensor:
    """(T, V): all on the most probable token."""
    return torch.nn.functional.one_hot(law.argmax(-1), law.shape[-1]).to(law)


def curves(texts: Sequence[Tensor], most: int) -> tuple[Kept, ...]:
    """A `curve` for blocks of 1, 2, ... drafts."""
    return tuple(curve(texts, size, size) for size in range(1, most + 1))


def curve(texts: Sequence[Tensor], most: int, size: int | None = None) -> Kept:
    """Chances that the first 1, 2, ... of a block are kept, of the blocks that begin in the texts.

    Blocks begin where others ended: where drafts are refused often, they begin often.

    Args:
        texts: (T,) chances that a draft is kept at each position.
        most: tokens of the longest block.
        size: of the blocks before; None is a middling one, for blocks of many sizes.
    """
    before = max(most // 2, 1) if size is None else size
    begins = [starts(text, text, before) for text in texts]
    return _averaged(texts, texts, begins, most)


def _stopped_curves(
    chances: Sequence[Tensor], both: Sequence[Tensor], going: Sequence[Tensor], most: int
) -> tuple[Kept, Kept]:
    """Of blocks that stop by themselves, `kept` and `going` as in `Stopped`.

    Args:
        chances: per text, (T,) chances that a draft is kept.
        both: that it is kept and the proposer goes on. going: that the proposer goes on.
        most: tokens of the longest block.
    """
    begins = [starts(kept, more, most) for kept, more in zip(chances, both, strict=True)]
    return _averaged(chances, both, begins, most), _averaged(going, going, begins, most)


def _averaged(
    last: Sequence[Tensor], before: Sequence[Tensor], begins: Sequence[Tensor], most: int
) -> Kept:
    """Means over blocks, weighted by where they begin, of the product of chances in a row.

    last: per text, (T,) chances of the block's last place. before: of the places before it.
    """
    means: list[float] = []
    for count in range(1, most + 1):
        part = total = 0.0
        for end, going, weights in zip(last, before, begins, strict=True):
            if len(end) >= count:
                reached = going.unfold(0, count, 1)[:, :-1].prod(-1)
                chances = reached * end[count - 1 :]
                part += float(chances @ weights[: len(chances)])
                total += float(weights[: len(chances)].sum())
        # Ends of blocks that are as long as a text say nothing.
        if total == 0:
            break
        means.append(min(part / total, means[-1] if means else 1.0))
    return tuple(means)


def starts(kept: Tensor, both: Tensor, size: int) -> Tensor:
    """(T,) chances that a block of `size` drafts begins at each position, one at the first.

    Args:
        kept: (T,) chances that a draft is kept.
        both: (T,) that it is kept, and another follows if the block has room.
        size: drafts of a block at most.
    """
    chances, follows = kept.tolist(), both.tolist()
    length = len(chances)
    begins = [1.0] + [0.0] * (length + size)
    for start in range(length):
        going = begins[start]
        for place in range(start, min(start + size, length)):
            begins[place + 1] += going * (1 - chances[place])
            last = place == start + size - 1
            # After a draft that is kept and is the last one, the ensemble adds a token.
            begins[place + 2] += going * (chances[place] - (0.0 if last else follows[place]))
            going *= follows[place]
    return torch.tensor(begins[:length], dtype=torch.float64)
