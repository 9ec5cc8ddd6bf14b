"""Messages and tools of a chat request, strictly typed; fields that nobody declared are ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from quant.errors import RequestError
from server.openai.refused import MESSAGE_REFUSED, refuse_fields
from server.openai.tools import MAX_NAME, custom_arguments

T = TypeVar("T")

# Reading a body holds up everybody else, so lists of objects end here, and at the first one that is wrong.
MAX_ITEMS = 16_384
Items = Annotated[list[T], Field(max_length=MAX_ITEMS, fail_fast=True)]


class Body(BaseModel):
    """Base of everything that arrives as JSON."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


# What the protocols call a piece of text.
_TEXT_TYPES = ("text", "input_text", "output_text", "reasoning_text", "summary_text", "refusal")


class TextPart(Body):
    """A part of a message's content. Only text is understood; whatever it is called, it becomes `text`."""

    type: str
    text: str | None = None
    refusal: str | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _call_it_text(self) -> Self:
        if self.type in _TEXT_TYPES:
            self.text = self.refusal if self.type == "refusal" else self.text
            self.type = "text"
        return self


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[Items[TextPart], Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<string>"),
]


def required(value: T | None, path: str) -> T:
    """`value`. Raises RequestError where there is none."""
    if value is None:
        raise missing(path)
    return value


def missing(path: str) -> RequestError:
    """A field was left out that must be there."""
    return RequestError(f"{path} is required", param=path, code="missing_required_parameter")


def unsupported(kind: str) -> str:
    """What to say of a part that is no text. Claude Code drops an image at these words."""
    if "image" in kind:
        return f"Could not process image: parts of type {kind!r} are not supported, this model reads text"
    return f"parts of type {kind!r} are not supported; send text"


def check_parts(content: str | list[TextPart] | None, path: str) -> None:
    """Raise RequestError naming a part that is no text."""
    for i, part in enumerate(content) if isinstance(content, list) else ():
        if part.type != "text":
            raise RequestError(
                f"{path}[{i}]: {unsupported(part.type)}",
                param=f"{path}[{i}].type",
                code="unsupported_content_part",
            )
        if part.text is None:
            raise missing(f"{path}[{i}].text")


_NOTED = {"image": "an image", "file": "a file", "document": "a document", "audio": "a recording"}
NOT_SHOWN = "[{kind} that cannot be shown: this model reads text only]"


def seen(content: str | list[TextPart] | None) -> str | list[TextPart] | None:
    """A tool's result as far as a model sees it that reads text: a note stands for what else is in it."""
    if not isinstance(content, list):
        return content
    return [part if part.type == "text" else _note(part.type) for part in content]


def _note(kind: str) -> TextPart:
    what = next((text for name, text in _NOTED.items() if name in kind), "a part")
    return TextPart(type="text", text=NOT_SHOWN.format(kind=what))


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


# Of a call in the history: JSON as text, or the object itself, as clients of other servers send it.
Arguments = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | dict[str, Any])]


class FunctionCall(Body):
    """Name and arguments of a call the model made."""

    name: str
    arguments: Arguments


class ToolCall(Body):
    """A call in an assistant message of the history."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _call_a_function(cls, data: Any) -> Any:
        """A tool that takes text is a function of one argument."""
        custom = data.get("custom") if isinstance(data, dict) and data.get("type") == "custom" else None
        if not isinstance(custom, dict) or not isinstance(custom.get("input"), str):
            return data
        function = {"name": custom.get("name"), "arguments": custom_arguments(custom["input"])}
        return {"id": data.get("id"), "type": "function", "function": function}


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None
    refusal: str | None = Field(default=None, exclude=True)  # what the assistant said instead of `content`
    reasoning: str | None = Field(default=None, exclude=True)  # what some call `reasoning_content`
    thinking: str | None = Field(default=None, exclude=True)  # what others call it
    function_call: Any = Field(default=None, exclude=True)
    audio: Any = Field(default=None, exclude=True)
    images: Any = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _call_it_reasoning_content(self) -> Self:
        self.reasoning_content = self.reasoning_content or self.reasoning or self.thinking
        return self

    @model_validator(mode="after")
    def _let_the_assistant_say_nothing(self) -> Self:
        # An answer that was cut off while the model reasoned has no text; clients send it back as it was.
        if self.role == "assistant" and self.content is None and not self.tool_calls:
            self.content = self.refusal or ""
        return self

    def check(self, path: str) -> None:
        """Raise RequestError where role and fields do not fit together."""
        given = {name: getattr(self, name) for name in MESSAGE_REFUSED}
        refuse_fields(given, MESSAGE_REFUSED, f"{path}.")
        if self.role == "tool":
            self.content = seen(self.content)
        check_parts(self.content, f"{path}.content")
        if self.content is None and self.role != "assistant":
            raise missing(f"{path}.content")
        if self.role == "tool" and self.tool_call_id is None:
            raise missing(f"{path}.tool_call_id")


class FunctionDefinition(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; only functions exist here."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """The function a tool choice names."""

    name: str


class NamedToolChoice(Body):
    """`{"type": "function", "function": {"name": ...}}`."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Which of the tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolChoice(Body):
    """`{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}`."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_kind(value: Any) -> str:
    """The tag of a tool choice, in all shapes that clients send and that are made of them."""
    if isinstance(value, str):
        return "<mode>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "<allowed>" if kind == "allowed_tools" else "<named>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedToolChoice, Tag("<named>")]
    | Annotated[AllowedToolChoice, Tag("<allowed>")],
    Discriminator(choice_kind),
]
