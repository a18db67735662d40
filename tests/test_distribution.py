# SPDX-License-Identifier: Apache-2.0
"""The source distribution has what a build needs, and nothing that only the repository can run.

`make wheel` builds from it, and tries what comes out in fresh environments.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from specens_kernels import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Of the files in a source distribution of the repository as it stands."""
    folder = tmp_path_factory.mktemp("source")
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(folder / f"specens_kernels-{__version__}.tar.gz") as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.slow
def test_a_source_distribution_can_be_built(names: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "specens_kernels", "python"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git repository, which says what the sources are")
    sources = {name for name in tracked.stdout.split() if (ROOT / name).exists()}
    assert len(sources) > 200
    assert sources - names == set()
    assert {"pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md"} <= names


@pytest.mark.slow
def test_a_source_distribution_has_nothing_built_and_no_tests(names: set[str]) -> None:
    assert not [name for name in names if name.endswith((".so", ".pyc", ".whl"))]
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks", "build")]
