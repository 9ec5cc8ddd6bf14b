"""`loci serve`: bind, load in the background, answer, drain on a signal."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvicorn

from quant.errors import ConfigError
from server.cli.address import Address, bind
from server.cli.arguments import OptionalNamedModel, Yes
from server.cli.process import flush_stdout, ignore_signals
from server.http.connection import allow_many_connections, protocol_with_deadlines
from server.http.logs import configure_logging
from server.settings import SEVERAL, Settings, resolve_settings

if TYPE_CHECKING:
    from server.metrics import Metrics
    from server.serving.service import Served, Service

log = logging.getLogger("loci")

# The engine's thread comes back from native code many times a step, and would wait each time until the event
# loop pauses, at most 5 ms (Python's own setting).
SWITCH_INTERVAL_S = 1e-4
# Longer than clients and proxies keep an idle connection (Python's SDKs 5 s, nginx 60 s): they must be first
# to hang up, or a request may meet a connection that is just being closed.
KEEP_ALIVE_S = 75
# Agents' first prompts were measured at 6,000 to 23,000 tokens, before any answer.
AGENTS_CONTEXT = 32_768
# After the deadline of a drain: time to read why an answer ended.
LAST_WORDS_S = 5


def _with_settings_as_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with one option per field of Settings, so that settings are described in one place."""
    parameters = [_flag("model", OptionalNamedModel, None)]
    for name, field in Settings.model_fields.items():
        if name != "model":
            kind = list[str] if name in SEVERAL else field.annotation
            option = typer.Option(help=_help(name), show_default=False)
            parameters.append(_parameter(name, kind, option))
    file = typer.Option(help="TOML file with settings.", envvar="LOCI_CONFIG", show_default=False)
    parameters.append(_parameter("config", Path, file))
    parameters.append(_flag("yes", Yes, False))

    @functools.wraps(command)
    def wrapper(**flags: Any) -> None:
        command(**flags)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return _flag(name, Annotated[kind | None, option], None)


def _flag(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = "" if field.default in (None, ()) else f" Default: {field.default}."
    return f"{field.description}{default}"


@_with_settings_as_options
def serve(config: Path | None, yes: bool, **flags: Any) -> None:
    """Serve a model over HTTP, with OpenAI's and Anthropic's interfaces.

    Each setting can also come from an environment variable (LOCI_PORT for --port) or a TOML file
    (port = 8000). Flags override variables, and variables override the file.

    Example: loci serve ./DeepSeek-V4.1-Flash --port 8000
    """
    settings = resolve_settings(flags, config)
    configure_logging(settings.log_level, settings.log_format)
    address = bind(settings.host, settings.port)
    allow_many_connections()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if not settings.is_loopback and not settings.needs_key:
        log.warning("listening on %s without an API key: anyone who can reach it can use it", settings.host)

    # Imported late: torch takes seconds, wrong settings should not.
    from server.app import create_app
    from server.cli.fetch import fetched
    from server.metrics import Metrics
    from server.serving.service import Service

    typed = settings.model
    settings = settings.model_copy(update={"model": str(fetched(settings.model, yes, settings.experts))})
    metrics = Metrics()
    metrics.observe_process()
    settings, bring_up, lines, give_up = _prepared(settings, metrics)
    service = Service(settings, metrics, typed)
    server = _Server(create_app(service), service, bring_up, lines, address, give_up)
    address.listen()
    try:
        server.run(sockets=[address.socket])
    finally:
        try:
            service.stop()
        finally:
            give_up()
    if service.failure is not None:
        raise service.failure
    if service.is_loading:  # a thread that is inside torch when the interpreter ends would abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _prepared(
    settings: Settings, metrics: Metrics
) -> tuple[Settings, Callable[[], Served], list[str], Callable[[], None]]:
    """The settings with what the plan has chosen, what brings the model up, lines to say meanwhile, and what
    ends what would outlive this process.

    A model that is wrong is refused before anybody is told to connect.
    """
    if settings.cluster is None:
        for name in ("stages", "replicas"):
            if getattr(settings, name) is not None:
                raise ConfigError(f"--{name} is for a model on several machines: give --cluster too")
        from server.cli.plan_lines import explained, plan_lines
        from server.serving import service

        here = service.prepare(settings)
        lines = [*plan_lines(here.planned), *(explained(here.planned) if settings.explain else ())]
        return here.settings, partial(service.bring_up, here), lines, _nothing
    if settings.replicas is not None:
        from server.cluster import replicas

        copies = replicas.prepare(settings)

        def give_up() -> None:
            ignore_signals()  # it takes a moment, and the process ends behind it
            copies.application.give_up()

        return settings, partial(replicas.bring_up, copies, metrics.registry), [], give_up
    from server.cluster import serving as in_parts

    parts = in_parts.prepare(settings)
    return settings, partial(in_parts.bring_up, parts, metrics.registry), [], _nothing


