"""Anthropic's Messages, as its real SDK sees them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import deepseek_recipe as recipe
import httpx
import openai
import pytest

from engine.chat.call_block import JsonCalls
from engine.chat.output_parser import TaggedParser
from engine.families.loader import Loaded, load
from engine.output import FinishReason
from server.anthropic.reply import MessagesReply
from server.anthropic.requests import MessagesRequest
from server.http.errors import ApiError
from server.serving.answer import Answer
from server.serving.service import Served
from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer
from tests.server.scripted import CALLS, Script, events, whole

MODEL = "v41-c"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TOOLS: list[Any] = [
    {"name": name, "input_schema": {"type": "object", "properties": {}}} for name in ("weather", "time")
]


def body_of(error: anthropic.APIStatusError) -> dict[str, Any]:
    assert isinstance(error.body, dict)
    return error.body


@pytest.fixture(scope="module")
def claude(server: LociServer) -> Iterator[anthropic.Anthropic]:
    """The real SDK, talking to the shared server."""
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=60) as sdk:
        yield sdk


def ask(claude: anthropic.Anthropic, messages: list[Any] = HELLO, **fields: Any) -> Any:
    plain: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "extra_body": {"temperature": 0}}
    return claude.messages.create(**({"messages": messages} | plain | fields))


def test_a_message_is_answered_as_in_a_chat(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    message = ask(claude, system="Be kind.")
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be kind."}, *HELLO],
        max_tokens=8,
        temperature=0,
        reasoning_effort="none",
    )

    (block,) = message.content
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8
    read = message.usage.input_tokens + message.usage.cache_read_input_tokens
    assert chat.usage
    assert read == chat.usage.prompt_tokens
    assert message._request_id


def test_thinking_is_a_block_of_its_own_where_asked_for(claude: anthropic.Anthropic) -> None:
    message = ask(claude, thinking={"type": "enabled", "budget_tokens": 1024})

    (block,) = message.content
    assert block.type == "thinking"
    assert block.thinking


def test_a_stream_adds_up_to_the_whole_message(claude: anthropic.Anthropic) -> None:
    expected = ask(claude)
    with claude.messages.stream(
        model=MODEL, messages=HELLO, max_tokens=8, extra_body={"temperature": 0}
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()

    assert text == expected.content[0].text
    (block,) = message.content
    assert block.type == "text"
    assert block.text == text
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8


def test_events_come_in_the_order_of_the_protocol(http: httpx.Client) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "stream": True}
    page = http.post("/v1/messages", json=body).text

    seen = [block.splitlines() for block in page.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in seen]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert set(names[3:-3]) == {"content_block_delta"}
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert [json.loads(data.removeprefix("data: "))["type"] for _, data in seen] == names


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    text = ask(claude, max_tokens=20).content[0].text

    message = ask(claude, max_tokens=20, stop_sequences=[text[5:8]])

    (block,) = message.content
    assert block.type == "text"
    assert block.text == text[: text.index(text[5:8])]
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == text[5:8]


def test_an_answer_that_was_begun_is_continued(claude: anthropic.Anthropic) -> None:
    message = ask(claude, [*HELLO, {"role": "assistant", "content": "It is"}])
    started_over = ask(claude, [*HELLO, {"role": "assistant", "content": "It is"}, *HELLO])

    assert message.usage.input_tokens < started_over.usage.input_tokens
    assert message.content


SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "rains": {"type": "boolean"}},
    "required": ["unit", "rains"],
    "additionalProperties": False,
}


def test_a_turn_without_blocks_is_an_empty_one(claude: anthropic.Anthropic) -> None:
    contents: list[Any] = [[], ""]
    turns: list[list[Any]] = [[{"role": "user", "content": content}] for content in contents]
    counted = [claude.messages.count_tokens(model=MODEL, messages=turn).input_tokens for turn in turns]

    assert counted[0] == counted[1]


@pytest.mark.slow
def test_a_tool_can_be_forced(claude: anthropic.Anthropic) -> None:
    tool = {"name": "weather", "input_schema": SCHEMA}

    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        message = ask(claude, tools=[tool], tool_choice=choice, max_tokens=200)

        (block,) = message.content
        assert block.type == "tool_use"
        assert block.input["unit"] in ("C", "F")
        assert message.stop_reason == "tool_use"


def test_a_text_can_be_held_to_a_schema(claude: anthropic.Anthropic) -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}

    message = ask(claude, output_config=form, max_tokens=100)

    assert json.loads(message.content[0].text)["unit"] in ("C", "F")
    assert message.stop_reason == "end_turn"


def test_a_schema_that_cannot_be_kept_is_named_as_it_was_sent(http: httpx.Client) -> None:
    form = {"format": {"type": "json_schema", "schema": {"type": "no such type"}}}
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "output_config": form}
    answer = http.post("/v1/messages", json=body)

    assert answer.status_code == 400
    assert "response_format" not in answer.json()["error"]["message"]


def test_tokens_are_counted_as_they_are_read(claude: anthropic.Anthropic) -> None:
    count = claude.messages.count_tokens(model=MODEL, messages=HELLO, system="Be kind.", tools=TOOLS)
    usage = ask(claude, system="Be kind.", tools=TOOLS).usage

    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_the_model_is_listed_for_this_sdk_too(claude: anthropic.Anthropic) -> None:
    (model,) = claude.models.list()

    assert model.id == MODEL
    assert model.created_at.year >= 2026
    assert claude.models.retrieve(MODEL) == model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: Input should be 'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]: Could not process image: blocks of type 'image' are not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id is required",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t"}]}]},
            "messages[0].content[0].input is required",
        ),
        ({"system": [{"type": "image"}]}, "system[0]: Could not process image"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].input_schema is required"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "tool_choice.name is required"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported: this server does not call other servers"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "prompt is too long: "),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, fields: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/messages", json={"model": MODEL, "messages": HELLO, "max_tokens": 8} | fields)

    body = answer.json()
    assert answer.status_code == 400, body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert message in body["error"]["message"]


def test_errors_have_the_shape_that_the_sdk_reads(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(claude, model="claude-9")
    assert body_of(caught.value)["error"]["type"] == "not_found_error"

    answers = [
        http.get("/v1/messages"),
        http.get("/v1/messages/nowhere"),
        http.post("/v1/messages", content=b"{}", headers={"Content-Type": "text/plain"}),
        http.post("/v1/messages", content=b"{", headers={"Content-Type": "application/json"}),
    ]
    assert [answer.status_code for answer in answers] == [405, 404, 415, 400]
    assert {answer.json()["type"] for answer in answers} == {"error"}


@pytest.mark.slow
def test_keys_come_in_the_sdks_own_header(start_server: StartServer) -> None:
    server = start_server(TINY, "--api-key", "first").await_ready()

    with anthropic.Anthropic(base_url=server.url, api_key="first") as known:
        assert known.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens > 0
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong") as unknown,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        unknown.messages.count_tokens(model=MODEL, messages=HELLO)
    assert body_of(caught.value)["error"]["type"] == "authentication_error"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


NewReply = Callable[..., MessagesReply]


@pytest.fixture
def reply(loaded: Loaded) -> NewReply:
    def new(thinking: str = "disabled", **fields: Any) -> MessagesReply:
        body = MessagesRequest.model_validate(
            {
                "model": "m",
                "max_tokens": 8,
                "messages": HELLO,
                "tools": TOOLS,
                "thinking": {"type": thinking},
            }
            | fields
        )
        assert loaded.chat is not None
        chat = body.as_chat()
        served = Served("m", loaded, engine=None)  # type: ignore[arg-type]  # nothing is submitted
        return MessagesReply(chat, loaded.chat.render(chat.as_prompt()), served)

    return new


def test_thinking_text_and_calls_are_blocks_in_that_order(reply: NewReply) -> None:
    message = whole(reply("enabled"), Script("I wonder.</think>" + CALLS))

    thinking, text, weather, time = message["content"]
    assert thinking == {"type": "thinking", "thinking": "I wonder.", "signature": ""}
    assert text == {"type": "text", "text": "Let me look."}
    assert (weather["type"], weather["name"], weather["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert (time["name"], time["input"]) == ("time", {"zone": 1})
    assert message["stop_reason"] == "tool_use"


def test_streamed_blocks_add_up_to_the_whole_ones(reply: NewReply) -> None:
    expected = whole(reply("enabled"), Script("I wonder.</think>" + CALLS))["content"]

    blocks: list[dict[str, Any]] = []
    for event in events(reply("enabled"), Script("I wonder.</think>" + CALLS)):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"partial_json": ""})
        elif event["type"] == "content_block_delta":
            for field, piece in event["delta"].items():
                if field != "type":
                    blocks[event["index"]][field] += piece

    assert [block.get("thinking") or block.get("text") for block in blocks[:2]] == [
        "I wonder.",
        "Let me look.",
    ]
    assert [json.loads(block["partial_json"]) for block in blocks[2:]] == [b["input"] for b in expected[2:]]


def test_without_parallel_calls_only_the_first_is_made(reply: NewReply) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}

    message = whole(reply(tool_choice=choice), Script(CALLS))

    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]


def test_a_call_that_was_cut_off_has_no_input(reply: NewReply) -> None:
    message = whole(reply(), Script(CALLS[:-70], FinishReason.LENGTH))

    assert message["stop_reason"] == "max_tokens"
    assert message["content"][-1]["input"] == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"code": "def f():\n\treturn \\"1\\""}', {"code": 'def f():\n\treturn "1"'}),
        ('{"code": "def', {"code": "def}"}),
        ('{"a": 1, "b": [1, {"c": "d"}', {"a": 1, "b": [1, {"c": "d"}]}),
        ('{"a": oops, "b": 1}', {"arguments": '{"a": oops, "b": 1}'}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}),
        ('{"a": 1e999}', {"arguments": '{"a": 1e999}'}),
        ('{"a": "\\ud800"}', {"arguments": '{"a": "\\ud800"}'}),
        ("[1]", {"arguments": "[1]"}),
        ('"Paris"', {"arguments": "Paris"}),
        ("null", {}),
    ],
)
def test_what_the_model_wrote_into_a_call_is_in_its_input(
    reply: NewReply, arguments: str, expected: dict[str, Any]
) -> None:
    script = Script(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')

    (block,) = whole(tagged(reply()), script)["content"]

    assert block["input"] == expected
    written = "".join(
        event["delta"]["partial_json"]
        for event in events(tagged(reply()), script)
        if event["type"] == "content_block_delta"
    )
    if "\n" in arguments:
        assert json.loads(written) == expected


def tagged(subject: MessagesReply) -> MessagesReply:
    """The reply of a model that writes its calls as JSON between tags."""
    parser = TaggedParser(reasoning=False, in_reasoning=False, calls=JsonCalls())
    subject.answers = [Answer(0, parser, parallel_calls=True, end_of_reasoning=None)]
    return subject


def test_a_failure_ends_the_stream_with_an_error_event(reply: NewReply) -> None:
    event = reply().failure(ApiError(503, "the engine stopped"))

    assert event == {"type": "error", "error": {"type": "overloaded_error", "message": "the engine stopped"}}


def test_blocks_are_rendered_as_the_vendors_library_does(loaded: Loaded) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hmm", "signature": "s"},
                {"type": "text", "text": "ok"},
                {"type": "text", "text": "then"},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"a": 1, "b": "c"}},
                {"type": "tool_use", "id": "t2", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "9 am", "is_error": True},
                {"type": "text", "text": "go on"},
            ],
        },
    ]
    system = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    body = {"model": "m", "max_tokens": 8, "system": system, "messages": messages, "tools": TOOLS}
    body |= {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    options = recipe.ConversionOptions().with_model_alias("m", recipe.ModelVersion.DeepseekV41Flash)
    theirs = recipe.MessagesRequest(body).convert(options).conversation
    expected = recipe.DeepseekV41Encoding().render_conversation(theirs)

    assert loaded.chat is not None
    ours = loaded.chat.render(MessagesRequest.model_validate(body).as_chat().as_prompt())

    assert loaded.tokenizer.decode(ours.token_ids) == expected.prompt


def test_an_answer_too_long_for_the_context_is_refused_in_the_words_that_clients_read(
    http: httpx.Client,
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 32_000}
    prompt = http.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]

    answer = http.post("/v1/messages", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        f"input length and `max_tokens` exceed context limit: {prompt} + 32000 > 2048, "
        "decrease input length or `max_tokens` and try again"
    )


def test_errors_use_the_names_of_this_protocol(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    too_many = http.post("/v1/messages", json=body | {"stop_sequences": ["x"] * 17}).json()
    tool = {"name": "f", "input_schema": {"type": "object", "not": {}}, "strict": True}
    schema = http.post("/v1/messages", json=body | {"tools": [tool]}).json()

    assert too_many["error"]["message"].startswith("stop_sequences takes up to 16 strings")
    assert schema["error"]["message"].startswith("tools[0].input_schema: ")
