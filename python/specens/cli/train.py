# SPDX-License-Identifier: Apache-2.0
"""The commands `specens train diversed` and `specens train draft`.

With no option both run on the family that ships with the package, offline, in minutes on a CPU. A
command parses, loads, trains, measures on held-out text and writes one JSON file of what it found.
To add an option, add it to the command and to the settings of what it trains.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

RESULT = "evaluation.json"

app = typer.Typer(
    help="Train a head that weights draft and target, or a draft.",
    no_args_is_help=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Data = Annotated[
    Path | None,
    typer.Option(
        help='JSON lines with "prompt", and "reference" or "answer", and "tests" where the reward '
        "needs them. None is Python's standard library."
    ),
]
_Evaluation = Annotated[
    Path | None,
    typer.Option(help="JSON lines to measure on, beside --data. None is every fifth line of it."),
]
_Out = Annotated[Path, typer.Option(help="Folder for everything that is written.")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint in --out, with all else equal.")
]
_Ensemble = Annotated[str, typer.Option(help="mixture or product.")]
_Steps = Annotated[int, typer.Option(min=1, help="Updates.")]
_Rate = Annotated[float, typer.Option(help="AdamW's, after the warm-up.")]
_Warmup = Annotated[int, typer.Option(min=0, help="Steps of linear warm-up; then half a cosine.")]
_Clip = Annotated[float, typer.Option(help="The gradient's largest norm.")]
_SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
_Seed = Annotated[int, typer.Option(min=0, max=2**31, help="Same seed, same result.")]
_Dtype = Annotated[
    str, typer.Option(help="Of the frozen models: auto, float32, bfloat16, float16.")
]
_Device = Annotated[
    str,
    typer.Option(help="auto (a GPU if torch has one, else the CPU), or as torch has it: cuda:1."),
]
_Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads. None is 1 if all models are family:..., else torch's choice."
    ),
]
_Trust = Annotated[bool, typer.Option(help="Run code that comes with a model. Off unless asked.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback()
def _train() -> None:
    """Train a head that weights draft and target, or a draft."""


@app.command()
def diversed(
    draft: Annotated[str, typer.Option(help="Folder, hub name or family:draft.")] = "family:draft",
    target: Annotated[str, typer.Option(help="The model that verifies.")] = "family:code",
    out: _Out = Path("specens-head"),
    data: _Data = None,
    evaluation: _Evaluation = None,
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
            help="'tests' runs what the models write: in a process with limits of time, memory and "
            "file size, but not shut off from network and disk.",
        ),
    ] = False,
    ensemble: _Ensemble = "mixture",
    temperature: Annotated[float, typer.Option(help="> 0: training samples.")] = 1.0,
    acceptance_scale: Annotated[
        float,
        typer.Option(help="What one more accepted token of a text is worth, in units of reward."),
    ] = 0.1,
    baseline: Annotated[
        str,
        typer.Option(help="group (the prompt's other samples) or ema (running mean of batches)."),
    ] = "group",
    steps: _Steps = 100,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 8,
    samples: Annotated[int, typer.Option(min=1, help="Texts per prompt.")] = 8,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Last tokens of a prompt to read.")
    ] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 32,
    evaluation_samples: Annotated[
        int, typer.Option(min=1, help="Texts per held-out example and weight.")
    ] = 3,
    rate: _Rate = 0.02,
    warmup_steps: _Warmup = 10,
    clip: _Clip = 1.0,
    save_every: _SaveEvery = 20,
    seed: _Seed = 0,
    resume: _Resume = False,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    threads: _Threads = None,
    trust_remote_code: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Learn how much the draft counts at each position (DIVERSED), by REINFORCE.

    Writes the head (weight_head.safetensors, weight_head.json), curves.csv, curves.png (with
    matplotlib) and evaluation.json: acceptance and quality on held-out examples, of the head and of
    constant weights, and how far the head is above their front. Both models stay as they are.
    """
    from specens.cli import terminal
    from specens.training import diversed as training
    from specens.training.examples import EVALUATION_MODULES, HEAD_MODULES, library_examples
    from specens.training.front import STATIC_WEIGHTS, compare_with_static
    from specens.training.loop import Schedule, draw_curves
    from specens.training.rewards import reward_for

    _check_evaluation(data, evaluation)
    settings = training.HeadSettings(
        ensemble=_ensemble(ensemble),
        temperature=temperature,
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        baseline=baseline,
        acceptance_scale=acceptance_scale,
        seed=seed,
        schedule=Schedule(steps, rate, warmup_steps, clip=clip, save_every=save_every),
    )
    if data is None:
        examples = library_examples(HEAD_MODULES, reference_characters=256)
        held_out = library_examples(EVALUATION_MODULES)
    else:
        examples, held_out = _read("train", data, evaluation)
    judge = reward_for(reward, examples, allow_code_execution=allow_code_execution)
    reward_for(reward, held_out, allow_code_execution=allow_code_execution)
    names = [draft, target]
    terminal.use_threads(threads, names)
    models, tokenizers = _frozen(names, dtype, device, trust_remote_code)
    pair = _pair(models, tokenizers, names)
    folder = _folder(out)
    began, began_cpu = time.perf_counter(), time.process_time()
    with _progress("training", steps) as advance:
        head, rows = training.train_head(
            pair, examples, judge, settings, folder, resume=resume, progress=advance
        )
    trained_s, trained_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    draw_curves(folder / "curves.png", rows, training.CURVES)
    with terminal.progress("evaluating", len(STATIC_WEIGHTS) + 1) as step:
        found = compare_with_static(
            pair, head, held_out, judge, settings, samples=evaluation_samples, progress=step
        )
    result = _result("train diversed", settings, names, data, evaluation) | {
        "reward": reward,
        "training_examples": len(examples),
        "training_seconds": trained_s,
        "training_cpu_seconds": trained_cpu_s,
        "evaluation_seconds": time.perf_counter() - began - trained_s,
        "evaluation_cpu_seconds": time.process_time() - began_cpu - trained_cpu_s,
        "last_steps": _mean_of_last(rows),
        **found,
    }
    _write(folder / RESULT, result)
    if as_json:
        terminal.write_json(result)
    else:
        _show_front(result)


