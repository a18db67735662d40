# SPDX-License-Identifier: Apache-2.0
"""The command `specens train draft`: a draft towards a target, or an ensemble of targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specens.cli import checks, loading, options, train
from specens.training.examples import Example, held_out_texts, read_texts
from specens.training.files import writing
from specens.training.settings import DraftSettings, StepPlan
from specens_kernels import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from specens.training.distil import Targets

# Held-out windows that a draft is measured on, at most.
_TEST_WINDOWS = 96


def draft(
    draft: Annotated[str, typer.Option(help="The draft to start from.")] = "family:draft",
    target: Annotated[
        list[str] | None,
        typer.Option(help="What the draft is for; repeat it for an ensemble. None is family:code."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number per target, such as 0.5,0.5. None is equal.")
    ] = None,
    ensemble: options.EnsembleName = "mixture",
    out: train.Out = Path("specens-draft"),
    data: train.Data = None,
    evaluation: train.Evaluation = None,
    divergence: Annotated[
        str,
        typer.Option(
            help="tv, kl (target to draft), reverse_kl or js. tv is the chance of a rejection, but "
            "teaches little where the laws hardly overlap: start with kl there."
        ),
    ] = "tv",
    select: Annotated[
        float,
        typer.Option(help="AdaSPEC: train on this fraction of tokens; 0.4 in the paper."),
    ] = 1.0,
    reference: Annotated[
        str | None,
        typer.Option(help="AdaSPEC: a draft that was distilled before, to select tokens by."),
    ] = None,
    online: Annotated[
        bool,
        typer.Option(
            "--online",
            help="The targets write, the draft speculates, and learns where it was rejected alone.",
        ),
    ] = False,
    steps: train.Steps = 500,
    batch: Annotated[int, typer.Option(min=1, max=options.MAX_TEXTS, help="Texts per step.")] = 6,
    window_tokens: Annotated[
        int, typer.Option(min=2, max=options.MAX_TOKENS, help="Tokens of a text.")
    ] = 256,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=options.MAX_TOKENS, help="Online: of each prompt.")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=options.MAX_TOKENS, help="Online: what is written.")
    ] = 64,
    rate: Annotated[
        float,
        typer.Option(help="AdamW's, after the warm-up; for large drafts 1e-4 or less."),
    ] = 3e-3,
    warmup_steps: train.WarmupSteps = 20,
    clip: train.Clip = 1.0,
    save_every: train.SaveEvery = 100,
    seed: train.Seed = 0,
    resume: train.Resume = False,
    dtype: train.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Distil a draft from a target, or from an ensemble of targets.

    Writes the draft (`save_pretrained`, float32, with its tokenizer), curves.csv, curves.png (with
    matplotlib) and evaluation.json: what verification keeps of the draft's tokens on held-out text,
    the mean of sum_x min(target, draft), before and after.
    """
    train.check_evaluation(data, evaluation)
    train.check_out(out, resume=resume)
    targets = target or ["family:code"]
    references = [] if reference is None else [reference]
    loading.check_names("draft", [draft])
    loading.check_names("target", targets)
    loading.check_names("reference", references)
    how = loading.Loading(dtype, device, threads, trust_remote_code)
    if (0 < select < 1) != (reference is not None):
        expected = "a draft beside --select below 1, and only there"
        raise Refusal("train", "reference", expected, reference or "none")
    # Some 3.4 characters a token, and as much again in case a text is longer than thought.
    texts, held_out = _draft_texts(data, evaluation, seed, steps * batch * window_tokens * 4)
    asked = None if weights is None else options.numbers("weights", weights)
    shares = checks.AskedLaw(targets, asked, ensemble).shares
    settings = DraftSettings(
        divergence=divergence,
        ensemble=ensemble,
        weights=tuple(shares),
        select=select,
        online=online,
        windows_per_step=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        plan=StepPlan(steps, rate, warmup_steps, 0.01, clip, save_every),
    )
    names = [draft, *targets, *references]
    work = _DraftWork.load(names, len(targets), settings, how)
    windows = work.windows(texts, window_tokens)
    test = work.windows(held_out, window_tokens)[:_TEST_WINDOWS]
    folder = train.make_folder(out)
    result = train.facts_of("train draft", settings, names, data, evaluation)
    result |= work.run(windows, test, folder, resume=resume)
    train.write_result(folder, result)
    train.show(result, as_json)


@dataclass(frozen=True)
class _DraftWork:
    """A draft to train and to measure.

    tokenizers: of the targets, then of the draft. names: of the draft, then of the others.
    """

    draft: Any
    targets: "Targets"
    reference: Any
    tokenizers: list[Any]
    names: list[str]
    settings: DraftSettings

    @classmethod
    def load(
        cls, names: list[str], num_targets: int, settings: DraftSettings, how: loading.Loading
    ) -> "_DraftWork":
        """The draft, in float32, the targets, and maybe a reference, of which there are names."""
        from specens.members.vocabulary import shared_vocabulary
        from specens.training.distil import Targets

        loading.use_threads(how.threads, names)
        (draft,), (tokenizer,) = train.load_frozen(names[:1], replace(how, dtype="float32"))
        models, tokenizers = train.load_frozen(names[1:], how)
        vocab_size = shared_vocabulary([draft, *models], [tokenizer, *tokenizers])
        targets = Targets(models[:num_targets], settings, vocab_size)
        reference = models[num_targets] if len(models) > num_targets else None
        draft.requires_grad_(True)
        tokenizers = [*tokenizers[:num_targets], tokenizer]
        return cls(draft, targets, reference, tokenizers, names, settings)

    def windows(self, texts: Sequence[str], tokens: int) -> "Tensor":
        """(W, tokens) int64 of the texts."""
        from specens.training.batches import token_windows

        return token_windows(self.tokenizers[-1], texts, tokens, self.settings.seed)

    def run(
        self, windows: "Tensor", test: "Tensor", folder: Path, *, resume: bool
    ) -> dict[str, Any]:
        """What was found, for JSON; the draft and its curves are in the folder."""
        from specens.cli import output
        from specens.training import distil
        from specens.training.loop import draw_curves

        with output.progress("measuring", 1):
            before = distil.held_out_acceptance(self.draft, self.targets, test)
        training = train.Watch()
        with train.progress("training", self.settings.plan.steps) as advance:
            rows = distil.train_draft(
                self.draft,
                self.targets,
                windows,
                self.settings,
                folder,
                reference=self.reference,
                tokenizers=self.tokenizers,
                names=self.names,
                resume=resume,
                progress=advance,
            )
        times = training.seconds("training")
        with writing(folder):
            self.draft.save_pretrained(folder)
            self.tokenizers[-1].save_pretrained(folder)
            draw_curves(folder / "curves.png", rows, distil.CURVES)
        return {
            "training_windows": list(windows.shape),
            "held_out_windows": list(test.shape),
            **times,
            "last_steps": train.mean_of_last(rows),
            "acceptance_before": before,
            "acceptance_after": distil.held_out_acceptance(self.draft, self.targets, test),
        }


def _draft_texts(
    data: Path | None, evaluation: Path | None, seed: int, characters: int
) -> tuple[list[str], list[str]]:
    """To train on, and held out; of the standard library, so many characters."""
    if data is None:
        return read_texts(seed, characters), held_out_texts()
    examples, held_out = train.read_data(data, evaluation)
    return _whole(examples), _whole(held_out)


def _whole(examples: Sequence[Example]) -> list[str]:
    return [example.prompt + example.reference for example in examples]
