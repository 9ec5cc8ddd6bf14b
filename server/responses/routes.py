"""The routes under /v1/responses."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from server.http.errors import ApiError
from server.openai.messages import Message
from server.responses.input import kept_items, resolved
from server.responses.reply import ResponsesReply
from server.responses.requests import ResponsesRequest
from server.responses.store import ResponseStore, StoredResponse
from server.serving.handling import (
    owner_of,
    read_body,
    render,
    report_ignored_tools,
    respond,
    running_of,
    service_of,
)
from server.serving.naming import own_names

router = APIRouter(prefix="/v1/responses")

MAX_ITEMS = 100  # of one page

# What a field of the chat request is called here.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    r"tools\[(\d+)\]\.(function|custom)": r"tools[\1]",
    "reasoning_effort": "reasoning.effort",
    r"response_format\.json_schema\.schema": "text.format.schema",
    "response_format": "text.format",
}


@router.post("")
async def create_response(request: Request) -> Response:
    """An answer, as items, to a conversation given as items."""
    body = await _read(request)
    served = service_of(request).named(body.model)
    store, owner = store_of(request), owner_of(request)
    report_ignored_tools(request, body.ignored_tools)
    with own_names(_NAMES):
        earlier = _earlier(body, store, owner)
        chat = body.as_chat(earlier)

        def keep(response: dict[str, Any], answer: Message) -> None:
            if body.store is not False:
                conversation = (*earlier, *body.messages, answer)
                store.put(StoredResponse(owner, response, conversation, kept_items(body.input)))

        reply = ResponsesReply(body, chat, await render(request, chat, served), served, keep)
        return await respond(request, reply, body.stream)


@router.post("/input_tokens")
async def count_input_tokens(request: Request) -> dict[str, Any]:
    """Number of prompt tokens of the same body."""
    body = await _read(request)
    served = service_of(request).named(body.model)
    with own_names(_NAMES):
        chat = body.as_chat(_earlier(body, store_of(request), owner_of(request)))
        prompt = await render(request, chat, served)
    return {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}


@router.get("/{response_id}")
async def get_response(request: Request, response_id: str) -> dict[str, Any]:
    """A stored response."""
    if request.query_params.get("stream") == "true":
        raise ApiError(400, "a finished response cannot be streamed; leave stream out", param="stream")
    return _stored(request, response_id).response


@router.get("/{response_id}/input_items")
async def list_input_items(request: Request, response_id: str) -> dict[str, Any]:
    """The input items of a stored response, page by page; `order` is `desc` (newest first) or `asc`."""
    items = list(_stored(request, response_id).input_items)
    asked = request.query_params
    if asked.get("order", "desc") not in ("asc", "desc"):
        raise ApiError(400, "order must be asc or desc", param="order", code="invalid_value")
    if asked.get("order", "desc") == "desc":
        items.reverse()
    limit = asked.get("limit", "20")
    if not (limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= MAX_ITEMS):
        text = f"limit must be a number from 1 to {MAX_ITEMS}"
        raise ApiError(400, text, param="limit", code="invalid_value")
    if after := asked.get("after"):
        ids = [item["id"] for item in items]
        if after not in ids:
            text = f"the response has no item {after!r}"
            raise ApiError(400, text, param="after", code="invalid_value")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, "has_more": len(items) > len(page)} | ends


@router.post("/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> dict[str, Any]:
    """Cancel a response that is being computed; its stream ends too."""
    for reply in running_of(request).cancel(owner_of(request), response_id):
        if isinstance(reply, ResponsesReply):
            return reply.cancelled()
    _stored(request, response_id)
    raise ApiError(400, "the response has already ended", code="response_not_cancellable")


@router.delete("/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Delete a stored response, or cancel one that is being computed."""
    owner = owner_of(request)
    if not running_of(request).cancel(owner, response_id) and not store_of(request).remove(
        response_id, owner
    ):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


async def _read(request: Request) -> ResponsesRequest:
    """The body, with the items that it refers to. Raises what `read_body` and `resolved` do."""
    body = await read_body(request, ResponsesRequest)
    if isinstance(body.input, list):
        store, owner = store_of(request), owner_of(request)
        body.input = resolved(body.input, lambda item_id: store.item(item_id, owner))
    return body


def _stored(request: Request, response_id: str) -> StoredResponse:
    """Raises ApiError 404 where it is not kept, or belongs to another key."""
    stored = store_of(request).get(response_id, owner_of(request))
    if stored is None:
        raise _not_found(response_id)
    return stored


def store_of(request: Request) -> ResponseStore:
    """The responses that the application keeps."""
    store = request.app.state.responses
    assert isinstance(store, ResponseStore)
    return store


def _earlier(body: ResponsesRequest, store: ResponseStore, owner: str | None) -> tuple[Message, ...]:
    """The conversation that the request goes on with."""
    if body.previous_response_id is None:
        return ()
    stored = store.get(body.previous_response_id, owner)
    if stored is None:
        raise ApiError(
            400,
            f"the response {body.previous_response_id!r} is not stored on this server; send its items as "
            "input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored.conversation


def _not_found(response_id: str) -> ApiError:
    return ApiError(
        404, f"the response {response_id!r} is not stored on this server", code="response_not_found"
    )
