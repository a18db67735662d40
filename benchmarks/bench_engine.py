# SPDX-License-Identifier: Apache-2.0
"""Deciding a step's tokens in vLLM: our runner's path against vLLM's own, on vLLM's inputs.

    build/engines-0.32.0/bin/python benchmarks/bench_engine.py --save

runs where vLLM's CPU build is (`make test-engines` makes that environment). Contestants: `ours`,
what the plug-in's `_sample` does with a step's logits; `vllm`, its `RejectionSampler`, or its
`Sampler` where nothing was drafted, with the same logits. The law is the target's alone, which is
all that vLLM can do; `ours, two members` mixes two and has no peer. Drafts come from a draft model:
vLLM keeps float32 probabilities of them, we the logits. Greedy steps are the gate. One function of
vLLM 0.32's CPU build, `expand_batch_to_tokens`, returns memory that nobody has written, and vLLM's
step fails or is wrong after a draft: it has a working one here.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import harness
import torch
from harness import Spread
from torch import Tensor

AIM = 5.0  # times as fast, where there are filters, for which vLLM sorts
FILTERS = {"none": {}, "top-k, top-p": {"top_k": 50, "top_p": 0.9}}
BATCHES, VOCAB_SIZES, DRAFTS = (1, 8, 32, 128), (32000, 152064), (0, 3)
COLUMNS = ("vocabulary", "batch", "drafts", "filters", "ours µs", "two members µs", "vllm µs")


@dataclass(frozen=True)
class Case:
    """One step: requests, drafts of each, vocabulary and filters."""

    vocab_size: int
    batch: int
    drafts: int
    filters: str


class Step:
    """The tensors of one step, as vLLM's runner has them."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        self.case, rows = case, case.batch * (case.drafts + 1)
        self.members = [
            (2 * torch.randn(rows, case.vocab_size, generator=generator)).bfloat16()
            for _ in range(2)
        ]
        drafted = case.batch * case.drafts
        noise = torch.randn(drafted, case.vocab_size, generator=generator)
        is_bonus = torch.arange(rows) % (case.drafts + 1) == case.drafts
        self.targets, self.bonuses = (~is_bonus).nonzero()[:, 0], is_bonus.nonzero()[:, 0]
        self.draft_logits = (self.members[0][self.targets].float() + noise).bfloat16()
        self.draft_probs = self.draft_logits.float().softmax(-1)
        # Tokens with mass under whatever filters.
        self.draft_tokens = self.draft_logits.argmax(-1).to(torch.int32)

    def metadata(self, greedy: bool) -> Any:
        """vLLM's `SamplingMetadata`."""
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.metadata import SamplingMetadata

        batch, filters = self.case.batch, FILTERS[self.case.filters]
        none = torch.zeros(batch)
        return SamplingMetadata(
            temperature=None if greedy else torch.full((batch,), 0.8),
            all_greedy=greedy,
            all_random=not greedy,
            top_p=torch.full((batch,), filters["top_p"]) if filters and not greedy else None,
            top_k=torch.full((batch,), filters["top_k"]).int() if filters and not greedy else None,
            generators={},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=none,
            presence_penalties=none,
            repetition_penalties=none + 1,
            output_token_ids=[[] for _ in range(batch)],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
        )

    def drafts(self) -> Any:
        """vLLM's `SpecDecodeMetadata`; None where nothing was drafted."""
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

        batch, drafts = self.case.batch, self.case.drafts
        if drafts == 0:
            return None
        ends = torch.arange(1, batch + 1, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=self.draft_tokens,
            num_draft_tokens=[drafts] * batch,
            cu_num_draft_tokens=ends * drafts,
            cu_num_sampled_tokens=ends * (drafts + 1),
            target_logits_indices=self.targets.int(),
            bonus_logits_indices=self.bonuses.int(),
            logits_indices=torch.arange(len(self.members[0]), dtype=torch.int32),
        )

    def ours(self, greedy: bool, members: int = 1) -> Callable[[], Tensor]:
        """The plug-in's runner, with this step instead of one of its own."""
        from specens.engines.vllm.runner import EnsembleRunner
        from specens.engines.vllm.settings import Settings

        pairs = [["target", 1 / members], ["other", 1 / members]][:members]
        names = [str(request) for request in range(self.case.batch)]
        asked = SimpleNamespace(extra_args=None, min_p=0.0)
        runner: Any = EnsembleRunner()
        runner.specens = Settings.parse({"members": pairs} if members > 1 else {})
        runner.device, runner.model_config = torch.device("cpu"), None
        runner.requests = {name: SimpleNamespace(sampling_params=asked) for name in names}
        runner.input_batch = SimpleNamespace(
            sampling_metadata=self.metadata(greedy),
            num_reqs=self.case.batch,
            req_ids=names,
            update_async_output_token_ids=lambda: None,
        )
        runner._drafts_have_laws = not greedy
        runner._get_spec_decode_draft_probs = lambda _: self.draft_logits
        runner._read = lambda *_: self.members
        drafts = self.drafts()
        return lambda: runner._sample(self.members[0], drafts).sampled_token_ids

    def vllm(self, greedy: bool) -> Callable[[], Tensor]:
        """vLLM's sampler."""
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.sample.sampler import Sampler

        sampler, metadata, drafts = Sampler(), self.metadata(greedy), self.drafts()
        if drafts is None:
            return lambda: sampler(self.members[0], metadata).sampled_token_ids
        judge = RejectionSampler(sampler)
        probs = None if greedy else self.draft_probs
        return lambda: judge(drafts, probs, self.members[0], metadata).sampled_token_ids


