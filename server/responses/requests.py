"""Body of /v1/responses, and its translation into the chat request that the engine's side knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from quant.errors import RequestError
from server.openai.messages import Body, Items, Message, choice_kind
from server.openai.refused import RESPONSES_REFUSED, only, refuse_fields, unless
from server.openai.requests import MAX_SALT, UNLIMITED, ChatRequest, ReasoningEffort, SamplingFields
from server.openai.tools import Origin
from server.responses.input import InputItem, messages_of
from server.responses.tools import NamedTool, ResponsesTool, chosen, functions_of, others_in

LOGPROBS = "message.output_text.logprobs"  # what `include` calls them

_Input = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[Items[InputItem], Field(min_length=1), Tag("<items>")],
    Discriminator(lambda value: "<items>" if isinstance(value, list) else "<string>"),
]


class AllowedFunctions(Body):
    """Which of the functions may be called, and whether one must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


_Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[AllowedFunctions, Tag("<allowed>")],
    Discriminator(choice_kind),
]


class TextFormat(Body):
    """The form that the text of an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_object" and self.json_schema is not None:
            self.type = "json_schema"  # as llama.cpp and others write it
        if self.type == "text" and self.json_schema is not None:
            text = f"text.format has a schema, which type {self.type!r} does not take; use json_schema"
            raise RequestError(text, param="text.format.type")
        return self


class Text(Body):
    """Settings of the answer's text."""

    format: TextFormat | None = None


class Reasoning(Body):
    """How much the model reasons."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        refused = {
            "max_tokens": only("reasoning is not limited separately from the answer"),
            "enabled": only("use effort", True),
            "mode": unless("there is one mode; use effort", "standard"),
            "context": unless("all reasoning that is sent is kept", "auto"),
            "exclude": unless("ignore the reasoning in the answer"),
        }
        return refuse_fields(data, refused, "reasoning.")


class ResponsesRequest(SamplingFields):
    """Body of /v1/responses."""

    model: str | None = None
    input: _Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=UNLIMITED)
    tools: Items[ResponsesTool] | None = None
    tool_choice: _Choice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    return_progress: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    truncation: Literal["disabled", "auto"] | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    cache_salt: str | None = Field(None, max_length=MAX_SALT)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_meaning(cls, data: Any) -> Any:
        return refuse_fields(data, RESPONSES_REFUSED)

    @property
    def wants_logprobs(self) -> bool:
        """True where the answer's text comes with log probabilities."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    @property
    def messages(self) -> list[Message]:
        """The input as messages. Raises RequestError naming an item that is not understood."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return messages_of(self.input)

    def as_chat(self, earlier: Sequence[Message] = ()) -> ChatRequest:
        """The same request in the terms of Chat Completions; `earlier` turns go before its input.

        Raises RequestError or ValidationError for what does not fit together.
        """
        messages = [*earlier, *self.messages]
        if self.instructions is not None:
            messages.insert(0, Message(role="system", content=self.instructions))
        fields = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool for _, tool in functions_of(self.tools)] or None,
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "response_format": _response_format(self.text.format if self.text else None),
            "stream": self.stream,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs,
            "cache_salt": self.cache_salt,
        } | {name: getattr(self, name) for name in SamplingFields.model_fields}
        return ChatRequest.model_validate(fields)

    @property
    def origins(self) -> dict[str, Origin]:
        """What the client calls each function of the model."""
        return {origin.function: origin for origin, _ in functions_of(self.tools)}

    @property
    def ignored_tools(self) -> list[str]:
        """Types of the tools that the model is not shown."""
        return list(others_in(self.tools))

    @property
    def wants_summary(self) -> bool:
        """True where reasoning is to come as its summary."""
        return self.reasoning is not None and self.reasoning.summary is not None

    def _choice(self) -> Any:
        """The tool choice as Chat Completions has it; of the tools allowed, those that can be called."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return chosen(choice)
        if not isinstance(choice, AllowedFunctions):
            if choice == "required" and self.tools and not self.origins:
                others = ", ".join(self.ignored_tools)
                text = f"tool_choice needs tools that the model can call, got only {others}"
                raise RequestError(text, param="tool_choice")
            return choice
        is_known = self.origins.keys()
        callable_ = [tool for tool in choice.tools if tool.type in ("function", "custom")]
        named = [chosen(tool) for tool in callable_ or (choice.tools if choice.mode == "required" else [])]
        if not named:
            return "none" if is_known else None
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}


def _response_format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    schema = {
        "name": wanted.name or "answer",
        "description": wanted.description,
        "schema": wanted.json_schema,
        "strict": wanted.strict,
    }
    return {"type": "json_schema", "json_schema": schema}
