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
from tests.server.web.pages import CHROMIUM, FLAGS, limited, show  # noqa: E402

OTHERS = (("What is the capital of France?",), ("Write a short Python function that adds two numbers.",))
DEMO = (("What does a cow eat?",), ("What is Loci?", "What is an expert?"))  # what that model knows about
# Written for the picture: it shows how the page sets what a larger model writes.
SOFTMAX = r"""Softmax turns any numbers into probabilities:

\[ \operatorname{softmax}(x)_i = \frac{e^{x_i}}{\sum_{j=1}^{n} e^{x_j}} \]

Large \(x_i\) would overflow, so the largest is subtracted first; the result stays the same.

```python
def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max())  # at most 1
    return shifted / shifted.sum()
```
"""
DESKTOP: ViewportSize = {"width": 1180, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 780}


def main(arguments: list[str]) -> None:
    """Write docs/images/chat.png, chat-phone.png, machine.png and chat-dark.png."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = LociServer(Path(folder), arguments)
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport=DESKTOP)
            page.goto(server.await_ready().url)
            page.evaluate(limited(160))
            page.reload()
            for conversation in DEMO if arguments[:1] == ["demo"] else OTHERS:
                page.get_by_role("button", name="New").click()
                for question in conversation:
                    ask(page, question)
            picture(page, "chat.png")
            page.set_viewport_size(PHONE)
            picture(page, "chat-phone.png")
            page.set_viewport_size(DESKTOP)
            page.get_by_role("button", name="Machine").click()
            expect(page.locator("#tiers strong").first).to_be_visible()
            picture(page, "machine.png")
            page.get_by_role("button", name="Machine").click()
            page.emulate_media(color_scheme="dark")
            show(page, "How is softmax computed?", SOFTMAX)
            expect(page.locator("math")).to_have_count(2)
            expect(page.locator(".hljs-keyword").first).to_be_visible()
            picture(page, "chat-dark.png")
            browser.close()
        finally:
            server.kill()


def ask(page: Page, question: str) -> None:
    """Ask and wait for the whole answer."""
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)


def picture(page: Page, name: str) -> None:
    """Write one picture."""
    page.mouse.move(0, 0)  # nothing is pointed at
    page.screenshot(path=ROOT / "docs" / "images" / name, animations="disabled")


if __name__ == "__main__":
    main(sys.argv[1:])
