"""Whatever is sent, the server answers with a status below 500, goes on serving and keeps nothing behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.harness import TINY, LociServer, eventually

pytestmark = pytest.mark.slow

# Short answers, few at a time: what matters is how requests are read.
FLAGS = ("--max-model-len", "64", "--max-num-seqs", "8", "--max-waiting", "16")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "use_after_free",
)
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "v41-c", "messages": MESSAGES, "max_tokens": 2},
    "/v1/completions": {"model": "v41-c", "prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"model": "v41-c", "input": "Hi", "max_output_tokens": 2},
    "/v1/responses/input_tokens": {"model": "v41-c", "input": "Hi"},
    "/v1/messages": {"model": "v41-c", "messages": MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "v41-c", "messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 2}, "stream": False},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 2}, "stream": False},
    "/api/show": {"model": "v41-c"},
    "/apply-template": {"messages": MESSAGES},
    "/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/messages": {"messages": MESSAGES, "max_tokens": 2},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """A server for nonsense; in the end it must be as it was."""
    server = LociServer(tmp_path_factory.mktemp("fuzz"), [TINY, *FLAGS])
    try:
        yield server.await_ready()
        eventually(lambda: server.metric("loci_sequences_running") == 0, "no sequence runs")
        assert server.metric("loci_sequences_waiting") == 0
        assert "Traceback" not in server.err.read_text()
    finally:
        server.kill()


def fields_of(path: str, document: dict[str, Any]) -> list[str]:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return list(document["components"]["schemas"][name]["properties"])


@pytest.fixture(scope="module")
def document(fuzzed: LociServer) -> dict[str, Any]:
    """The server's OpenAPI document."""
    found: dict[str, Any] = httpx.get(f"{fuzzed.url}/openapi.json").json()
    return found


def test_schemathesis_finds_nothing(fuzzed: LociServer) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{fuzzed.url}/openapi.json"),
        *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing,stateful"),
        *("--max-time", "34", "--request-timeout", "15", "--seed", "1", "--max-examples", "20"),
        *("--suppress-health-check", "all", "--no-color"),
    ]

    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    assert re.search(r"Selected: (\d+)/\1\s+Tested: \1\s", found.stdout), found.stdout[-3000:]


NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 1e308])
)
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["<think>", "｜DSML｜", "\x00", "﷐", "😀" * 50, "a" * 20_000])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_field_is_taken_or_refused(
    fuzzed: LociServer, document: dict[str, Any], path: str, data: st.DataObject
) -> None:
    names = st.sampled_from(fields_of(path, document))
    body = BODIES[path] | data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))

    answer = _post(fuzzed, path, json.dumps(body).encode())

    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or complaint(answer)


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_that_were_damaged_on_the_way_are_taken_or_refused(
    fuzzed: LociServer, path: str, data: st.DataObject
) -> None:
    body = bytearray(json.dumps(BODIES[path]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))

    answer = _post(fuzzed, path, bytes(body))

    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or complaint(answer)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "spoilt",
    [
        b'{"a":' * 50_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"model": "v41-c", "model": "v41-c", "prompt": "a", "prompt": ["b"], "max_tokens": 1}',
        b'{"seed": 1' + b"0" * 100_000 + b"}",
        b'{"seed": -Infinity, "model": NaN}',
        b'"' + b"\\u0000" * 10_000 + b'"',
        b'{"model": "\xc3\x28\xed\xa0\x80"}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b"null",
    ],
    ids=["deep", "deeper", "twice", "huge", "infinite", "nulls", "utf8", "utf16", "mark", "null"],
)
def test_hostile_bodies_are_answered(fuzzed: LociServer, path: str, spoilt: bytes) -> None:
    answer = _post(fuzzed, path, spoilt)

    assert answer.status_code in (200, 400)
    assert answer.status_code == 200 or complaint(answer)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip"},
        {"X-Request-Id": "x" * 5000, "Authorization": "Bearer \xff"},
        {"Host": "other.example"},
    ],
)
def test_odd_headers_are_answered(fuzzed: LociServer, headers: dict[str, str]) -> None:
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}

    answer = httpx.post(
        f"{fuzzed.url}/v1/completions",
        content=json.dumps(BODIES["/v1/completions"]).encode(),
        headers={b"Content-Type": b"application/json"} | encoded,
    )

    assert answer.status_code in (200, 400, 403, 415)


def complaint(answer: httpx.Response) -> str:
    """What an error says, in the shape of its protocol."""
    error: Any = answer.json()["error"]
    return str(error) if isinstance(error, str) else str(error["message"])


def _post(server: LociServer, path: str, body: bytes) -> httpx.Response:
    return httpx.post(
        server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=30
    )
