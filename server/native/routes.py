"""The routes that are Loci's own: health, readiness, version, metrics, and the tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json

from engine.distribution import DISTRIBUTION, version_of
from server.http.errors import RETRY_AFTER_S, ApiError
from server.native.requests import DetokenizeRequest, TokenizeRequest
from server.openai.completion_requests import check_ids
from server.openapi import document
from server.serving.handling import aside, owner_of, read_body, running_of, service_of
from server.serving.service import Served

router = APIRouter()


def loci_version() -> str:
    """The installed version, or `source` where the package is run without being installed."""
    return version_of(DISTRIBUTION) or "source"


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the server works, 503 once the engine's thread has died.

    A failed step changes only the status field: a restart would not repair a file or a disk.
    """
    service = service_of(request)
    if not service.is_alive:
        return JSONResponse({"status": "engine_stopped"}, 503)
    return JSONResponse({"status": "failing" if service.is_failing else "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 once the model is loaded."""
    service = service_of(request)
    if service.is_ready:
        return JSONResponse({"status": "ready"})
    status = "stopping" if service.is_draining else "loading" if service.is_alive else "engine_stopped"
    return JSONResponse({"status": status}, 503, headers={"Retry-After": str(RETRY_AFTER_S)})


@router.delete("/v1/requests/{request_id}")
async def cancel_request(request: Request, request_id: str) -> dict[str, Any]:
    """Cancel a running request by its id or that of its answer."""
    if not running_of(request).cancel(owner_of(request), request_id):
        text = f"no request with the id {request_id!r} is running"
        raise ApiError(404, text, code="request_not_found")
    return {"id": request_id, "object": "request", "cancelled": True}


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The server's version."""
    return {"version": loci_version()}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json")
async def openapi(request: Request) -> dict[str, Any]:
    """This OpenAPI description."""
    service = service_of(request)
    model = service.served.name if service.is_ready else None
    return document(request.app.state.routes, loci_version(), model)


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation rendered as a prompt."""
    body = await read_body(request, TokenizeRequest)
    served = service_of(request).served
    answer = await aside(len(await request.body()), _tokenized, body, served)
    return Response(answer, media_type="application/json")


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    body = await read_body(request, DetokenizeRequest)
    served = service_of(request).served
    answer = await aside(len(await request.body()), _detokenized, body, served)
    return Response(answer, media_type="application/json")


def _tokenized(body: TokenizeRequest, served: Served) -> bytes:
    ids = _token_ids(body, served)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.engine.max_context}
    if body.return_token_strs:
        answer["token_strs"] = [served.loaded.tokenizer.token_text(i) for i in ids]
    if body.with_pieces:
        answer["tokens"] = [{"id": i, "piece": served.loaded.tokenizer.token_text(i)} for i in ids]
    return to_json(answer)


def _detokenized(body: DetokenizeRequest, served: Served) -> bytes:
    check_ids(body.tokens, served.vocab_size, "tokens")
    text = served.loaded.tokenizer.decode(body.tokens)
    return to_json({"prompt": text, "content": text})


def _token_ids(body: TokenizeRequest, served: Served) -> list[int]:
    if body.prompt is not None:
        return served.loaded.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens)
    if served.loaded.chat is None:
        raise ApiError(400, f"{served.name} has no chat template; send prompt", param="messages")
    conversation = body.model_dump(include={"messages", "tools"}, exclude_none=True)
    return served.loaded.chat.render(conversation).token_ids
