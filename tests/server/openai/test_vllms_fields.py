"""Fields that clients of vLLM send: log probabilities of prompts, ids for tokens, counts in every chunk."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
PLAIN: dict[str, Any] = {"prompt": "Hello there", "max_tokens": 2, "temperature": 0}


def test_prompts_have_log_probabilities(http: httpx.Client) -> None:
    chat = http.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 1}).json()
    plain = http.post("/v1/completions", json=PLAIN | {"prompt_logprobs": 0}).json()
    echo = http.post("/v1/completions", json=PLAIN | {"echo": True, "logprobs": 0}).json()

    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert chat["prompt_logprobs"][0] is None
    likeliest = [token for token in chat["prompt_logprobs"][1].values() if token["rank"] == 1]
    assert len(likeliest) == 1
    told = plain["choices"][0]["prompt_logprobs"]
    assert all(list(token) for token in told[1:])
    shown = echo["choices"][0]["logprobs"]["token_logprobs"]
    assert [next(iter(token.values()))["logprob"] for token in told[-2:]] == shown[-4:-2]


def test_prompts_have_none_in_streams(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 1, "stream": True})

    assert answer.json()["error"]["param"] == "prompt_logprobs"


def test_tokens_may_be_called_by_their_ids(http: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    (chat,) = http.post("/v1/chat/completions", json=CHAT | fields).json()["choices"]
    fields = {"logprobs": 1, "echo": True, "return_tokens_as_token_ids": True}
    (plain,) = http.post("/v1/completions", json=PLAIN | fields).json()["choices"]

    first = chat["logprobs"]["content"][0]
    assert first["token"].startswith("token_id:")
    assert first["top_logprobs"][0]["token"].startswith("token_id:")
    prompt = http.post("/tokenize", json={"prompt": "Hello there", "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert plain["logprobs"]["tokens"][: len(prompt)] == [f"token_id:{i}" for i in prompt]
    assert plain["logprobs"]["token_logprobs"][0] is None


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", PLAIN)])
def test_every_chunk_may_have_the_counts(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}

    text = http.post(f"/v1/{path}", json=body | options).text

    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 2
