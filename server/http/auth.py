"""Access control: API keys with their limits, and accepted host names."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.chat_page import PAGE_PATHS
from server.http.errors import ApiError
from server.http.keys import KeyRing
from server.http.rate_limits import Account
from server.metrics import Metrics

# Container probes and browsers opening a page cannot send keys; these routes reveal nothing that needs one.
OPEN_PATHS = frozenset(("/health", "/ready", *PAGE_PATHS))


class RequireKey:
    """Responds 401 unless a request has a key of `ring`, 429 if the key's limits are reached.

    Runs before any of the body is read. Limits apply to requests that compute, i.e. POST.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, metrics: Metrics) -> None:
        self._app = app
        self._ring = ring
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        account = self._ring.account(_given_key(Headers(scope=scope)))
        if account is None:
            error = ApiError(
                401,
                "send one of the server's API keys: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response_to(scope)(scope, receive, send)
            return
        scope["state"]["account"] = account
        await self._serve(account, scope, receive, send)

    async def _serve(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(dict(account.headers()))
                self._metrics.key_requests.labels(account.name, str(message["status"])).inc()
            await send(message)

        if scope["method"] != "POST":
            await self._app(scope, receive, send_with_limits)
            return
        try:
            with account.request():
                await self._app(scope, receive, send_with_limits)
        except ApiError as error:
            await error.response_to(scope)(scope, receive, send_with_limits)


def _given_key(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    # Anthropic's clients send their own header.
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


class RequireHost:
    """Responds 403 to requests for a host name that is not the server's.

    Against DNS rebinding: another site can point its own name to this machine and so become same-origin for
    the browser, but its Host header still has the other site's name.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _host_name(Headers(scope=scope).get("host", "")) if scope["type"] == "http" else ""
        if not host or host in self._allowed:
            await self._app(scope, receive, send)
            return
        text = (
            f"this server does not accept the host name {host!r}; use another of its names, or ask its "
            "operator to add this one to --allowed-hosts"
        )
        await ApiError(403, text, code="host_not_allowed").response_to(scope)(scope, receive, send)


def _host_name(header: str) -> str:
    """`name:port` or `[address]:port` without port and brackets."""
    bracketed, closing, _ = header.rpartition("]")
    name = bracketed.removeprefix("[") if closing else header.partition(":")[0]
    return name.lower().rstrip(".")
