"""Chat messages to token ids, and generated text back to messages: one `ChatFormat` per prompt dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.output_parser import OutputParser


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat: the prompt's ids, a fresh parser per choice, and stop tokens it implies.

    max_tokens is the dialect's own default where the request gives none.
    """

    token_ids: list[int]
    new_parser: Any  # Callable[[], OutputParser]
    max_tokens: int | None = None


class ChatFormat(ABC):
    """How one family of models writes conversations."""

    @abstractmethod
    def render(self, request: Mapping[str, Any]) -> ChatPrompt:
        """`request` is an OpenAI chat-completions body (messages, tools, tool_choice, reasoning_effort,
        response_format, chat_template_kwargs ...), already validated in shape.

        Raises RequestError for what the dialect cannot express, naming the field.
        """


__all__ = ["ChatFormat", "ChatPrompt", "OutputParser"]
