"""How a server starts, fails to start, and ends."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server import harness
from tests.server.conftest import StartServer
from tests.server.harness import TINY, eventually

LONG: dict[str, Any] = {
    "model": "v41-c",
    "prompt": "Once",
    "max_tokens": 2000,
    "extra_body": {"ignore_eos": True},
}


@pytest.mark.slow
def test_it_prints_where_it_is_and_a_curl_that_works(start_server: StartServer) -> None:
    server = start_server(TINY, "--served-model-name", "it's tiny").await_ready()
    eventually(lambda: "curl" in server.out.read_text(), "the curl line is printed")

    printed = server.out.read_text()
    (command,) = [line.strip() for line in printed.splitlines() if line.strip().startswith("curl ")]
    short = command.replace('"messages"', '"max_tokens": 3, "messages"')
    answer = subprocess.run(short, shell=True, capture_output=True, text=True, timeout=60, check=True)

    assert server.url in command
    assert '"model":"it\'s tiny"' in answer.stdout
    assert "\x1b" not in printed


@pytest.mark.slow
def test_sigterm_lets_a_stream_finish_and_exits_with_0(start_server: StartServer) -> None:
    server = start_server(TINY).await_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(**LONG | {"max_tokens": 60}, stream=True)
        chunks = [next(stream)]
        server.signal(signal.SIGTERM)
        chunks += list(stream)
        eventually(lambda: _refuses_connections(server.url), "no new connections are taken")

    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.exit_code() == 0


@pytest.mark.slow
def test_while_it_drains_new_requests_are_told_so_and_probes_are_answered(start_server: StartServer) -> None:
    server = start_server(TINY).await_ready()
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
        client.completions.create(**LONG, stream=True) as running,
    ):
        next(running)
        server.signal(signal.SIGTERM)
        eventually(lambda: "Shutting down" in server.out.read_text(), "the signal is noticed")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**LONG)
        ready, health, metrics = (
            httpx.get(f"{server.url}{path}") for path in ("/ready", "/health", "/metrics")
        )
        list(running)

    assert caught.value.status_code == 503
    assert caught.value.code == "server_stopping"
    assert caught.value.response.headers["retry-after"] == "1"
    assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
    assert (health.status_code, metrics.status_code) == (200, 200)
    assert server.exit_code() == 0


@pytest.mark.slow
def test_sigterm_while_loading_exits_with_0(start_server: StartServer) -> None:
    server = start_server(TINY)
    assert server.url
    server.signal(signal.SIGTERM)

    assert server.exit_code() == 0


@pytest.mark.slow
def test_after_the_drain_deadline_streams_end_with_an_error(start_server: StartServer) -> None:
    server = start_server(TINY, "--drain-timeout-s", "0.3").await_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        server.signal(signal.SIGINT)
        eventually(lambda: "press Ctrl-C again to stop now" in server.out.read_text(), "a person is told")
        with pytest.raises(openai.APIError, match="stopped before the answer was finished"):
            list(stream)

    assert server.exit_code() == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(start_server: StartServer) -> None:
    server = start_server(TINY).await_ready()
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"model": "v41-c", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True},
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        eventually(lambda: "Shutting down" in server.out.read_text(), "the first signal is noticed")
        server.signal(signal.SIGTERM)

        assert server.exit_code() == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_broken_checkpoint_ends_the_server_with_a_clear_message(
    start_server: StartServer, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    (broken / "model-00002-of-00002.safetensors").unlink()

    server = start_server(broken)

    assert server.exit_code() == 1
    error = harness.complaint(server.err.read_text())
    assert error.startswith(f"loci: {broken}: ")
    assert "model-00002-of-00002.safetensors" in error
    assert "Traceback" not in error
    assert server.out.read_text() == ""  # nobody was told to connect


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/model"], "/nowhere/model: no such file or directory"),
        ([TINY, "--max-model-len", "4096"], "max_model_len is 4096, but v41-c supports at most 2048 tokens"),
        ([TINY, "--prefix-cache", "much"], "'much' is not a size"),
        ([TINY, "--max-num-seqs", "0"], "max_num_seqs: Input should be greater than or equal to 1, got 0"),
        ([TINY, "--config", "/nowhere.toml"], "/nowhere.toml: no such file"),
        ([TINY, "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:0"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments: list[str | Path], message: str) -> None:
    result = harness.run("serve", *arguments, "--port", "0")

    (line,) = harness.complaint(result.stderr).splitlines()
    assert result.returncode == 1
    assert message in line
    assert result.stdout == ""


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = harness.run("serve", TINY, "--port", str(port))

    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another" in result.stderr


@pytest.mark.slow
def test_an_open_address_without_a_key_is_warned_about(start_server: StartServer) -> None:
    server = start_server(TINY, "--host", "0.0.0.0").await_ready()

    assert "listening on 0.0.0.0 without an API key" in server.err.read_text()
    assert server.url.startswith("http://127.0.0.1:")
    assert "every IPv4 address of this machine (here: " in server.out.read_text()


@pytest.mark.slow
def test_a_server_whose_output_nobody_reads_goes_on() -> None:
    process = subprocess.Popen(
        harness.command("serve", TINY, "--port", "0"), env=harness.environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        process.stdout.close()
        eventually(lambda: httpx.get(f"{found[0]}/ready").status_code == 200, "the model is loaded")
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
        assert process.wait(harness.DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_wrong_usage_exits_with_2() -> None:
    result = harness.run("serve", "--no-such-flag")

    assert result.returncode == 2
    assert "No such option" in result.stderr


def _refuses_connections(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return True
    return False
