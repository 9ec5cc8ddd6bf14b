"""Items of a Responses request as messages of a conversation."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any, Literal

from quant.errors import RequestError
from server.openai.messages import (
    Arguments,
    Body,
    Content,
    FunctionCall,
    Items,
    Message,
    TextPart,
    ToolCall,
    check_parts,
    missing,
    required,
    seen,
)
from server.openai.tools import Origin, custom_arguments

Text = str | list[TextPart]


class InputItem(Body):
    """One item of the input. Which fields it needs depends on its type; without one it is a message."""

    type: str = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Arguments | None = None
    output: Content | None = None
    input: str | None = None
    namespace: str | None = None
    summary: Items[TextPart] | None = None

    @property
    def is_bare_id(self) -> bool:
        """Whether it is nothing but an id, as OpenAI's API takes references too."""
        return self.id is not None and self.model_fields_set <= {"id", "type"} and self.type == "message"


def messages_of(items: Iterable[InputItem]) -> list[Message]:
    """The conversation that `items` are: reasoning, text and calls that follow each other make one message.

    Raises RequestError naming an item that is not understood.
    """
    messages: list[Message] = []
    for i, item in enumerate(items):
        path = f"input[{i}]"
        match item.type:
            case "message":
                _add_message(messages, item, path)
            case "function_call_output" | "custom_tool_call_output":
                output = _content(seen(item.output), f"{path}.output")
                call_id = required(item.call_id, f"{path}.call_id")
                messages.append(Message(role="tool", tool_call_id=call_id, content=output))
            case "reasoning":
                thoughts = _content(item.content or item.summary or [], f"{path}.content")
                _assistant(messages).reasoning_content = _plain(thoughts)
            case "function_call" | "custom_tool_call":
                turn = _assistant(messages)
                turn.tool_calls = [*(turn.tool_calls or []), _call(item, path)]
            case _:
                raise RequestError(
                    f"{path}: items of type {item.type!r} are not supported; supported are message, "
                    "reasoning, function_call, custom_tool_call, their outputs and item_reference",
                    param=f"{path}.type",
                    code="unsupported_input_item",
                )
    return messages


def resolved(items: Iterable[InputItem], stored: Callable[[str], dict[str, Any] | None]) -> list[InputItem]:
    """The items, with those of earlier answers that are only named by their ids.

    Raises RequestError for one that is not `stored`.
    """
    found = []
    for i, item in enumerate(items):
        if item.type != "item_reference" and not item.is_bare_id:
            found.append(item)
            continue
        kept = stored(required(item.id, f"input[{i}].id"))
        if kept is None:
            raise RequestError(
                f"input[{i}]: the item {item.id!r} is not stored on this server; send the item itself",
                param=f"input[{i}].id",
                code="item_not_found",
            )
        found.append(InputItem.model_validate(kept))
    return found


def kept_items(given: str | list[InputItem]) -> tuple[dict[str, Any], ...]:
    """The input as clients read it back: items with ids, their texts as parts."""
    items = [InputItem(role="user", content=given)] if isinstance(given, str) else given
    return tuple(_kept(item) for item in items)


def _kept(item: InputItem) -> dict[str, Any]:
    kinds = {"content": "input_text", "output": "input_text", "summary": "summary_text"}
    if item.type == "reasoning":
        kinds["content"] = "reasoning_text"
    elif item.role == "assistant":
        kinds["content"] = "output_text"
    fields = item.model_dump(exclude_none=True)
    fields["id"] = item.id or f"item_{uuid.uuid4().hex}"
    for name, kind in kinds.items():
        if name in fields and not (name == "output" and isinstance(item.output, str)):
            fields[name] = [{"type": kind, "text": part.text} for part in _parts(getattr(item, name))]
    return fields


def _add_message(messages: list[Message], item: InputItem, path: str) -> None:
    content = _content(item.content, f"{path}.content")
    if item.role != "assistant":
        messages.append(Message(role=required(item.role, f"{path}.role"), content=content))
        return
    turn = _assistant(messages)
    turn.content = content if not turn.content else _parts(turn.content) + _parts(content)


def _assistant(messages: list[Message]) -> Message:
    """The assistant's message that the last items belong to, or a new one."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message(role="assistant", content=""))
    return messages[-1]


def _call(item: InputItem, path: str) -> ToolCall:
    name = Origin(required(item.name, f"{path}.name"), item.namespace).function
    if item.type == "custom_tool_call":
        arguments = custom_arguments(required(item.input, f"{path}.input"))
    else:
        arguments = required(item.arguments, f"{path}.arguments")
    call_id = required(item.call_id, f"{path}.call_id")
    return ToolCall(id=call_id, function=FunctionCall(name=name, arguments=arguments))


def _content(content: Text | None, path: str) -> Text:
    if content is None:
        raise missing(path)
    check_parts(content, path)
    return content


def _parts(content: Text) -> list[TextPart]:
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


def _plain(content: Text) -> str:
    return "".join(part.text or "" for part in _parts(content))
