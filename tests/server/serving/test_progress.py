"""A stream whose prompt takes long tells how far it has got, where that is asked for."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import StartServer
from tests.server.harness import TINY

pytestmark = pytest.mark.slow


def chunks(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = httpx.post(f"{url}/v1/{path}", json=body | {"stream": True}, timeout=60).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def told(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    events = chunks(url, path, body | {"return_progress": True})
    return [event["prompt_progress"] for event in events if "prompt_progress" in event]


def test_a_prompt_tells_how_far_it_is_from_its_beginning_to_its_end(start_server: StartServer) -> None:
    server = start_server(TINY, "--prefill-chunk", "4").await_ready()
    text = "word " * 400
    bodies: dict[str, dict[str, Any]] = {
        "completions": {"prompt": text, "max_tokens": 1},
        "chat/completions": {"messages": [{"role": "user", "content": "x" + text}], "max_tokens": 1},
        "responses": {"input": "y" + text, "max_output_tokens": 1},
    }

    for path, body in bodies.items():
        for _ in range(2):  # then from the cache
            parts = told(server.url, path, body)
            done = [each["processed"] for each in parts]
            assert done == sorted(set(done))
            assert done[0] == parts[0]["cache"] <= done[-1] == parts[-1]["total"]
            assert len({(each["total"], each["cache"]) for each in parts}) == 1
        assert parts[0]["cache"] > 0
        assert not any("prompt_progress" in chunk for chunk in chunks(server.url, path, body))


def test_the_prompts_of_several_answers_are_told_together(start_server: StartServer) -> None:
    server = start_server(TINY, "--prefill-chunk", "4", "--max-num-seqs", "1").await_ready()

    parts = told(server.url, "completions", {"prompt": ["a " * 40, "b " * 80], "max_tokens": 1})

    done = [each["processed"] for each in parts]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, parts[0]["total"])
