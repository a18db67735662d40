# SPDX-License-Identifier: Apache-2.0
"""The parts of `on_card.py` that are programs of their own: facts, build, generation.

    python3 benchmarks/card_parts.py generation --dry-run

Each prints what it does, and writes what it found as JSON to $CARD_RESULT, if that is set. torch is
imported where it is used, for `facts` is there to say that it is missing.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import revision

ROOT = revision.ROOT
PACKAGES = ["torch", "triton", "transformers", "numpy", "scipy", "safetensors", "tokenizers"]
PACKAGES += ["pytest", "pytest-xdist", "hypothesis", "typer", "rich"]
PACKAGES += ["setuptools", "cmake", "ninja", "pybind11"]
TOOLS = ["nvidia-smi", "nvcc --version", "c++ --version", "cmake --version", "ninja --version"]
TOOLS += ["compute-sanitizer --version", "uname -a"]


def write(result: dict[str, Any]) -> None:
    """The part's result so far."""
    path = os.environ.get("CARD_RESULT")
    if path:
        Path(path).write_text(json.dumps(result))


# facts


def facts(dry: bool) -> int:
    """Versions and the card. Fails where torch sees none."""
    found: dict[str, Any] = {"commit": revision.commit(), "python": sys.version}
    found["executable"] = Path(sys.executable).name
    found["packages"] = {name: version(name) for name in PACKAGES}
    for command in TOOLS:
        found[command] = said(command.split())
    found["cpu"] = {"cores": os.cpu_count(), "load": os.getloadavg(), "machine": platform.machine()}
    write({**found, "summary": "torch cannot be imported"})
    import torch

    found["torch"] = {
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "devices": [str(torch.cuda.get_device_properties(i)) for i in range(_count(torch))],
    }
    for name, value in found.items():
        print(f"{name}: {value}", flush=True)
    versions = found["packages"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    found["summary"] = f"{_count(torch)} devices; Python {platform.python_version()}, {shown}"
    write(found)
    return 0 if torch.cuda.is_available() or dry else 1


def _count(torch: Any) -> int:
    return int(torch.cuda.device_count())


def version(name: str) -> str:
    """Of a package; empty where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def said(command: Sequence[str]) -> str:
    """What a tool prints; empty where it is absent."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False
    )
    return (done.stdout + done.stderr)[-3000:]


# build


def architecture(capability: tuple[int, int]) -> str:
    """For CMake: the card's own machine code alone, with what is specific to it from Hopper on."""
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def build(dry: bool) -> int:
    """The native module, in place; without CUDA where it cannot be built with it."""
    began = time.time()
    if dry:  # the module that is there may be in use
        done = compile_module({}, ["--name"])
        write({"summary": "setup.py finds its tools; nothing is compiled in a dry run"})
        return done
    import torch

    chosen = architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    cuda = {"SPECENS_CUDA": "ON", "SPECENS_CUDA_ARCHITECTURES": chosen}
    sources = revision.tree(ROOT, ["csrc"], ["CMakeLists.txt", "setup.py"])
    state = f"{sources} {chosen} {sys.version} {said(['nvcc', '--version'])}"
    modules = list((ROOT / "specens_kernels").glob("_C.*.so"))
    result = build_once(state, ROOT / "build" / "card-module.json", cuda, compile_module, modules)
    result["seconds"] = round(time.time() - began, 1)
    result["summary"] = f"{result['what']} in {result['seconds']} s; {available()}"
    write(result)
    print(result["summary"])
    return 0 if result["cuda"] else 1