def _nothing() -> None:
    pass


class _Server(uvicorn.Server):
    """uvicorn with our start and end: loads once it listens; the first signal drains, the second ends.

    While it drains it goes on listening, so that who comes now is told that the server stops.
    """

    def __init__(
        self,
        app: Any,
        service: Service,
        bring_up: Callable[[], Served],
        lines: list[str],
        address: Address,
        give_up: Callable[[], None],
    ) -> None:
        self._service = service
        self._bring_up, self._lines, self._give_up = bring_up, lines, give_up
        self._address = address
        self._drain_s = service.settings.drain_timeout_s
        self._unfinished: set[asyncio.Task[None]] = set()  # requests that ran when draining began
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with_deadlines(
                    service.settings.read_timeout_s, service.settings.write_timeout_s
                ),
                ws="none",
                loop="asyncio",  # also where another one happens to be installed
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                # Our own deadline ends the sequences, so that clients read why; this one begins after it, and
                # is for clients that do not read.
                timeout_graceful_shutdown=LAST_WORDS_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _say(f"Loci listens on {self._address} and is loading the model")
        for line in self._lines:
            _say(line)
        self._service.load_in_background(self._bring_up, self._when_loaded)

    def _when_loaded(self) -> None:
        if self._service.failure is not None:
            self.should_exit = True
        if self.should_exit or self._service.is_draining:
            return
        self._catch_signals()  # Ray, where it was started meanwhile, has put its own handler before ours
        served = self._service.served
        _say(f"{served.name} is ready. Try:\n  {_curl(self._address.url, self._service)}")
        if served.loaded.chat is not None and served.engine.max_context < AGENTS_CONTEXT:
            _say(
                f"Its context of {served.engine.max_context:,} tokens suits chats and scripts; coding agents "
                "need 32,768: they begin with prompts of up to 25,000 (docs/clients.md)"
            )

    async def on_tick(self, counter: int) -> bool:
        is_over = await super().on_tick(counter)
        return is_over or (self._service.is_draining and all(task.done() for task in self._unfinished))

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        self._catch_signals()
        yield

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        signal.alarm(
            0
        )  # Ray's handler, which is before this one while it loads, would abort 3 s after SIGTERM
        if self._service.is_draining:
            self._give_up()
            os._exit(128 + number)
        self._service.drain()
        self._unfinished = set(self.server_state.tasks)
        again = "press Ctrl-C again" if number == signal.SIGINT else "send SIGTERM again"
        _say(f"Shutting down: running requests have {self._drain_s:g} s to finish; {again} to stop now")
        asyncio.get_running_loop().call_later(self._drain_s, self._end)

    def _end(self) -> None:
        self.should_exit = True
        threading.Thread(target=self._service.stop, daemon=True).start()


def _curl(url: str, service: Service) -> str:
    served = service.served
    body: dict[str, object]
    if served.loaded.chat is None:
        path, body = "completions", {"model": served.name, "prompt": "Once upon a time"}
    else:
        message = {"role": "user", "content": "What is the capital of France?"}
        path, body = "chat/completions", {"model": served.name, "messages": [message]}
    key = ' -H "Authorization: Bearer $LOCI_API_KEY"' if service.settings.needs_key else ""
    data = shlex.quote(json.dumps(body))
    return f"curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {data}"


def _say(text: str) -> None:
    with suppress(OSError):  # a server goes on where nobody reads it any more
        print(text)
    flush_stdout()