@app.command()
def draft(
    draft: Annotated[str, typer.Option(help="The draft to start from.")] = "family:draft",
    target: Annotated[
        list[str] | None,
        typer.Option(help="What the draft is for; repeat it for an ensemble. None is family:code."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One number per target, such as 0.5,0.5. None is equal.")
    ] = None,
    ensemble: _Ensemble = "mixture",
    out: _Out = Path("specens-draft"),
    data: _Data = None,
    evaluation: _Evaluation = None,
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
    steps: _Steps = 500,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 6,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a text.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Online: of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Online: what is written.")] = 64,
    rate: Annotated[
        float,
        typer.Option(help="AdamW's, after the warm-up; for large drafts 1e-4 or less."),
    ] = 3e-3,
    warmup_steps: _Warmup = 20,
    clip: _Clip = 1.0,
    save_every: _SaveEvery = 100,
    seed: _Seed = 0,
    resume: _Resume = False,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    threads: _Threads = None,
    trust_remote_code: _Trust = False,
    as_json: _Json = False,
) -> None:
    """Distil a draft from a target, or from an ensemble of targets.

    Writes the draft (`save_pretrained`, float32, with its tokenizer), curves.csv, curves.png (with
    matplotlib) and evaluation.json: what verification keeps of the draft's tokens on held-out text,
    the mean of sum_x min(target, draft), before and after.
    """
    from specens.cli import terminal
    from specens.members.vocabulary import shared_vocabulary
    from specens.training import distil
    from specens.training.examples import held_out_texts, read_texts, token_windows
    from specens.training.loop import Schedule, draw_curves

    _check_evaluation(data, evaluation)
    targets = target or ["family:code"]
    settings = distil.DraftSettings(
        divergence=divergence,
        ensemble=_ensemble(ensemble),
        weights=_weights(weights, len(targets)),
        select=select,
        online=online,
        windows_per_step=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=seed,
        schedule=Schedule(steps, rate, warmup_steps, 0.01, clip, save_every),
    )
    if (select < 1) != (reference is not None):
        raise ValueError(
            "train: --reference: expected a draft beside --select below 1, and only there"
        )
    if data is None:
        # Some 3.4 characters a token, and as much again in case a text is longer than thought.
        texts = read_texts(seed, characters=steps * batch * window_tokens * 4)
        held_out = held_out_texts()
    else:
        examples, others = _read("train", data, evaluation)
        texts, held_out = (
            [one.prompt + one.reference for one in each] for each in (examples, others)
        )
    frozen = [*targets, *([] if reference is None else [reference])]
    names = [draft, *frozen]
    terminal.use_threads(threads, names)
    (student,), (tokenizer,) = _frozen([draft], "float32", device, trust_remote_code)
    models, tokenizers = _frozen(frozen, dtype, device, trust_remote_code)
    vocab_size = shared_vocabulary([student, *models], [tokenizer, *tokenizers])
    student.requires_grad_(True)
    law = distil.Targets(models[: len(targets)], settings, vocab_size)
    windows = token_windows(tokenizer, texts, window_tokens, seed)
    test = token_windows(tokenizer, held_out, window_tokens, seed)[:96]
    folder = _folder(out)
    with terminal.progress("measuring", 1):
        before = distil.held_out_acceptance(student, law, test)
    began, began_cpu = time.perf_counter(), time.process_time()
    with _progress("training", steps) as advance:
        rows = distil.train_draft(
            student,
            law,
            windows,
            settings,
            folder,
            reference=None if reference is None else models[-1],
            tokenizers=[*tokenizers[: len(targets)], tokenizer],
            names=names,
            resume=resume,
            progress=advance,
        )
    trained_s, trained_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw_curves(folder / "curves.png", rows, distil.CURVES)
    after = distil.held_out_acceptance(student, law, test)
    result = _result("train draft", settings, names, data, evaluation) | {
        "training_windows": list(windows.shape),
        "held_out_windows": list(test.shape),
        "training_seconds": trained_s,
        "training_cpu_seconds": trained_cpu_s,
        "last_steps": _mean_of_last(rows),
        "acceptance_before": before,
        "acceptance_after": after,
    }
    _write(folder / RESULT, result)
    if as_json:
        terminal.write_json(result)
    else:
        for when, one in (("before", before), ("after", after)):
            terminal.write_text(
                f"held-out acceptance {when}: {one['mean']:.3f} ± {one['standard_error']:.3f}\n"
            )


def _ensemble(name: str) -> str:
    from specens_kernels import ENSEMBLES

    if name not in ENSEMBLES:
        known = ", ".join(sorted(ENSEMBLES))
        raise ValueError(f"train: --ensemble: unknown name {name!r}; known names: {known}")
    return name


def _weights(text: str | None, count: int) -> tuple[float, ...]:
    if text is None:
        return (1 / count,) * count
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"train: --weights: expected numbers with commas between, got {text!r}"
        ) from error


