"""What the supported families write reaches the clients of all protocols, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.chat.format import ChatPrompt
from engine.families.loader import Loaded, load
from server.anthropic.reply import MessagesReply
from server.anthropic.requests import MessagesRequest
from server.openai.chat import ChatReply
from server.openai.requests import ChatRequest
from server.responses.reply import ResponsesReply
from server.responses.requests import ResponsesRequest
from server.serving.service import Served
from tests.engine.chat.test_transcripts import names, parser
from tests.engine.chat.transcripts import TRANSCRIPTS, Transcript
from tests.server import scripted
from tests.server.harness import TINY
from tests.server.scripted import Script

FULL = [transcript for transcript in TRANSCRIPTS if transcript.content and transcript.calls]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


def prompt_of(transcript: Transcript) -> ChatPrompt:
    return ChatPrompt([0], lambda: parser(transcript.family, thinks=transcript.thinks))


def served(loaded: Loaded) -> Served:
    return Served("m", loaded, engine=None)  # type: ignore[arg-type]  # nothing is submitted


@pytest.mark.parametrize("transcript", FULL, ids=names)
def test_openais_chat_has_them(loaded: Loaded, transcript: Transcript) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    request = ChatRequest.model_validate(body)

    def reply() -> ChatReply:
        return ChatReply(request, prompt_of(transcript), served(loaded))

    (choice,) = scripted.whole(reply(), Script(transcript.text))["choices"]
    message = choice["message"]
    assert message.get("reasoning_content", "") == transcript.reasoning
    assert message["content"] == transcript.content
    calls = [call["function"] for call in message["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == transcript.calls
    assert choice["finish_reason"] == "tool_calls"

    deltas = [event["choices"][0]["delta"] for event in scripted.events(reply(), Script(transcript.text))]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == transcript.reasoning
    assert "".join(delta.get("content") or "" for delta in deltas) == transcript.content
    arguments = [""] * len(calls)
    for piece in (piece for delta in deltas for piece in delta.get("tool_calls", ())):
        arguments[piece["index"]] += piece["function"]["arguments"]
    assert arguments == [call["arguments"] for call in calls]


@pytest.mark.parametrize("transcript", FULL, ids=names)
def test_anthropics_messages_have_them(loaded: Loaded, transcript: Transcript) -> None:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    chat = MessagesRequest.model_validate(body).as_chat()
    reply = MessagesReply(chat, prompt_of(transcript), served(loaded))

    message = scripted.whole(reply, Script(transcript.text))

    blocks: dict[str, list[Any]] = {"thinking": [], "text": [], "tool_use": []}
    for block in message["content"]:
        blocks[block["type"]].append(block)
    assert "".join(block["thinking"] for block in blocks["thinking"]) == transcript.reasoning
    assert "".join(block["text"] for block in blocks["text"]) == transcript.content
    assert [(block["name"], block["input"]) for block in blocks["tool_use"]] == transcript.calls
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("transcript", FULL, ids=names)
def test_responses_have_them(loaded: Loaded, transcript: Transcript) -> None:
    body = ResponsesRequest.model_validate({"model": "m", "input": "Hi"})
    reply = ResponsesReply(body, body.as_chat(), prompt_of(transcript), served(loaded), lambda *_: None)

    items = scripted.whole(reply, Script(transcript.text))["output"]

    calls = [item for item in items if item["type"] == "function_call"]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == transcript.calls
    (text,) = [item for item in items if item["type"] == "message"]
    assert text["content"][0]["text"] == transcript.content
