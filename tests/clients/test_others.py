"""Tests of llama.cpp's and vLLM's servers that a client could have written pass; the page lists them."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.clients.others.apart import LEFT
from tests.clients.others.checks import KEY, ORIGIN, Asked, Check
from tests.clients.others.page import CHECKS, PAGE, text
from tests.server.harness import TINY, LociServer


def asked(server: LociServer) -> Iterator[Asked]:
    with (
        httpx.Client(base_url=server.url, timeout=60) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as sdk,
        anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=60) as claude,
    ):
        yield Asked(http, sdk, claude)


def started(tmp_path_factory: pytest.TempPathFactory, *flags: str) -> Iterator[Asked]:
    server = LociServer(tmp_path_factory.mktemp("others"), [TINY, "--max-num-seqs", "4", *flags])
    try:
        yield from asked(server.await_ready())
    finally:
        server.kill()


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A server that answers to any model's name."""
    yield from started(tmp_path_factory, "--any-model")


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """A server that wants a key, and answers pages of another origin."""
    yield from started(tmp_path_factory, "--api-key", KEY, "--cors-origins", ORIGIN)


# A request may answer for tests of several names.
ONCE = list({check.ask: check for check in CHECKS}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", ONCE, ids=lambda check: f"{check.folder.partition(':')[0]}{check.ask.__name__}"
)
def test_what_another_servers_test_asks_is_answered(check: Check, request: pytest.FixtureRequest) -> None:
    check.ask(request.getfixturevalue("keyed_server" if check.keyed else "open_server"))


def test_the_page_lists_every_check_and_what_is_left_out() -> None:
    assert PAGE.read_text() == text()


def test_no_test_is_both_asked_and_left_out() -> None:
    asked = {(check.folder, check.file, check.test) for check in CHECKS}

    for left in LEFT:
        for name in left.tests.split(", "):
            assert (left.folder, left.file, name) not in asked
