"""The served model as lists of models describe it. Clients of many servers ask the same route, and each looks
for the context length under the name that its own server has for it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from server.serving.service import Served


def cards(served: Served) -> list[dict[str, Any]]:
    """One description for each name of the model."""
    return [card(served, name) for name in (served.name, *served.aliases)]


def card(served: Served, name: str | None = None) -> dict[str, Any]:
    """The model under `name`: OpenAI's fields, Anthropic's, and those of other servers."""
    context = served.engine.max_context
    info = served.loaded.model.info
    chats = served.loaded.chat is not None
    return {
        "id": name or served.name,
        "object": "model",
        "type": "model",
        "display_name": name or served.name,
        "created": served.created,
        "created_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
        "owned_by": "loci",
        "root": served.name,
        "parent": None,
        # Prompt and answer share the context, so each may be as long as all of it but a token.
        "max_model_len": context,
        "max_input_tokens": context - 1,
        "max_tokens": context - 1,
        "context_length": context,
        "context_window": context,
        "max_context_length": info.max_context,
        "loaded_context_length": context,
        "meta": {"n_ctx": context, "n_ctx_train": info.max_context, "n_vocab": info.vocab_size},
        "capabilities": _capabilities(chats),
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "supported_parameters": ["tools", "tool_choice", "reasoning", "structured_outputs"] if chats else [],
    }


def _capabilities(chats: bool) -> dict[str, Any]:
    """What Mistral's clients and Anthropic's look for."""
    mistral = {"completion_chat": chats, "function_calling": chats, "vision": False, "completion_fim": False}
    anthropic = {"structured_outputs": chats, "image_input": False, "pdf_input": False, "batch": False}
    return mistral | {name: {"supported": value} for name, value in anthropic.items()}
