"""The OpenAPI document: routes from the application, bodies from the pydantic models that read them.

The handlers read bodies themselves (so that errors have the protocols' shapes), so FastAPI cannot know
them; OPERATIONS says which model each route reads and what it answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from server.anthropic.requests import CountRequest, MessagesRequest
from server.http.errors import MESSAGES_PATH, OLLAMA_PATH
from server.http.short_paths import PREFIX, short_path
from server.native.requests import ApplyTemplateRequest, DetokenizeRequest, TokenizeRequest
from server.ollama.requests import OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from server.openai.completion_requests import CompletionRequest
from server.openai.messages import Body
from server.openai.requests import ChatRequest
from server.responses.requests import ResponsesRequest
from server.serving.streaming import EVENTS, LINES

REF = "#/components/schemas/{model}"
STATUSES = {
    400: "Invalid, unsupported, or longer than the context.",
    401: "No key, or a wrong one.",
    403: "A host name that the server does not accept.",
    404: "No such model, response or running request.",
    408: "A body that did not arrive in time.",
    413: "A body above the limit.",
    415: "Not application/json.",
    429: "The queue is full, or a key's limit is reached.",
    499: "Cancelled by another request.",
    500: "A fault in engine or server.",
    503: "The model is loading, or the server is stopping.",
    504: "The request took longer than the server's limit.",
}
ALWAYS = (401, 403, 408, 413)
READING = (400, 404, 415, 429, 500, 503)


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_TOKEN = {"anyOf": [_COUNT, _object(id=_COUNT, piece=_TEXT)]}
_LIST: dict[str, Any] = {"type": "array", "items": {"type": "object"}}
_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT)
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)


def _completion(kind: str) -> dict[str, Any]:
    return _object(id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_LIST, usage=_USAGE)


_RESPONSE = _object(id=_TEXT, object={"const": "response"}, model=_TEXT, status=_TEXT, output=_LIST)
_MESSAGE = _object(
    id=_TEXT, type={"const": "message"}, role={"const": "assistant"}, model=_TEXT, content=_LIST
)
_LINE = _object(model=_TEXT, created_at=_TEXT, done={"type": "boolean"})
_STATUS = _object(status=_TEXT)


@dataclass(frozen=True)
class Operation:
    """What a route reads and answers; `errors` are statuses beside those in ALWAYS."""

    answer: dict[str, Any]
    body: type[Body] | None = None
    errors: tuple[int, ...] = ()
    streams: bool = False
    streamed: str = EVENTS.media_type
    media_type: str = "application/json"
    answers_503: dict[str, Any] | None = None


OPERATIONS = {
    ("GET", "/v1/models"): Operation(_object(object={"const": "list"}, data=_LIST), errors=(503,)),
    ("GET", "/v1/models/{model}"): Operation(_MODEL, errors=(404, 503)),
    ("POST", "/v1/chat/completions"): Operation(_completion("chat.completion"), ChatRequest, READING, True),
    ("POST", "/v1/completions"): Operation(_completion("text_completion"), CompletionRequest, READING, True),
    ("POST", "/v1/responses"): Operation(_RESPONSE, ResponsesRequest, READING, True),
    ("POST", "/v1/responses/input_tokens"): Operation(
        _object(object=_TEXT, input_tokens=_COUNT), ResponsesRequest, READING
    ),
    ("GET", "/v1/responses/{response_id}"): Operation(_RESPONSE, errors=(400, 404)),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation(
        _object(object={"const": "list"}, data=_LIST, has_more={"type": "boolean"}), errors=(400, 404)
    ),
    ("POST", "/v1/responses/{response_id}/cancel"): Operation(_RESPONSE, errors=(400, 404, 429)),
    ("DELETE", "/v1/responses/{response_id}"): Operation(
        _object(id=_TEXT, object=_TEXT, deleted={"const": True}), errors=(404,)
    ),
    ("DELETE", "/v1/requests/{request_id}"): Operation(
        _object(id=_TEXT, object={"const": "request"}, cancelled={"const": True}), errors=(404,)
    ),
    ("POST", MESSAGES_PATH): Operation(_MESSAGE, MessagesRequest, READING, True),
    ("POST", f"{MESSAGES_PATH}/count_tokens"): Operation(_object(input_tokens=_COUNT), CountRequest, READING),
    ("POST", "/tokenize"): Operation(
        _object(tokens={"type": "array", "items": _TOKEN}, count=_COUNT, max_model_len=_COUNT),
        TokenizeRequest,
        READING,
    ),
    ("POST", "/detokenize"): Operation(_object(prompt=_TEXT), DetokenizeRequest, READING),
    ("GET", "/props"): Operation(_object(total_slots=_COUNT), errors=(503,)),
    ("GET", "/slots"): Operation(_LIST, errors=(503,)),
    ("GET", "/tokenizer_info"): Operation(_object(vocab_size=_COUNT), errors=(503,)),
    ("POST", "/apply-template"): Operation(_object(prompt=_TEXT), ApplyTemplateRequest, READING),
    ("POST", "/v1/embeddings"): Operation({"type": "object"}, errors=(400,)),
    ("GET", "/api/version"): Operation(_object(version=_TEXT)),
    ("GET", "/api/tags"): Operation(_object(models=_LIST), errors=(503,)),
    ("GET", "/api/ps"): Operation(_object(models=_LIST), errors=(503,)),
    ("POST", "/api/show"): Operation(_object(details={"type": "object"}), OllamaShowRequest, READING),
    ("POST", "/api/chat"): Operation(_LINE, OllamaChatRequest, READING, True, streamed=LINES.media_type),
    ("POST", "/api/generate"): Operation(
        _LINE, OllamaGenerateRequest, READING, True, streamed=LINES.media_type
    ),
    ("POST", "/api/embed"): Operation({"type": "object"}, errors=(400,)),
    ("GET", "/health"): Operation(_STATUS, answers_503=_STATUS),
    ("GET", "/ready"): Operation(_STATUS, answers_503=_STATUS),
    ("GET", "/version"): Operation(_object(version=_TEXT)),
    ("GET", "/tiers"): Operation(
        _object(
            object={"const": "tiers"}, model=_TEXT, tiers={"type": "array", "items": _TEXT}, layers=_LIST
        ),
        errors=(503,),
    ),
    ("GET", "/metrics"): Operation(_TEXT, media_type=CONTENT_TYPE_LATEST),
    ("GET", "/openapi.json"): Operation({"type": "object"}),
}


def document(routes: Iterable[BaseRoute], version: str, model: str | None) -> dict[str, Any]:
    """The OpenAPI 3.1 document of those `routes` that OPERATIONS knows.

    `model` is the name that requests must use.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not isinstance(route, APIRoute):
            continue
        path = route.path.replace(":path}", "}")
        for method in route.methods or ():
            operation = OPERATIONS.get((method, path))
            if operation is not None:
                described = _described(route, path, operation)
                paths.setdefault(path, {})[method.lower()] = described
                if path.startswith(f"{PREFIX}/"):
                    again = described | {"operationId": f"{described['operationId']}_short"}
                    paths.setdefault(short_path(path), {})[method.lower()] = again
    return {
        "openapi": "3.1.0",
        "info": {"title": "Loci", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": _schemas(model)},
    }


def _described(route: APIRoute, path: str, operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": route.name, "summary": route.description.splitlines()[0]}
    if names := re.findall(r"{(\w+)}", path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.body is not None:
        content = {"schema": {"$ref": REF.format(model=operation.body.__name__)}}
        described["requestBody"] = {"required": True, "content": {"application/json": content}}
    described["responses"] = _responses(path, operation)
    return described


def _responses(path: str, operation: Operation) -> dict[str, Any]:
    answer: dict[str, Any] = {operation.media_type: {"schema": operation.answer}}
    if operation.streams:
        answer[operation.streamed] = {"schema": _object(data=_TEXT)}  # of one event
    if path.startswith(f"{OLLAMA_PATH}/"):
        error = "OllamaError"
    else:
        error = "MessagesError" if path.startswith(MESSAGES_PATH) else "Error"
    content = {"application/json": {"schema": {"$ref": REF.format(model=error)}}}
    statuses = {*ALWAYS, *operation.errors} | ({499, 504} if operation.streams else set())
    responses = {
        str(status): {"description": STATUSES[status], "content": content} for status in sorted(statuses)
    }
    if operation.answers_503 is not None:
        schema = {"application/json": {"schema": operation.answers_503}}
        responses["503"] = {"description": STATUSES[503], "content": schema}
    return {"200": {"description": "The answer.", "content": answer}, **responses}


def _schemas(model: str | None) -> dict[str, Any]:
    bodies = dict.fromkeys(o.body for o in OPERATIONS.values() if o.body is not None)
    _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=REF)
    schemas: dict[str, Any] = found["$defs"]
    for body in bodies:
        name = schemas[body.__name__]["properties"].get("model")
        if name is not None and model is not None:
            name["enum"] = [model, None]
    nullable = {"type": ["string", "null"]}
    error = _object(message=_TEXT, type=_TEXT, param=nullable, code=nullable)
    schemas["Error"] = _object(error=error)
    schemas["OllamaError"] = _object(error=_TEXT)
    schemas["MessagesError"] = _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT))
    return {name: _any_of(schema) for name, schema in schemas.items()}


def _any_of(schema: Any) -> Any:
    """The schema with `anyOf` for `oneOf`: an empty list is a list of texts and one of ids."""
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _any_of(value) for key, value in schema.items()}
    return [_any_of(each) for each in schema] if isinstance(schema, list) else schema
