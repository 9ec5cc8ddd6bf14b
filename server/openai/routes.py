"""The routes under /v1 that OpenAI's clients know: models, chat completions, completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from server.openai.chat import ChatReply
from server.openai.completion_requests import CompletionRequest
from server.openai.completions import CompletionReply, tokenize_prompts
from server.openai.requests import ChatRequest
from server.serving.handling import (
    aside,
    read_body,
    render,
    report_ignored_tools,
    respond,
    salt_of,
    service_of,
)
from server.serving.model_cards import card, cards
from server.serving.naming import own_names

router = APIRouter(prefix="/v1")

# What a field of the chat request is called where there is no conversation.
_NAMES = {"messages": "prompt"}


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The model that this server serves, once for each of its names."""
    listed = cards(service_of(request).served)
    pages = {"has_more": False, "first_id": listed[0]["id"], "last_id": listed[-1]["id"]}
    return {"object": "list", "data": listed} | pages


@router.get("/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """The model, if that is its name."""
    return card(service_of(request).named(model), model)


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """One or more assistant messages that continue a conversation."""
    body = await read_body(request, ChatRequest)
    served = service_of(request).named(body.model)
    report_ignored_tools(request, body.ignored_tools)
    return await respond(request, ChatReply(body, await render(request, body, served), served), body.stream)


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continuations of one or more prompts."""
    body = await read_body(request, CompletionRequest)
    served = service_of(request).named(body.model)
    salt = salt_of(request, body.cache_salt)
    prompts = await aside(len(await request.body()), tokenize_prompts, body, served, salt)
    with own_names(_NAMES):
        return await respond(request, CompletionReply(body, prompts, served), body.stream)
