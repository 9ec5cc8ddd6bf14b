"""Pictures of the chat page for the documentation: a real server, a real browser, a real conversation.

Run: python tests/bench/pictures.py [MODEL] (default: the embedded one). Further arguments go to `loci serve`.
The README's picture, in which experts lie in every tier: demo --dram-budget 7MB
--devices virtual:2.2MB@25GB/s,virtual:2.2MB@25GB/s
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, expect, sync_playwright

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.server.harness import LociServer  # noqa: E402
from tests.server.test_chat_page import CHROMIUM, FLAGS  # noqa: E402

QUESTIONS = ("What is the capital of France?", "Write a short Python function that adds two numbers.")
DEMO_QUESTIONS = (
    "What does a cow eat?",
    "What is Loci?",
    "What is an expert?",
)  # what that model knows about
SETTINGS = "localStorage.setItem('loci.settings', JSON.stringify({max_tokens: '160', temperature: '0'}))"
DESKTOP: ViewportSize = {"width": 1180, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 780}


def main(arguments: list[str]) -> None:
    """Write docs/images/chat.png and chat-phone.png."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = LociServer(Path(folder), arguments)
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=DESKTOP)
            page.goto(server.await_ready().url)
            page.evaluate(SETTINGS)
            page.reload()
            for question in DEMO_QUESTIONS if arguments[:1] == ["demo"] else QUESTIONS:
                ask(page, question)
            picture(page, "chat.png")
            page.set_viewport_size(PHONE)
            picture(page, "chat-phone.png")
            browser.close()
        finally:
            server.kill()


def ask(page: Page, question: str) -> None:
    """Ask and wait for the whole answer."""
    page.get_by_label("Message").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)


def picture(page: Page, name: str) -> None:
    """Write one picture."""
    page.screenshot(path=ROOT / "docs" / "images" / name, animations="disabled")


if __name__ == "__main__":
    main(sys.argv[1:])
