# SPDX-License-Identifier: Apache-2.0
"""What the commands of `cli.py` share: prompts and models in, text and tables out.

Text goes to standard output; progress, statistics and errors go to standard error, so that a pipe
gets nothing but text. To add a column to a table, add it where the table is made.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specens import family

if TYPE_CHECKING:
    from specens.loop.statistics import Statistics
    from specens.members.probe import Probe
    from specens.methods import Method
    from specens.tuning import Tuning
    from specens.tuning.compare import Comparison

DTYPES = ("auto", "bfloat16", "float16", "float32")
FAMILY_PREFIX = "family:"
CONTEXT_TOKENS = 8


def errors() -> Console:
    """Standard error, as it is now: tests and pipes replace it."""
    return Console(stderr=True, highlight=False)


def read_prompts(command: str, prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    """The prompts to continue, from the argument, a file ("-" is standard input) or a pipe.

    Of a file and of standard input the last newline is dropped. With `lines`, each line that is not
    blank is a prompt; if the first is a JSON object, all are, and "prompt" holds the text.

    Raises:
        ValueError: there is no text, or too much of it.
    """
    if prompt is not None and file is not None:
        raise ValueError(f"{command}: --file: expected no prompt argument beside it, got both")
    if prompt is not None:
        source, text = "the argument", prompt
    elif file is not None and str(file) != "-":
        source, text = str(file), _read_file(command, file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise ValueError(f"{command}: prompt: expected an argument, --file or a pipe, got none")
    else:
        source, text = "standard input", sys.stdin.read()
    if prompt is None:
        text = text.removesuffix("\n")
    prompts = _split(command, text, source) if lines else [text]
    if not prompts or not all(one.strip() for one in prompts):
        raise ValueError(f"{command}: prompt: expected text, got none in {source}")
    return prompts


def _read_file(command: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(
            f"{command}: --file: expected a text file that can be read, got {str(file)!r} ({why})"
        ) from error


def _split(command: str, text: str, source: str) -> list[str]:
    # Not splitlines: JSON strings may hold other separators as they are, such as U+2028.
    lines = {n: line for n, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not next(iter(lines.values()), "").lstrip().startswith("{"):
        return list(lines.values())
    prompts = []
    for number, line in lines.items():
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(
                f'{command}: --lines: expected a JSON object with the text of "prompt" in line '
                f"{number} of {source}, got {line[:40]!r}"
            )
        prompts.append(prompt)
    return prompts


@contextmanager
def progress(label: str, count: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; yields what to call after each step."""
    console = errors()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(label, total=count)
        yield lambda: bar.advance(task)


def device_named(command: str, name: str) -> str:
    """The device to put models on; "auto" is a GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or has none here, or it computes nothing ("meta").
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Only a number that comes back shows that there is such a device.
        torch.zeros(1, device=torch.device(name)).item()
    # Torch raises an AssertionError or ImportError for devices that it was built without.
    except (RuntimeError, AssertionError, ImportError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{command}: --device: expected auto, or a device that torch has here, such as cpu or "
            f"cuda:0, got {name!r} ({why})"
        ) from error
    return name


def use_threads(threads: int | None, names: Sequence[str]) -> None:
    """Have torch compute with so many CPU threads.

    None is 1 if all models are of the family, which are too small for more; else torch's choice.
    """
    import torch

    if threads is None and all(name.startswith(FAMILY_PREFIX) for name in names):
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def load(
    command: str,
    names: Sequence[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[list[Any], list[Any]]:
    """Models and their tokenizers, from safetensors only. A name that comes twice is loaded once.

    Args:
        command: for messages.
        names: folders, hub names, or "family:code" and the like for what ships with the package.
        dtype: one of `DTYPES`. "auto" is the checkpoint's own, and float32 for the family.
        device: where the models go, as in `device_named`.
        trust_remote_code: run code that comes with a model.
    Raises:
        ValueError: an unknown dtype or device, or a model that cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"{command}: --dtype: unknown name {dtype!r}; known names: {', '.join(DTYPES)}"
        )
    where = device_named(command, device)
    for name in names:
        _check_path(command, name)
    found: dict[str, tuple[Any, Any]] = {}
    with progress("loading models", len(names)) as step:
        for name in names:
            if name not in found:
                found[name] = _load(command, name, dtype, where, trust_remote_code)
            step()
    return [found[name][0] for name in names], [found[name][1] for name in names]


