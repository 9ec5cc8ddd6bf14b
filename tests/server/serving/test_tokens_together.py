"""Tokens that come within `--stream-interval-ms` are sent together, and read the same in all protocols."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.server.harness import TINY, LociServer

pytestmark = pytest.mark.slow

MODEL = "v41-c"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TOKENS = 24


@pytest.fixture(scope="module")
def leisurely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """Sends an event a second, while the tiny model makes a token in some milliseconds."""
    server = LociServer(tmp_path_factory.mktemp("leisurely"), [TINY, "--stream-interval-ms", "1000"])
    try:
        yield server.await_ready()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def sdk(leisurely: LociServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{leisurely.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        yield sdk


def chat(sdk: openai.OpenAI, **fields: Any) -> Any:
    plain: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": TOKENS, "temperature": 0}
    return sdk.chat.completions.create(**(plain | {"reasoning_effort": "none"} | fields))


def test_a_chat_comes_in_few_pieces_that_make_the_whole_answer(sdk: openai.OpenAI) -> None:
    whole = chat(sdk).choices[0].message.content
    *chunks, last = chat(sdk, stream=True, stream_options={"include_usage": True})

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert len(chunks) < TOKENS / 2
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == TOKENS


def test_choices_side_by_side_come_in_few_pieces_each(sdk: openai.OpenAI) -> None:
    whole = chat(sdk, temperature=1, seed=20, n=2)
    texts = {0: "", 1: ""}
    for chunk in chat(sdk, temperature=1, seed=20, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""

    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


def test_every_token_keeps_its_log_probability_and_its_text(sdk: openai.OpenAI) -> None:
    _, *pieces = chat(sdk, logprobs=True, stream=True)

    for piece in pieces:
        spelled = b"".join(bytes(token.bytes) for token in piece.choices[0].logprobs.content)
        assert spelled.decode(errors="replace") == (piece.choices[0].delta.content or "")
    assert sum(len(piece.choices[0].logprobs.content) for piece in pieces) == TOKENS


def test_completions_keep_the_offsets_of_their_tokens(sdk: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Hello",
        "max_tokens": TOKENS,
        "temperature": 0,
        "logprobs": 1,
    }
    whole = sdk.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in sdk.completions.create(stream=True, **fields)]

    assert "".join(chunk.text for chunk in chunks) == whole.text
    for name in ("tokens", "text_offset"):
        assert [each for c in chunks for each in getattr(c.logprobs, name)] == getattr(whole.logprobs, name)


def test_responses_and_messages_make_the_same_text(sdk: openai.OpenAI, leisurely: LociServer) -> None:
    whole = chat(sdk).choices[0].message.content
    events = list(
        sdk.responses.create(
            model=MODEL, input="Hello", max_output_tokens=TOKENS, temperature=0, stream=True,
            reasoning={"effort": "none"},
        )
    )  # fmt: skip
    with anthropic.Anthropic(base_url=leisurely.url, api_key="unused", max_retries=0, timeout=60) as claude:
        blocks = list(
            claude.messages.create(
                model=MODEL, messages=HELLO, max_tokens=TOKENS, stream=True, extra_body={"temperature": 0}
            )
        )

    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    texts = [
        block.delta.text
        for block in blocks
        if block.type == "content_block_delta" and block.delta.type == "text_delta"
    ]
    assert "".join(deltas) == "".join(texts) == whole
    assert len(deltas) < TOKENS / 2 > len(texts)


def test_an_answer_that_ends_within_the_interval_is_not_held_back(leisurely: LociServer) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2, "stream": True}
    with httpx.Client(base_url=leisurely.url, timeout=60) as http:
        took = [http.post("/v1/completions", json=body).elapsed.total_seconds() for _ in range(5)]

    assert min(took) < 0.9
