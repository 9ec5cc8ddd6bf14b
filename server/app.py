"""The web application: routes, middleware and error handlers around a Service."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from quant.errors import LociError
from server import chat_page
from server.anthropic import routes as messages_api
from server.http.auth import RequireHost, RequireKey
from server.http.errors import ApiError, from_loci, from_validation
from server.http.keys import KeyRing
from server.http.middleware import BodyLimit, RequestLog
from server.http.rate_limits import RATE_LIMIT_HEADERS
from server.http.short_paths import ShortPaths
from server.native import llama_cpp
from server.native import routes as native_api
from server.native import tiers as tiers_api
from server.ollama import routes as ollama_api
from server.openai import routes as openai_api
from server.responses import routes as responses_api
from server.responses.store import ResponseStore
from server.serving.running import RunningAnswers
from server.serving.service import Service

ROUTERS = (
    openai_api.router,
    responses_api.router,
    messages_api.router,
    ollama_api.router,
    native_api.router,
    tiers_api.router,
    llama_cpp.router,
)
# What scripts of other origins may read beside the body.
EXPOSED_HEADERS = ("X-Request-Id", "X-Ignored-Tools", "Retry-After", *RATE_LIMIT_HEADERS)


def create_app(service: Service) -> FastAPI:
    """The application that answers for `service`. Raises ConfigError for a wrong file of keys."""
    # FastAPI's own document knows no bodies, and its pages load scripts from elsewhere.
    app = FastAPI(title="Loci", openapi_url=None)
    settings = service.settings
    app.state.service = service
    app.state.responses = ResponseStore(settings.response_store_bytes)
    app.state.running = RunningAnswers()
    routers = (*ROUTERS, chat_page.router)
    routes = [route for router in routers for route in router.routes]
    app.state.routes = routes
    for router in routers:
        _answer_heads(router)
        app.include_router(router)

    # Added last means run first: names of routes and log, then host, origin, key and size.
    app.add_middleware(BodyLimit, limit_bytes=settings.max_body_bytes, timeout_s=settings.read_timeout_s)
    if settings.needs_key:
        keys = [key.get_secret_value() for key in settings.api_key]
        ring = KeyRing(keys, settings.api_key_file, service.metrics)
        app.add_middleware(RequireKey, ring=ring, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    if settings.host_names is not None:
        app.add_middleware(RequireHost, allowed=settings.host_names)
    app.add_middleware(RequestLog, metrics=service.metrics, routes=routes)
    app.add_middleware(ShortPaths, routes=routes)

    for route in routes:
        if isinstance(route, APIRoute) and route.methods:
            service.metrics.expect_requests(route.path, computes="POST" in route.methods)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(LociError, _on_loci_error)
    app.add_exception_handler(ValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


def _answer_heads(router: APIRouter) -> None:
    """Take HEAD wherever GET is taken, as monitors expect; the server leaves bodies out by itself."""
    for route in router.routes:
        if isinstance(route, APIRoute) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response_to(request.scope)


async def _on_loci_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LociError)
    return from_loci(error).response_to(request.scope)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError)
    return from_validation(error).response_to(request.scope)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    text = {
        404: f"there is no {path}; docs/api.md lists the routes",
        405: f"{path} does not support {method}",
    }.get(error.status_code, str(error.detail))
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, text, code=code, headers=error.headers).response_to(request.scope)
