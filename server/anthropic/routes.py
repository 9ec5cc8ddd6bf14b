"""The routes under /v1/messages."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from server.anthropic.reply import MessagesReply
from server.anthropic.requests import CountRequest, MessagesRequest
from server.http.errors import MESSAGES_PATH
from server.serving.handling import read_body, render, respond, service_of

router = APIRouter(prefix=MESSAGES_PATH)


@router.post("")
async def create_message(request: Request) -> Response:
    """The assistant's next message in a conversation."""
    body = await read_body(request, MessagesRequest)
    served = service_of(request).named(body.model)
    chat = body.as_chat()
    return await respond(request, MessagesReply(chat, await render(chat, served), served), body.stream)


@router.post("/count_tokens")
async def count_tokens(request: Request) -> dict[str, Any]:
    """Number of prompt tokens of the same body."""
    body = await read_body(request, CountRequest)
    served = service_of(request).named(body.model)
    prompt = await render(body.as_chat(), served)
    return {"input_tokens": len(prompt.token_ids)}
