"""The embedded SmolLM2: `loci serve smollm2` gives sensible answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from engine.embedded import model_path
from quant.errors import ConfigError
from tests.server.harness import LociServer

pytestmark = pytest.mark.slow

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    try:
        model_path(Path("smollm2"))
    except ConfigError as error:
        pytest.skip(str(error))
    server = LociServer(tmp_path_factory.mktemp("smollm2"), ["smollm2", "--max-model-len", "512"])
    try:
        with openai.OpenAI(base_url=f"{server.await_ready().url}/v1", api_key="x") as sdk:
            yield sdk
    finally:
        server.kill()


def test_a_streamed_chat_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    stream = client.chat.completions.create(
        model=model.id, messages=QUESTION, temperature=0, max_tokens=30, stream=True
    )
    chunks = list(stream)

    answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "Paris" in answer
    assert "<|im_end|>" not in answer
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_by_schema_says_what_the_model_knows(client: openai.OpenAI) -> None:
    class Place(BaseModel):
        city: str = Field(max_length=40)
        country: Literal["Germany", "France", "Spain"]

    (model,) = client.models.list().data
    answer = client.chat.completions.parse(
        model=model.id, messages=QUESTION, temperature=0, max_tokens=60, response_format=Place
    )

    assert answer.choices[0].message.parsed == Place(city="Paris", country="France")


def test_characters_of_several_tokens_arrive_whole(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    stream = client.completions.create(
        model=model.id, prompt="🦊" * 12, temperature=0, max_tokens=24, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream]

    assert "🦊" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_tools_can_be_called_though_the_template_has_no_place_for_them(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": schema}}

    (choice,) = client.chat.completions.create(
        model=model.id, messages=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False
    ).choices

    assert choice.finish_reason == "tool_calls"
    (call, *_) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
