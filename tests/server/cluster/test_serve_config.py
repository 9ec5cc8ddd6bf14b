"""The application of deploy/cluster, behind Serve's own HTTP, as `serve deploy` would start it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server.cluster.on_ray import check_loopback_only
from tests.server.harness import ROOT, TINY, environment

pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
pytestmark = pytest.mark.slow

START_S = 240.0
# What `serve run` does with a config, on a Ray that listens on this machine alone.
PROGRAM = """
import sys
from server.cluster.ray_stages import connect
connect("local")
from ray import serve
from server.cluster.front import app
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
limits = {"dram_budget": "150MiB", "max_model_len": 1000, "max_num_seqs": 4}
serve.run(app({"model": sys.argv[1], "host": "0.0.0.0", **limits}))
print("runs", flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_the_application_streams_as_it_computes_and_asks_for_keys_behind_serves_http(tmp_path: Path) -> None:
    port = free_port()
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(TINY), str(port)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env=environment(LOCI_API_KEY="sk-1", LOCI_MAX_BODY_BYTES="2000"),
        )
    started = []
    try:
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, headers={"Authorization": "Bearer sk-1"}
        )
        end = time.monotonic() + START_S
        while not is_ready(client):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        started = psutil.Process(process.pid).children(recursive=True)
        assert client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        elsewhere = client.get("/v1/models", headers={"Host": "loci-serve-svc:8000"})
        assert elsewhere.status_code == 200, elsewhere.text
        body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        streamed = body | {"stream": True, "max_tokens": 900}
        with client.stream("POST", "/v1/completions", json=streamed) as answer:
            assert answer.headers["x-request-id"]
            pieces = list(answer.iter_raw())
        # As they come, not all at the end; how many tokens share a piece is the proxy's pace.
        assert b"[DONE]" in pieces[-1]
        assert len(pieces) >= 3
        several = client.post("/v1/completions", json=body | {"n": 3}).json()["choices"]
        assert [choice["text"] for choice in several] == [whole] * 3
        large = client.post("/v1/completions", json=body | {"prompt": "x " * 2000})
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
        assert "loci_replicas_up 1.0" in client.get("/metrics").text
        check_loopback_only(process.pid)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()
            for each in psutil.wait_procs(started, timeout=15)[1]:
                each.kill()


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
