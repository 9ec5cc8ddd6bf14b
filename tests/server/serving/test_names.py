"""A model answers to all of its names, to none, and to any where the operator says so."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY

pytestmark = pytest.mark.slow

PROMPT: dict[str, Any] = {"prompt": "Hi", "max_tokens": 1}


def test_every_name_answers_and_is_listed(start_server: StartServer) -> None:
    flags = ("--served-model-name", "first", "--served-model-name", "second,gpt-4o")
    server = start_server(TINY, *flags).await_ready()

    def status(**model: str) -> int:
        return httpx.post(f"{server.url}/v1/completions", json=PROMPT | model).status_code

    listed = httpx.get(f"{server.url}/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["first", "second", "gpt-4o"]
    assert httpx.get(f"{server.url}/v1/models/second").json()["root"] == "first"
    assert [status(model=name) for name in ("first", "second", "gpt-4o", str(TINY))] == [200] * 4
    assert status() == 200
    assert status(model="v41-c") == 404


def test_any_name_answers_where_it_may(start_server: StartServer) -> None:
    server = start_server(TINY, "--any-model").await_ready()

    answer = httpx.post(f"{server.url}/v1/completions", json=PROMPT | {"model": "claude-sonnet"})

    assert answer.json()["model"] == "v41-c"


def test_answers_too_long_for_the_context_are_cut_or_refused(start_server: StartServer) -> None:
    flags = ("--max-model-len", "64")
    cutting = start_server(TINY, *flags).await_ready()
    refusing = start_server(TINY, *flags, "--max-tokens-overflow", "refuse").await_ready()
    say = [{"role": "user", "content": "Hi"}]
    bodies: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": say, "max_tokens": 32_000},
        "completions": {"prompt": "Hi", "max_tokens": 32_000, "ignore_eos": True},
        "responses": {"input": "Hi", "max_output_tokens": 32_000},
    }

    for path, body in bodies.items():
        assert httpx.post(f"{cutting.url}/v1/{path}", json=body).status_code == 200
        refused = httpx.post(f"{refusing.url}/v1/{path}", json=body).json()["error"]
        assert refused["code"] == "context_length_exceeded"
    assert (
        httpx.post(f"{cutting.url}/v1/completions", json=bodies["completions"]).json()["usage"][
            "total_tokens"
        ]
        == 64
    )
