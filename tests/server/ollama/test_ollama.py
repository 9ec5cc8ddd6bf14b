"""Ollama's interface: chats and texts, as lines and whole, and what its clients ask first."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engine.families.loader import load
from server.ollama.reply import OllamaReply
from server.ollama.requests import OllamaChatRequest
from server.serving.service import Served
from tests.server.harness import TINY
from tests.server.scripted import CALLS, Script, events, whole

CHAT: dict[str, Any] = {
    "model": "v41-c:latest",
    "messages": [{"role": "user", "content": "Hello"}],
    "options": {"num_predict": 6, "temperature": 0, "num_ctx": 4096, "num_gpu": 99},
    "think": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.slow
def test_a_chat_is_streamed_unless_it_is_not_to_be(http: httpx.Client) -> None:
    streamed = lines(http.post("/api/chat", json=CHAT))
    answer = http.post("/api/chat", json=CHAT | {"stream": False}).json()

    assert "".join(line["message"]["content"] for line in streamed) == answer["message"]["content"]
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    for last in (streamed[-1], answer):
        assert (last["done_reason"], last["eval_count"]) == ("length", 6)
        assert last["prompt_eval_count"] > 0
        assert last["total_duration"] >= last["eval_duration"]


@pytest.mark.slow
def test_a_text_is_answered_or_continued(http: httpx.Client) -> None:
    body = {"prompt": "Hello", "options": CHAT["options"], "think": False, "stream": False}

    answered = http.post("/api/generate", json=body).json()
    continued = http.post("/api/generate", json=body | {"raw": True}).json()

    assert (
        answered["response"]
        == http.post("/api/chat", json=CHAT | {"stream": False}).json()["message"]["content"]
    )
    plain = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}
    assert continued["response"] == http.post("/v1/completions", json=plain).json()["choices"][0]["text"]


@pytest.mark.slow
def test_the_format_binds_the_answer(http: httpx.Client) -> None:
    properties = {"a": {"enum": [1]}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}

    answer = http.post("/api/chat", json=CHAT | {"format": schema, "stream": False, "options": {}}).json()

    assert json.loads(answer["message"]["content"]) == {"a": 1}


@pytest.mark.slow
def test_clients_find_the_model_and_what_it_can_do(http: httpx.Client) -> None:
    (model,) = http.get("/api/tags").json()["models"]
    (running,) = http.get("/api/ps").json()["models"]
    shown = http.post("/api/show", json={"model": model["name"]}).json()

    assert model["name"] == running["name"] == "v41-c"
    assert "tools" in shown["capabilities"]
    assert shown["model_info"][f"{shown['details']['family']}.context_length"] == running["context_length"]
    assert http.get("/api/version").json()["version"] >= "0.12"


@pytest.mark.slow
def test_a_request_without_a_prompt_asks_for_the_model_to_be_loaded(http: httpx.Client) -> None:
    assert http.post("/api/generate", json={"model": "v41-c"}).json()["done_reason"] == "load"
    assert http.post("/api/chat", json={"messages": []}).json()["done_reason"] == "load"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "llama3"}, 404, "'llama3' does not exist"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat is not supported"),
        ({"options": {"temperature": "hot"}}, 400, "options.temperature: "),
        ({"options": {"temperature": 11}}, 400, "temperature must be between 0 and 10"),
        (
            {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
            400,
            "Could not process image",
        ),
        ({"template": "{{ .Prompt }}"}, 400, "template is not supported"),
        ({"messages": 5}, 400, "messages: "),
        ({"format": {"const": 2**64}}, 400, "outside the JSON number range"),
    ],
)
def test_errors_have_ollamas_shape(
    http: httpx.Client, fields: dict[str, Any], status: int, message: str
) -> None:
    answer = http.post("/api/chat", json=CHAT | fields)

    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_calls_have_objects_for_arguments() -> None:
    loaded = load(TINY)
    chat = OllamaChatRequest.model_validate(CHAT | {"tools": TOOLS}).as_chat()
    assert loaded.chat is not None
    prompt = loaded.chat.render(chat.as_prompt())

    def reply() -> OllamaReply:
        return OllamaReply(chat, prompt, Served("m", loaded, engine=None))  # type: ignore[arg-type]

    message = whole(reply(), Script(CALLS))["message"]
    streamed = events(reply(), Script(CALLS))

    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert calls == [("weather", {"city": "Paris"}), ("time", {"zone": 1})]
    (told,) = [line["message"]["tool_calls"] for line in streamed if "tool_calls" in line["message"]]
    assert [call["function"]["name"] for call in told] == ["weather", "time"]
    assert streamed[-1]["done"] is True


def test_results_without_ids_belong_to_the_calls_before_them() -> None:
    called = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("a", "b")]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": called},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "tool", "content": "of a"},
    ]

    _, turn, of_b, of_a = OllamaChatRequest.model_validate({"messages": messages}).as_chat().messages

    first, second = turn.tool_calls or []
    assert (of_a.tool_call_id, of_b.tool_call_id) == (first.id, second.id)
    assert json.loads(first.function.arguments) == {"n": 1}
