"""The chat page in a real browser: it talks to a real server and to nothing else."""

from __future__ import annotations

from typing import Literal

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect

from server.chat_page import PAGE_PATHS
from server.openai.requests import SamplingFields
from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer, eventually
from tests.server.web.pages import await_words, limited, needs_chromium, say, set_up, show, slow_down, write


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
def test_escape_stops_an_answer_and_its_sequence(page: Page, server: LociServer) -> None:
    set_up(page, server.url, limited(1900, "ignore_eos: 'true'"))
    slow_down(page)
    write(page, "Hello")
    await_words(page)
    page.keyboard.press("Escape")

    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.locator(".answer .text").first).not_to_be_empty()
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

    set_up(page, server.url, limited(more="ignore_eos: 'true'"))
    page.keyboard.type("Hello")  # where one writes has the focus from the beginning
    page.keyboard.press("Enter")
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()

    move_to("Settings")
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).not_to_be_visible()
    page.keyboard.press("Enter")
    page.get_by_label("Maximum tokens").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("1900")
    page.keyboard.press("Enter")
    slow_down(page)
    move_to("Retry", "Tab")
    page.keyboard.press("Enter")
    await_words(page)
    move_to("Stop", "Tab")
    page.keyboard.press("Space")

    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    eventually(lambda: server.metric("loci_sequences_running") == 0, "the slot is free", deadline_s=10)


@pytest.mark.slow
@needs_chromium
def test_on_a_phone_return_begins_a_line_and_nothing_sticks_out(browser: Browser, server: LociServer) -> None:
    size: ViewportSize = {"width": 360, "height": 640}
    context = browser.new_context(viewport=size, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(10_000)
    set_up(page, server.url)
    wide = "```py\n" + "y" * 300 + "\n```\n\n|a|b|\n|-|-|\n|" + "z" * 200 + "|1|\n\n$$" + "x + " * 99 + "x$$"
    show(page, "wide `code` " + "x" * 300, wide)
    page.get_by_label("Message", exact=True).tap()
    page.keyboard.type("One")
    page.keyboard.press("Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Message", exact=True)).to_have_value("One\ntwo")
    page.get_by_role("button", name="Send").tap()
    expect(page.locator(".figures").last).to_contain_text("12 tokens")
    page.set_viewport_size({"width": size["width"], "height": 340})  # as when a keyboard opens
    page.wait_for_function("scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 2")

    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate("document.documentElement.scrollHeight") <= 340  # only the conversation scrolls
    letters_px = page.locator("#prompt").evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
    assert letters_px >= 16  # phones zoom into smaller ones
    for name in ("Conversations", "New", "Settings", "Attach", "Send"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box is not None
        assert box["height"] >= 24  # WCAG's least size of a target
    context.close()


@pytest.mark.slow
@needs_chromium
def test_what_a_model_writes_cannot_act_on_the_page(page: Page) -> None:
    show(
        page, "<b>Hi</b>", "<img src=x onerror='window.harmed = 1'><script>window.harmed = 1</script> *safe*"
    )

    expect(page.locator(".answer em")).to_have_text("safe")
    expect(page.locator(".question .text")).to_have_text("<b>Hi</b>")
    assert page.locator(".answer img, .answer script, .question b").count() == 0
    assert page.evaluate("window.harmed") is None


@pytest.mark.slow
@needs_chromium
def test_settings_reach_the_server(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Maximum tokens").fill("3")
    page.get_by_text("More sampling settings").click()
    page.get_by_label("Stop at these texts").fill("End.\n\tStop")
    page.get_by_label("Token biases").fill("nothing")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_contain_text("nothing")  # and the dialog stays
    page.get_by_label("Token biases").fill("7: -100\n8=2.5")
    page.get_by_label("Seed").fill("12")
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
    assert body["stop"] == ["End.", "\tStop"]
    assert body["logit_bias"] == {"7": -100, "8": 2.5}
    assert body["seed"] == 12
    expect(page.locator(".figures")).to_contain_text("3 tokens")


@pytest.mark.slow
@needs_chromium
def test_every_sampling_field_of_the_server_can_be_set(renderer: Page) -> None:
    offered = renderer.evaluate("[...document.querySelectorAll('#settings-form [name]')].map((e) => e.name)")

    assert set(SamplingFields.model_fields) <= set(offered)


@pytest.mark.slow
@needs_chromium
def test_reasoning_is_folded_until_it_is_opened(page: Page, server: LociServer) -> None:
    set_up(page, server.url, limited(more="reasoning_effort: 'high'"))
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
    show(
        page,
        "Hello",
        '*one* `two` \\(x^2\\)\n\n```py\ndef f(): # note\n    return "a" + 1\n```\n\n$$\\sqrt x$$',
    )
    expect(page.locator(".hljs-keyword").first).to_be_visible()
    expect(page.locator("math")).to_have_count(2)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".versions")).to_contain_text("1/2")
    say(page, "word " * 3000)
    expect(page.get_by_role("alert")).to_be_visible()
    page.locator("#conversations summary").first.click()
    page.locator("#choose-files").set_input_files({"name": "a.txt", "mimeType": "", "buffer": b"one"})
    expect(page.locator("#files li")).to_have_count(1)
    on_page = Axe().run(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("More sampling settings").click()
    in_settings = Axe().run(page)

    assert on_page.violations_count == 0, on_page.generate_report()
    assert in_settings.violations_count == 0, in_settings.generate_report()


@pytest.mark.slow
@needs_chromium
def test_a_key_is_asked_for_once_and_stays_in_the_tab(browser: Browser, start_server: StartServer) -> None:
    guarded = start_server(TINY, "--api-key", "secret").await_ready()
    page = browser.new_page()
    page.goto(guarded.url)
    expect(page.get_by_role("alert")).to_have_text("This server requires an API key.")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("alert")).to_have_text("The server does not accept this API key.")
    page.keyboard.press("Escape")
    with page.expect_response("**/v1/models"):  # the page goes on asking, but not the person
        pass
    expect(page.locator("#model")).to_have_text("needs an API key")
    expect(page.get_by_label("API key")).not_to_be_visible()
    write(page, "Hello")
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Save").click()

    expect(page.locator("#model")).to_have_text(TINY.name)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('loci.key')") == "secret"
    page.close()


