"""Fixtures: a real browser with the page of a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.server.harness import LociServer
from tests.server.web.pages import CHROMIUM, FLAGS, set_up


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, server: LociServer) -> Iterator[Page]:
    """The page, connected; what went wrong in it, and requests to elsewhere, fail the test."""
    troubles: list[str] = []
    opened = browser.new_page()
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda line: troubles.append(line.text) if "Policy" in line.text else None)
    mine = (server.url, f"blob:{server.url}")
    opened.on("request", lambda asked: None if asked.url.startswith(mine) else troubles.append(asked.url))
    set_up(opened, server.url)
    yield opened
    opened.close()
    assert troubles == []


@pytest.fixture(scope="module")
def renderer(browser: Browser, server: LociServer) -> Iterator[Page]:
    """A page whose scripts are tried one by one; a breach of its policy fails the tests."""
    troubles: list[str] = []
    opened = browser.new_page()
    opened.on("console", lambda line: troubles.append(line.text) if "Policy" in line.text else None)
    opened.goto(server.url)
    yield opened
    opened.close()
    assert troubles == []
