"""States that are hard to reach with a real engine: loading takes long, the engine dies, code fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.engine import EngineStats, Submission
from engine.families.loader import Loaded, load
from engine.output import FinishReason, Output
from engine.sequence import OnOutput
from server.app import create_app
from server.metrics import Metrics
from server.serving.service import Served, Service
from server.settings import resolve_settings
from tests.server.harness import TINY

BODY = {"model": "m", "prompt": "Hello", "max_tokens": 2}


class PlayedEngine:
    """An engine that answers each submission with `play`."""

    max_context = 100
    is_alive = True
    max_sequences = 1

    def __init__(self, play: Callable[[OnOutput], None] = lambda on_output: None) -> None:
        self._play = play
        self.between_steps: Callable[[], None]
        self.aborted: list[Submission] = []

    def submit(
        self,
        prompt_ids: list[int],
        params: object,
        on_output: OnOutput,
        *,
        cache_salt: str,
        prediction: object,
    ) -> Submission:
        self._play(on_output)
        self.between_steps()
        return Submission(1)

    @property
    def is_ready(self) -> bool:
        return self.is_alive

    def foresee(self, cache_salt: str, beginning: list[int]) -> None:
        pass

    def abort(self, submission: Submission) -> None:
        self.aborted.append(submission)

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(TINY)


def ask(
    bring_up: Callable[[], Served], *requests: tuple[str, str, dict[str, Any] | None], wait: bool = True
) -> list[httpx.Response]:
    """Answers of an application whose model comes from `bring_up`; waits for it unless told not to."""

    async def talk() -> list[httpx.Response]:
        service = Service(resolve_settings({}), Metrics())
        app = create_app(service)
        done = asyncio.Event()
        service.load_in_background(bring_up, done.set)
        if wait:
            await done.wait()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost"
        ) as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return asyncio.run(talk())


def test_while_the_model_loads_the_server_is_alive_but_not_ready(loaded: Loaded) -> None:
    may_go_on = threading.Event()

    def bring_up() -> Served:
        may_go_on.wait()
        return Served("m", loaded, PlayedEngine())  # type: ignore[arg-type]

    try:
        health, ready, models, completion = ask(
            bring_up,
            ("GET", "/health", None),
            ("GET", "/ready", None),
            ("GET", "/v1/models", None),
            ("POST", "/v1/completions", BODY),
            wait=False,
        )
    finally:
        may_go_on.set()

    assert health.status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
    assert models.status_code == completion.status_code == 503
    assert completion.headers["retry-after"] == "1"
    assert completion.json()["error"] == {
        "message": "the model is still loading; try again soon",
        "type": "server_error",
        "param": None,
        "code": "model_loading",
    }


def test_while_the_server_stops_new_requests_are_sent_away(loaded: Loaded) -> None:
    async def talk() -> list[httpx.Response]:
        service = Service(resolve_settings({}), Metrics())
        done = asyncio.Event()
        service.load_in_background(lambda: Served("m", loaded, PlayedEngine()), done.set)  # type: ignore[arg-type]
        await done.wait()
        service.drain()
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [
                await client.get("/health"),
                await client.get("/ready"),
                await client.post("/v1/completions", json=BODY),
            ]

    health, ready, completion = asyncio.run(talk())

    assert health.status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"status": "stopping"})
    assert completion.status_code == 503
    assert completion.json()["error"]["code"] == "server_stopping"
    assert completion.headers["retry-after"] == "1"


def test_a_dead_engine_fails_health_and_requests(loaded: Loaded) -> None:
    engine = PlayedEngine()
    engine.is_alive = False

    health, ready, completion = ask(
        lambda: Served("m", loaded, engine),  # type: ignore[arg-type]
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("POST", "/v1/completions", BODY),
    )

    assert (health.status_code, health.json()) == (503, {"status": "engine_stopped"})
    assert (ready.status_code, ready.json()) == (503, {"status": "engine_stopped"})
    assert completion.status_code == 503
    assert "to restart it" in completion.json()["error"]["message"]


def test_a_failed_sequence_is_a_500_with_the_engines_words(loaded: Loaded) -> None:
    failing = PlayedEngine(lambda on: on(Output(finish_reason=FinishReason.ERROR, error="a step failed")))

    whole, streamed = ask(
        lambda: Served("m", loaded, failing),  # type: ignore[arg-type]
        ("POST", "/v1/completions", BODY),
        ("POST", "/v1/completions", BODY | {"stream": True}),
    )

    assert whole.status_code == 500
    assert whole.json()["error"]["message"] == "a step failed"
    assert streamed.status_code == 200
    assert streamed.text == (
        'data: {"error":{"message":"a step failed","type":"server_error","param":null,'
        '"code":"engine_error"}}\n\n'
    )


def test_a_fault_of_ours_is_a_500_that_tells_nothing_but_where_to_look(loaded: Loaded) -> None:
    def fail(on_output: OnOutput) -> None:
        raise ZeroDivisionError("inner detail")

    (answer,) = ask(
        lambda: Served("m", loaded, PlayedEngine(fail)),  # type: ignore[arg-type]
        ("POST", "/v1/completions", BODY),
    )

    request_id = answer.headers["x-request-id"]
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == (
        f"internal error; the server's log has details under {request_id}"
    )


def test_outputs_that_are_ready_together_come_as_one(loaded: Loaded) -> None:
    def play(on_output: OnOutput) -> None:
        for text in ("a", "b", "c"):
            on_output(Output(text, token_ids=(5,)))
        on_output(Output("d", token_ids=(5,), finish_reason=FinishReason.LENGTH))

    (answer,) = ask(
        lambda: Served("m", loaded, PlayedEngine(play)),  # type: ignore[arg-type]
        ("POST", "/v1/completions", BODY | {"stream": True}),
    )

    assert answer.text.count("data: ") == 2
    assert '"text":"abcd"' in answer.text
