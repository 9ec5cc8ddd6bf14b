"""What is under /v1 answers without it, with the same keys, limits, errors and counters."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY

pytestmark = pytest.mark.slow

SAY: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": SAY, "max_tokens": 2}),
        ("/completions", {"prompt": "Hello", "max_tokens": 2}),
        ("/responses", {"input": "Hello", "max_output_tokens": 2}),
        ("/responses/input_tokens", {"input": "Hello"}),
        ("/messages", {"messages": SAY, "max_tokens": 2}),
        ("/messages/count_tokens", {"messages": SAY}),
    ],
)
def test_a_request_is_answered_with_and_without_v1(http: httpx.Client, path: str, body: Any) -> None:
    short, long = (http.post(prefix + path, json=body | {"temperature": 0}) for prefix in ("", "/v1"))

    assert short.status_code == long.status_code == 200
    assert short.json().keys() == long.json().keys()


def test_models_are_listed_with_and_without_v1(http: httpx.Client) -> None:
    assert http.get("/models").json() == http.get("/v1/models").json()
    assert http.get("/models/v41-c").json()["id"] == "v41-c"
    assert http.post("/embeddings", json={"input": "Hello"}).json()["error"]["code"] == (
        "embeddings_not_supported"
    )
    assert http.get("/modelsx").status_code == http.get("/v1/v1/models").status_code == 404


def test_an_sdk_may_be_given_the_address_alone(http: httpx.Client) -> None:
    with openai.OpenAI(base_url=str(http.base_url), api_key="unused", max_retries=0) as sdk:
        answer = sdk.chat.completions.create(model="v41-c", messages=SAY, max_tokens=2)

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_errors_have_the_shape_of_the_protocol(http: httpx.Client) -> None:
    told = http.post("/messages", json={"messages": SAY})

    assert told.status_code == 400
    assert told.json()["type"] == "error"
    assert "Request-Id" in told.headers


def test_the_document_has_both(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    ids = [operation["operationId"] for path in paths.values() for operation in path.values()]

    long = [path for path in paths if path.startswith("/v1/")]
    assert long
    assert [path for path in long if path.removeprefix("/v1") not in paths] == []
    assert len(set(ids)) == len(ids)


def test_keys_and_limits_hold_without_v1(start_server: StartServer) -> None:
    server = start_server(TINY, "--api-key", "sk-secret").await_ready()
    key = {"Authorization": "Bearer sk-secret"}
    body = {"prompt": "Hello", "max_tokens": 1}

    assert httpx.get(f"{server.url}/models").status_code == 401
    assert httpx.post(f"{server.url}/completions", json=body).status_code == 401
    assert httpx.post(f"{server.url}/completions", json=body, headers=key).status_code == 200
    server.headers = key
    assert server.metric("loci_http_requests_total", route="/v1/completions", status="200") == 1
    assert server.metric("loci_http_requests_total", route="/completions") == 0
