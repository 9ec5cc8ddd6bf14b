"""Which chat format a model uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.chat import deepseek_v32
from engine.chat.deepseek import VERSIONS, DeepseekChat
from engine.chat.format import ChatFormat
from engine.chat.template import TemplateChat
from engine.tokenizer.tokenizer import Tokenizer


def chat_format_for(model_type: str, config: Mapping[str, Any], tokenizer: Tokenizer) -> ChatFormat | None:
    """How a model of `model_type` chats; None where nothing says how (completions still work).

    DeepSeek V4 and V4.1 have a dialect of their own; `default_thinking_mode: false` in their config
    makes answers without reasoning the default. All others bring a Jinja template with their
    tokenizer, but for V3.2, which has one here. Raises ConfigError for a template that is broken.
    """
    if model_type in VERSIONS:
        return DeepseekChat(tokenizer, model_type, config.get("default_thinking_mode", True) is not False)
    if tokenizer.chat_template is not None:
        return TemplateChat(tokenizer, tokenizer.chat_template, for_tools=tokenizer.tool_template)
    return TemplateChat(tokenizer, deepseek_v32.TEMPLATE) if model_type in deepseek_v32.MODEL_TYPES else None
