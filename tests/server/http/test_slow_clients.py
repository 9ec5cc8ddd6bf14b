"""Clients that take their time, or many connections, keep nobody else from being served."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.server.harness import TINY, LociServer, eventually

pytestmark = pytest.mark.slow

SHORT = {"model": "v41-c", "prompt": "Once", "max_tokens": 2}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """Gives a client one second for a head, one for a body, and one to take an answer."""
    limits = ["--read-timeout-s", "1", "--write-timeout-s", "1"]
    server = LociServer(tmp_path_factory.mktemp("impatient"), [TINY, *limits])
    try:
        yield server.await_ready()
    finally:
        server.kill()


def connect(server: LociServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def drip(connection: socket.socket, rest: bytes) -> bytes:
    """Send `rest` byte by byte until the server answers; what it said until it hung up."""
    connection.settimeout(0.05)
    answer = b""
    for byte in rest:
        try:
            connection.sendall(bytes([byte]))
            answer += connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            break
        if answer:
            break
    connection.settimeout(20)
    try:
        while more := connection.recv(4096):
            answer += more
    except ConnectionResetError:
        pass
    return answer


def test_a_head_that_comes_byte_by_byte_is_given_up(impatient: LociServer) -> None:
    with connect(impatient) as connection:
        answer = drip(connection, HEAD + b"X-Slow: " + b"x" * 10_000)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive in time" in answer


def test_a_body_that_comes_byte_by_byte_is_given_up(impatient: LociServer) -> None:
    with connect(impatient) as connection:
        connection.sendall(HEAD + b"Content-Length: 20000\r\n\r\n")
        answer = drip(connection, b'{"prompt": "' + b"x" * 10_000)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_too_slow"' in answer
    assert b"connection: close" in answer.lower()


def test_a_connection_that_says_nothing_is_closed(impatient: LociServer) -> None:
    with connect(impatient) as connection:
        assert connection.recv(1) == b""


def test_a_second_request_on_a_connection_has_its_own_time(impatient: LociServer) -> None:
    long = SHORT | {"max_tokens": 300, "ignore_eos": True}  # takes longer than a head may

    with httpx.Client(base_url=impatient.url, timeout=120) as client:
        assert client.post("/v1/completions", json=long).status_code == 200
        assert client.post("/v1/completions", json=SHORT).status_code == 200


def test_a_client_that_does_not_take_its_answer_is_hung_up_on(impatient: LociServer) -> None:
    def connections() -> set[str]:
        files = Path(f"/proc/{impatient.process.pid}/fd").iterdir()
        return {
            target
            for file in files
            if (target := os.path.realpath(file)).rpartition("/")[2].startswith("socket:")
        }

    before = connections()
    body = json.dumps({"prompt": "a b " * 400_000, "return_token_strs": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = impatient.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        head = HEAD.replace(b"/v1/completions", b"/tokenize")
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"

        (ours,) = connections() - before
        eventually(lambda: ours not in connections(), "the connection is closed", deadline_s=20)


def test_many_slow_connections_leave_room_for_others(impatient: LociServer) -> None:
    with ExitStack() as stack:
        waiting = [stack.enter_context(connect(impatient)) for _ in range(300)]
        for connection in waiting:
            connection.sendall(HEAD)

        assert httpx.post(f"{impatient.url}/v1/completions", json=SHORT, timeout=20).status_code == 200
        assert all(connection.recv(15) == b"HTTP/1.1 408 Re" for connection in waiting)