def build_once(
    state: str,
    stamp: Path,
    cuda: dict[str, str],
    compile_with: Callable[[dict[str, str]], int],
    modules: Sequence[Path],
) -> dict[str, Any]:
    """Build with CUDA, else without, unless `stamp` says that it was done in this very state.

    compile_with: builds under these variables of the environment; its exit status.
    modules: those that are there.
    """
    if stamp.exists() and any(module.exists() for module in modules):
        known = json.loads(stamp.read_text())
        if known["state"] == state:
            return {**known, "what": "built before"}
    stamp.unlink(missing_ok=True)
    if compile_with(cuda) == 0:
        result = {"state": state, "cuda": True, "what": f"built for {list(cuda.values())[-1]}"}
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(result))
        return result
    print("The CUDA kernels cannot be built; once more without them.", flush=True)
    status = compile_with({"SPECENS_CUDA": "OFF"})
    what = "CUDA kernels FAILED; built without them" if status == 0 else "nothing can be built"
    return {"state": state, "cuda": False, "what": what}


def compile_module(
    variables: dict[str, str], command: Sequence[str] = ("build_ext", "--inplace")
) -> int:
    """Run setup.py, which needs no network; its exit status."""
    environment = {**os.environ, "SPECENS_NATIVE": "1", **variables}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment, check=False
    )
    return done.returncode


def available() -> str:
    """Which backends a new process can use, and why not the others."""
    program = (
        "from specens_kernels import native, cuda, triton\n"
        "for module in (native, cuda, triton):\n"
        "    name = module.__name__.split('.')[-1]\n"
        "    print(name, 'yes' if module.AVAILABLE else module.REASON, end='; ')\n"
    )
    return said([sys.executable, "-c", program]).strip().rstrip(";")


# generation

MEMBERS, DRAFT = ("code", "prose"), "draft"
GAMMA = 4
PROMPT = "def read_lines(path):\n"
# Of the best two tokens' log-probabilities. Below, rows of other shapes may rank them otherwise.
NEAR = 1e-4


@contextmanager
def backend(name: str, dry: bool) -> Iterator[None]:
    """The ops' implementation; in a dry run Triton is interpreted, as in the tests."""
    import specens_kernels

    if dry and name == "triton":
        import triton_guard

        triton_guard.install()
    with specens_kernels.backend(name):
        yield


def ways(models: dict[str, Any], dry: bool) -> dict[str, Any]:
    """Decoders by name; a dry run has few."""
    from specens import SpeculativeDecoder

    members, draft = [models[name] for name in MEMBERS], models[DRAFT]
    schedules = {
        "plain": "plain",
        "speculative": "speculative:tokens=2",
        "alternating": f"alternating:tokens={GAMMA},1",
        "lookup": "lookup",
        "lookahead": "lookahead",
    }
    if dry:
        schedules = {name: schedules[name] for name in ("plain", "alternating")}
    decoders = {
        name: SpeculativeDecoder(members, schedule=schedule) for name, schedule in schedules.items()
    }
    if dry:
        return decoders
    drafting = {"schedule": f"speculative:tokens={GAMMA}", "draft": draft}
    decoders["speculative, draft"] = SpeculativeDecoder(members, **drafting)
    decoders["1 member, plain"] = SpeculativeDecoder(members[:1], schedule="plain")
    decoders["1 member, draft"] = SpeculativeDecoder(members[:1], **drafting)
    return decoders


