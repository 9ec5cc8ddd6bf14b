"""The routes under /v1/messages."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from engine.chat.format import ChatPrompt
from quant.errors import RequestError
from server.anthropic.reply import MessagesReply
from server.anthropic.requests import CountRequest, MessagesRequest
from server.http.errors import MESSAGES_PATH
from server.serving.handling import read_body, render, report_ignored_tools, respond, service_of
from server.serving.naming import own_names
from server.serving.service import Served

router = APIRouter(prefix=MESSAGES_PATH)

# What a field of the chat request is called here.
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    r"response_format\.json_schema\.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
}


@router.post("")
async def create_message(request: Request) -> Response:
    """The assistant's next message in a conversation."""
    body = await read_body(request, MessagesRequest)
    served = service_of(request).named(body.model)
    report_ignored_tools(request, body.ignored_tools)
    with own_names(_NAMES):
        chat = body.as_chat()
        prompt = await render(request, chat, served)
        _check_room(prompt, body.max_tokens, served)
        reply = MessagesReply(chat, prompt, served, hides_thinking=body.hides_thinking)
        return await respond(request, reply, body.stream)


@router.post("/count_tokens")
async def count_tokens(request: Request) -> dict[str, Any]:
    """Number of prompt tokens of the same body."""
    body = await read_body(request, CountRequest)
    served = service_of(request).named(body.model)
    with own_names(_NAMES):
        prompt = await render(request, body.as_chat(), served)
    return {"input_tokens": len(prompt.token_ids)}


def _check_room(prompt: ChatPrompt, max_tokens: int, served: Served) -> None:
    """Raise RequestError where the answer does not fit, in the words of Anthropic's API: clients read the
    figures in them, and shorten the conversation or ask for less."""
    tokens, context = len(prompt.token_ids), served.engine.max_context
    if tokens >= context:
        text = f"prompt is too long: {tokens} tokens > {context - 1} maximum"
        raise RequestError(text, param="messages", code="context_length_exceeded")
    if tokens + max_tokens > context:
        text = (
            f"input length and `max_tokens` exceed context limit: {tokens} + {max_tokens} > {context}, "
            "decrease input length or `max_tokens` and try again"
        )
        raise RequestError(text, param="max_tokens", code="context_length_exceeded")
