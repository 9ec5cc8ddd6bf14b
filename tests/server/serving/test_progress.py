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


def test_a_long_prompt_tells_how_far_it_is(start_server: StartServer) -> None:
    server = start_server(TINY, "--prefill-chunk", "4").await_ready()
    text = "word " * 400
    bodies: dict[str, dict[str, Any]] = {
        "completions": {"prompt": text, "max_tokens": 1},
        "chat/completions": {"messages": [{"role": "user", "content": "x" + text}], "max_tokens": 1},
    }

    for path, body in bodies.items():
        told = [
            chunk["prompt_progress"]
            for chunk in chunks(server.url, path, body | {"return_progress": True})
            if "prompt_progress" in chunk
        ]
        assert told
        assert all(0 <= each["cache"] <= each["processed"] < each["total"] for each in told)
        assert [each["processed"] for each in told] == sorted({each["processed"] for each in told})
        assert not any("prompt_progress" in chunk for chunk in chunks(server.url, path, body))