def _check_path(command: str, name: str) -> None:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise ValueError(f"{command}: model: expected a folder or a hub name, got {name!r}")


def _load(
    command: str, name: str, dtype: str, device: str, trust_remote_code: bool
) -> tuple[Any, Any]:
    import torch
    from huggingface_hub.utils import logging as hub_logging
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where: str | Path = name
    if name.startswith(FAMILY_PREFIX):
        where = family.path(name.removeprefix(FAMILY_PREFIX))
        dtype = "float32" if dtype == "auto" else dtype
    elif name.startswith("~"):
        where = Path(name).expanduser()
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Else it tells of every retry.
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=wanted, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "ignore_mismatched_sizes" in why:  # no argument of the user's
            why = "weights of other shapes than its config.json says"
        raise ValueError(
            f"{command}: model: expected a causal LM with tokenizer and safetensors, "
            f"got {name!r} ({why})"
        ) from error
    return model.eval().to(device), tokenizer


def encode(
    command: str, tokenizer: Any, prompt: str, *, chat: bool = False, device: Any = "cpu"
) -> Any:
    """(1, S) int64 on the device: the prompt's tokens, as a turn of the user's if `chat`.

    Raises:
        ValueError: there is no chat template, or the prompt has no tokens.
    """
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{command}: --chat: expected a tokenizer with a chat template, got none"
            )
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError(f"{command}: prompt: expected at least one token, got none")
    return ids.to(device)


