"""The chat page in a real browser: it talks to a real server and to nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Literal

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from server.chat_page import PAGE_PATHS
from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer, eventually

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


def stored(question: str, answer: str) -> str:
    """The script that leaves a conversation in the tab, to be shown after a reload."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns[1] |= {"reasoning": "", "note": ""}
    return f"sessionStorage.setItem('loci.conversation', {json.dumps(json.dumps(turns))})"


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


@pytest.mark.slow
@needs_chromium
def test_turns_follow_each_other_and_survive_a_reload(page: Page) -> None:
    say(page, "Hello")
    say(page, "And again")

    expect(page.locator(".question")).to_have_count(2)
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator(".figures").last).to_contain_text("12 tokens")
    expect(page.locator(".figures").last).to_contain_text("stopped at the token limit")
    before = page.locator(".answer > .text").last.inner_text()
    page.reload()
    expect(page.locator(".question")).to_have_count(2)
    assert page.locator(".answer > .text").last.inner_text() == before
    page.get_by_role("button", name="New").click()
    expect(page.locator("#messages > li")).to_have_count(0)


@pytest.mark.slow
@needs_chromium
def test_an_answer_can_be_asked_for_again_and_a_question_changed(page: Page) -> None:
    say(page, "Hello")
    first = page.locator(".answer > .text").last.inner_text()
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".figures").last).to_contain_text("12 tokens")
    assert page.locator(".answer > .text").last.inner_text() == first  # temperature 0

    say(page, "More")
    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Message")).to_have_value("Hello")
    say(page, "Goodbye")
    expect(page.locator(".question")).to_have_count(1)
    expect(page.locator(".question .text")).to_have_text("Goodbye")


@pytest.mark.slow
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
    eventually(lambda: server.metric("loci_sequences_running") == 0, "the slot is free", deadline_s=10)


@pytest.mark.slow
@needs_chromium
def test_everything_can_be_done_without_a_mouse(page: Page, server: LociServer) -> None:
    def move_to(name: str, key: str = "Shift+Tab") -> None:
        for _ in range(20):
            page.keyboard.press(key)
            if page.evaluate("document.activeElement.textContent.trim()") == name:
                return
        raise AssertionError(f"the keyboard does not reach {name}")

    page.keyboard.type("Hello")  # where one writes has the focus from the beginning
    page.keyboard.press("Enter")
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    expect(page.get_by_label("Message")).to_be_focused()

    move_to("Settings")
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).not_to_be_visible()
    page.keyboard.press("Enter")
    page.get_by_label("Maximum tokens per answer").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("1900")
    page.keyboard.press("Enter")
    move_to("Retry", "Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".answer > .text")).not_to_be_empty()
    move_to("Stop", "Tab")
    page.keyboard.press("Space")

    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.get_by_label("Message")).to_be_focused()
    eventually(lambda: server.metric("loci_sequences_running") == 0, "the slot is free", deadline_s=10)


