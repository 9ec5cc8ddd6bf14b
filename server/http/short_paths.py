"""Routes under /v1 answer without it too: llama.cpp's server has both, clients are told either address."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "/v1"


class ShortPaths:
    """Reads `/models` as `/v1/models`, and so on, before anything else looks at the path.

    Keys, limits, errors, logs and counters know one route.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        paths = [route.path for route in routes if isinstance(route, Route)]
        self._heads = frozenset(_head(short_path(path)) for path in paths if path.startswith(f"{PREFIX}/"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _head(scope["path"]) in self._heads:
            scope = {**scope, "path": PREFIX + scope["path"]}
        await self._app(scope, receive, send)


def short_path(path: str) -> str:
    """The path without the prefix."""
    return path.removeprefix(PREFIX)


def _head(path: str) -> str:
    return path.split("/", 2)[1] if path.startswith("/") else ""
