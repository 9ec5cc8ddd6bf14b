"""The chat page in a real browser: it talks to a real server and to nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Literal

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from server.chat_page import PAGE_PATHS
from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
LIMITED = "localStorage.setItem('loci.settings', JSON.stringify({max_tokens: '12', temperature: '0'}))"

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)


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
    opened.on(
        "request", lambda asked: None if asked.url.startswith(server.url) else troubles.append(asked.url)
    )
    opened.goto(server.url)
    opened.evaluate(LIMITED)
    opened.reload()
    expect(opened.locator("#model")).to_have_text(TINY.name)
    yield opened
    opened.close()
    assert troubles == []


@pytest.fixture(scope="module")
def renderer(browser: Browser, server: LociServer) -> Iterator[Page]:
    """A page whose scripts are tried one by one."""
    opened = browser.new_page()
    opened.goto(server.url)
    yield opened
    opened.close()


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".answer").last).not_to_have_class("answer growing", timeout=30_000)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def shown(page: Page, markdown: str) -> str:
    """The HTML that the page's renderer makes of a text."""
    script = """async (text) => {
        const { render } = await import("/web/markdown.js");
        const box = document.createElement("div");
        render(box, text);
        return box.innerHTML;
    }"""
    return str(page.evaluate(script, markdown))


def test_the_page_and_its_files_are_served_under_a_strict_policy(http: httpx.Client) -> None:
    for path in PAGE_PATHS:
        answer = http.get(path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http:" not in policy
        assert "https:" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.head("/").status_code == 200
    assert http.get("/web/nothing.js").status_code == 404
    assert http.get("/web/..%2Fapp.py").status_code == 404


@needs_chromium
def test_turns_follow_each_other_and_survive_a_reload(page: Page) -> None:
    say(page, "Hello")
    say(page, "And again")

    expect(page.locator(".question")).to_have_count(2)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".figures").last).to_contain_text("12 tokens")
    expect(page.locator(".figures").last).to_contain_text("ended by the limit")
    before = page.locator(".answer > .text").last.inner_text()
    page.reload()
    expect(page.locator(".question")).to_have_count(2)
    assert page.locator(".answer > .text").last.inner_text() == before
    page.get_by_role("button", name="New").click()
    expect(page.locator("#messages > li")).to_have_count(0)


@needs_chromium
def test_an_answer_can_be_asked_for_again_and_a_question_changed(page: Page) -> None:
    say(page, "Hello")
    first = page.locator(".answer > .text").last.inner_text()
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".figures").last).to_contain_text("12 tokens")
    assert page.locator(".answer > .text").last.inner_text() == first  # temperature 0

    say(page, "More")
    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Message")).to_have_value("Hello")
    say(page, "Goodbye")
    expect(page.locator(".question")).to_have_count(1)
    expect(page.locator(".question .text")).to_have_text("Goodbye")


@needs_chromium
def test_escape_stops_an_answer_and_its_sequence(page: Page, server: LociServer) -> None:
    page.evaluate(LIMITED.replace("'12'", "'1900'"))
    page.reload()
    expect(page.locator("#model")).to_have_text(TINY.name)
    page.get_by_label("Message").fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".answer > .text")).not_to_be_empty()
    page.keyboard.press("Escape")

    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.locator(".answer > .text").inner_text() != ""


