"""Responses that are kept: conversations go on from them, and clients come back to them."""

from __future__ import annotations

import httpx
import openai
import pytest

from server.openai.messages import Message
from server.responses.store import ResponseStore, StoredResponse
from tests.server.responses.helpers import TOOLS, ask, chat_text


def test_a_conversation_goes_on_from_a_kept_response(client: openai.OpenAI) -> None:
    first = ask(client, "My name is Ada.", instructions="not carried over")
    second = ask(client, "Who am I?", previous_response_id=first.id)
    history = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Who am I?"},
    ]

    assert second.previous_response_id == first.id
    assert second.output_text == chat_text(client, history)
    assert ask(client, history).output_text == second.output_text
    assert ask(client, [*history[:1], *first.output, history[2]]).output_text == second.output_text


def test_a_kept_response_can_be_fetched_and_forgotten(client: openai.OpenAI) -> None:
    response = ask(client)

    assert client.responses.retrieve(response.id) == response
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="is not stored on this server"):
        client.responses.retrieve(response.id)
    with pytest.raises(
        openai.BadRequestError, match="is not stored on this server; send its items"
    ) as caught:
        ask(client, previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(response.id)


def test_what_a_response_answers_can_be_read_back_page_by_page(client: openai.OpenAI) -> None:
    items = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    response = ask(client, items, tools=TOOLS)

    oldest_first = list(client.responses.input_items.list(response.id, order="asc", limit=3))
    newest_first = list(client.responses.input_items.list(response.id))

    assert [item.type for item in oldest_first] == [
        "message",
        "message",
        "function_call",
        "function_call_output",
    ]
    assert [item.id for item in newest_first] == [item.id for item in reversed(oldest_first)]
    user, assistant, call, output = (item.to_dict() for item in oldest_first)
    assert user["content"] == [{"type": "input_text", "text": "Hello"}]
    assert assistant["content"] == [{"type": "output_text", "text": "Hi."}]
    assert (call["name"], call["arguments"], output["output"]) == ("weather", "{}", "rain")
    assert ask(client, oldest_first, tools=TOOLS).output_text == response.output_text
    (only,) = client.responses.input_items.list(ask(client, "Hello").id)
    assert only.to_dict()["content"] == user["content"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("order=up", "order"),
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("after=nothing", "after"),
    ],
)
def test_a_page_that_cannot_be_is_refused(
    client: openai.OpenAI, http: httpx.Client, query: str, param: str
) -> None:
    answer = http.get(f"/v1/responses/{ask(client).id}/input_items?{query}")

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_response_that_has_ended_cannot_be_cancelled(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has already ended"):
        client.responses.cancel(ask(client).id)
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_0")
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_0")


def test_a_response_is_not_kept_where_the_client_says_so(client: openai.OpenAI) -> None:
    response = ask(client, store=False)

    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def stored(name: str, owner: str | None = None) -> StoredResponse:
    return StoredResponse(owner, {"id": name}, (Message(role="user", content="x" * 100),))


def test_the_store_forgets_what_was_not_used_for_longest() -> None:
    store = ResponseStore(3 * stored("a").size_bytes)
    for name in ("a", "b", "c"):
        store.put(stored(name))
    store.get("a", None)

    store.put(stored("d"))

    assert [name for name in ("a", "b", "c", "d") if store.get(name, None)] == ["a", "c", "d"]


def test_the_store_shows_a_response_to_its_owner_only() -> None:
    store = ResponseStore(10_000)
    store.put(stored("a", owner="ada"))

    assert store.get("a", "bob") is None
    assert not store.remove("a", None)
    assert store.get("a", "ada") is not None


def test_a_store_without_room_keeps_nothing() -> None:
    store = ResponseStore(0)
    store.put(stored("a"))

    assert store.get("a", None) is None
