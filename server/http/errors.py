"""Errors as clients expect them: OpenAI's `{"error": {"message", "type", "param", "code"}}`, or Anthropic's
shape on the routes of its protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse
from starlette.types import Scope

from quant.errors import CapacityError, LociError, RequestError

RETRY_AFTER_S = 1

MESSAGES_PATH = "/v1/messages"
OLLAMA_PATH = "/api"

_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error response: HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that clients read."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def messages_body(self) -> dict[str, Any]:
        """The JSON object that clients of /v1/messages read."""
        otherwise = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _MESSAGES_TYPES.get(self.status, otherwise)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    @property
    def ollama_body(self) -> dict[str, Any]:
        """The JSON object that Ollama's clients read."""
        return {"error": self.message}

    def response_to(self, scope: Scope) -> JSONResponse:
        """The whole response, in the shape of the protocol of `scope`'s path."""
        if scope["path"].startswith(f"{OLLAMA_PATH}/"):
            body = self.ollama_body
        else:
            body = self.messages_body if speaks_messages(scope) else self.body
        return JSONResponse(body, self.status, headers=self.headers)


def speaks_messages(scope: Scope) -> bool:
    """True for the routes of Anthropic's protocol."""
    path: str = scope["path"]
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def unavailable(message: str, code: str) -> ApiError:
    """503: the server cannot answer now; the client may retry."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_S)})


def internal(request_id: str) -> ApiError:
    """500 for an internal error; the traceback is in the log under `request_id`."""
    return ApiError(
        500, f"internal error; the server's log has details under {request_id}", code="internal_error"
    )


def from_loci(error: LociError) -> ApiError:
    """400 for a request that cannot be served, 429 for a full queue, 500 for the rest."""
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, CapacityError):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    return ApiError(500, str(error), code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """400 that names the first wrong field, what was found and what was expected."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        detail = str(first.get("ctx", {}).get("error", first["msg"]))
        return ApiError(400, f"the body is not valid JSON: {detail}", code="invalid_json")
    param = _path(first)
    if not param:
        return ApiError(400, f"the body must be a JSON object, got {_kind(first['input'])}")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    message = f"{param}: {first['msg']}, got {_kind(first['input'])}"
    return ApiError(400, message, param=param, code="invalid_value")


def _path(error: ErrorDetails) -> str:
    # Tags of unions stand in angle brackets (as in server/openai/messages.py); they are no part of the body.
    path = ""
    for part in error["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool() | int() | float():
            return f"{value!r}".lower()
        case str():
            return f"the string {value!r}" if len(value) <= 40 else f"a string of {len(value)} characters"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
    return type(value).__name__
