# SPDX-License-Identifier: Apache-2.0
"""vLLM's server with our worker, asked by OpenAI's client as a user asks it.

One server for all tests: a port of the system's choice, two members, no drafter. A case is one more
function that takes the client.
"""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from texts import differing
from vllm_engines import Engines, options

pytestmark = pytest.mark.slow
TWO = {"code": 0.4, "prose": 0.6}
OWN = {"code": 0.9, "prose": 0.1}
PROMPT = "And the king said"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SECONDS = 180
# Runs in the Python that has vLLM, which brings OpenAI's client: a JSON line for each answer.
CLIENT = """
import json, sys
import openai

address, kind, given = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
ask = client.chat.completions if kind == "chat" else client.completions
try:
    answer = ask.create(model="both", **given)
    chunks = list(answer) if given.get("stream") else [answer]
    for chunk in chunks:
        print(chunk.model_dump_json())
except openai.APIStatusError as error:
    print(json.dumps({"status": error.status_code, "message": str(error)}))
"""


class Client:
    """OpenAI's client of a running server."""

    def __init__(self, engines: Engines, address: str) -> None:
        self.engines, self.address = engines, address

    def __call__(self, kind: str, **given: Any) -> list[dict[str, Any]]:
        command = [self.engines.python, "-c", CLIENT, self.address, kind, json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def completion(self, **given: Any) -> str:
        (answer,) = self("completion", prompt=PROMPT, max_tokens=16, temperature=0, **given)
        text: str = answer["choices"][0]["text"]
        return text


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def client(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    port, folder = free_port(), tmp_path_factory.mktemp("server")
    (folder / "chat.jinja").write_text(CHAT, encoding="utf-8")
    given = options(TWO)
    command = [engines.python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", given["model"], "--served-model-name", "both", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--enforce-eager", "--chat-template", str(folder / "chat.jinja")]
    command += ["--worker-cls", given["worker_cls"]]
    command += ["--additional-config", json.dumps(given["additional_config"])]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = engines.environment | quiet | {"VLLM_LOGGING_LEVEL": "WARNING"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, folder / "log")
        yield Client(engines, address)
    finally:
        server.terminate()
        server.wait(60)


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace")[-4000:])


def expected(engines: Engines, members: dict[str, Any], weights: dict[str, float]) -> str:
    """The text that an engine in this process's child writes, which is the mixture's."""
    parameters = {"temperature": 0.0, "max_tokens": 16}
    parameters["extra_args"] = {"specens": {"weights": list(weights.values())}}
    result = engines(([PROMPT], [parameters]), **options(TWO))
    ((answer,),) = result["answers"]
    assert differing(answer, members, weights) == 0
    text: str = answer["text"]
    return text


def test_completions_chat_and_streams_are_the_mixtures(
    client: Client, engines: Engines, members: dict[str, Any]
) -> None:
    text = expected(engines, members, TWO)
    assert client.completion() == text
    message = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 16}
    (chat,) = client("chat", temperature=0, **message)
    assert chat["choices"][0]["message"]["content"].strip() == text.strip()
    stream = client("completion", prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
    assert len(stream) > 2
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == text


def test_two_requests_at_once_have_weights_of_their_own(
    client: Client, engines: Engines, members: dict[str, Any]
) -> None:
    bodies = [{}, {"extra_body": {"vllm_xargs": {"specens": list(OWN.values())}}}] * 2
    with ThreadPoolExecutor(len(bodies)) as pool:
        texts = list(pool.map(lambda body: client.completion(**body), bodies))
    assert texts == [expected(engines, members, TWO), expected(engines, members, OWN)] * 2
    assert texts[0] != texts[1]


@pytest.mark.parametrize(
    ("xargs", "key"),
    [
        ({"specens": [0.5, 0.6]}, "extra_args.weights"),
        ({"specens": '{"acceptance": "typcal"}'}, "extra_args.acceptance"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_one_answered(
    client: Client, xargs: dict[str, Any], key: str
) -> None:
    body = {"extra_body": {"vllm_xargs": xargs}}
    (error,) = client("completion", prompt=PROMPT, max_tokens=4, **body)
    assert error["status"] == 400
    assert f"specens: {key}: expected " in error["message"]
    assert client.completion()
