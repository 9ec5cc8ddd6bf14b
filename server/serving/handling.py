"""Shared by the handlers of all protocols: the service, the body, and the answer as a whole or as a
stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_json

from engine.chat.format import ChatPrompt
from engine.grammar.constraint import GrammarCompiler
from engine.grammar.lark import Grammar
from quant.errors import RequestError
from server.http.errors import ApiError
from server.http.rate_limits import Account
from server.openai.messages import Body
from server.openai.requests import ChatRequest
from server.openai.tools import listed
from server.serving.reply import Reply
from server.serving.running import RunningAnswers
from server.serving.service import Served, Service
from server.serving.streaming import EventStream, answer

COMPILE_TIMEOUT_S = 5
SHORT_BYTES = 4096
MAX_REPORTED = 100  # clients choose what stands in these lines
log = logging.getLogger("loci")
B = TypeVar("B", bound=Body)
T = TypeVar("T")


def service_of(request: Request) -> Service:
    """The service of the application that `request` came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def account_of(request: Request) -> Account | None:
    """The account of the request's key; None if the server requires no keys."""
    account = request.scope["state"].get("account")
    assert account is None or isinstance(account, Account)
    return account


def owner_of(request: Request) -> str | None:
    """The name of the request's key."""
    account = account_of(request)
    return None if account is None else account.name


def salt_of(request: Request, cache_salt: str | None) -> str:
    """What the cached prompts of a request are kept apart by: its key, where there are several, and the salt
    that it names."""
    account = account_of(request)
    return ("" if account is None else account.salt) + (cache_salt or "")


def running_of(request: Request) -> RunningAnswers:
    """The answers that are being generated now."""
    running = request.app.state.running
    assert isinstance(running, RunningAnswers)
    return running


async def read_body(request: Request, kind: type[B]) -> B:
    """The body as `kind`.

    Raises pydantic's ValidationError and RequestError for what is wrong with it, ApiError 415 where
    it is not declared as JSON: browsers send other types across sites without asking.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        found = media_type or "none"
        raise ApiError(
            415, f"send Content-Type: application/json, got {found}", code="unsupported_media_type"
        )
    return kind.model_validate_json(await request.body())


_reported: set[str] = set()


def report_ignored_tools(request: Request, types: Iterable[str]) -> None:
    """Say in a header of the answer which kinds of tools the model is not shown, and in the log once each."""
    text = listed(types)
    if not text:
        return
    request.scope["state"]["ignored_tools"] = text
    if text not in _reported and len(_reported) < MAX_REPORTED:
        _reported.add(text)
        log.info("tools that this server does not run are not shown to the model: %s", text)


async def render(request: Request, chat: ChatRequest, served: Served) -> ChatPrompt:
    """The rendered prompt of the conversation. Raises RequestError for what the model's format cannot
    express."""
    if served.loaded.chat is None:
        text = f"{served.name} has no chat template; use /v1/completions"
        raise ApiError(400, text, param="messages", code="no_chat_template")
    conversation = chat.as_prompt()
    foresee = partial(served.engine.foresee, salt_of(request, chat.cache_salt))
    return await aside(len(to_json(conversation)), served.loaded.chat.render, conversation, foresee)


async def aside(length: int, work: Callable[..., T], *arguments: Any) -> T:
    """Do `work` on a text of about `length` bytes: in another thread, unless it is short.

    With all cores busy, a thread may begin milliseconds late, which is longer than short work takes.
    """
    if length <= SHORT_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


async def respond(request: Request, reply: Reply, is_stream: bool | None) -> Response:
    """Submit the sequences of `reply` and send what they generate.

    Raises ApiError where they are more than this server ever takes, CapacityError for a full queue,
    RequestError for settings out of range and for grammars that are wrong or too large.
    """
    service = service_of(request)
    limit = service.max_sequences + service.settings.max_waiting
    if reply.sequences > limit:
        text = (
            f"{reply.sequences} answers at once exceed this server's limit of {limit}; send fewer prompts, "
            "or a smaller n"
        )
        raise ApiError(400, text, param="n", code="too_many_sequences")
    if reply.grammar is not None:
        await _compile(reply.grammar, service.served.engine.grammars)
    generation = service.new_generation(salt_of(request, reply.cache_salt))
    try:
        reply.submit_to(generation)
    except BaseException:
        generation.close()
        raise
    account = account_of(request)
    running, owner = running_of(request), owner_of(request)
    ids = (request.scope["state"]["request_id"], reply.id)
    running.begin(owner, ids, generation, reply)

    def close() -> None:
        generation.close()
        running.end(owner, ids, generation)
        if account is not None:
            account.spend(reply.counts.prompt, reply.counts.generated)

    if is_stream:
        return EventStream(
            reply.events(generation),
            reply.last,
            reply.failure,
            partial(reply.pulse, generation),
            close,
            reply.framing,
        )
    result = await answer(request, reply.whole(generation), close)
    return result if isinstance(result, Response) else JSONResponse(result)


async def _compile(grammar: Grammar, grammars: GrammarCompiler) -> None:
    """Compile without blocking the event loop, within a time limit."""
    compiling = grammars.compile(grammar)
    try:
        await asyncio.wait_for(asyncio.wrap_future(compiling), COMPILE_TIMEOUT_S)
    except TimeoutError:
        field = grammar.parts[0][0] if grammar.parts else None
        text = f"the answer's grammar took longer than {COMPILE_TIMEOUT_S} s to compile; make it simpler"
        raise RequestError(text, param=field, code="invalid_grammar") from None
