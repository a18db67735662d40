# SPDX-License-Identifier: Apache-2.0
"""Train a draft towards a target, or towards an ensemble of targets.

Three published ways, which can be combined:

* distillation by any divergence with a gradient (DistillSpec, arXiv:2310.08461);
* on the tokens alone that the draft can still learn (AdaSPEC, arXiv:2510.19779): the fraction whose
  divergence is the furthest above that of a reference, a draft that was distilled before;
* online (Online Speculative Decoding, arXiv:2310.07177): the draft speculates while the targets
  write, and learns from the positions alone where it was rejected.

What verification keeps of a draft's tokens is sum_x min(target, draft) = 1 - TV, which is measured
on held-out text before and after. Weights are trained in float32, and dropout stays off.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specens.decoder import SpeculativeDecoder
from specens.members.evaluation import evaluating
from specens.training.batches import in_turn, row_seeds
from specens.training.loop import optimise
from specens.training.settings import DraftSettings
from specens.tuning.compare import sampling
from specens_kernels import Law, Refusal, Stream, divergence, mix, sample, uniforms, verify

CURVES = ("loss", "acceptance")


class Targets:
    """The law that a draft is for: of one model, or of several as an ensemble."""

    def __init__(self, models: Sequence[Any], settings: DraftSettings, vocab_size: int) -> None:
        if len(settings.weights) != len(models):
            expected = f"{len(models)} numbers, one per target"
            raise Refusal("train", "weights", expected, len(settings.weights))
        self.models = list(models)
        self.vocab_size = vocab_size
        self.law = Law(settings.weights, settings.ensemble, vocab_size=vocab_size)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S, V) logits, or log-probabilities where there are several models."""
        with evaluating(self.models):
            logits = [read(model, tokens) for model in self.models]
        if len(logits) == 1 and self.law.weights == (1.0,):
            return logits[0][..., : self.vocab_size]
        return mix(logits, self.law)[0]


def read(model: Any, tokens: Tensor) -> Tensor:
    """(B, S, V) logits of texts (B, S) of equal length."""
    logits: Tensor = model(tokens, use_cache=False, return_dict=True).logits
    return logits


@torch.no_grad()
def held_out_acceptance(draft: Any, targets: Targets, windows: Tensor) -> dict[str, float]:
    """Mean of sum_x min(target, draft) over the positions of windows (W, S), and its error."""
    parts = []
    for window in windows.to(draft.device):
        with evaluating((draft,)):
            logits = read(draft, window[None])[..., : targets.vocab_size]
        parts.append(1 - divergence(targets.logits(window[None]), logits, "tv").mean())
    means = torch.stack(parts).double().cpu()
    error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return {"mean": means.mean().item(), "standard_error": error}


@torch.no_grad()
def rejected(draft_logits: Tensor, target_logits: Tensor, seeds: Tensor) -> Tensor:
    """(B, S) bool: where a token drawn from the draft would be rejected, a coin at each position.

    It is the op of decoding, each position a block of one draft, so that positions are rejected
    with the chance that they have there.

    Args:
        draft_logits, target_logits: (B, S, V).
        seeds: (B,) int64.
    """
    batch, length, width = draft_logits.shape
    positions = torch.arange(length, device=draft_logits.device)[None]
    proposals = uniforms(seeds, positions, Stream.DRAFT)
    coins = uniforms(seeds, positions, Stream.VERIFY).reshape(-1, 1, 4)
    law = Law(vocab_size=width)
    drafts = sample([draft_logits], proposals, law).tokens.reshape(-1, 1)
    verdict = verify(
        [target_logits.reshape(-1, 1, width)],
        drafts,
        coins.expand(-1, 2, -1),
        law,
        draft_logits=draft_logits.reshape(-1, 1, width),
        bonus=False,
    )
    return (verdict.num_accepted == 0).reshape(batch, length)


