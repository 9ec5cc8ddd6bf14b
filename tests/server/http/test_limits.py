"""Keys, sizes, queues, time limits and clients that leave."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer, eventually

pytestmark = pytest.mark.slow

LONG = {"model": "v41-c", "prompt": "Once", "max_tokens": 2000, "ignore_eos": True}
SHORT: dict[str, Any] = {"model": "v41-c", "prompt": "Once", "max_tokens": 2}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """Takes one sequence at a time, lets one wait, wants small bodies."""
    flags = ["--max-num-seqs", "1", "--max-waiting", "1", "--max-body-bytes", "4096"]
    started = LociServer(tmp_path_factory.mktemp("narrow"), [TINY, *flags])
    try:
        yield started.await_ready()
    finally:
        started.kill()


def test_a_client_that_leaves_a_stream_frees_its_slot(narrow: LociServer) -> None:
    with httpx.stream("POST", f"{narrow.url}/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert narrow.metric("loci_sequences_running") == 1

    eventually(lambda: narrow.metric("loci_sequences_running") == 0, "the slot is free", deadline_s=10)
    assert narrow.metric("loci_generated_tokens_total") < 2000


def test_a_client_that_leaves_a_whole_answer_frees_its_slot(narrow: LociServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{narrow.url}/v1/completions", json=LONG, timeout=httpx.Timeout(10, read=0.1))

    eventually(lambda: narrow.metric("loci_sequences_running") == 0, "the slot is free", deadline_s=10)
    assert narrow.metric("loci_http_requests_total", route="/v1/completions", status="499") == 1


def test_a_full_queue_is_a_429_that_says_when_to_come_back(narrow: LociServer) -> None:
    with (
        httpx.stream("POST", f"{narrow.url}/v1/completions", json=LONG | {"stream": True}) as running,
        openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="x", max_retries=0) as client,
    ):
        lines = running.iter_lines()
        next(lines)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**SHORT, n=2)

        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        assert "already waiting; try again later" in caught.value.message
        eventually(lambda: narrow.metric("loci_sequences_waiting") == 0, "the other one was taken back")
    eventually(lambda: narrow.metric("loci_sequences_running") == 0, "the slot is free")


@pytest.mark.parametrize(("waiting", "n"), [("0", 4), ("1", 3), ("1", 5)])
def test_an_idle_server_takes_what_fits(start_server: StartServer, waiting: str, n: int) -> None:
    server = start_server(TINY, "--max-num-seqs", "4", "--max-waiting", waiting).await_ready()

    for fields in ({"n": n}, {"prompt": ["Once"] * n}, {}, {"n": n, "stream": True}):
        assert httpx.post(f"{server.url}/v1/completions", json=SHORT | fields).status_code == 200


def test_more_answers_than_ever_fit_are_refused_for_good(narrow: LociServer) -> None:
    answer = httpx.post(f"{narrow.url}/v1/completions", json=SHORT | {"prompt": ["a", "b", "c"]})

    assert answer.status_code == 400
    assert "3 answers at once exceed this server's limit of 2;" in answer.json()["error"]["message"]


def test_a_body_that_declares_to_be_too_large_is_refused_unread(narrow: LociServer) -> None:
    answer = httpx.post(f"{narrow.url}/v1/completions", json=SHORT | {"prompt": "x" * 5000})

    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "limit of 4096 bytes" in answer.json()["error"]["message"]


def test_a_body_that_hides_its_size_is_cut_off_at_the_limit(narrow: LociServer) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{narrow.url}/v1/completions", content=pieces(), headers=headers)

    assert answer.status_code == 413


def test_a_client_that_leaves_while_sending_does_no_harm(narrow: LociServer) -> None:
    host, port = narrow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head + b"{")

    eventually(
        lambda: narrow.metric("loci_http_requests_total", route="/v1/chat/completions", status="499") == 1,
        "the request is given up",
    )
    assert httpx.post(f"{narrow.url}/v1/completions", json=SHORT).status_code == 200


def test_requests_above_the_time_limit_are_ended(start_server: StartServer) -> None:
    server = start_server(TINY, "--request-timeout-s", "0.1").await_ready()

    answer = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        extra = {"ignore_eos": True}
        stream = client.completions.create(
            model="v41-c", prompt="Once", max_tokens=2000, stream=True, extra_body=extra
        )
        with pytest.raises(openai.APIError, match=r"longer than 0\.1 s"):
            list(stream)

    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "request_timeout"
    eventually(lambda: server.metric("loci_sequences_running") == 0, "the slots are free")


def test_only_holders_of_a_key_get_in(start_server: StartServer) -> None:
    server = start_server(TINY, "--api-key", "first", "--api-key", "second,third").await_ready()

    def status(header: str | None, path: str = "/v1/models") -> int:
        headers = {} if header is None else {"Authorization": header}
        return httpx.get(server.url + path, headers=headers).status_code

    assert [status(f"Bearer {key}") for key in ("first", "second", "third")] == [200, 200, 200]
    assert [status(f"Bearer {key}") for key in ("fourth", "firs", "second,third")] == [401, 401, 401]
    assert status("first") == 401
    assert status(None) == 401
    assert status(None, "/metrics") == 401
    assert status(None, "/nowhere") == 401
    assert status(None, "/health") == 200
    assert status(None, "/ready") == 200
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY") as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    assert "Bearer $LOCI_API_KEY" in server.out.read_text()
    assert "first" not in server.out.read_text() + server.err.read_text()