@pytest.mark.slow
@needs_chromium
def test_on_a_phone_return_begins_a_line_and_nothing_sticks_out(browser: Browser, server: LociServer) -> None:
    size: ViewportSize = {"width": 360, "height": 640}
    context = browser.new_context(viewport=size, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.goto(server.url)
    page.evaluate(LIMITED)
    page.evaluate(
        stored(
            "wide `code` " + "x" * 300, "```\n" + "y" * 300 + "\n```\n\n|a|b|\n|-|-|\n|" + "z" * 200 + "|1|"
        )
    )
    page.reload()
    expect(page.locator("#model")).to_have_text(TINY.name)
    page.get_by_label("Message").tap()
    page.keyboard.type("One")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Message")).to_have_value("One\ntwo")
    page.get_by_role("button", name="Send").tap()
    expect(page.locator(".figures").last).to_contain_text("12 tokens")
    page.set_viewport_size({"width": size["width"], "height": 340})  # as when a keyboard opens
    page.wait_for_function("scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 2")

    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    letters_px = page.locator("#prompt").evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
    assert letters_px >= 16  # phones zoom into smaller ones
    for name in ("New", "Settings", "Send"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None
        assert box["height"] >= 24  # WCAG's least size of a target
    context.close()


@pytest.mark.slow
@needs_chromium
def test_what_a_model_writes_cannot_act_on_the_page(page: Page) -> None:
    page.evaluate(
        stored(
            "<b>Hi</b>", "<img src=x onerror='window.harmed = 1'><script>window.harmed = 1</script> *safe*"
        )
    )
    page.reload()

    expect(page.locator(".answer em")).to_have_text("safe")
    expect(page.locator(".question .text")).to_have_text("<b>Hi</b>")
    assert page.locator(".answer img, .answer script, .question b").count() == 0
    assert page.evaluate("window.harmed") is None


@pytest.mark.slow
@needs_chromium
def test_settings_reach_the_server(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Maximum tokens per answer").fill("3")
    page.get_by_role("button", name="Save").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hello")

    body = asked.value.post_data_json or {}
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert body["max_completion_tokens"] == 3
    assert body["temperature"] == 0
    expect(page.locator(".figures")).to_contain_text("3 tokens")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@needs_chromium
def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Browser, start_server: StartServer) -> None:
    guarded = start_server(TINY, "--api-key", "secret").await_ready()
    page = browser.new_page()
    page.goto(guarded.url)
    expect(page.get_by_role("alert")).to_have_text("This server requires an API key.")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Save").click()

    expect(page.locator("#model")).to_have_text(TINY.name)
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('loci.key')") == "secret"
    page.close()


@pytest.mark.slow
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

    expect(page.locator("#strip dt")).to_have_text(
        ["VRAM 0", "VRAM 1", "DRAM", "NVMe", "Stalled", "Context", "Tokens/s"]
    )
    # Of the answer that has just ended, not of the time since the page was opened.
    expect(page.locator(".speed dd")).to_have_text(re.compile(r"^\d+\.\d$"))
    nvme = str(page.locator(".nvme").get_attribute("title"))
    assert "of 40 experts are here" in nvme
    shown = re.search(r"([1-9]\d*) % of expert uses were served from here just now", nvme)
    assert shown is not None
    # Some of the answer may have been computed before the page's first reading, so not more can be said.
    assert tiered.metric("loci_expert_hits_total", tier="nvme") > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
    page.close()


@pytest.mark.slow
@needs_chromium
def test_the_strip_tells_of_what_changed_between_two_readings(renderer: Page) -> None:
    def metrics(found: int, missed: int) -> str:
        return (
            'loci_tier_memory_bytes{tier="dram"} 1000\nloci_experts{tier="nvme"} 5\n'
            f'loci_experts_computed_total {found + missed}\nloci_expert_hits_total{{tier="dram"}} {found}\n'
            f'loci_expert_hits_total{{tier="nvme"}} {missed}\n'
        )

    script = """async ([before, now]) => {
        const { Reading, figures } = await import("/web/strip.js");
        return figures(new Reading(now, 2000), new Reading(before, 1000)).map((cell) => cell.title);
    }"""
    dram, nvme, *_ = renderer.evaluate(script, [metrics(90, 10), metrics(93, 11)])
    assert "75 % of expert uses were served from here just now" in dram
    assert "25 % of expert uses were served from here just now" in nvme
    dram, nvme, *_ = renderer.evaluate(script, [metrics(90, 10), metrics(90, 10)])
    assert "90 % of expert uses were served from here since startup" in dram
    assert "10 % of expert uses were served from here since startup" in nvme


@pytest.mark.slow
@needs_chromium
def test_a_refusal_is_shown_where_the_answer_would_be(page: Page) -> None:
    say(page, "word " * 3000)

    expect(page.get_by_role("alert")).to_contain_text("context")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Hello")
    assert [message["content"] for message in (asked.value.post_data_json or {})["messages"]] == ["Hello"]
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.slow
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


@pytest.mark.slow
@needs_chromium
def test_tables_and_code_become_elements(renderer: Page) -> None:
    table = shown(renderer, "| a | b |\n|---|--:|\n| 1 | `x` |")
    code = shown(renderer, "```python\nif a < b:\n    pass")

    assert '<th class="left" scope="col">a</th><th class="right" scope="col">b</th>' in table
    assert '<td class="right"><code>x</code></td>' in table
    assert "<code>if a &lt; b:\n    pass</code>" in code
    assert "<span>python</span>" in code


@pytest.mark.slow
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


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("piece", ["*a ", "**a", "`", "[", "> ", "_~*", "- ", "|a", "[a](", "h", "https://"])
def test_long_runs_of_marks_do_not_hold_the_page(renderer: Page, piece: str) -> None:
    renderer.set_default_timeout(20_000)
    assert "a" in shown(renderer, piece * 3000 + "a")
