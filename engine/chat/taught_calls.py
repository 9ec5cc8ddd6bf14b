"""Tool calls for templates without a place for them: the prompt teaches one spelling, a grammar enforces it.

Definitions go into the system message (or the first message, for templates without one), calls and results of
the history become text of ordinary messages. The spelling is the one that most open models have seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.chat.call_block import END_TOOL_CALL, TOOL_CALL
from engine.chat.template_messages import text_of

RESULT, END_RESULT = "<tool_response>", "</tool_response>"

_INTRODUCTION = """\
You can call tools. Each line between <tools> and </tools> describes one of them in JSON:
<tools>
{tools}
</tools>
To call a tool, write its name and its arguments as one JSON object between these tags, and then stop:
{begin}
{{"name": "the tool's name", "arguments": {{"the argument's name": "its value"}}}}
{end}
The result comes back between {result} and {end_result}. Call a tool only where it helps; \
otherwise answer in words."""

Conversation = list[dict[str, Any]]


def conversations(messages: Sequence[Mapping[str, Any]], tools: Any) -> Iterator[Conversation]:
    """`messages` with `tools` (OpenAI's, perhaps none), calls and results as plain text, the likeliest shape
    first: some templates take no system message, and none of them two messages of a role in a row."""
    told = _merged(map(_as_text, messages))
    if not tools:
        yield told
        return
    introduction = _introduction(tools)
    has_system = bool(told) and told[0]["role"] in ("system", "developer")
    behind = f"{text_of(told[0]['content'])}\n\n{introduction}" if has_system else introduction
    rest = told[1:] if has_system else told
    yield [{"role": "system", "content": behind}, *rest]
    if rest and rest[0]["role"] == "user":
        yield [{**rest[0], "content": f"{behind}\n\n{text_of(rest[0]['content'])}"}, *rest[1:]]


def needs_telling(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a call or a result in the conversation."""
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def _introduction(tools: Any) -> str:
    lines = (json.dumps(_described(tool["function"]), ensure_ascii=False) for tool in tools)
    return _INTRODUCTION.format(
        tools="\n".join(lines), begin=TOOL_CALL, end=END_TOOL_CALL, result=RESULT, end_result=END_RESULT
    )


def _described(function: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function[name] for name in ("name", "description", "parameters") if function.get(name)}


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"{RESULT}\n{text_of(message.get('content'))}\n{END_RESULT}"}
    told = {name: value for name, value in message.items() if name != "tool_calls"}
    if calls := message.get("tool_calls"):
        spelled = "\n".join(map(_spelled, calls))
        before = text_of(message.get("content"))
        told["content"] = f"{before}\n{spelled}" if before else spelled
    return told


def _spelled(call: Mapping[str, Any]) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"] or "{}"
    head = json.dumps(name, ensure_ascii=False)
    return f'{TOOL_CALL}\n{{"name": {head}, "arguments": {arguments}}}\n{END_TOOL_CALL}'


def _merged(messages: Iterator[dict[str, Any]]) -> Conversation:
    """Neighbours of the user's made one: results of tools, and what is said after them."""
    merged: Conversation = []
    for message in messages:
        if merged and message["role"] == merged[-1]["role"] == "user":
            texts = text_of(merged[-1]["content"]), text_of(message["content"])
            merged[-1] = {**merged[-1], "content": "\n".join(texts)}
        else:
            merged.append(message)
    return merged
