"""Who may ask: bearer tokens, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

# Probes of container platforms cannot send keys, and these two say nothing that needs one.
OPEN_PATHS = ("/health", "/ready")


class RequireKey:
    """Answers 401 unless the request carries one of `keys`; runs before any of the body is read."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "send one of the server's API keys: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response_to(scope)(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            token = headers.get("x-api-key", "")  # as Anthropic's clients send it
        given = token.strip().encode("latin-1")
        # Every key is compared, so that the time taken tells nothing about which one matched.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return any(matches)
