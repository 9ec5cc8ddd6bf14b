"""Chat messages to token ids, and generated text back to messages: one `ChatFormat` per prompt dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.grammar import Grammar
from engine.output_parser import OutputParser
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat.

    token_ids       the prompt
    new_parser      makes a fresh parser for each choice
    max_tokens      the dialect's own default where the request gives none; it may be more than the
                    context has room for
    stop_token_ids  tokens that end a turn in this dialect, beside those of the model's config
    grammar         what the answer must match, where the request says so
    """

    token_ids: list[int]
    new_parser: Callable[[], OutputParser]
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None


class ChatFormat(ABC):
    """How one family of models writes conversations.

    Parsers find tags such as `<think>` in the text, so generated ids must be decoded with special
    tokens kept.
    """

    @abstractmethod
    def render(self, request: Mapping[str, Any]) -> ChatPrompt:
        """`request` is an OpenAI chat-completions body (messages, tools, tool_choice, reasoning_effort,
        response_format, structured_outputs, chat_template_kwargs ...), already validated in shape.

        What it says is text: spelling a special token in a message never makes one. Raises
        RequestError for what the dialect cannot express, naming the field.
        """


def chat_format_for(model_type: str, config: Mapping[str, Any], tokenizer: Tokenizer) -> ChatFormat | None:
    """How a model of `model_type` chats; None where nothing says how (completions still work).

    DeepSeek V4 and V4.1 have a dialect of their own; `default_thinking_mode: false` in their config
    makes answers without reasoning the default. All others bring a Jinja template with their
    tokenizer. Raises ConfigError for a template that is broken.
    """
    from engine.chat_deepseek import VERSIONS, DeepseekChat
    from engine.chat_template import TemplateChat

    if model_type in VERSIONS:
        return DeepseekChat(tokenizer, model_type, config.get("default_thinking_mode", True) is not False)
    if tokenizer.chat_template is not None:
        return TemplateChat(tokenizer, tokenizer.chat_template)
    return None


__all__ = ["ChatFormat", "ChatPrompt", "OutputParser", "chat_format_for"]
