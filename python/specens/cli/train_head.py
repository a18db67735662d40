# SPDX-License-Identifier: Apache-2.0
"""The command `specens train diversed`: a head that weights draft and target at each position."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specens.cli import loading, options, train
from specens.training.examples import (
    EVALUATION_MODULES,
    HEAD_MODULES,
    Example,
    library_examples,
)
from specens.training.files import writing
from specens.training.rewards import REWARDS, Reward, reward_for
from specens.training.settings import HeadSettings, StepPlan
from specens_kernels import Refusal

if TYPE_CHECKING:
    from specens.training.diversed import Pair


def diversed(
    draft: Annotated[str, typer.Option(help="Folder, hub name or family:draft.")] = "family:draft",
    target: Annotated[str, typer.Option(help="The model that verifies.")] = "family:code",
    out: train.Out = Path("specens-head"),
    data: train.Data = None,
    evaluation: train.Evaluation = None,
    reward: Annotated[
        str,
        typer.Option(
            help="likelihood (mean log-probability of the text under the target), exact_match, "
            "rouge_1, rouge_2, rouge_l or tests."
        ),
    ] = "likelihood",
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="'tests' runs what the models write: with limits, and shut off from network, disk "
            "and other processes where the machine gives namespaces; see docs/training.md.",
        ),
    ] = False,
    ensemble: options.EnsembleName = "mixture",
    temperature: Annotated[float, typer.Option(help="> 0: training samples.")] = 1.0,
    acceptance_scale: Annotated[
        float,
        typer.Option(help="What one more accepted token of a text is worth, in units of reward."),
    ] = 0.1,
    baseline: Annotated[
        str,
        typer.Option(help="group (the prompt's other samples) or ema (running mean of batches)."),
    ] = "group",
    steps: train.Steps = 100,
    prompts: Annotated[
        int, typer.Option(min=1, max=options.MAX_TEXTS, help="Prompts per step.")
    ] = 8,
    samples: Annotated[
        int, typer.Option(min=1, max=options.MAX_TEXTS, help="Texts per prompt.")
    ] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=options.MAX_TOKENS, help="Last tokens of a prompt to read.")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=options.MAX_TOKENS, help="Most tokens of a text.")
    ] = 32,
    evaluation_samples: Annotated[
        int,
        typer.Option(min=1, max=options.MAX_TEXTS, help="Texts per held-out example and weight."),
    ] = 3,
    rate: train.Rate = 0.02,
    warmup_steps: train.WarmupSteps = 10,
    clip: train.Clip = 1.0,
    save_every: train.SaveEvery = 20,
    seed: train.Seed = 0,
    resume: train.Resume = False,
    dtype: train.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Learn how much the draft counts at each position (DIVERSED), by REINFORCE.

    Writes the head (weight_head.safetensors, weight_head.json), curves.csv, curves.png (with
    matplotlib) and evaluation.json: acceptance and quality on held-out examples, of the head and of
    constant weights, and how far the head is above their front. Both models stay as they are.
    """
    train.check_evaluation(data, evaluation)
    train.check_out(out, resume=resume)
    names = [draft, target]
    loading.check_names("draft", [draft])
    loading.check_names("target", [target])
    how = loading.Loading(dtype, device, threads, trust_remote_code)
    if reward not in REWARDS:
        raise Refusal.unknown("train", "reward", reward, REWARDS)
    settings = HeadSettings(
        ensemble=ensemble,
        temperature=temperature,
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        baseline=baseline,
        acceptance_scale=acceptance_scale,
        seed=seed,
        plan=StepPlan(steps, rate, warmup_steps, clip=clip, save_every=save_every),
    )
    examples, held_out = _head_examples(data, evaluation)
    judge = reward_for(reward, examples, allow_code_execution=allow_code_execution)
    reward_for(reward, held_out, allow_code_execution=allow_code_execution)
    pair = _pair(names, how)
    folder = train.make_folder(out)
    work = _HeadWork(pair, examples, held_out, judge, settings)
    result = train.facts_of("train diversed", settings, names, data, evaluation)
    result |= work.run(folder, samples=evaluation_samples, resume=resume)
    train.write_result(folder, result)
    train.show(result, as_json)


@dataclass(frozen=True)
class _HeadWork:
    """A head to train and to measure."""

    pair: "Pair"
    examples: list[Example]
    held_out: list[Example]
    reward: Reward
    settings: HeadSettings

    def run(self, folder: Path, *, samples: int, resume: bool) -> dict[str, Any]:
        """What was found, for JSON; the head and its curves are in the folder."""
        from specens.cli import output
        from specens.training.diversed import CURVES, train_head
        from specens.training.front import STATIC_WEIGHTS, compare_with_static
        from specens.training.loop import draw_curves

        training = train.Watch()
        with train.progress("training", self.settings.plan.steps) as advance:
            head, rows = train_head(
                self.pair,
                self.examples,
                self.reward,
                self.settings,
                folder,
                resume=resume,
                progress=advance,
            )
        times = training.seconds("training")
        with writing(folder):
            draw_curves(folder / "curves.png", rows, CURVES)
        evaluation = train.Watch()
        with output.progress("evaluating", len(STATIC_WEIGHTS) + 1) as step:
            measures = compare_with_static(
                self.pair,
                head,
                self.held_out,
                self.reward,
                self.settings,
                samples=samples,
                progress=step,
            )
        return {
            "reward": self.reward.name,
            "training_examples": len(self.examples),
            **times,
            **evaluation.seconds("evaluation"),
            "last_steps": train.mean_of_last(rows),
            **measures,
        }


def _head_examples(
    data: Path | None, evaluation: Path | None
) -> tuple[list[Example], list[Example]]:
    """To train on, and held out."""
    if data is not None:
        return train.read_data(data, evaluation)
    examples = library_examples(HEAD_MODULES, reference_characters=256)
    return examples, library_examples(EVALUATION_MODULES)


def _pair(names: list[str], how: loading.Loading) -> "Pair":
    """The draft and the target of these names."""
    from specens.members.vocabulary import shared_vocabulary
    from specens.training.diversed import Pair

    loading.use_threads(how.threads, names)
    models, tokenizers = train.load_frozen(names, how)
    stops = models[1].generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    size = shared_vocabulary(models, tokenizers)
    return Pair(models[0], models[1], tokenizers[1], size, stops, names)
