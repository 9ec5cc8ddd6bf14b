"""Answers under way can be ended from another connection, by whoever asked for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer, eventually

MODEL = "v41-c"
LONG: dict[str, Any] = {"model": MODEL, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def is_idle(server: LociServer) -> bool:
    return server.metric("loci_sequences_running") == 0


def test_a_streamed_chat_ends_where_its_id_is_deleted(
    server: LociServer, client: openai.OpenAI, http: httpx.Client
) -> None:
    stream = client.chat.completions.create(messages=HELLO, n=2, stream=True, **LONG)
    first = next(stream)

    answer = http.delete(f"/v1/requests/{first.id}")
    with pytest.raises(openai.APIError, match="the request was cancelled"):
        list(stream)

    assert answer.json() == {"id": first.id, "object": "request", "cancelled": True}
    eventually(lambda: is_idle(server), "the slots are free", deadline_s=10)
    assert http.delete(f"/v1/requests/{first.id}").status_code == 404


def test_a_whole_answer_is_known_by_the_id_of_its_request(
    server: LociServer, client: openai.OpenAI, http: httpx.Client
) -> None:
    def ask() -> int:
        headers = {"X-Request-Id": "mine"}
        with pytest.raises(openai.APIStatusError, match="the request was cancelled") as caught:
            client.with_options(max_retries=2).completions.create(
                prompt="Hello", extra_headers=headers, **LONG
            )
        assert caught.value.code == "request_cancelled"
        return caught.value.status_code

    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask)
        eventually(lambda: http.delete("/v1/requests/mine").status_code == 200, "the answer is under way")

        assert asked.result() == 499
    assert is_idle(server)  # and the SDK did not ask again


def test_a_message_is_ended_in_its_own_protocol(server: LociServer, http: httpx.Client) -> None:
    with (
        anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0) as claude,
        claude.messages.create(messages=HELLO, stream=True, **LONG) as stream,
    ):
        events = iter(stream)
        begun = next(events)
        assert begun.type == "message_start"
        assert http.delete(f"/v1/requests/{begun.message.id}").status_code == 200
        with pytest.raises(anthropic.APIStatusError, match="the request was cancelled"):
            list(events)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_response_under_way_is_cancelled_or_deleted(
    server: LociServer, client: openai.OpenAI, is_deleted: bool
) -> None:
    stream = client.responses.create(
        model=MODEL, input="Hello", stream=True, max_output_tokens=1900, extra_body={"ignore_eos": True}
    )
    begun = next(stream)
    assert begun.type == "response.created"

    if is_deleted:
        client.responses.delete(begun.response.id)
    else:
        assert client.responses.cancel(begun.response.id).status == "cancelled"
    *_, last = stream

    assert last.type == "response.failed"
    assert last.response.status == "cancelled"
    assert last.response.error is not None
    assert "was cancelled" in last.response.error.message
    eventually(lambda: is_idle(server), "the slot is free", deadline_s=10)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.response.id)


@pytest.mark.slow
def test_nobody_ends_what_another_key_asked_for(start_server: StartServer) -> None:
    server = start_server(TINY, "--api-key", "ada,bob").await_ready()
    server.headers = {"Authorization": "Bearer ada"}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="ada", max_retries=0) as ada:
        stream = ada.chat.completions.create(messages=HELLO, stream=True, **LONG)
        path = f"{server.url}/v1/requests/{next(stream).id}"

        assert httpx.delete(path, headers={"Authorization": "Bearer bob"}).status_code == 404
        assert not is_idle(server)
        assert httpx.delete(path, headers=server.headers).status_code == 200
        stream.close()
