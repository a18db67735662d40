# SPDX-License-Identifier: Apache-2.0
"""`specens train`: what it writes, and what it refuses.

A new way to go wrong is one more entry of `MISTAKES`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specens import SpeculativeDecoder
from specens.cli import app, loading, train_draft
from specens.members.weight_head import WeightHead
from specens.schedules import Speculative
from specens.training import distil

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no command": ((), "Missing command"),
    "reward": (
        ("diversed", "--reward", "fun"),
        "--reward: expected one of likelihood, exact_match",
    ),
    "code": (
        ("diversed", "--reward", "tests"),
        "--allow-code-execution: expected leave for 'tests'",
    ),
    "no tests": (
        ("diversed", "--reward", "tests", "--allow-code-execution"),
        'expected "tests" in every example',
    ),
    "ensemble": (("diversed", "--ensemble", "sum"), "--ensemble: expected one of mixture, product"),
    "baseline": (
        ("diversed", "--baseline", "none"),
        "--baseline: expected one of ema, group, got 'none'",
    ),
    "one sample": (("diversed", "--samples", "1"), "got 1 (here: --samples)"),
    "greedy": (("diversed", "--temperature", "0"), "--temperature: expected > 0, got 0"),
    "scale": (("diversed", "--acceptance-scale", "-1"), "--acceptance-scale: expected >= 0"),
    "rate": (("diversed", "--rate", "0"), "--rate: expected > 0, got 0"),
    "steps": (("diversed", "--steps", "0"), "--steps"),
    "too many steps": (("draft", "--steps", "10000000000"), "--steps"),
    "too many prompts": (("diversed", "--prompts", "100000000"), "--prompts"),
    "too many samples": (("diversed", "--samples", "100000000"), "--samples"),
    "too long texts": (("diversed", "--new-tokens", "100000000"), "--new-tokens"),
    "too large windows": (("draft", "--window-tokens", "100000000"), "--window-tokens"),
    "too many windows": (("draft", "--batch", "100000000"), "--batch"),
    "no folder": (
        ("diversed", "--out", "/dev/null"),
        "train diversed: --out: expected a folder, got '/dev/null', which is none",
    ),
    "no folder for a draft": (("draft", "--out", "/dev/null"), "train draft: --out: expected a fo"),
    "nothing to resume": (
        ("draft", "--resume"),
        "train draft: --resume: expected a checkpoint in 'specens-draft/checkpoint.safetensors'",
    ),
    "no file": (("diversed", "--data", "/no/such.jsonl"), "No such file"),
    "evaluation alone": (
        ("diversed", "--evaluation", "x.jsonl", "--target", "/no/such"),
        "train diversed: --evaluation: expected --data beside it, got none",
    ),
    "evaluation of a draft alone": (
        ("draft", "--evaluation", "x.jsonl", "--target", "/no/such"),
        "train draft: --evaluation: expected --data beside it, got none",
    ),
    "no model": (("diversed", "--target", "/no/such"), "expected a folder or a hub name"),
    "no member": (("diversed", "--draft", "family:poet"), "got 'family:poet'"),
    "divergence": (("draft", "--divergence", "js_fsd"), "--divergence: expected one of"),
    "select": (("draft", "--select", "0"), "select: expected a fraction in (0, 1]"),
    "no reference": (("draft", "--select", "0.4"), "--reference: expected a draft beside --select"),
    "reference": (("draft", "--reference", "family:draft"), "--reference: expected a draft beside"),
    "weights": (("draft", "--weights", "a"), "--weights: expected numbers with commas"),
    "two weights": (("draft", "--weights", "0.5,0.5"), "--weights: expected 1 numbers, one for"),
    "sum": (("draft", "--weights", "0.5"), "sum to 1"),
    "dtype": (("draft", "--dtype", "float8"), "--dtype: expected one of auto"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_draft, "read_texts", lambda *_: ["a " * 500])
    arguments, words = MISTAKES[mistake]
    result = run(*arguments)
    assert result.exit_code == 2, (result.exception, result.output)
    (line,) = result.stderr.splitlines()
    assert line.startswith("specens: error: ")
    assert words in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("text\ntext", "expected a JSON object in line 1 of data.jsonl, got 'text'"),
        ('{"prompt": "a"}', "expected at least 2 examples, got 1"),
        ('{"prompt": "a"}\n{"prompt": 3}', 'expected text as "prompt" in line 2'),
        ('{"prompt": "a"}\n{"prompt": " "}', 'expected text as "prompt" in line 2'),
        ('{"prompt": "a", "tests": [1]}\n{"prompt": "b"}', 'expected text as "tests" in line 1'),
        ('{"prompt": "a\\ud800"}\n{"prompt": "b"}', 'whole characters as "prompt" in line 1'),
        ('{"prompt": "b"}\n{"prompt": "a", "answer": "\\udfff"}', '"reference" in line 2'),
    ],
)
def test_data_that_is_none_is_refused(lines: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(lines)
    result = run("diversed", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.slow
def test_train_diversed_writes_head_curves_and_result(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"x = {n}\n", "answer": f"y = {n}"} for n in range(6)]
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    tiny = ("--steps", "2", "--prompts", "2", "--samples", "2", "--new-tokens", "3")
    result = run(
        "diversed", "--data", data, "--out", out, *tiny, "--evaluation-samples", "1",
        "--reward", "exact_match", "--ensemble", "product", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "evaluation.json").read_text())
    assert found["examples"] == 1
    assert found["training_examples"] == 5
    assert len(found["candidates"]) == 12
    head = WeightHead.load(out)
    assert (head.ensemble, head.draft_size, head.target_size) == ("product", 128, 192)
    assert head.metadata["task"] == "exact_match"
    models, _ = loading.load(["family:draft", "family:code"])
    decoder = SpeculativeDecoder(
        models, schedule=Speculative(proposer=0), weights=head, ensemble="product"
    )
    prompt = torch.tensor([[5, 6, 7]])
    written = decoder.generate(prompt, do_sample=True, max_new_tokens=8, eos_token_id=-1, seed=0)
    assert written.shape == (1, 11)
    assert len((out / "curves.csv").read_text().splitlines()) == 3
    again = run("diversed", "--data", data, "--out", out, *tiny, "--reward", "exact_match")
    assert again.exit_code == 2
    assert "--out: expected a folder without checkpoint.safetensors, or --resume" in again.stderr


@pytest.mark.slow
def test_train_draft_writes_a_draft_that_loads(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    text = Path(distil.__file__).read_text()
    data.write_text("\n".join(json.dumps({"prompt": text}) for _ in range(2)))
    result = run("draft", "--data", data, "--out", out, "--steps", "2", "--window-tokens", "32")
    assert result.exit_code == 0, result.output
    assert "held-out acceptance after: 0." in result.stdout
    (draft,), _ = loading.load([str(out)])
    (before,), _ = loading.load(["family:draft"])
    assert draft.dtype == torch.float32
    moved = draft.model.layers[0].mlp.up_proj.weight - before.model.layers[0].mlp.up_proj.weight
    assert 0 < moved.abs().max() < 0.01
    again = run(
        "draft", "--data", data, "--out", out, "--steps", "2", "--window-tokens", "32", "--resume"
    )
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_train_draft_online_with_models_of_other_widths(tmp_path: Path) -> None:
    (wide,), (tokenizer,) = loading.load(["family:draft"])
    wide.resize_token_embeddings(4096 + 64, mean_resizing=False)
    for one in (wide, tokenizer):
        one.save_pretrained(tmp_path / "wide")
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    text = Path(distil.__file__).read_text()
    data.write_text("\n".join(json.dumps({"prompt": text}) for _ in range(2)))
    result = run(
        "draft", "--draft", tmp_path / "wide", "--online", "--data", data, "--out", out,
        "--steps", "1", "--batch", "2", "--window-tokens", "16", "--new-tokens", "8",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((out / "evaluation.json").read_text())
    assert found["last_steps"]["trained_tokens"] > 0
