"""Around every request: an id, one log line, the request counter, a last-resort 500 and the size limit."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.encoding import decoded
from server.http.errors import ApiError, internal, speaks_messages
from server.metrics import Metrics
from server.serving.streaming import CLIENT_CLOSED_REQUEST

log = logging.getLogger("loci")
access = logging.getLogger("loci.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLOSING = {"Connection": "close"}  # or the rest of an unwanted body would still be received
# What monitors ask every few seconds; logged at the level debug.
PROBES = frozenset(("/health", "/ready", "/metrics"))
_NO_ROUTE = "unmatched"  # one label for all paths that do not exist, or a scanner would fill the registry


class RequestLog:
    """Gives each request an id (the client's own X-Request-Id, if valid), logs and counts it.

    Paths are logged, bodies and query strings never. Uncaught exceptions become a 500 here.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not _SANE_ID.fullmatch(request_id):
            request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if ignored := scope["state"].get("ignored_tools"):
                    headers["X-Ignored-Tools"] = ignored
                if speaks_messages(scope):
                    headers["Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("%s: unexpected error", request_id)
            if status == 0:
                await internal(request_id).response_to(scope)(scope, receive, send_with_id)
        finally:
            status = status or CLIENT_CLOSED_REQUEST
            self._metrics.requests.labels(self._route_of(scope), str(status)).inc()
            elapsed_ms = (time.perf_counter() - began) * 1000
            # Quoted, because a decoded path may contain line breaks.
            fields = {
                "method": scope["method"],
                "path": quote(scope["path"]),
                "status": status,
                "duration_ms": round(elapsed_ms, 1),
                "request_id": request_id,
                "key": account.name if (account := scope["state"].get("account")) else None,
                "client": scope["client"][0] if scope.get("client") else None,
            }
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            text = "%(method)s %(path)s %(status)d %(duration_ms)sms %(request_id)s"
            access.log(level, text, fields, extra={"fields": fields})

    def _route_of(self, scope: Scope) -> str:
        """The path of the requested route, also if the request was refused before reaching it."""
        if (found := scope.get("route")) is None:
            matches = ((route, route.matches(scope)[0]) for route in self._routes)
            # A route that needs another method is the second choice.
            found, match = max(matches, key=lambda each: each[1].value)
            found = None if match is Match.NONE else found
        return getattr(found, "path", _NO_ROUTE)


class BodyLimit:
    """Responds 413 to bodies above the limit, whether or not they declare their size, 408 to slow ones.

    The body is read here, counting bytes as they arrive, and passed on whole.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive)
        except ApiError as error:
            await error.response_to(scope)(scope, receive, send)
            return
        except TimeoutError:
            text = f"the body did not arrive within {self._timeout_s:g} s"
            too_slow = ApiError(408, text, code="body_too_slow", headers=CLOSING)
            await too_slow.response_to(scope)(scope, receive, send)
            return
        if body is None:
            return
        is_delivered = False

        async def replay() -> Message:
            nonlocal is_delivered
            if is_delivered:
                return await receive()
            is_delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, None if the client disconnects. Raises ApiError 413 if it is too large, and what
        `decoded` raises."""
        headers = Headers(scope=scope)
        declared, encoding = headers.get("content-length", "0"), headers.get("content-encoding", "")
        body = bytearray()
        is_complete = False
        too_large = declared.isdecimal() and int(declared) > self._limit_bytes
        while not is_complete and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            is_complete = not message.get("more_body", False)
            too_large = len(body) > self._limit_bytes
        plain = None if too_large else decoded(bytes(body), encoding, self._limit_bytes)
        if plain is None:
            text = f"the body is larger than this server's limit of {self._limit_bytes} bytes; send less"
            raise ApiError(413, text, code="body_too_large", headers=CLOSING)
        return plain
