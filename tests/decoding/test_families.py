# SPDX-License-Identifier: Apache-2.0
"""Every architecture of transformers that writes text: right, or refused with a reason; none wrong.

A short list runs always; with --zoo (`make test-zoo`) all do, and a table says what became of each.
A new architecture needs no entry; one whose sizes cannot be guessed has it in tools/families.py.
"""

import pytest
from families import AUTO, examine

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each way to keep state or to be called, with the mode that is found for it.
SHORT = {
    "qwen2_5_vl": "slot",  # sees images; several positions a token
    "gemma3": "slot",  # sees images; two kinds of layers
    "mistral3": "slot",
    "llama4": "slot",
    "gpt_neo": "crop",
    "mamba2": "replay",  # its cache has a name of its own
    "deepseek_v32": "replay",  # an index over keys
    "xlnet": "",  # looks ahead
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All of them with --zoo."""
    if "model_type" in metafunc.fixturenames:
        metafunc.parametrize("model_type", AUTO if metafunc.config.getoption("zoo") else SHORT)


@pytest.mark.slow
def test_family_writes_right_or_is_refused(model_type, record_property):
    record_property("family", model_type)
    verdict = examine(model_type)
    for name, value in vars(verdict).items():
        record_property(name, value)
    assert verdict.outcome != "wrong", verdict.reason
    if model_type in SHORT:
        assert verdict.modes == SHORT[model_type]
        assert verdict.outcome == ("right" if verdict.modes else "refused"), verdict.reason
    if verdict.outcome in ("not tiny", "cannot"):
        pytest.skip(verdict.reason)
