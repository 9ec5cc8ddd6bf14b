"""Tools of a Responses request: functions, tools that take text, namespaces of both, and those of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from quant.errors import RequestError
from server.openai.messages import Body, FunctionDefinition, Items, Tool
from server.openai.refused import TOOL_REFUSED, refuse_fields
from server.openai.tools import MAX_NAME, Origin, custom_function


class _OfFunctionType(Body):
    type: Literal["function"]


class FunctionTool(FunctionDefinition, _OfFunctionType):
    """A function that the model may call; its type is looked at first."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_callers(cls, data: Any) -> Any:
        return refuse_fields(data, TOOL_REFUSED, "tools.")


class CustomTool(Body):
    """A tool that takes text instead of arguments."""

    type: Literal["custom"]
    name: str = Field(min_length=1, max_length=MAX_NAME)
    description: str | None = None
    format: dict[str, Any] | None = None


class OtherTool(Body):
    """A tool of the vendor's own servers, or of a client that the model must know by its type alone."""

    type: str


_OWN = {"function": "<function>", "custom": "<custom>"}


def _kind(value: Any) -> str:
    """The tag of a tool, as it was sent or already read."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind == "namespace":
        return "<namespace>"
    is_named = isinstance(kind, str) and kind and kind not in _OWN
    return "<other>" if is_named else _OWN.get(str(kind), "<function>")


_Member = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[CustomTool, Tag("<custom>")]
    | Annotated[OtherTool, Tag("<other>")],
    Discriminator(lambda value: "<other>" if _kind(value) == "<namespace>" else _kind(value)),
]


class NamespaceTool(Body):
    """Tools under a common name."""

    type: Literal["namespace"]
    name: str = Field(min_length=1, max_length=MAX_NAME)
    tools: Items[_Member]


ResponsesTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[CustomTool, Tag("<custom>")]
    | Annotated[NamespaceTool, Tag("<namespace>")]
    | Annotated[OtherTool, Tag("<other>")],
    Discriminator(_kind),
]
AnyTool = FunctionTool | CustomTool | NamespaceTool | OtherTool


class NamedTool(Body):
    """`{"type": "function", "name": ...}`: the tool that a choice names."""

    type: str
    name: str | None = None
    namespace: str | None = None

    @property
    def function(self) -> str:
        """The function that the model knows it as."""
        return Origin(self.name or "", self.namespace).function


def functions_of(tools: Sequence[AnyTool] | None) -> list[tuple[Origin, Tool]]:
    """The functions that the model is shown, each with what the client calls it.

    Raises what `custom_function` does.
    """
    return list(_functions(tools or (), None, "tools"))


def others_in(tools: Sequence[AnyTool] | None) -> Iterator[str]:
    """Types of the tools that the model is not shown."""
    for tool in tools or ():
        if isinstance(tool, OtherTool):
            yield tool.type
        elif isinstance(tool, NamespaceTool):
            yield from others_in(tool.tools)


def chosen(choice: NamedTool) -> dict[str, Any]:
    """A choice of one tool as Chat Completions has it. Raises RequestError for one that nobody calls."""
    if choice.type not in _OWN or not choice.name:
        raise RequestError(
            f"tool_choice asks for {choice.type}, which this server does not run; name a function or "
            "a custom tool",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return {"type": "function", "function": {"name": choice.function}}


def _functions(tools: Sequence[AnyTool], namespace: str | None, field: str) -> Iterator[tuple[Origin, Tool]]:
    for i, tool in enumerate(tools):
        if isinstance(tool, NamespaceTool):
            yield from _functions(tool.tools, tool.name, f"{field}[{i}].tools")
        elif isinstance(tool, FunctionTool | CustomTool):
            is_custom = isinstance(tool, CustomTool)
            origin = Origin(tool.name, namespace, is_custom)
            fields = tool.model_dump(exclude={"type"})
            fields = custom_function(fields, f"{field}[{i}]") if is_custom else fields
            function = FunctionDefinition.model_validate(fields | {"name": origin.function})
            yield origin, Tool(type="function", function=function)