@pytest.mark.slow
@needs_chromium
def test_a_refusal_is_seen_stays_with_its_question_and_is_not_sent_again(page: Page) -> None:
    show(page, "Hello", "word\n\n" * 60)  # more than the window holds
    say(page, "word " * 3000)

    refusal = page.get_by_role("alert")
    expect(refusal).to_contain_text("context")
    box, composer = refusal.bounding_box(), page.locator("#composer").bounding_box()
    assert box is not None
    assert composer is not None
    assert box["y"] + box["height"] <= composer["y"]
    page.reload()
    expect(refusal).to_contain_text("context")
    expect(page.locator("#model")).to_have_text(TINY.name)
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "And now?")
    sent = [message["content"][:8] for message in (asked.value.post_data_json or {})["messages"]]
    assert sent == ["Hello", "word\n\nwo", "And now?"]
    expect(page.locator(".figures").last).to_contain_text("12 tokens")


@pytest.mark.slow
@needs_chromium
def test_a_server_that_dies_is_said_to_be_gone_and_nothing_is_lost(
    browser: Browser, start_server: StartServer
) -> None:
    mortal = start_server(TINY).await_ready()
    page = browser.new_page()
    set_up(page, mortal.url, limited(1900, "ignore_eos: 'true'"))
    write(page, "Hello")
    await_words(page)
    mortal.kill()

    expect(page.get_by_role("alert")).to_contain_text(
        "The connection was lost before the answer was complete"
    )
    expect(page.locator("#model")).to_contain_text("the server does not answer")
    expect(page.locator("#strip")).to_be_hidden()
    write(page, "Are you there?")
    expect(page.locator("#notice")).to_contain_text("Not sent")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Are you there?")
    page.close()