class TextStream:
    """A streamer that writes text as soon as its tokens are whole characters.

    A few tokens before the new ones are decoded with them, so that the spaces and characters that
    depend on their neighbours come out as in the whole text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object] | None = None) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._write = write
        self._tokens: list[int] | None = None
        self._begin = self._read = 0

    def put(self, value: Any) -> None:
        """Take tokens: first the prompt's, then those written, of any shape."""
        tokens = value.flatten().tolist()
        if self._tokens is None:
            self._tokens = tokens[-CONTEXT_TOKENS:]
            self._read = len(self._tokens)
            return
        self._tokens.extend(tokens)
        self._flush(final=False)

    def end(self) -> None:
        """Write what is left, whole or not."""
        self._flush(final=True)

    def _flush(self, *, final: bool) -> None:
        tokens = self._tokens or []
        old = self._decode(tokens[self._begin : self._read])
        new = self._decode(tokens[self._begin :])[len(old) :]
        if not new or (new.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return
        self._begin, self._read = self._read, len(tokens)
        self.text += new
        if self._write is not None:
            self._write(new)

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def write_text(text: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """One line of JSON on standard output."""
    write_text(_json(value))


def check_folder(command: str, option: str, path: Path) -> None:
    """Find out before the work, not after it, that there is no place for its result.

    Raises:
        ValueError: the file's folder does not exist.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"{command}: {option}: expected a file in a folder that exists, got {str(path)!r}"
        )


def write_file(command: str, path: Path, value: Any) -> None:
    """One line of JSON in a file.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        path.write_text(_json(value), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{command}: --output: expected a file that can be written, got {str(path)!r} "
            f"({error.strerror})"
        ) from error


def _json(value: Any) -> str:
    from specens.tuning.compare import finite

    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False) + "\n"


def methods_table(methods: "Iterable[Method]") -> Table:
    """What each method emits, needs and is for."""
    table = Table(box=None, pad_edge=False)
    for column in ("method", "law of the text", "needs", "use it for"):
        table.add_column(column, overflow="fold")
    for method in methods:
        table.add_row(method.name, method.law, method.needs, method.use)
    return table


def members_table(statistics: "Statistics") -> Table:
    """Per member: calls and what became of its drafts; below, the whole call in one line."""
    table = Table(title_justify="left", caption_justify="left")
    table.add_column("member")
    for name in ("calls", "drafted", "tested", "accepted", "rate"):
        table.add_column(name, justify="right")
    for m, name in enumerate(statistics.members):
        tested, accepted = statistics.tested[m], statistics.accepted[m]
        table.add_row(
            name,
            str(statistics.calls[m]),
            str(statistics.drafted[m]),
            str(tested),
            str(accepted),
            _percent(accepted, tested),
        )
    return table


def summary(statistics: "Statistics") -> str:
    """Speed, calls and acceptance of one call of generate, in a few words each."""
    lines = [
        f"{statistics.num_tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s after a "
        f"prefill of {statistics.prefill_seconds * 1000:.0f} ms; "
        f"{statistics.calls_per_token:.2f} calls/token"
    ]
    if statistics.by_position:
        rates = [_percent(accepted, tested) for tested, accepted in statistics.by_position]
        lines.append(f"accepted by position in the block: {' '.join(rates)}")
    return "\n".join(lines)


def rows_table(title: str, rows: Sequence["Comparison"]) -> Table:
    """A comparison: median speeds, 10-90 % spread, ratio to the first row."""
    table = Table(title=title, title_justify="left")
    table.add_column("schedule", no_wrap=True)
    for name in ("tokens/s", "10-90 %", "accepted", "calls/token", f"vs {rows[0].name}"):
        table.add_column(name, justify="right")
    for row in rows:
        drafted = row.acceptance_rate == row.acceptance_rate
        table.add_row(
            row.name,
            f"{row.tokens_per_second:.1f}",
            f"{row.low:.1f} - {row.high:.1f}",
            f"{row.acceptance_rate:.0%}" if drafted else "",
            f"{row.calls_per_token:.2f}",
            f"{row.ratio:.2f}x",
        )
    return table


def tuning_table(tuning: "Tuning", rows: "Sequence[Comparison] | None" = None) -> Table:
    """Candidates by predicted time; where they were run, measured beside predicted."""
    measured = {row.name: row for row in rows or ()}
    best = tuning.best(rows).name
    table = Table(title="Predicted, the fastest first", title_justify="left")
    table.add_column("", no_wrap=True)
    longest = max(len(word) for one in tuning.candidates for word in one.name.split())
    table.add_column("schedule", overflow="fold", min_width=longest)
    columns = ["ms/token", "vs plain"]
    columns += ["measured ms/token", "measured vs plain"] if rows else []
    for name in columns:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for one in tuning.candidates:
        cells = [f"{one.seconds * 1e3:.2f}", f"{tuning.speedup(one):.2f}x"]
        if rows:
            row = measured.get(one.name)
            cells += (
                [f"{1e3 / row.tokens_per_second:.2f}", f"{row.ratio:.2f}x"] if row else ["", ""]
            )
        table.add_row("best" if one.name == best else "", one.name, *cells)
    return table


def lossy_notes(tuning: "Tuning") -> list[str]:
    """What the text of each lossy candidate is instead of what was asked for."""
    lossy = [one for one in tuning.candidates if not one.lossless]
    notes = [
        f"{one.arguments['acceptance']}: lossy. The text's law is {one.law}; {one.divergence:.3f} "
        "is the mean total variation from the law asked for, at a draft's place."
        for one in lossy
    ]
    return [*notes, "Lossy rules are never called the best."] if lossy else []


def probe_table(probe: "Probe") -> Table:
    """What `probe` found, one fact a row."""
    modes = {
        "slot": "all rows of a batch in one forward, rollback is an integer",
        "crop": "row by row, the stock cache is cropped",
        "replay": "row by row, an earlier state is restored and tokens are fed again",
    }
    continuations = {
        "chunk": "any number of tokens at once",
        "token": "one token at a time",
        "none": "not at all: every forward starts from the first token",
    }
    keeps = {
        "rows": "an index per row, so that only the logits asked for are computed",
        "last": "the last tokens, one number for all rows",
        "all": "not understood: all logits are computed",
    }
    tree = "is scored in one forward" if probe.tree else "cannot be scored in one forward"
    masks = "a dict, one for each layer type" if probe.per_type else "one for all layers"
    table = Table("of the model", probe.model)
    table.add_row("mode", f"{probe.mode}: {modes[probe.mode]}")
    table.add_row("tree of tokens", tree)
    if probe.mode == "slot":
        table.add_row("masks", masks)
    if probe.mode == "replay":
        table.add_row(
            "cache continues", f"{probe.continuation}: {continuations[probe.continuation]}"
        )
    table.add_row("logits_to_keep", f"{probe.logits_to_keep}: {keeps[probe.logits_to_keep]}")
    table.add_row("why this mode", probe.reason or "the fastest gives the model's own logits")
    return table


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""
