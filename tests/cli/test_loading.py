# SPDX-License-Identifier: Apache-2.0
"""Models, devices and prompts as the command line loads them, and the files that it refuses."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import complaint, results, run

from specens import family
from specens.cli import loading
from specens_kernels import Refusal

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_a_mistake() -> None:
    line = complaint(run("generate", "x", "--device", "cuda"))
    assert "generate: --device: expected auto, or a device that torch has here" in line
    assert "got 'cuda' (" in line


def test_auto_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    zeros = torch.zeros

    def noted(*shape: int, device: torch.device) -> torch.Tensor:
        made.append(str(device))
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", noted)
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert loading.device_named("auto") == expected
        assert loading.device_named("cuda:1") == "cuda:1"
    assert made == ["cuda", "cuda:1", "cpu", "cuda:1"]


def test_models_and_prompts_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """To "meta", which every build of torch has, where nothing is computed."""
    monkeypatch.setattr(loading, "device_named", lambda name: name)
    (model,), (tokenizer,) = loading.load(["family:draft"], loading.Loading(device="meta"))
    assert {one.device.type for one in model.parameters()} == {"meta"}
    ids = loading.encode(tokenizer, "x = 1", device=model.device)
    assert ids.device.type == "meta"
    assert loading.encode(tokenizer, "x = 1").device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [1]),
        (("--model", "family:code"), [1]),
        (("--model", "family:code", "--schedule", "speculative", "--draft", "family:draft"), [1]),
        (("--method", "speculative"), [1]),
        (("--model", "FOLDER"), []),
        (("--model", "family:code", "--model", "FOLDER"), []),
        (("--method", "speculative", "--draft", "FOLDER"), []),
        (("--model", "FOLDER", "--threads", "3"), [3]),
        (("--threads", "3"), [3]),
    ],
    ids=str,
)
def test_the_family_alone_takes_one_thread(
    arguments: Sequence[str], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    given = [str(family.path("draft")) if one == "FOLDER" else one for one in arguments]
    results("def f(x):", *given, "--max-new-tokens", "1")
    assert taken == expected


def test_tokenizers_that_disagree_are_refused(tmp_path: Path) -> None:
    for file in family.path("prose").iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    described = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = described["model"]["vocab"]
    one, other = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    line = complaint(run("generate", "x", "--model", "family:code", "--model", tmp_path))
    assert "expected the same token for every id, got 2 that differ" in line


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "safetensors" in complaint(run("generate", "x", "--model", tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(family.path("draft") / name)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "safetensors" in complaint(run("probe", tmp_path))


def test_weights_that_are_cut_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    for name in ("cut", "header", "other"):
        shutil.copytree(family.path("draft"), tmp_path / name)
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "header" / "model.safetensors").write_bytes(weights[:5])
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["intermediate_size"] += 8
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    for name, why in (
        ("cut", "not fully covered"),
        ("header", "header too small"),
        ("other", "weights of other shapes than its config.json says"),
    ):
        for command in (("generate", "x", "--model"), ("probe",)):
            line = complaint(run(*command, tmp_path / name))
            assert "expected a causal LM with tokenizer and safetensors" in line
            assert why in line


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    retries: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            retries.append(record)

    def unreachable(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("We couldn't connect to the hub\nCheck your internet connection.")

    handler, hub = Kept(), logging.getLogger("huggingface_hub")
    level = hub.level
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    hub.addHandler(handler)
    hub.setLevel(logging.WARNING)
    try:
        line = complaint(run("generate", "x", "--model", "nobody-here/nothing-there"))
    finally:
        hub.removeHandler(handler)
        hub.setLevel(level)
    assert line.endswith("got 'nobody-here/nothing-there' (We couldn't connect to the hub)")
    assert retries == []


def test_lines_are_counted_and_parted_as_an_editor_does(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('\n{"prompt": "a"}\n\n \n{"text": "b"}\n', encoding="utf-8")
    assert "in line 5 of" in complaint(run("generate", "--lines", "--file", tmp_path / "lines"))
    parted = "a\u2028b\u0085c\x0cd"
    for text in (json.dumps({"prompt": parted}, ensure_ascii=False), parted):
        (tmp_path / "lines").write_text(f"{text}\n\n{text}\n", encoding="utf-8")
        found = loading.read_prompts(None, tmp_path / "lines", lines=True)
        assert found == [parted] * 2


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "not UTF-8" in complaint(run("generate", "--file", tmp_path / "latin"))
    assert "prompt: expected text in the pipe" in complaint(run("generate", stdin=b"caf\xe9"))
    (tmp_path / "lines").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in complaint(run("generate", "--lines", "--file", tmp_path / "lines"))


def test_the_family_is_package_data() -> None:
    for name in family.FAMILY:
        assert (family.path(name) / "model.safetensors").is_file()
    with pytest.raises(Refusal, match="expected one of code, prose, draft, got 'poet'"):
        family.path("poet")