def load(device: str) -> tuple[dict[str, Any], Any]:
    """The shipped family on the device, in float32, and the prompt's tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from specens import family

    models = {}
    for name in (*MEMBERS, DRAFT):
        model = AutoModelForCausalLM.from_pretrained(family.path(name), dtype=torch.float32)
        models[name] = model.to(device).eval()
        models[name].generation_config = GenerationConfig(
            pad_token_id=0,  # no token ends the text
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
            num_assistant_tokens=GAMMA,
        )
    tokenizer = AutoTokenizer.from_pretrained(family.path(MEMBERS[0]))
    return models, tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)


def gap(models: Sequence[Any], text: Any) -> float:
    """Between the best two log-probabilities of the next token, in the even mixture."""
    import torch

    with torch.no_grad():
        laws = [model(text).logits[0, -1].double().softmax(-1) for model in models]
    best = torch.stack(laws).mean(0).log().topk(2).values
    return float(best[0] - best[1])


def generation(dry: bool) -> int:
    """Texts and speeds of the shipped family: our schedules on each backend, and transformers.

    Greedy text must be the plain ensemble's on the reference, and with one member transformers'
    own; sampled text must come again with its seed.
    """
    import harness
    import torch

    device = "cpu" if dry else "cuda"
    if dry:
        torch.set_num_threads(1)
    models, ids = load(device)
    length = 3 if dry else 96
    backends = ["reference", "triton"] if dry else ["reference", "cuda", "triton"]
    result: dict[str, Any] = {"benchmark": "generation_gpu", **harness.surroundings()}
    options = {"family": "shipped", "dtype": "float32", "prompt_tokens": ids.shape[1]}
    result |= {"options": {**options, "new_tokens": length, "backends": backends}, "rows": []}
    rows, wrong = result["rows"], []

    def settings(sampled: bool) -> dict[str, Any]:
        return {"max_new_tokens": length, "do_sample": sampled, "top_k": 0, "temperature": 1.0}

    def add(name: str, ops: str, sampled: bool, expected: Any, run: Callable[[], Any]) -> Any:
        """Time it, and compare its text; where greedy text parts at a near-tie, say so."""
        texts, speeds = [], []
        for _ in range(2 if dry else 4):  # the first one compiles
            began = time.perf_counter()
            texts.append(run())
            speeds.append(length / (time.perf_counter() - began))
        row = {"way": name, "ops": ops, "mode": "sampled" if sampled else "greedy"}
        row["tokens_per_second"] = round(statistics.median(speeds[1:]), 1)
        row["repeats"] = all(torch.equal(texts[0], text) for text in texts)
        row["text"] = "as expected"
        if not torch.equal(texts[0], expected):
            at = int((texts[0] != expected)[0].nonzero()[0])
            members = [models[one] for one in MEMBERS[: 1 if name.startswith("1 ") else 2]]
            apart = gap(members, expected[:, :at])
            row["text"] = f"parts at {at}, where the best two tokens are {apart:.1e} apart"
            if not sampled and apart > NEAR:
                wrong.append(f"{name} on {ops}: {row['text']}")
        if not row["repeats"]:
            wrong.append(f"{name} on {ops}, {row['mode']}: the same seed gave other texts")
        rows.append(row)
        print(row, flush=True)
        result["summary"] = f"{len(rows)} rows, {len(wrong)} wrong"
        result["failed"] = wrong
        write(result)
        return texts[0]

    def theirs(**extra: Any) -> Callable[[], Any]:
        return lambda: models[MEMBERS[0]].generate(ids, **settings(False), **extra)

    alone = theirs()()
    add("transformers, 1 member", "torch", False, alone, theirs())
    add(
        "transformers, 1 member, assistant",
        "torch",
        False,
        alone,
        theirs(assistant_model=models[DRAFT]),
    )
    decoders = ways(models, dry)
    with backend("reference", dry):
        plain = decoders["plain"].generate(ids, **settings(False))
    until = float(os.environ.get("CARD_UNTIL", "inf"))
    todo = list(itertools.product(backends, decoders, (False, True)))  # Triton's, the slowest, last
    for place, (ops, name, sampled) in enumerate(todo):
        if name == "lookahead" and not sampled:
            continue  # it draws a member for each token
        if time.time() > until:
            result["left for lack of time"] = len(todo) - place
            break

        def ours(name: str = name, sampled: bool = sampled) -> Any:
            return decoders[name].generate(ids, seed=7, **settings(sampled))

        with backend("reference", dry):
            greedy = alone if name.startswith("1 ") else plain
            expected = ours() if sampled else greedy
        with backend(ops, dry):
            add(name, ops, sampled, expected, ours)
    result["headline"] = {
        f"{row['way']} {row['ops']} {row['mode']}": row["tokens_per_second"] for row in rows
    }
    write(result)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of them."""
    parser = argparse.ArgumentParser(description="One part of on_card.py.")
    parser.add_argument("part", choices=("facts", "build", "generation"))
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args(arguments)
    part = {"facts": facts, "build": build, "generation": generation}[options.part]
    return part(options.dry_run)


if __name__ == "__main__":
    raise SystemExit(main())
