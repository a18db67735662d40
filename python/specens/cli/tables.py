# SPDX-License-Identifier: Apache-2.0
"""The tables that commands show. To add a column, add it where its table is made."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from specens.loop.statistics import Statistics
    from specens.members.probe import Probe
    from specens.methods import Method
    from specens.tuning import Comparison, Tuning


def methods_table(methods: "Iterable[Method]") -> Table:
    """What each method emits, needs and is for."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in ("law of the text", "needs", "use it for"):
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


def comparisons_table(title: str, comparisons: "Sequence[Comparison]") -> Table:
    """Median speeds, 10-90 % spread, ratio to the first one's."""
    table = Table(title=title, title_justify="left")
    table.add_column("schedule", no_wrap=True)
    first = comparisons[0].name
    for name in ("tokens/s", "10-90 %", "accepted", "calls/token", f"vs {first}"):
        table.add_column(name, justify="right")
    for comparison in comparisons:
        drafted = comparison.acceptance_rate == comparison.acceptance_rate
        table.add_row(
            comparison.name,
            f"{comparison.tokens_per_second:.1f}",
            f"{comparison.low:.1f} - {comparison.high:.1f}",
            f"{comparison.acceptance_rate:.0%}" if drafted else "",
            f"{comparison.calls_per_token:.2f}",
            f"{comparison.ratio:.2f}x",
        )
    return table


def tuning_table(tuning: "Tuning", comparisons: "Sequence[Comparison] | None" = None) -> Table:
    """Candidates by predicted time; where they were run, measured beside predicted."""
    measured = {comparison.name: comparison for comparison in comparisons or ()}
    best = tuning.best(comparisons).name
    table = Table(title="Predicted, the fastest first", title_justify="left")
    table.add_column("", no_wrap=True)
    words = [word for candidate in tuning.candidates for word in candidate.name.split()]
    table.add_column("schedule", overflow="fold", min_width=max(map(len, words)))
    columns = ["ms/token", "vs plain"]
    columns += ["measured ms/token", "measured vs plain"] if measured else []
    for name in columns:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for candidate in tuning.candidates:
        cells = [f"{candidate.seconds * 1e3:.2f}", f"{tuning.speedup(candidate):.2f}x"]
        comparison = measured.get(candidate.name)
        if comparison is not None:
            cells.append(f"{1e3 / comparison.tokens_per_second:.2f}")
            cells.append(f"{comparison.ratio:.2f}x")
        table.add_row("best" if candidate.name == best else "", candidate.name, *cells)
    return table


def lossy_notes(tuning: "Tuning") -> list[str]:
    """What the text of each lossy candidate is instead of what was asked for."""
    notes = [
        f"{candidate.acceptance}: lossy. The text's law is {candidate.law}; "
        f"{candidate.divergence:.3f} is the mean total variation from the law asked for, at a "
        "draft's place."
        for candidate in tuning.candidates
        if not candidate.lossless
    ]
    return [*notes, "Lossy rules are never called the best."] if notes else []


def front_table(result: Mapping[str, Any]) -> Table:
    """Means on held-out examples, of constant weights and of the learned head."""
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
    return table


def front_notes(result: Mapping[str, Any]) -> list[str]:
    """How far the head is above the front of constant weights, by each quality."""
    return [
        f"{quality.replace('_', ' ')}: {gain['gain']:+.3f} ± {gain['standard_error']:.3f} "
        f"above the static front at acceptance {gain['acceptance']:.3f}"
        for quality, gain in result["above_front"].items()
    ]


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
    masks = "masks in a dict by layer type" if probe.per_type else "one mask for all layers"
    table = Table("of the model", probe.model)
    table.add_row("mode", f"{probe.mode}: {modes[probe.mode]}")
    table.add_row("tree of tokens", tree)
    if probe.attention == "kernel":
        table.add_row("attention", "kernel: a kernel of this package, no masks")
    elif probe.mode == "slot":
        table.add_row("attention", f"mask: {masks} ({probe.mask_reason})")
    if probe.mode == "replay":
        table.add_row(
            "cache continues", f"{probe.continuation}: {continuations[probe.continuation]}"
        )
    table.add_row("logits_to_keep", f"{probe.logits_to_keep}: {keeps[probe.logits_to_keep]}")
    table.add_row("why this mode", probe.reason or "the fastest gives the model's own logits")
    return table


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""
