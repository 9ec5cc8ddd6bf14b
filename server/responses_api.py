"""The routes under /v1/responses."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request, Response

from quant.errors import RequestError
from server.errors import ApiError
from server.handling import account_of, read_body, render, respond, service_of
from server.openai_messages import Message
from server.response_store import ResponseStore, StoredResponse
from server.responses import ResponsesReply
from server.responses_types import ResponsesRequest

router = APIRouter(prefix="/v1/responses")

# What a field of the chat request is called here.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}


@router.post("")
async def create_response(request: Request) -> Response:
    """An answer to a conversation given as items, as items."""
    body = await read_body(request, ResponsesRequest)
    served = service_of(request).named(body.model)
    store, owner = store_of(request), owner_of(request)
    with _own_names():
        earlier = _earlier(body, store, owner)
        chat = body.as_chat(earlier)

        def keep(response: dict[str, Any], answer: Message) -> None:
            if body.store is not False:
                store.put(StoredResponse(owner, response, (*earlier, *body.messages, answer)))

        reply = ResponsesReply(body, chat, await render(chat, served), served, keep)
        return await respond(request, reply, body.stream)


@router.post("/input_tokens")
async def count_input_tokens(request: Request) -> dict[str, Any]:
    """How many tokens the same body would make as a prompt."""
    body = await read_body(request, ResponsesRequest)
    served = service_of(request).named(body.model)
    with _own_names():
        prompt = await render(body.as_chat(_earlier(body, store_of(request), owner_of(request))), served)
    return {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}


@router.get("/{response_id}")
async def get_response(request: Request, response_id: str) -> dict[str, Any]:
    """A response that is still kept."""
    if request.query_params.get("stream") == "true":
        raise ApiError(400, "a finished response is not streamed again; leave stream out", param="stream")
    stored = store_of(request).get(response_id, owner_of(request))
    if stored is None:
        raise _not_found(response_id)
    return stored.response


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Forget a response."""
    if not store_of(request).remove(response_id, owner_of(request)):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


def store_of(request: Request) -> ResponseStore:
    """The responses that the application keeps."""
    store = request.app.state.responses
    assert isinstance(store, ResponseStore)
    return store


def owner_of(request: Request) -> str | None:
    """Name of the key that the request came with."""
    account = account_of(request)
    return None if account is None else account.name


def _earlier(body: ResponsesRequest, store: ResponseStore, owner: str | None) -> tuple[Message, ...]:
    """The conversation that the request goes on with."""
    if body.previous_response_id is None:
        return ()
    stored = store.get(body.previous_response_id, owner)
    if stored is None:
        raise ApiError(
            400,
            f"the response {body.previous_response_id!r} is not kept here; send its items as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored.conversation


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"the response {response_id!r} is not kept here", code="response_not_found")


@contextmanager
def _own_names() -> Generator[None]:
    """Errors about fields of the chat request name what the client has sent instead."""
    try:
        yield
    except RequestError as error:
        raise RequestError(
            str(error), param=_NAMES.get(error.param or "", error.param), code=error.code
        ) from None