def _check_evaluation(data: Path | None, evaluation: Path | None) -> None:
    if evaluation is not None and data is None:
        raise ValueError("train: --evaluation: expected --data beside it, got none")


def _read(command: str, data: Path, evaluation: Path | None) -> tuple[list[Any], list[Any]]:
    from specens.training.examples import read_examples, split

    examples = read_examples(command, data)
    if evaluation is None:
        return split(examples)
    return examples, read_examples(command, evaluation)


def _frozen(
    names: list[str], dtype: str, device: str, trust_remote_code: bool
) -> tuple[list[Any], list[Any]]:
    """Models without gradients, and their tokenizers."""
    from specens.cli import terminal

    models, tokenizers = terminal.load(
        "train", names, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    for model in models:
        model.requires_grad_(False)
    return models, tokenizers


def _pair(models: list[Any], tokenizers: list[Any], names: list[str]) -> Any:
    from specens.members.vocabulary import shared_vocabulary
    from specens.training.diversed import Pair

    stops = models[1].generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    size = shared_vocabulary(models, tokenizers)
    return Pair(models[0], models[1], tokenizers[1], size, stops, names)


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"train: --out: expected a folder that can be written, got {str(out)!r} "
            f"({error.strerror})"
        ) from error
    return out


@contextmanager
def _progress(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; what is yielded takes the number of steps done."""
    from specens.cli import terminal

    done = 0
    with terminal.progress(label, steps) as step:

        def advance(now: int) -> None:
            nonlocal done
            for _ in range(now - done):
                step()
            done = now

        yield advance


def _result(
    command: str, settings: Any, models: list[str], data: Path | None, evaluation: Path | None
) -> dict[str, Any]:
    """What was run, with what."""
    import torch

    import specens_kernels

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "models": models,
        "data": "standard library" if data is None else data.name,
        "evaluation": None if evaluation is None else evaluation.name,
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "specens-kernels": specens_kernels.__version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    }


def _mean_of_last(rows: list[dict[str, float]]) -> dict[str, float]:
    """Each column's mean over the last tenth of the steps."""
    last = rows[-max(1, len(rows) // 10) :]
    return {name: sum(row[name] for row in last) / len(last) for name in last[0] if name != "step"}


def _write(file: Path, result: dict[str, Any]) -> None:
    import json

    from specens.tuning.compare import finite

    file.write_text(json.dumps(finite(result), indent=1, allow_nan=False) + "\n")


def _show_front(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["acceptance", "target_log_likelihood", "closeness_to_target"]
    if result["reward"] != "likelihood":
        columns.append("reward")
    columns += ["text_acceptance", "text_log_likelihood"]
    table = Table(title="means on held-out examples", title_justify="left")
    table.add_column("draft weight", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, measures in result["candidates"].items():
        cells = (measures.get(column) for column in columns)
        table.add_row(name, *("" if cell is None else f"{cell['mean']:.3f}" for cell in cells))
    console = Console(highlight=False)
    console.print(table)
    for quality, gain in result["above_front"].items():
        console.print(
            f"{quality.replace('_', ' ')}: {gain['gain']:+.3f} ± {gain['standard_error']:.3f} "
            f"above the static front at acceptance {gain['acceptance']:.3f}"
        )
