"""Whom the command line talks to; here a server over HTTP, in local_talk.py a model of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from engine.chat.output_parser import MessageDelta
from quant.errors import LociError

ChatMessage = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """What the command line offers of sampling; None leaves it to the model or server."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Talk(Protocol):
    """Someone to talk to."""

    name: str

    def reply(self, messages: Sequence[ChatMessage], sampling: Sampling) -> Iterator[MessageDelta]:
        """The answer to `messages` as it is generated. Raises LociError."""
        ...

    def close(self) -> None:
        """Let go of model or connection."""
        ...


class RemoteTalk:
    """A server with OpenAI's interface."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._url = url.rstrip("/").removesuffix("/v1")
        # A long prompt may take minutes before the first token comes.
        self._client = httpx.Client(timeout=httpx.Timeout(10, read=None))
        with self._request("GET", "/v1/models") as response:
            self.name = str(json.loads(response.read())["data"][0]["id"])

    def reply(self, messages: Sequence[ChatMessage], sampling: Sampling) -> Iterator[MessageDelta]:
        """The answer to `messages` as it is generated. Raises LociError."""
        body = {"model": self.name, "messages": list(messages), "stream": True} | sampling.given
        with self._request("POST", "/v1/chat/completions", body) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data != line and data != "[DONE]":
                    yield _delta(json.loads(data))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @contextmanager
    def _request(self, method: str, path: str, body: object = None) -> Iterator[httpx.Response]:
        try:
            with self._client.stream(method, self._url + path, json=body, headers=self._headers) as response:
                if response.is_error:
                    raise LociError(f"{self._url}: {_error_text(response)}")
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LociError(f"{self._url}: {error}; is a server running there?") from None
        except (ValueError, LookupError) as error:
            raise LociError(f"{self._url} does not speak the OpenAI protocol ({error})") from None


def _error_text(response: httpx.Response) -> str:
    text = response.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"answered {response.status_code}: {text[:200]}"


def _delta(event: dict[str, Any]) -> MessageDelta:
    if "error" in event:
        raise LociError(str(event["error"].get("message", event["error"])))
    delta = event["choices"][0]["delta"] if event["choices"] else {}
    return MessageDelta(content=delta.get("content") or "", reasoning=delta.get("reasoning_content") or "")
