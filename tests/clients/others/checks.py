"""Tests of other servers that a client could have written: what each asks of Loci, and which are left out.

The names of files and tests are theirs; what is asked and expected here is written anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai

SAY: list[Any] = [{"role": "user", "content": "Hello"}]
KEY, ORIGIN = "sk-secret", "http://web.example"
# The model that answers reasons unless it is told not to, and a draw may end an answer early.
PLAIN: dict[str, Any] = {"messages": SAY, "max_tokens": 8, "temperature": 0, "reasoning_effort": "none"}
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


@dataclass(frozen=True)
class Asked:
    """A running server, by its address and through the SDKs."""

    http: httpx.Client
    sdk: openai.OpenAI
    claude: anthropic.Anthropic

    def get(self, path: str) -> Any:
        """What a route tells."""
        return self.http.get(path).raise_for_status().json()

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request, which must have one."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        """The error that a request must get."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 400, answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream."""
        text = self.http.post(path, json=body | {"stream": True}).raise_for_status().text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]


Ask = Callable[[Asked], None]


@dataclass(frozen=True)
class Check:
    """A test of another server, by the folder of its files, its file and its name.

    note   what of it was left out
    keyed  it asks a server that wants KEY, and answers pages of ORIGIN
    """

    folder: str
    file: str
    test: str
    ask: Ask
    note: str = ""
    keyed: bool = False

    @property
    def name(self) -> str:
        """File and name."""
        return f"{self.file}::{self.test}"


@dataclass(frozen=True)
class Left:
    """Tests that are not asked: some of a file, or (`*`) all others of it."""

    folder: str
    file: str
    tests: str
    why: str


class Suite:
    """The tests of one folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.checks: list[Check] = []

    def test(self, file: str, *names: str, note: str = "", keyed: bool = False) -> Callable[[Ask], Ask]:
        """The decorated function asks what the tests of these names do."""

        def register(ask: Ask) -> Ask:
            self.checks += [Check(self.folder, file, name, ask, note, keyed) for name in names]
            return ask

        return register


def texts_of(events: list[dict[str, Any]]) -> Iterator[str]:
    """Pieces of the content in a stream of chat completions."""
    for event in events:
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                yield piece
