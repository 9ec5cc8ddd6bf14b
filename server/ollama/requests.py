"""Bodies of Ollama's routes, and their translation into the requests that the engine's side knows."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from quant.errors import RequestError
from server.openai.completion_requests import CompletionRequest
from server.openai.messages import Arguments, Body, FunctionCall, Items, Message, Tool, ToolCall
from server.openai.refused import COMMON, Refused, refuse_fields, unless
from server.openai.requests import UNLIMITED, ChatRequest

# What `options` of these requests is in chat completions.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
}
# No prompt is cut to `num_ctx`, which clients send with everything.
OPTIONS_REFUSED: Mapping[str, Refused] = {
    name: rule for name, rule in COMMON.items() if name not in ("num_ctx", "options")
}
REFUSED: Mapping[str, Refused] = {
    "suffix": unless("filling in the middle is not supported"),
    "images": unless("Could not process image: this model reads text"),
    "template": unless("the model's own template is used"),
    "context": unless("send the conversation to /api/chat"),
}
FILLING = -2  # as `num_predict`: as many as the context holds


class OllamaRequest(Body):
    """What chats and plain texts have in common."""

    model: str | None = None
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        refuse_fields(data, REFUSED)
        refuse_fields(data.get("options") if isinstance(data, dict) else None, OPTIONS_REFUSED, "options.")
        return data

    @property
    def is_stream(self) -> bool:
        """Ollama streams unless it is told not to."""
        return self.stream is not False

    def sampling_fields(self) -> dict[str, Any]:
        """Sampling settings under the names of chat completions."""
        given = self.options or {}
        fields = {own: given[name] for name, own in _SAMPLING.items() if given.get(name) is not None}
        limit = given.get("num_predict")
        if limit is not None:
            fields["max_tokens"] = UNLIMITED if limit in (UNLIMITED, FILLING) else limit
        if isinstance(self.format, dict):
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": self.format},
            }
        elif self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        return fields

    def thinking_fields(self) -> dict[str, Any]:
        """Reasoning on or off, or how much."""
        if isinstance(self.think, str):
            return {"reasoning_effort": self.think}
        return {} if self.think is None else {"thinking": {"type": "enabled" if self.think else "disabled"}}


class OllamaFunction(Body):
    """Name and arguments of a call the model made."""

    name: str
    arguments: Arguments = "{}"


class OllamaCall(Body):
    """A call in an assistant message of the history; older clients send no id."""

    id: str | None = None
    function: OllamaFunction


class OllamaMessage(Body):
    """One message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Items[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: list[str] | None = None


class OllamaChatRequest(OllamaRequest):
    """Body of /api/chat."""

    messages: Items[OllamaMessage] = Field(default_factory=list)
    tools: Items[Tool] | None = None

    def as_chat(self) -> ChatRequest:
        """The same request in the terms of Chat Completions.

        Raises RequestError or ValidationError for what does not fit together.
        """
        fields = {
            "model": self.model,
            "messages": _messages(self.messages),
            "tools": self.tools or None,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
            "stream": self.is_stream,
        }
        return ChatRequest.model_validate(fields | self.sampling_fields() | self.thinking_fields())


class OllamaGenerateRequest(OllamaRequest):
    """Body of /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None

    @model_validator(mode="after")
    def _check_raw(self) -> Self:
        if self.raw and self.system:
            raise RequestError("system is part of the chat template, which raw leaves out", param="system")
        return self

    def as_chat(self) -> ChatRequest:
        """The prompt as a user's message. Raises RequestError or ValidationError."""
        say = [OllamaMessage(role="system", content=self.system)] if self.system else []
        return OllamaChatRequest(
            messages=[*say, OllamaMessage(role="user", content=self.prompt)],
            **{name: getattr(self, name) for name in OllamaRequest.model_fields},
        ).as_chat()

    def as_completion(self) -> CompletionRequest:
        """The prompt as it is, to be continued. Raises RequestError or ValidationError."""
        fields = {"prompt": self.prompt or "", "max_tokens": UNLIMITED} | self.sampling_fields()
        return CompletionRequest.model_validate(fields)


class OllamaShowRequest(Body):
    """Body of /api/show."""

    model: str | None = None
    name: str | None = None


def _messages(messages: Sequence[OllamaMessage]) -> list[Message]:
    """The conversation; results without an id belong to the calls before them, in their order."""
    result: list[Message] = []
    open_calls: deque[tuple[str, str]] = deque()  # id and name
    for i, message in enumerate(messages):
        path = f"messages[{i}]"
        if message.images:
            raise RequestError(
                f"{path}.images: Could not process image: this model reads text", param=f"{path}.images"
            )
        if message.role == "tool":
            result.append(_result(message, open_calls))
            continue
        calls = [
            ToolCall(
                id=call.id or f"call_{i}_{k}",
                function=FunctionCall(name=call.function.name, arguments=call.function.arguments),
            )
            for k, call in enumerate(message.tool_calls or ())
        ]
        open_calls.extend((call.id, call.function.name) for call in calls)
        result.append(
            Message(
                role=message.role,
                content=message.content or "",
                reasoning_content=message.thinking,
                tool_calls=calls or None,
            )
        )
    return result


def _result(message: OllamaMessage, open_calls: deque[tuple[str, str]]) -> Message:
    names = [name for _, name in open_calls]
    at = names.index(message.tool_name) if message.tool_name in names else 0
    call_id = open_calls[at][0] if open_calls else "call"
    if open_calls:
        del open_calls[at]
    return Message(role="tool", content=message.content or "", tool_call_id=message.tool_call_id or call_id)
