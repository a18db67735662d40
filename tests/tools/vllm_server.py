# SPDX-License-Identifier: Apache-2.0
"""Runs engines of vLLM for the tests, each in a process of its own. Started by conftest.py.

    python vllm_server.py                    a job's file and its answer's file a line, on stdin
    python vllm_server.py JOB ANSWER         one job, in vLLM's default engine of several processes
    python vllm_server.py JOB ANSWER v2      one job, by model runner V2, in Triton's interpreter

vLLM takes ten seconds to import: it is imported once and each job is forked. To seed a bug, add it
to `FAULTS`.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

SINGLE = len(sys.argv) >= 3
IS_V2 = sys.argv[3:] == ["v2"]
if __name__ == "__main__":
    os.environ.update(
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_DO_NOT_TRACK="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="1" if SINGLE and not IS_V2 else "0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )


def unfiltered_drafts() -> None:
    """Drafts obey the temperature, but no filter, as vLLM's own do."""
    from specens.engines.vllm import drafter
    from specens_kernels import Law

    drawn_by = drafter.law_of

    def law_of(metadata: Any, batch: int, **filters: Any) -> Law:
        return Law(temperature=drawn_by(metadata, batch, **filters).temperature)

    drafter.law_of = law_of


def unknown_vllm() -> None:
    """One function that is relied upon takes another argument."""
    from vllm.v1.sample.sampler import Sampler

    known = Sampler.apply_logits_processors

    def apply(
        self: Any, logits: Any, sampling_metadata: Any, predict_bonus_token: Any, more: Any = None
    ) -> Any:
        return known(self, logits, sampling_metadata, predict_bonus_token)

    Sampler.apply_logits_processors = apply


FAULTS = {fault.__name__: fault for fault in (unfiltered_drafts, unknown_vllm)}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Build the engine, write its texts."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import StructuredOutputsParams

    def read(given: dict[str, Any]) -> SamplingParams:
        """A request's parameters; "regex" is the grammar of one."""
        regex = given.pop("regex", None)
        grammar = None if regex is None else StructuredOutputsParams(regex=regex)
        return SamplingParams(**given, structured_outputs=grammar)

    if job.get("fault"):
        FAULTS[job["fault"]]()
    engine = LLM(**job["options"])
    answers = []
    for prompts, parameters in job["calls"]:
        try:
            outputs = engine.generate(prompts, list(map(read, parameters)), use_tqdm=False)
        except VLLMClientError as refusal:
            if not job["keep"]:
                raise
            answers.append(str(refusal))
            continue
        answers.append(
            [
                {
                    "prompt": list(output.prompt_token_ids),
                    "tokens": list(output.outputs[0].token_ids),
                    "text": output.outputs[0].text,
                    "log_probs": [
                        {token: entry.logprob for token, entry in position.items()}
                        for position in output.outputs[0].logprobs or ()
                    ],
                }
                for output in outputs
            ]
        )
    metrics = engine.get_metrics() if not job["options"].get("disable_log_stats", True) else ()
    counts = {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in metrics
        if hasattr(metric, "value")
    }
    return {"answers": answers, "counts": counts}


def answer(job: Path, result: Path) -> None:
    """Write what `run` returns, or what it raises."""
    try:
        text = json.dumps(run(json.loads(job.read_text(encoding="utf-8"))))
    except Exception as error:  # the test says which it expects
        traceback.print_exc()
        text = json.dumps({"error": f"{type(error).__name__}: {error}"})
    result.write_text(text, encoding="utf-8")


def serve() -> None:
    """Fork a child for each line; its output goes beside its answer."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.spec_decode.draft_model
    import vllm.v1.worker.cpu_worker  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job, result = map(Path, json.loads(line))
        child = os.fork()
        if child == 0:
            log = os.open(result.with_suffix(".log"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            answer(job, result)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if IS_V2:
        import vllm_interpreter  # noqa: F401
    if SINGLE:
        answer(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        serve()
