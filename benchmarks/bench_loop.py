# SPDX-License-Identifier: Apache-2.0
"""The decoding loop's own time, models subtracted, beside transformers' assisted generation.

Own time is wall time minus the time inside the models' forwards, which hooks measure. A turn is one
round of propose, score, verify, commit: for assisted generation one forward of the target, for
plain decoding one token. Prefill and the entry into `generate` are not counted, for anyone. The
models are random Llamas of 4 layers and width 128; the draft is a copy of the target with noise on
its weights, so that some drafts are kept and some are not. `--profile` shows where our time goes.
"""

import argparse
import contextlib
import copy
import cProfile
import itertools
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
from harness import WRONG, Spread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specens import Alternating, Speculative, SpeculativeDecoder
from specens_kernels import native

GAMMA = 4
PROMPT = 32
TARGET_MS = 0.4


def models(vocab_size: int) -> tuple[Any, Any]:
    """A random target and a draft that resembles it; no token ends the text."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    target = LlamaForCausalLM(config).eval()
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    # Transformers reads the draft length here, and stops early below its confidence unless it is 0.
    draft.generation_config.num_assistant_tokens = GAMMA
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return target, draft


@dataclass
class Forwards:
    """(model, began, ended) of every forward while `watched`."""

    calls: list[tuple[Any, float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def watched(self, *watched: Any) -> Iterator[None]:
        """Measure with hooks, which leave the signature of `forward` alone."""
        self.calls.clear()
        began: list[float] = []

        def before(module: Any, inputs: Any) -> None:
            began.append(time.perf_counter())

        def after(module: Any, inputs: Any, output: Any) -> None:
            self.calls.append((module, began.pop(), time.perf_counter()))

        hooks = [model.register_forward_pre_hook(before) for model in watched]
        hooks += [model.register_forward_hook(after) for model in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seconds(self, first: int = 0) -> float:
        """Time inside the forwards from the `first` on."""
        return sum(ended - began for _, began, ended in self.calls[first:])


@dataclass(frozen=True)
class Turns:
    """What one call of generate took: the loop's own seconds, turns and tokens."""

    own: float
    turns: int
    tokens: int
    acceptance: float | None = None  # where drafts were tested, by us


def measure_ours(decoder: SpeculativeDecoder, ids: Tensor, options: dict[str, Any]) -> Turns:
    """Decode; the prefill is each model's first forward."""
    forwards = Forwards()
    with forwards.watched(*decoder.models):
        decoder.generate(ids, seed=1, **options)
    statistics = decoder.statistics
    assert statistics is not None
    own = statistics.decode_seconds - forwards.seconds(len(decoder.models))
    acceptance = statistics.acceptance_rate if sum(statistics.tested) else None
    return Turns(own, statistics.turns, statistics.num_tokens, acceptance)


def measure_transformers(target: Any, draft: Any, ids: Tensor, options: dict[str, Any]) -> Turns:
    """Decode; from the end of the target's first forward to the end of its last one."""
    forwards = Forwards()
    extra = {} if draft is None else {"assistant_model": draft}
    with forwards.watched(*(model for model in (target, draft) if model is not None)):
        out = target.generate(ids, **options, **extra)
    ends = [i for i, (model, _, _) in enumerate(forwards.calls) if model is target]
    first, last = ends[0], ends[-1]
    wall = forwards.calls[last][2] - forwards.calls[first][2]
    forwards.calls = forwards.calls[: last + 1]
    return Turns(wall - forwards.seconds(first + 1), len(ends) - 1, out.shape[1] - ids.shape[1] - 1)


