# SPDX-License-Identifier: Apache-2.0
"""What `specens export` writes, loaded as the other library does: in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import complaint, environment, run

from specens import export, family
from specens_kernels import Law, Stream, __version__, sample, uniforms

pytestmark = pytest.mark.slow

# Hugging Face's `kernels` reads an id in the metadata, and imports the package under that name.
LOADER = """
import importlib.util, json, pathlib, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("specens", "specens_kernels"):
            raise ImportError(f"{name}: expected a kernel that needs no installation")

sys.meta_path.insert(0, Hidden())

def load(folder):
    variant = pathlib.Path(folder) / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    file = variant / metadata["name"].replace("-", "_") / "__init__.py"
    spec = importlib.util.spec_from_file_location(metadata["id"], file)
    module = sys.modules[metadata["id"]] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
USE = """
import torch
torch.manual_seed(0)
logits, results = torch.randn(2, 4, 50), []
for folder, backend in zip(sys.argv[1::2], sys.argv[2::2]):
    kernel = load(folder)
    seeds, positions = torch.tensor([1, 2]), torch.arange(4)[None]
    with kernel.backend(backend):
        numbers = kernel.uniforms(seeds, positions, kernel.Stream.VERIFY)
    with kernel.backend("reference"):
        results.append(kernel.sample([logits], numbers, kernel.Law()).tokens.tolist())
    ops = torch._C._dispatch_get_all_op_names()
    assert f"{kernel.__name__}::sample" in ops and "specens::sample" not in ops
print(json.dumps(results))
"""


def written(folder: Path) -> str:
    result = run("export", "kernels", folder)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert Path(line).name == "metadata.json"
    return str(folder)


def test_kernels_are_loaded_without_an_installation(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first"), written(tmp_path / "second")
    # Another version beside it: an id of its own, and ops of its own.
    metadata = tmp_path / "second/build/torch-universal/metadata.json"
    metadata.write_text(metadata.read_text().replace("_specens_kernels_", "_specens_kernels_x"))
    command = [sys.executable, "-c", LOADER + USE, first, "reference", second, "triton"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 50)
    numbers = uniforms(torch.tensor([1, 2]), torch.arange(4)[None], Stream.VERIFY)
    tokens = sample([logits], numbers, Law()).tokens.tolist()
    assert json.loads(done.stdout) == [tokens, tokens]


def test_a_kernel_is_the_package_without_what_is_compiled(tmp_path: Path) -> None:
    variant = Path(written(tmp_path / "new" / "folder")) / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    # All that the loader of kernels 0.17 asks for.
    assert set(metadata) == {"name", "id", "version", "license", "python-depends", "backend"}
    assert metadata["id"].isidentifier()
    files = {path.name for path in variant.rglob("*") if path.is_file()}
    assert {"ops.py", "verify.py", "py.typed"} <= files
    assert not [name for name in files if name.startswith("_C") or name.endswith((".so", ".pyc"))]


GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from specens import SpeculativeDecoder, family

names = "code", "prose", "draft"
code, prose, draft = (AutoModelForCausalLM.from_pretrained(family.path(n)) for n in names)
tokenizer = AutoTokenizer.from_pretrained(family.path("code"))
inputs = tokenizer("import os", return_tensors="pt")
how = {"custom_generate": sys.argv[1], "trust_remote_code": True, "max_new_tokens": 12}
settings = {"weights": [0.4, 0.6], "schedule": "speculative:tokens=3", "draft": draft, "seed": 5}
texts = code.generate(**inputs, **how, members=[prose], do_sample=True, **settings)
ours = SpeculativeDecoder([code, prose], **settings)
assert torch.equal(texts, ours.generate(**inputs, max_new_tokens=12, do_sample=True))
greedy = code.generate(**inputs, **how, do_sample=False, assistant_model=draft)
alone = code.generate(**inputs, max_new_tokens=12, do_sample=False)
assert torch.equal(greedy, alone)

# A repository of a model that has the loop beside it.
bound = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "custom_generate" in bound.generate.func.__module__
sampled = {"max_new_tokens": 12, "do_sample": True, **settings}
assert torch.equal(texts, bound.generate(**inputs, members=[prose], **sampled))
assert torch.equal(texts, bound.generate(inputs.input_ids, members=[prose], **sampled))
"""


def test_transformers_loads_the_loop(tmp_path: Path) -> None:
    shutil.copytree(family.path("code"), tmp_path / "loop")
    result = run("export", "custom_generate", tmp_path / "loop")
    assert result.exit_code == 0, result.output
    home = tmp_path / "loop" / "custom_generate"
    assert result.stdout.splitlines() == [f"{home}/generate.py", f"{home}/requirements.txt"]
    assert (home / "requirements.txt").read_text() == f"specens-kernels>={__version__}\n"
    # What transformers compares the requirements with, of the sources that are tested.
    about = tmp_path / "path" / f"specens_kernels-{__version__}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Name: specens-kernels\nVersion: {__version__}\n")
    paths = environment()
    paths["PYTHONPATH"] = os.pathsep.join([str(about.parent), paths["PYTHONPATH"]])
    paths["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", GENERATE, str(tmp_path / "loop")]
    done = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    assert "kernels: folder: expected one without 'build'" in complaint(
        run("export", "kernels", tmp_path)
    )
    export.custom_generate(tmp_path)
    again = complaint(run("export", "custom_generate", tmp_path))
    assert "custom_generate: folder: expected one without 'custom_generate'" in again
    file = tmp_path / "file"
    file.touch()
    assert "expected a folder" in complaint(run("export", "kernels", file))
