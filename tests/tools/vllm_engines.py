# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM for the tests: what they are made with, and the process that runs them."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from specens import family

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("vllm_server.py")
PATH = os.pathsep.join(map(str, (ROOT, ROOT / "python")))
# The member that vLLM calls its model.
TARGET = "code"


class Engines:
    """vLLM, imported once."""

    def __init__(self, python: str, folder: Path) -> None:
        self.python, self.folder, self.number = python, folder, 0
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join([PATH, installed(folder)])}
        self.server: subprocess.Popen[str] | None = None

    def __call__(
        self,
        *calls: tuple[list[str], list[dict[str, Any]]],
        fault: str | None = None,
        processes: bool = False,
        keep: bool = False,
        v2: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """What an engine writes, or the error that it raised, and its log.

        keep: the engine goes on after a call that it refuses, whose answer is the error.
        v2: by model runner V2.
        """
        self.number += 1
        job, result = (self.folder / f"{self.number}.{name}" for name in ("job", "answer"))
        job.write_text(
            json.dumps({"options": options, "calls": calls, "fault": fault, "keep": keep})
        )
        if processes or v2:
            command = [self.python, str(SERVER), str(job), str(result), *["v2"] * v2]
            done = subprocess.run(
                command, env=self.environment, capture_output=True, check=False, text=True
            )
            log = done.stdout + done.stderr
        else:
            self._serve(job, result)
            log = result.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        if not result.exists():
            raise AssertionError(log)
        return json.loads(result.read_text(encoding="utf-8")) | {"log": log}

    def _serve(self, job: Path, result: Path) -> None:
        if self.server is None:
            with (self.folder / "server.log").open("w") as log:
                self.server = subprocess.Popen(
                    [self.python, str(SERVER)],
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps([str(job), str(result)]) + "\n")
        self.server.stdin.flush()
        while (line := self.server.stdout.readline()) != "done\n":
            if not line:
                raise AssertionError((self.folder / "server.log").read_text())

    def close(self) -> None:
        """End the server, which ends with its input."""
        if self.server is not None:
            self.server.communicate()


def installed(folder: Path) -> str:
    """A folder that says of the sources what their installation would: vLLM's plug-in."""
    group = "vllm.general_plugins"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (plugin,) = re.findall(rf'^\[project.entry-points."{group}"\]\n(.+)$', project, re.MULTILINE)
    info = folder / "installed" / "specens_kernels-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: specens-kernels\nVersion: 0\n", encoding="utf-8")
    text = "[{}]\n{}\n".format(group, plugin.replace('"', ""))
    (info / "entry_points.txt").write_text(text, encoding="utf-8")
    return str(info.parent)


def member_settings(weights: dict[str, float], drafter: dict[str, Any] | None) -> list[Any]:
    """`members` of the settings: the draft model of a drafter is read as its member."""
    known = {TARGET: "target"}
    if drafter is not None and drafter["method"] == "draft_model":
        known["draft"] = "draft"
    return [[known.get(name, str(family.path(name))), weight] for name, weight in weights.items()]


def options(
    weights: dict[str, float] | None = None,
    drafter: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of `LLM` for an ensemble of the shipped family."""
    settings = dict(settings or {})
    if weights is not None:
        settings["members"] = member_settings(weights, drafter)
    return {
        "model": str(family.path(TARGET)),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "disable_log_stats": False,
        "worker_cls": "specens.engines.vllm.Worker",
        "additional_config": {"specens": settings},
        "speculative_config": drafter,
        **more,
    }


def draft_model(drafts: int = 3) -> dict[str, Any]:
    return {
        "model": str(family.path("draft")),
        "method": "draft_model",
        "num_speculative_tokens": drafts,
        "draft_sample_method": "probabilistic",
    }


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