def contestants(target: Any, draft: Any, batch: int) -> dict[str, Any]:
    """Name -> (measuring function of (ids, options), generating function of the same)."""

    def our(decoder: SpeculativeDecoder) -> tuple[Any, Any]:
        return (
            lambda ids, options: measure_ours(decoder, ids, options),
            lambda ids, options: decoder.generate(ids, seed=1, **options),
        )

    def theirs(assistant: Any) -> tuple[Any, Any]:
        extra = {} if assistant is None else {"assistant_model": assistant}
        return (
            lambda ids, options: measure_transformers(target, assistant, ids, options),
            lambda ids, options: target.generate(ids, **options, **extra),
        )

    listed = {
        "plain": our(SpeculativeDecoder([target], schedule="plain")),
        "speculative": our(SpeculativeDecoder([target], schedule=Speculative(GAMMA), draft=draft)),
        "plain of two": our(SpeculativeDecoder([target, draft], schedule="plain")),
        "alternating of two": our(
            SpeculativeDecoder([target, draft], schedule=Alternating(GAMMA, order=(1, 0)))
        ),
    }
    if batch == 1:  # assisted generation takes one sequence
        listed["transformers plain"] = theirs(None)
        listed["transformers assisted"] = theirs(draft)
    return listed


def gate(listed: dict[str, Any], ids: Tensor) -> list[str]:
    """Names whose greedy text is not the plain one's; of one model, or of two."""
    options = {"max_new_tokens": 24, "do_sample": False}
    texts = {name: generate(ids, options) for name, (_, generate) in listed.items()}
    return [
        name
        for name, text in texts.items()
        if not torch.equal(text, texts["plain of two" if "of two" in name else "plain"])
    ]


def measure(
    vocab_size: int, batch: int, threads: int, options: argparse.Namespace, rounds: int
) -> list[dict[str, Any]]:
    """Rows of the result: each contestant, greedy and sampled."""
    torch.set_num_threads(threads)
    target, draft = models(vocab_size)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab_size, (batch, PROMPT), generator=generator)
    listed = contestants(target, draft, batch)
    wrong = gate(listed, ids)
    rows = []
    for mode in ("greedy", "sampled"):
        asked = {"max_new_tokens": options.new_tokens, "do_sample": mode == "sampled"}
        if mode == "sampled":
            asked |= {"temperature": 1.0, "top_k": 0}
        turns: dict[str, list[Turns]] = {name: [] for name in listed if name not in wrong}

        def clocked(name: str, asked: dict[str, Any], turns: Any) -> Callable[[int], float]:
            def run(number: int) -> float:
                torch.manual_seed(number)
                turns[name].append(listed[name][0](ids, asked))
                return turns[name][-1].own

            return run

        runs = {name: clocked(name, asked, turns) for name in turns}
        harness.interleave(runs, rounds, options.budget_s)
        for name in listed:
            row = {"loop": name, "mode": mode, "vocab_size": vocab_size, "batch": batch}
            row |= {"threads": threads, "own_per_turn": WRONG}
            if name not in wrong:
                calls = turns[name]
                row |= {
                    "own_per_turn": Spread.of([t.own / t.turns for t in calls]),
                    "own_per_token": Spread.of([t.own / t.tokens for t in calls]),
                    "tokens_per_turn": sum(t.tokens for t in calls) / sum(t.turns for t in calls),
                }
                if calls[0].acceptance is not None:
                    row["acceptance"] = sum(t.acceptance for t in calls) / len(calls)
            rows.append(row)
    return rows


def profile(vocab_size: int, batch: int, options: argparse.Namespace) -> None:
    """The fifteen functions, models left out, in which our speculative loop spends its own time."""
    torch.set_num_threads(1)
    target, draft = models(vocab_size)
    ids = torch.randint(1, vocab_size, (batch, PROMPT))
    decoder = SpeculativeDecoder([target], schedule=Speculative(tokens=GAMMA), draft=draft)
    asked = {"max_new_tokens": 4 * options.new_tokens, "do_sample": True, "top_k": 0}
    decoder.generate(ids, seed=1, **asked)
    profiler = cProfile.Profile()

    def stop(*_: Any) -> None:
        profiler.disable()

    def go(*_: Any) -> None:
        profiler.enable()

    hooks = [model.register_forward_pre_hook(stop) for model in (target, draft)]
    hooks += [model.register_forward_hook(go) for model in (target, draft)]
    decoder.generate(ids, seed=1, **asked)
    profiler.disable()
    for hook in hooks:
        hook.remove()
    assert decoder.statistics is not None
    print(f"V = {vocab_size}, B = {batch}: {decoder.statistics.turns} turns")
    statistics = pstats.Stats(profiler).strip_dirs()
    statistics.sort_stats("tottime").print_stats(15)
    statistics.sort_stats("cumulative").print_stats("specens|loop|ops.py|members|schedules", 15)