@needs_chromium
def test_settings_reach_the_server(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Most tokens of an answer").fill("3")
    page.get_by_role("button", name="Save").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hello")

    body = asked.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert body["max_completion_tokens"] == 3
    assert body["temperature"] == 0
    expect(page.locator(".figures")).to_contain_text("3 tokens")


@needs_chromium
def test_reasoning_is_folded_until_it_is_opened(page: Page) -> None:
    page.evaluate(LIMITED.replace("{", "{reasoning_effort: 'high', "))
    page.reload()
    expect(page.locator("#model")).to_have_text(TINY.name)
    say(page, "Hello")

    thoughts = page.locator(".reasoning > .text")
    expect(thoughts).not_to_be_empty()
    expect(thoughts).not_to_be_visible()
    page.get_by_text("Thoughts").click()
    expect(thoughts).to_be_visible()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_who_sees_or_types_otherwise(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    say(page, "Hello")
    on_page = Axe().run(page)
    page.get_by_role("button", name="Settings").click()
    in_settings = Axe().run(page)

    assert on_page.violations_count == 0, on_page.generate_report()
    assert in_settings.violations_count == 0, in_settings.generate_report()


@needs_chromium
def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Browser, start_server: StartServer) -> None:
    guarded = start_server(TINY, "--api-key", "secret").await_ready()
    page = browser.new_page()
    page.goto(guarded.url)
    expect(page.get_by_role("alert")).to_have_text("This server wants an API key.")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Save").click()

    expect(page.locator("#model")).to_have_text(TINY.name)
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('loci.key')") == "secret"
    page.close()


@needs_chromium
def test_the_strip_shows_every_tier(browser: Browser, start_server: StartServer) -> None:
    devices = "virtual:64KB@100MB/s,virtual:64KB@100MB/s"
    tiered = start_server(TINY, "--dram-budget", "1.6MB", "--devices", devices).await_ready()
    page = browser.new_page(viewport={"width": 390, "height": 780})
    page.goto(tiered.url)
    page.evaluate(LIMITED)
    page.reload()
    expect(page.locator("#model")).to_have_text(TINY.name)
    say(page, "Hello")
    page.reload()  # which reads the metrics at once

    expect(page.locator("#strip dt")).to_have_text(
        ["VRAM 0", "VRAM 1", "DRAM", "NVMe", "Stalled", "Context", "Tokens/s"]
    )
    assert "of 40 experts are here" in str(page.locator(".nvme").get_attribute("title"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    page.close()


@needs_chromium
def test_a_refusal_is_shown_where_the_answer_would_be(page: Page) -> None:
    say(page, "word " * 3000)

    expect(page.get_by_role("alert")).to_contain_text("context")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hello")
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == ["Hello"]
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    expect(page.get_by_role("alert")).to_have_count(0)


@needs_chromium
@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# One\n\ntwo **three**", "<h3>One</h3><p>two <strong>three</strong></p>"),
        ("*four* `five`", "<p><em>four</em> <code>five</code></p>"),
        ("snake_case_name and 2*3*4 = 24", "<p>snake_case_name and 2<em>3</em>4 = 24</p>"),
        ("- a\n- b\n  - c", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
        ("3. c\n4. d", '<ol start="3"><li>c</li><li>d</li></ol>'),
        ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
        ("**open `code", "<p>**open `code</p>"),
        ("***both***", "<p><strong><em>both</em></strong></p>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("~~gone~~ \\*kept\\*", "<p><del>gone</del> *kept*</p>"),
    ],
)
def test_markdown_becomes_elements(renderer: Page, text: str, html: str) -> None:
    assert shown(renderer, text) == html


@needs_chromium
def test_tables_and_code_become_elements(renderer: Page) -> None:
    table = shown(renderer, "| a | b |\n|---|--:|\n| 1 | `x` |")
    code = shown(renderer, "```python\nif a < b:\n    pass")

    assert '<th class="left" scope="col">a</th><th class="right" scope="col">b</th>' in table
    assert '<td class="right"><code>x</code></td>' in table
    assert "<code>if a &lt; b:\n    pass</code>" in code
    assert "<span>python</span>" in code


@needs_chromium
@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](data:text/html,x)",
        "![a](x.png)",
        "[a](  JAVASCRIPT:alert(1))",
        "```<img src=x onerror=alert(1)>\n</code></pre><script>1</script>\n```",
        '[a](https://x.example/"onmouseover="alert(1))',
    ],
)
def test_nothing_in_a_text_becomes_a_script_or_is_loaded(renderer: Page, text: str) -> None:
    html = shown(renderer, text)

    assert "<script" not in html
    assert "<img" not in html
    assert 'href="' not in html or 'href="https://' in html
    assert '"onmouseover=' not in html


@needs_chromium
@pytest.mark.parametrize("piece", ["*a ", "**a", "`", "[", "> ", "_~*", "- ", "|a", "[a](", "h", "https://"])
def test_long_runs_of_marks_do_not_hold_the_page(renderer: Page, piece: str) -> None:
    renderer.set_default_timeout(20_000)
    assert "a" in shown(renderer, piece * 3000 + "a")
