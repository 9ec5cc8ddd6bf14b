"""Messages and tools of a chat request, strictly typed; fields that nobody declared are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from quant.errors import RequestError


class Body(BaseModel):
    """Base of everything that arrives as JSON."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(Body):
    """A part of a message's content. Only text is understood."""

    type: str
    text: str | None = None


_Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, list) else "<string>"),
]


class FunctionCall(Body):
    """Name and arguments (JSON as text) of a call the model made."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in an assistant message of the history."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None

    def check(self, path: str) -> None:
        """Raise RequestError where role and fields do not fit together."""
        if isinstance(self.content, list):
            for i, part in enumerate(self.content):
                if part.type != "text":
                    raise RequestError(
                        f"{path}.content[{i}]: parts of type {part.type!r} are not supported; send text",
                        param=f"{path}.content[{i}].type",
                        code="unsupported_content_part",
                    )
                if part.text is None:
                    raise RequestError(
                        f"{path}.content[{i}].text is required", param=f"{path}.content[{i}].text"
                    )
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise RequestError(f"{path}.content is required", param=f"{path}.content")
        if self.role == "tool" and self.tool_call_id is None:
            raise RequestError(f"{path}.tool_call_id is required", param=f"{path}.tool_call_id")


class FunctionDefinition(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(min_length=1, max_length=64)
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


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedToolChoice, Tag("<named>")],
    Discriminator(lambda value: "<mode>" if isinstance(value, str) else "<named>"),
]
