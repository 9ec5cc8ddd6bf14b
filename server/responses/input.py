"""Items of a Responses request as messages of a conversation."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
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
)

Text = str | list[TextPart]


class InputItem(Body):
    """One item of the input. Which fields it needs depends on its type; without one it is a message."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Arguments | None = None
    output: Content | None = None
    summary: Items[TextPart] | None = None


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
            case "function_call_output":
                output = _content(item.output, f"{path}.output")
                call_id = required(item.call_id, f"{path}.call_id")
                messages.append(Message(role="tool", tool_call_id=call_id, content=output))
            case "reasoning":
                thoughts = _content(item.content or item.summary or [], f"{path}.content")
                _assistant(messages).reasoning_content = _plain(thoughts)
            case "function_call":
                turn = _assistant(messages)
                turn.tool_calls = [*(turn.tool_calls or []), _call(item, path)]
            case _:
                raise RequestError(
                    f"{path}: items of type {item.type!r} are not supported; supported are message, "
                    "reasoning, function_call and function_call_output",
                    param=f"{path}.type",
                    code="unsupported_input_item",
                )
    return messages


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
    fields = item.model_dump(exclude_none=True) | {"id": f"item_{uuid.uuid4().hex}"}
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
    name = required(item.name, f"{path}.name")
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