def measure(case: Case, rounds: int, budget_s: float) -> dict[str, Any]:
    """One row of the result."""
    step = Step(case)
    ours, theirs = (run(True)() for run in (step.ours, step.vllm))
    if not torch.equal(ours.view(case.batch, -1), theirs.view(case.batch, -1).to(ours.dtype)):
        raise AssertionError(f"{case}: greedy tokens differ")
    contestants = {
        "ours": step.ours(False),
        "ours, two members": step.ours(False, 2),
        "vllm": step.vllm(False),
    }
    clocks = {name: harness.clock(run) for name, run in contestants.items()}
    samples = harness.interleave(clocks, rounds, budget_s)
    row = {**asdict(case), "seconds": {name: Spread.of(each) for name, each in samples.items()}}
    row["vllm_over_ours"] = Spread.of(harness.ratios(samples["vllm"], samples["ours"]))
    return row


def shown(row: dict[str, Any]) -> list[str]:
    """The row as it is printed."""
    times = [row["seconds"][name] for name in ("ours", "ours, two members", "vllm")]
    return [
        *(str(row[key]) for key in ("vocab_size", "batch", "drafts", "filters")),
        *(f"{time.median * 1e6:.0f}" for time in times),
        f"{row['vllm_over_ours'].median:.1f}",
    ]


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The least and the greatest ratio, by filters, and whether the aim is met everywhere."""
    targets = []
    for name in FILTERS:
        ratios = [row["vllm_over_ours"].median for row in rows if row["filters"] == name]
        target = {"id": "sampler", "filters": name, "ratio": "vllm_over_ours"}
        target |= {"figure": round(min(ratios), 2), "most": round(max(ratios), 2)}
        if name != "none":
            verdict = "pass" if min(ratios) >= AIM else "miss"
            target |= {"target": f">= {AIM:g}", "verdict": verdict}
        targets.append(target)
    return {"targets": targets}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, save."""
    parser = harness.arguments("The sampler of vLLM's runner, ours and its own.")
    parser.add_argument("--batches", type=harness.numbers, default=list(BATCHES))
    parser.add_argument("--vocab-sizes", type=harness.numbers, default=list(VOCAB_SIZES))
    options = parser.parse_args(arguments)
    if find_spec("vllm") is None:
        print("bench_engine: vllm: expected an installed package, got none", file=sys.stderr)
        return 2
    prepare(options)
    rounds, budget_s = (5, 1.0) if options.quick else (15, 8.0)
    rows = []
    cases = [
        Case(vocab_size, batch, drafts, filters)
        for vocab_size in options.vocab_sizes
        for batch in options.batches
        for drafts in DRAFTS
        for filters in FILTERS
    ]
    for case in harness.in_time(options, cases):
        rows.append(measure(case, rounds, budget_s))
        print(" ".join(shown(rows[-1])), flush=True)
    columns = [*COLUMNS, "vllm/ours"]
    lines = [shown(row) for row in rows]
    print(harness.table(columns, lines))
    caption = f"One step's tokens in vLLM on a CPU, bfloat16, threads: {torch.get_num_threads()}"
    tables = {"engine_sampler": {"caption": caption, "columns": columns, "rows": lines}}
    return harness.finish("bench_engine", options, rows, tables, headline(rows))


def prepare(options: argparse.Namespace) -> None:
    """vLLM as its engine would have it: its own kernels, and the threads that were asked for."""
    torch.set_num_threads(max(options.threads))  # vLLM makes this a no-op
    import vllm._custom_ops  # noqa: F401
    from vllm.platforms import current_platform

    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None:
        register()
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expanded


def expanded(
    values: Tensor, ends: Tensor, count: int, replace_from: Any = 0, replace_to: Any = 0
) -> Tensor:
    """A value of each request for each of its tokens, which end at `ends`."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    values = torch.where(values == replace_from, replace_to, values).to(values.dtype)
    return values.repeat_interleave(counts.long(), output_size=count)


if __name__ == "__main__":
    raise SystemExit(main())
