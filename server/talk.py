"""Two ways to talk to a model from the command line: in this process, or with a server over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import httpx

from engine.generation import FinishReason, Output
from engine.output_parser import MessageDelta
from engine.prompts import ChatPrompt
from engine.sampling_params import SamplingParams
from quant.errors import LociError, RequestError
from server.service import bring_up
from server.settings import resolve_settings

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


class LocalTalk:
    """A model in this process."""

    def __init__(self, path: Path | None) -> None:
        self._served = bring_up(resolve_settings({"model": path, "max_num_seqs": 1}))
        self.name = self._served.name

    @property
    def can_chat(self) -> bool:
        """False for a model without chat template."""
        return self._served.loaded.chat is not None

    def reply(self, messages: Sequence[ChatMessage], sampling: Sampling) -> Iterator[MessageDelta]:
        """The answer to `messages` as it is generated. Raises LociError."""
        if self._served.loaded.chat is None:
            raise RequestError(f"{self.name} has no chat template; use loci run, which continues a text")
        return self._generate(self._served.loaded.chat.render({"messages": list(messages)}), sampling)

    def continue_text(self, text: str, sampling: Sampling) -> Iterator[str]:
        """What the model writes after `text`, as it is generated. Raises LociError."""
        ids = self._served.loaded.tokenizer.encode(text, add_special_tokens=True)
        for output in self._outputs(ids, sampling):
            yield output.text

    def close(self) -> None:
        """Stop the engine."""
        self._served.engine.stop()

    def _generate(self, prompt: ChatPrompt, sampling: Sampling) -> Iterator[MessageDelta]:
        parser = prompt.new_parser()
        if sampling.max_tokens is None:
            max_tokens = self._served.default_max_tokens(prompt.max_tokens, len(prompt.token_ids))
            sampling = replace(sampling, max_tokens=max_tokens)
        for output in self._outputs(prompt.token_ids, sampling, prompt.stop_token_ids):
            yield from parser.push(output.text)
        yield from parser.finish()

    def _outputs(
        self, ids: Sequence[int], sampling: Sampling, stop_token_ids: tuple[int, ...] = ()
    ) -> Iterator[Output]:
        inbox: SimpleQueue[Output] = SimpleQueue()
        params = SamplingParams(**sampling.given, stop_token_ids=stop_token_ids)
        ticket = self._served.engine.submit(ids, params, inbox.put)
        try:
            is_over = False
            while not is_over:
                output = inbox.get()
                if output.finish_reason is FinishReason.ERROR:
                    raise LociError(output.error or "the engine failed")
                yield output
                is_over = output.finish_reason is not None
        finally:
            self._served.engine.abort(ticket)


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
            raise LociError(f"{self._url} does not speak OpenAI's protocol ({error})") from None


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