def in_ms(row: dict[str, Any], name: str) -> str:
    """One cell: a spread in milliseconds."""
    value = row.get(name, "-")
    return value.text(1e3, 2) if isinstance(value, Spread) else value


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Own milliseconds per turn at B = 1, and how many times more transformers takes."""
    numbers: dict[str, Any] = {"native": native.AVAILABLE, "target_ms": TARGET_MS}
    for row in rows:
        spread = row["own_per_turn"]
        if row["batch"] == 1 and row["mode"] == "sampled" and spread != WRONG:
            key = f"{row['loop']} V{row['vocab_size']} {row['threads']}t".replace(" ", "_")
            numbers[f"{key}_ms"] = round(spread.median * 1e3, 3)
    for key in [key for key in numbers if key.startswith("transformers_assisted")]:
        own = numbers.get(key.replace("transformers_assisted", "speculative"))
        if own:
            numbers[key.replace("_ms", "_over_ours")] = round(numbers[key] / own, 1)
    numbers["wrong_rows"] = sum(row["own_per_turn"] == WRONG for row in rows)
    return numbers


def readme_tables(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the README shows: sampled, one thread."""
    least = min(row["threads"] for row in rows)
    columns = ["loop", "vocabulary", "sequences", "ms per turn", "ms per token", "tokens per turn"]
    lines = []
    for row in rows:
        if row["mode"] == "sampled" and row["threads"] == least and row["own_per_turn"] != WRONG:
            cells = [row["loop"], f"{row['vocab_size']:,}", row["batch"]]
            cells += [f"{row[k].median * 1e3:.2f}" for k in ("own_per_turn", "own_per_token")]
            lines.append([*cells, f"{row['tokens_per_turn']:.2f}"])
    caption = f"time outside the models, {GAMMA} speculative tokens, sampled, threads: {least}"
    return {"loop": {"caption": caption, "columns": columns, "rows": lines}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = harness.arguments("The loop's own time per turn, against transformers.")
    parser.add_argument("--vocab-sizes", type=harness.numbers, default=[512, 32000])
    parser.add_argument("--batches", type=harness.numbers, default=[1, 8])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=30.0, help="most seconds per mode")
    parser.add_argument("--profile", action="store_true", help="where our time goes, and no result")
    options = parser.parse_args(arguments)
    if not native.AVAILABLE:
        print(f"{native.REASON}: `verify` and `sample` are the reference, which is slow")
    grid = list(itertools.product(options.threads, options.batches, options.vocab_sizes))
    if options.quick:
        options.new_tokens, options.rounds = min(options.new_tokens, 32), min(options.rounds, 5)
        options.budget_s = 25.0 / len(grid) / 2
    if options.profile:
        for vocab_size, batch in itertools.product(options.vocab_sizes, options.batches):
            profile(vocab_size, batch, options)
        return 0
    before = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for threads, batch, vocab_size in harness.in_time(options, grid):
        rows += measure(vocab_size, batch, threads, options, options.rounds)
    torch.set_num_threads(before)
    keys = ("loop", "mode", "vocab_size", "batch", "threads")
    columns = [*keys, "own ms per turn", "own ms per token", "tokens per turn", "acceptance"]
    cells = [
        [
            *(row[key] for key in keys),
            in_ms(row, "own_per_turn"),
            in_ms(row, "own_per_token"),
            f"{row.get('tokens_per_turn', float('nan')):.2f}",
            f"{row['acceptance']:.2f}" if "acceptance" in row else "-",
        ]
        for row in rows
    ]
    print(harness.table(columns, cells))
    return harness.finish("bench_loop", options, rows, readme_tables(rows), headline(rows))


if __name__ == "__main__":
    raise SystemExit(main())
