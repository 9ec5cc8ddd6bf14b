"""What the tests of the chat page do again and again in a browser."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import Page, expect

from tests.server.harness import TINY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


def limited(tokens: int = 12, more: str = "") -> str:
    """The script that sets short answers which are always the same; `more` are further settings."""
    text = f"{{max_completion_tokens: '{tokens}', temperature: '0', {more}}}"
    return f"localStorage.setItem('loci.settings', JSON.stringify({text}))"


def set_up(page: Page, url: str, settings: str | None = None) -> None:
    """Open the page with these settings, connected."""
    page.goto(f"{url}/version")  # of the same origin, and quickly there
    page.evaluate(settings or limited())
    page.goto(url)
    expect(page.locator("#model")).to_have_text(TINY.name)


def write(page: Page, text: str) -> None:
    """Send a message."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def say(page: Page, text: str) -> None:
    """Send a message and wait for the end of the answer."""
    write(page, text)
    expect(page.locator(".answer").last).not_to_have_class("answer growing", timeout=30_000)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def slow_down(page: Page) -> None:
    """From now on answers arrive slowly, so that there is time to do something while they grow."""
    network = {"offline": False, "latency": 0, "downloadThroughput": 30_000, "uploadThroughput": -1}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", network)


def await_words(page: Page) -> None:
    """Wait until the growing answer has any."""
    expect(page.locator(".growing :is(.reasoning:not([hidden]), .text:not(:empty))").first).to_be_attached()


def show(page: Page, question: str, answer: str) -> None:
    """Show a kept conversation of these two turns."""
    script = """async ([question, answer]) => {
        const { Library } = await import("/web/library.js");
        const { Conversation } = await import("/web/conversation.js");
        const conversation = new Conversation({ changed: 1 });
        const first = conversation.add({ role: "user", content: question }, null);
        conversation.add({ role: "assistant", content: answer }, first);
        await (await Library.open()).put(conversation);
        location.hash = conversation.id;
    }"""
    page.evaluate(script, [question, answer])
    expect(page.locator(".answer")).to_have_count(1)
