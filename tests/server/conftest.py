"""Fixtures: server processes that end with the test (or session) that asked for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.harness import TINY, LociServer

StartServer = Callable[..., LociServer]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """A server with the tiny model and ordinary settings, shared by all tests that leave it as it is."""
    started = LociServer(tmp_path_factory.mktemp("server"), [TINY, "--max-num-seqs", "4"])
    try:
        yield started.await_ready()
    finally:
        started.kill()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Starts further servers: `start_server(model, "--flag", "value", LOCI_X="...")`."""
    started: list[LociServer] = []

    def start(*arguments: str | Path, **variables: str) -> LociServer:
        directory = tmp_path / f"server-{len(started)}"
        directory.mkdir()
        started.append(LociServer(directory, arguments, **variables))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture(scope="session")
def client(server: LociServer) -> Iterator[openai.OpenAI]:
    """The real SDK, talking to the shared server."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.fixture(scope="session")
def http(server: LociServer) -> Iterator[httpx.Client]:
    """A plain HTTP client on the shared server."""
    with httpx.Client(base_url=server.url, timeout=60) as plain:
        yield plain
