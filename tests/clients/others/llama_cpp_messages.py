"""What the tests of llama.cpp's server ask of Anthropic's route."""

from __future__ import annotations

from typing import Any

from tests.clients.others.checks import CHAT, MESSAGES, PLAIN, SAY, Asked
from tests.clients.others.llama_cpp import LLAMA_CPP

FILE = "test_compat_anthropic.py"
# Greedy: a draw may end an answer before its first word.
BODY: dict[str, Any] = {"model": "test", "max_tokens": 8, "messages": SAY, "temperature": 0}
CITY = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city", "input_schema": CITY}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}


def _turns(*results: dict[str, Any]) -> list[Any]:
    call = {"type": "tool_use", "id": "test123", "name": "get_weather", "input": {"location": "Paris"}}
    return [*SAY, {"role": "assistant", "content": [call]}, {"role": "user", "content": list(results)}]


def _result(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "test123", "content": "Sunny, 25°C"} | fields


@LLAMA_CPP.test(FILE, "test_anthropic_messages_basic")
def _basic(ask: Asked) -> None:
    answer = ask.post(MESSAGES, **BODY)
    assert (answer["type"], answer["role"], answer["content"][0]["type"]) == ("message", "assistant", "text")
    assert answer["stop_reason"] in ("end_turn", "max_tokens")
    assert answer["usage"]["output_tokens"] == 8
    assert answer["usage"]["cache_read_input_tokens"] + answer["usage"]["input_tokens"] > 0
    assert "timings" not in answer


@LLAMA_CPP.test(
    FILE,
    "test_anthropic_messages_with_system",
    "test_anthropic_messages_multipart_content",
    "test_anthropic_messages_conversation",
    "test_anthropic_stop_sequences",
    "test_anthropic_temperature",
    "test_anthropic_top_p",
    "test_anthropic_top_k",
    "test_anthropic_thinking",
    "test_anthropic_metadata",
)
def _fields(ask: Asked) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " the answer?"}]
    said = {"role": "assistant", "content": "Hi there!"}
    for more in (
        {"system": "You are a helpful assistant."},
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [*SAY, said, {"role": "user", "content": "How are you?"}]},
        {"stop_sequences": ["\n", "END"]},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"top_k": 40},
        {"thinking": {"type": "enabled", "budget_tokens": 50}},
        {"metadata": {"user_id": "test_user_123"}},
    ):
        assert ask.post(MESSAGES, **BODY | more)["content"]


@LLAMA_CPP.test(FILE, "test_anthropic_messages_streaming")
def _stream(ask: Asked) -> None:
    events = ask.events(MESSAGES, **BODY)
    assert [event["type"] for event in events if event["type"] not in ("ping", "content_block_delta")] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert (message["type"], message["role"], message["content"]) == ("message", "assistant", [])
    assert "input_tokens" in message["usage"]
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert {(event["index"], event["delta"]["type"]) for event in deltas} == {(0, "text_delta")}
    assert events[-2]["delta"]["stop_reason"] in ("end_turn", "max_tokens")
    assert events[-2]["usage"]["output_tokens"] > 0


@LLAMA_CPP.test(
    FILE,
    "test_anthropic_count_tokens",
    "test_anthropic_count_tokens_with_system",
    "test_anthropic_count_tokens_no_max_tokens",
)
def _count(ask: Asked) -> None:
    plain = ask.post(f"{MESSAGES}/count_tokens", model="test", messages=SAY)
    more = ask.post(f"{MESSAGES}/count_tokens", model="test", messages=SAY, system="Be kind.")
    assert plain.keys() == {"input_tokens"}
    assert more["input_tokens"] > plain["input_tokens"] > 0


@LLAMA_CPP.test(FILE, "test_anthropic_tool_use_basic", "test_anthropic_tool_streaming")
@LLAMA_CPP.test(FILE, "test_anthropic_streaming_content_block_indices")
def _call(ask: Asked) -> None:
    body = BODY | {"max_tokens": 300, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    answer = ask.post(MESSAGES, **body)
    calls = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert {call["name"] for call in calls} == {"get_weather"}
    assert all(call["id"] and isinstance(call["input"], dict) for call in calls)
    events = ask.events(MESSAGES, **body)
    begun, ended = (
        [event["index"] for event in events if event["type"] == f"content_block_{kind}"]
        for kind in ("start", "stop")
    )
    assert begun == ended == list(range(len(begun)))


@LLAMA_CPP.test(
    FILE,
    "test_anthropic_tool_result",
    "test_anthropic_tool_result_with_text",
    "test_anthropic_tool_result_error",
)
def _results(ask: Asked) -> None:
    text = {"type": "text", "text": "Here are the results:"}
    for turns in (_turns(_result()), _turns(text, _result()), _turns(_result(is_error=True))):
        assert ask.post(MESSAGES, **BODY | {"messages": turns})["content"][0]["type"] == "text"


@LLAMA_CPP.test(FILE, "test_anthropic_vision_format_accepted", note="400 in words that clients look for")
def _image(ask: Asked) -> None:
    turn = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}
    assert "Could not process image" in ask.refused(MESSAGES, **BODY | {"messages": [turn]})["message"]


@LLAMA_CPP.test(FILE, "test_anthropic_missing_messages")
def _missing(ask: Asked) -> None:
    ask.refused(MESSAGES, model="test", max_tokens=50)


@LLAMA_CPP.test(FILE, "test_anthropic_vs_openai_different_response_format")
def _shapes(ask: Asked) -> None:
    chat, message = ask.post(CHAT, **PLAIN), ask.post(MESSAGES, **BODY)
    assert (chat["object"], message["type"]) == ("chat.completion", "message")
    assert {"choices", "usage"} <= chat.keys()
    assert {"content", "usage"} <= message.keys()
    assert {"prompt_tokens", "completion_tokens"} <= chat["usage"].keys()
    assert {"input_tokens", "output_tokens"} <= message["usage"].keys()
