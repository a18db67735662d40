# SPDX-License-Identifier: Apache-2.0
"""What goes into a command: prompts from an argument, a file or a pipe, and models by their names.

What can be refused without torch is refused before it is imported. To add a place that models come
from, add it to `check_names` and `_load`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specens import family
from specens_kernels import Refusal

DTYPES = ("auto", "bfloat16", "float16", "float32")
FAMILY_PREFIX = "family:"
WHOLE_FAMILY = [FAMILY_PREFIX + name for name in family.FAMILY]


def read_prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    """The prompts to continue, from the argument, a file ("-" is standard input) or a pipe.

    Of a file and of standard input the last newline is dropped. With `lines`, each line that is not
    blank is a prompt; if the first is a JSON object, all are, and "prompt" holds the text.

    Raises:
        Refusal: there is no text, or too much of it.
    """
    if prompt is not None and file is not None:
        raise Refusal("prompts", "file", "no prompt argument beside it", "both")
    if prompt is not None:
        source, text = "the argument", prompt
    elif file is not None and str(file) != "-":
        source, text = str(file), _read_file(file)
    else:
        source, text = "standard input", _read_pipe()
    prompts = _split(text, source) if lines else [text]
    if not prompts or not all(text.strip() for text in prompts):
        raise Refusal("prompts", "prompt", "text", f"none in {source}")
    for text in prompts:
        check_text("prompts", "prompt", text, source)
    return prompts


def check_text(op: str, argument: str, text: str, source: str = "it") -> None:
    """Refuse halves of characters, as bytes that are no UTF-8 come in, and JSON's escapes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refusal(op, argument, "text that UTF-8 has", f"a lone surrogate in {source}")


def read_prompts_or_built_in(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    """As `read_prompts`, but the built-in ones where none are given."""
    if prompt is None and file is None:
        return list(family.PROMPTS)
    return read_prompts(prompt, file, lines)


def _read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        got = f"{str(file)!r} ({why})"
        raise Refusal("prompts", "file", "a text file that can be read", got) from error


def _read_pipe() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise Refusal("prompts", "prompt", "an argument, --file or a pipe", "none")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise Refusal("prompts", "prompt", "text in the pipe", "no UTF-8") from error


def _split(text: str, source: str) -> list[str]:
    # Not splitlines: JSON strings may hold other separators as they are, such as U+2028.
    lines = {n: line for n, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not next(iter(lines.values()), "").lstrip().startswith("{"):
        return list(lines.values())
    prompts = []
    for number, line in lines.items():
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            prompt = None
        if not isinstance(prompt, str):
            expected = f'a JSON object with the text of "prompt" in line {number} of {source}'
            raise Refusal("prompts", "lines", expected, repr(line[:40]))
        prompts.append(prompt)
    return prompts


def encode(tokenizer: Any, prompt: str, *, chat: bool = False, device: Any = "cpu") -> Any:
    """(1, S) int64 on the device: the prompt's tokens, as a turn of the user's if `chat`.

    Raises:
        Refusal: there is no chat template, or the prompt has no tokens.
    """
    if chat:
        if tokenizer.chat_template is None:
            raise Refusal("encode", "chat", "a tokenizer with a chat template", "none")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise Refusal("encode", "prompt", "at least one token", "none")
    return ids.to(device)


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    dtype: one of `DTYPES`. "auto" is the checkpoint's own, and float32 for the family.
    device: where the models go, as in `device_named`.
    threads: as in `use_threads`.
    trust_remote_code: run code that comes with a model.
    """

    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without torch."""
        if self.dtype not in DTYPES:
            raise Refusal.unknown("load", "dtype", self.dtype, DTYPES)


def check_names(argument: str, names: Sequence[str] | None) -> None:
    """Find out without torch that there are no models of these names.

    Raises:
        Refusal: a name, which was given as `argument`, is none of the family's, or no folder.
    """
    for name in names or ():
        if name.startswith(FAMILY_PREFIX) and name not in WHOLE_FAMILY:
            raise Refusal.unknown("load", argument, name, WHOLE_FAMILY)
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_like_path and not Path(name).expanduser().is_dir():
            raise Refusal("load", argument, "a folder or a hub name", repr(name))


def device_named(name: str) -> str:
    """The device to put models on; "auto" is a GPU if there is one.

    Raises:
        Refusal: torch knows no such device, or has none here, or it computes nothing ("meta").
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Only a number that comes back shows that there is such a device.
        torch.zeros(1, device=torch.device(name)).item()
    # Torch raises an AssertionError or ImportError for devices that it was built without.
    except (RuntimeError, AssertionError, ImportError) as error:
        expected = "auto, or a device that torch has here, such as cpu or cuda:0"
        raise Refusal("load", "device", expected, f"{name!r} ({_first_line(error)})") from error
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


def load(names: Sequence[str], how: Loading = Loading()) -> tuple[list[Any], list[Any]]:
    """Models and their tokenizers, from safetensors only. A name that comes twice is loaded once.

    Args:
        names: folders, hub names, or "family:code" and the like for what ships with the package.
        how: on which device, as what.
    Raises:
        Refusal: an unknown device, or a model that cannot be loaded.
    """
    from specens.cli.output import progress

    check_names("model", names)
    device = device_named(how.device)
    loaded: dict[str, tuple[Any, Any]] = {}
    with progress("loading models", len(names)) as step:
        for name in names:
            if name not in loaded:
                loaded[name] = _load(name, how.dtype, device, how.trust_remote_code)
            step()
    return [loaded[name][0] for name in names], [loaded[name][1] for name in names]


@dataclass(frozen=True)
class Loaded:
    """An ensemble's members, the drafts outside it, and the tokenizers of all, the drafts' last."""

    members: list[Any]
    drafts: list[Any]
    tokenizers: list[Any]

    @property
    def device(self) -> Any:
        """Where the first member is, and prompts go."""
        return self.members[0].device

    def encode(self, prompts: Sequence[str], *, chat: bool = False) -> list[Any]:
        """(1, S) int64 of each prompt, on the device; see `encode`."""
        return [encode(self.tokenizers[0], text, chat=chat, device=self.device) for text in prompts]


def load_ensemble(
    models: Sequence[str] | None, drafts: Sequence[str] | None, how: Loading
) -> Loaded:
    """The models of these names, or the whole family; sets the threads."""
    members = list(models or WHOLE_FAMILY)
    names = [*members, *(drafts or ())]
    use_threads(how.threads, names)
    loaded, tokenizers = load(names, how)
    return Loaded(loaded[: len(members)], loaded[len(members) :], tokenizers)


def _load(name: str, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    import torch
    from huggingface_hub.utils import logging as hub_logging
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
    # What reads a folder's files raises anything where they are not what they should be, the
    # tokenizers' Exception itself among it.
    except Exception as error:
        why = _first_line(error)
        if "ignore_mismatched_sizes" in why:  # no argument of the user's
            why = "weights of other shapes than its config.json says"
        expected = "a causal LM with tokenizer and safetensors"
        raise Refusal("load", "model", expected, f"{name!r} ({why})") from error
    _check_facts(name, model)
    return model.eval().to(device), tokenizer


def _check_facts(name: str, model: Any) -> None:
    """Refuse what a configuration may say and a model be made of all the same."""
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise Refusal("load", "model", "one layer at least", f"{name!r} with {layers!r}")
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(model.generation_config, field, None)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(each, int) and -1 <= each < 2**31 for each in listed):
            raise Refusal("load", "model", f"ids of tokens as {field}", f"{ids!r} of {name!r}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
