# SPDX-License-Identifier: Apache-2.0
"""The small model family that ships with the package: two members, a draft, one tokenizer.

`code` reads mostly Python, `prose` mostly English, and `draft` is distilled from their even
mixture; the recipe is `recipes/train_family.py` of the repository. They write plausible fragments,
not sense: they are here so that everything can be tried and tested offline. To add a model, train
it into a folder of this package and add its name to `FAMILY`.
"""

from importlib.resources import files
from pathlib import Path

from specens_kernels import Refusal

FAMILY = ("code", "prose", "draft")

# What the demo and the benchmarks of the command line ask them to continue.
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "She had been walking in the garden with her sister, when",
)


def path(name: str) -> Path:
    """The folder of one of `FAMILY`, as `from_pretrained` takes it.

    Raises:
        Refusal: there is no such model.
    """
    if name not in FAMILY:
        raise Refusal.unknown("family", "name", name, FAMILY)
    return Path(str(files(__name__) / name))


def head_path() -> Path:
    """The folder of the weight head of `draft` and `code`, as `WeightHead.load` takes it."""
    return Path(str(files(__name__) / "head"))