def token_losses(
    draft_logits: Tensor,
    target_logits: Tensor,
    settings: DraftSettings,
    reference_logits: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence of every token, and which of them are trained on.

    Args:
        draft_logits, target_logits, reference_logits: (B, S, V). The reference is needed where
            `settings.select` < 1.
        counts: (B, S) bool. Tokens that may be trained on; None is all.
    Returns:
        losses: (B, S). chosen: (B, S) bool.
    """
    losses = divergence(target_logits, draft_logits, settings.divergence)
    chosen = torch.ones_like(losses, dtype=torch.bool) if counts is None else counts
    if settings.select < 1:
        assert reference_logits is not None
        known = divergence(target_logits, reference_logits, settings.divergence)
        excess = (losses.detach() - known).masked_fill(~chosen, -torch.inf).flatten()
        number = int(chosen.sum())
        kept = excess.topk(min(number, max(1, round(settings.select * number)))).indices
        chosen = torch.zeros_like(chosen).flatten().index_fill(0, kept, True).view_as(chosen)
    return losses, chosen


def train_draft(
    draft: Any,
    targets: Targets,
    windows: Tensor,
    settings: DraftSettings,
    folder: Path,
    *,
    reference: Any = None,
    tokenizers: Sequence[Any] | None = None,
    names: Sequence[str] = (),
    resume: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> list[dict[str, float]]:
    """Train the draft in place; checkpoints and curves go to the folder.

    Args:
        draft: a causal LM in float32.
        targets: what it is for.
        windows: (W, S) int64. Texts to train on; when online, prompts.
        settings: everything else.
        folder: it exists.
        reference: a draft that was distilled before, for `settings.select` < 1.
        tokenizers: of the targets, then of the draft. When online, needed where vocabularies are
            padded differently.
        names: of draft and targets, to be sure that a resumed run has the same.
        resume: go on from the folder's checkpoint.
        progress: called with the number of steps done, after each.
    Returns:
        One row of numbers for each step.
    """
    if (settings.select < 1) != (reference is not None):
        expected = "a distilled draft beside select < 1, and only there"
        got = f"{'none' if reference is None else 'a draft'} for {settings.select}"
        raise Refusal("train", "reference", expected, got)
    decoder = _decoder(draft, targets, settings, tokenizers) if settings.online else None
    parameters = {
        name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad
    }
    return optimise(
        parameters,
        _Steps(draft, targets, windows, settings, reference, decoder),
        settings.plan,
        folder,
        settings={**asdict(settings), "models": list(names), "windows": list(windows.shape)},
        resume=resume,
        progress=progress,
    )


@dataclass(frozen=True)
class _Steps:
    """The loss of each step, and what its curves show; decoder: when online, what writes."""

    draft: Any
    targets: Targets
    windows: Tensor
    settings: DraftSettings
    reference: Any
    decoder: SpeculativeDecoder | None

    def __call__(self, step: int, memory: dict[str, float]) -> tuple[Tensor, dict[str, float]]:
        settings, width, device = self.settings, self.targets.vocab_size, self.draft.device
        chosen = in_turn(len(self.windows), settings.windows_per_step, step, settings.seed)
        seeds = row_seeds(settings.seed, step, len(chosen)).to(device)
        tokens, counts = self.windows[chosen].to(device), None
        # Fewer where windows are shorter.
        prompts = tokens[:, : settings.prompt_tokens]
        if self.decoder is not None:
            tokens = _written(self.decoder, prompts, seeds, settings)
        draft_logits = read(self.draft, tokens)[..., :width]
        target_logits = self.targets.logits(tokens)
        if self.decoder is not None:
            counts = rejected(draft_logits.detach().contiguous(), target_logits, seeds)
            counts[:, : prompts.shape[1] - 1] = False
            counts[:, -1] = False  # what comes after the text was not written
        reference_logits = None
        if self.reference is not None:
            with evaluating((self.reference,)), torch.no_grad():
                reference_logits = read(self.reference, tokens)[..., :width]
        losses, trained = token_losses(
            draft_logits, target_logits, settings, reference_logits, counts
        )
        number = int(trained.sum())
        # Without a token there is no gradient, and the optimiser does not step.
        loss = (losses * trained).sum() / number if number else losses.new_zeros(())
        with torch.no_grad():
            kept = 1 - divergence(target_logits, draft_logits, "tv").mean()
        return loss, {"acceptance": kept.item(), "trained_tokens": float(number)}


def _decoder(
    draft: Any, targets: Targets, settings: DraftSettings, tokenizers: Sequence[Any] | None
) -> SpeculativeDecoder:
    """What writes the text: the targets, speculatively, with the draft as it is by then."""
    return SpeculativeDecoder(
        targets.models,
        weights=settings.weights,
        ensemble=settings.ensemble,
        schedule="speculative",
        draft=draft,
        tokenizers=tokenizers,
    )


def _written(
    decoder: SpeculativeDecoder, prompts: Tensor, seeds: Tensor, settings: DraftSettings
) -> Tensor:
    """(B, S) int64: the prompts and what the targets write after them."""
    sequences: Tensor = decoder.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        seed=seeds.tolist(),
        eos_token_id=-1,  # no token: all texts are equally long
        pad_token_id=0,
        **sampling(settings.new_tokens),
    )
    return sequences
