"""Files that are truncated under a running server: who is told, and that it goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer

pytestmark = pytest.mark.slow


def complete(server: LociServer, prompt: str, **more: object) -> httpx.Response:
    body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def status(server: LociServer) -> tuple[int, str]:
    answer = httpx.get(f"{server.url}/health")
    return answer.status_code, answer.json()["status"]


# Of v41-c the first shard holds all but one Engram table, the second nothing else. A question begins with
# rows of the embedding, which stays in its file too; the others are read over links.
@pytest.mark.parametrize("shard", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_truncated_shard_fails_the_requests_that_need_it_and_the_server_goes_on(
    start_server: StartServer, tmp_path: Path, shard: str
) -> None:
    file = shutil.copytree(TINY, tmp_path / "m") / shard
    server = start_server(file.parent, "--dram-budget", "1.34MB", "--prefix-cache", "0").await_ready()
    expected = complete(server, "What is it?").json()["choices"]
    assert status(server) == (200, "ok")
    content = file.read_bytes()

    os.truncate(file, 4096)
    failed = complete(server, "Another question")
    streamed = complete(server, "A third one", stream=True)
    assert failed.status_code == 500
    error = failed.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", "engine_error")
    assert str(file) in error["message"]
    assert error["message"].endswith("download it again")
    assert '"code":"engine_error"' in streamed.text.replace(" ", "")
    assert status(server) == (200, "failing")
    assert httpx.get(f"{server.url}/ready").status_code == 200
    if shard.startswith("model-00002"):
        assert server.metric("loci_link_failures_total") > 0

    file.write_bytes(content)
    assert complete(server, "What is it?").json()["choices"] == expected
    assert status(server) == (200, "ok")
    assert server.process.poll() is None
