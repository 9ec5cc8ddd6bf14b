"""Chat messages to token ids, and generated text back to messages: one `ChatFormat` per prompt dialect."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.chat.output_parser import END_THINK, OutputParser
from engine.grammar.lark import Grammar
from engine.tokenizer.tokenizer import OnBeginning


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat.

    token_ids       the prompt
    new_parser      makes a fresh parser for each choice
    max_tokens      the dialect's own default where the request gives none; it may be more than the
                    context has room for
    stop_token_ids  tokens that end a turn in this dialect, beside those of the model's config
    grammar         what the answer must match, where the request says so
    end_of_reasoning  spelling of the token that ends reasoning, where the dialect has reasoning
    """

    token_ids: list[int]
    new_parser: Callable[[], OutputParser]
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
    end_of_reasoning: str = END_THINK


class ChatFormat(ABC):
    """How one family of models writes conversations.

    Parsers find tags such as `<think>` in the text, so generated ids must be decoded with special
    tokens kept.
    """

    @abstractmethod
    def render(self, request: Mapping[str, Any], on_beginning: OnBeginning | None = None) -> ChatPrompt:
        """`request` is an OpenAI chat-completions body (messages, tools, tool_choice, reasoning_effort,
        response_format, structured_outputs, chat_template_kwargs ...), already validated in shape.

        What it says is text: spelling a special token in a message never makes one. `on_beginning` hears how
        a long prompt begins, before the rest is encoded. Raises RequestError for what the dialect cannot
        express, naming the field.
        """
