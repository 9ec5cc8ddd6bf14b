"""What tests of the Responses interface ask, and how."""

from __future__ import annotations

from typing import Any

import openai
from openai.types.chat import ChatCompletion

MODEL = "v41-c"
PLAIN: dict[str, Any] = {"reasoning": {"effort": "none"}, "max_output_tokens": 8, "temperature": 0}
TOOLS: list[Any] = [
    {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}, "strict": False}
    for name in ("weather", "time")
]


def ask(client: openai.OpenAI, content: Any = "Hello", **fields: Any) -> Any:
    return client.responses.create(**({"model": MODEL, "input": content} | PLAIN | fields))


def chat_text(client: openai.OpenAI, messages: list[Any], **fields: Any) -> str | None:
    answer: ChatCompletion = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, reasoning_effort="none", **fields
    )
    return answer.choices[0].message.content
