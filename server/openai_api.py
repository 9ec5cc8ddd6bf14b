"""The routes under /v1: models, chat completions, completions."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.chat import ChatReply
from server.completions import CompletionReply, tokenize_prompts
from server.errors import ApiError
from server.openai_messages import Body
from server.openai_types import ChatRequest, CompletionRequest
from server.service import Served, Service
from server.streaming import EventStream, answer

router = APIRouter(prefix="/v1")
B = TypeVar("B", bound=Body)


def service_of(request: Request) -> Service:
    """The service of the application that `request` came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


async def read_body(request: Request, kind: type[B]) -> B:
    """The body as `kind`.

    Raises pydantic's ValidationError and RequestError for what is wrong with it, ApiError 415 where
    it is not declared as JSON: browsers send other types across sites without asking.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        found = media_type or "none"
        raise ApiError(
            415, f"send Content-Type: application/json, got {found}", code="unsupported_media_type"
        )
    return kind.model_validate_json(await request.body())


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model this server has."""
    return {"object": "list", "data": [_card(service_of(request).served)]}


@router.get("/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """The model, if that is its name."""
    return _card(service_of(request).named(model))


@router.post("/chat/completions")
async def chat_completions(request: Request) -> Response:
    """One or more assistant messages that continue a conversation."""
    service = service_of(request)
    body = await read_body(request, ChatRequest)
    served = service.named(body.model)
    if served.loaded.chat is None:
        text = f"{served.name} has no chat template; use /v1/completions"
        raise ApiError(400, text, param="messages", code="no_chat_template")
    prompt = await asyncio.to_thread(served.loaded.chat.render, body.as_prompt())
    return await _reply(request, service, ChatReply(body, prompt, served), bool(body.stream))


@router.post("/completions")
async def completions(request: Request) -> Response:
    """Continuations of one or more prompts."""
    service = service_of(request)
    body = await read_body(request, CompletionRequest)
    served = service.named(body.model)
    prompts = await asyncio.to_thread(tokenize_prompts, body, served)
    return await _reply(request, service, CompletionReply(body, prompts, served), bool(body.stream))


async def _reply(
    request: Request, service: Service, reply: ChatReply | CompletionReply, is_stream: bool
) -> Response:
    limit = service.settings.max_num_seqs + service.settings.max_waiting
    if reply.sequences > limit:
        text = (
            f"{reply.sequences} answers at once are more than this server takes ({limit}); send fewer prompts"
        )
        raise ApiError(400, text, param="n", code="too_many_sequences")
    generation = service.new_generation()
    try:
        reply.submit_to(generation)
    except BaseException:
        generation.close()
        raise
    if is_stream:
        return EventStream(reply.events(generation), generation.close)
    result = await answer(request, reply.whole(generation), generation.close)
    return result if isinstance(result, Response) else JSONResponse(result)


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "loci",
        "max_model_len": served.engine.max_context,
    }
