"""Names, origins and what the log says: who may reach the server from where, and what is written down."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import httpx
import pytest

from server.http.logs import JsonFormatter
from server.settings import Settings
from tests.server.harness import TINY, LociServer, eventually

PAGE = "https://chat.example.org"
KEY = {"Authorization": "Bearer sk-secret"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("evil.example.org", 403),
        ("localhost.evil.example.org:8000", 403),
        ("[::2]", 403),
    ],
)
def test_a_server_on_loopback_answers_to_its_names_only(http: httpx.Client, host: str, status: int) -> None:
    answer = http.get("/v1/models", headers={"Host": host})

    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert "x-request-id" in answer.headers


def test_names_can_be_allowed_and_an_open_server_answers_to_any() -> None:
    assert Settings(allowed_hosts=("a.example.org",)).host_names == ("a.example.org",)
    assert Settings(allowed_hosts=("*",)).host_names is None
    assert Settings(host="0.0.0.0").host_names is None
    assert "127.0.0.5" in (Settings(host="127.0.0.5").host_names or ())


@pytest.fixture(scope="module")
def open_to_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """A server that one page may use, with a key, logging JSON."""
    flags = ["--cors-origins", PAGE, "--api-key", "sk-secret", "--log-format", "json"]
    started = LociServer(tmp_path_factory.mktemp("origins"), [TINY, *flags])
    try:
        yield started.await_ready()
    finally:
        started.kill()


def test_without_the_setting_no_page_may_read_answers(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Origin": PAGE})

    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.slow
def test_an_allowed_page_may_ask_and_read_errors_too(open_to_page: LociServer) -> None:
    preflight = httpx.options(
        f"{open_to_page.url}/v1/chat/completions",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        },
    )
    answer = httpx.get(f"{open_to_page.url}/v1/models", headers=KEY | {"Origin": PAGE})
    refused = httpx.get(f"{open_to_page.url}/v1/models", headers={"Origin": PAGE})

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


@pytest.mark.slow
def test_another_page_may_not(open_to_page: LociServer) -> None:
    headers = KEY | {"Origin": "https://evil.example.org"}

    answer = httpx.get(f"{open_to_page.url}/v1/models", headers=headers)

    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.slow
def test_the_log_is_json_and_names_the_key_without_showing_it(open_to_page: LociServer) -> None:
    body = {"model": "v41-c", "prompt": "my own wish", "max_tokens": 2}
    headers = KEY | {"X-Request-Id": "log-json-1"}
    httpx.post(f"{open_to_page.url}/v1/completions", json=body, headers=headers)

    eventually(lambda: "log-json-1" in open_to_page.err.read_text(), "the request is logged")
    log = open_to_page.err.read_text()
    records = [json.loads(line) for line in log.splitlines()]
    (record,) = [record for record in records if record.get("request_id") == "log-json-1"]
    assert record["logger"] == "loci.access"
    assert (record["method"], record["path"], record["status"]) == ("POST", "/v1/completions", 200)
    assert record["duration_ms"] > 0
    assert record["key"] == "key-1"
    assert record["client"] == "127.0.0.1"
    assert "sk-secret" not in log
    assert "wish" not in log


def test_a_traceback_stays_within_its_line() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        record = logging.LogRecord("loci", logging.ERROR, "x", 1, "failed: %s", ("a",), sys.exc_info())

    line = JsonFormatter().format(record)

    assert "\n" not in line
    assert json.loads(line)["message"] == "failed: a"
    assert "ValueError: broken" in json.loads(line)["exception"]
