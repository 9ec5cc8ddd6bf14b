"""The strip of tiers, and what the page says of waiting and of pace."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer
from tests.server.web.pages import needs_chromium, say, set_up, write


@pytest.mark.slow
@needs_chromium
def test_the_strip_shows_every_tier(browser: Browser, start_server: StartServer) -> None:
    devices = "virtual:64KB@100MB/s,virtual:64KB@100MB/s"
    tiered = start_server(TINY, "--dram-budget", "1.34MB", "--devices", devices).await_ready()
    page = browser.new_page(viewport={"width": 390, "height": 780})
    set_up(page, tiered.url)
    say(page, "Hello")

    expect(page.locator("#strip dt")).to_have_text(
        ["VRAM 0", "VRAM 1", "DRAM", "NVMe", "Stalled", "Tokens/s", "Context"]
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
        const { Reading } = await import("/web/reading.js");
        const { figures } = await import("/web/strip.js");
        return figures(new Reading(now, 2000), new Reading(before, 1000)).map((cell) => cell.title);
    }"""
    dram, nvme, *_ = renderer.evaluate(script, [metrics(90, 10), metrics(93, 11)])
    assert "75 % of expert uses were served from here just now" in dram
    assert "25 % of expert uses were served from here just now" in nvme
    dram, nvme, *_ = renderer.evaluate(script, [metrics(90, 10), metrics(90, 10)])
    assert "90 % of expert uses were served from here since startup" in dram

    def drafts(made: int, right: int) -> str:
        names = ("loci_drafted_tokens_total", "loci_accepted_draft_tokens_total")
        lines = (
            f'{name}{{drafter="lookup"}} {count}' for name, count in zip(names, (made, right), strict=True)
        )
        return metrics(90, 10) + "\n".join(lines) + "\n"

    told = renderer.evaluate(script, [drafts(5, 3), drafts(9, 6)])
    assert any("Of 4 tokens guessed ahead, 3 were right just now" in title for title in told)
    told = renderer.evaluate(script, [drafts(9, 6), drafts(9, 6)])
    assert not any("guessed ahead" in title for title in told)
    assert "10 % of expert uses were served from here since startup" in nvme


@pytest.mark.slow
@needs_chromium
def test_rates_are_never_too_high(renderer: Page) -> None:
    # The first reading was long under way: the 90 tokens came since it was asked for, not since it was there.
    script = """async () => {
        const { Reading } = await import("/web/reading.js");
        const { figures } = await import("/web/strip.js");
        const { paceOf } = await import("/web/chat.js");
        const name = "loci_generated_tokens_total";
        const before = new Reading(`${name} 10`, 1890, 1000);
        const cells = figures(new Reading(`${name} 100`, 1900, 1895), before);
        const burst = paceOf({ usage: { completion_tokens: 90 }, firstMs: 900, ms: 10 });
        const steady = paceOf({ usage: { completion_tokens: 91 }, firstMs: 900, ms: 3000 });
        return [cells.find((cell) => cell.kind === "speed").value, burst, steady];
    }"""
    strip, burst, steady = renderer.evaluate(script)
    assert strip == "100.0"
    assert burst == "90 tokens · first after 0.9 s"
    assert steady == "91 tokens · 30.0 tokens/s · first after 0.9 s"


@pytest.mark.slow
@needs_chromium
def test_a_silent_answer_says_what_it_waits_for(renderer: Page) -> None:
    script = """async () => {
        const { Answer } = await import("/web/answer.js");
        const turn = { id: "a", role: "assistant", content: "", reasoning: "", note: "" };
        const run = { progress: null, began: performance.now() - 9000 };
        const answer = new Answer(turn, [turn], {}, run);
        const wait = answer.item.querySelector(".wait");
        const said = [];
        const say = () => said.push(wait.hidden ? "" : wait.textContent);
        answer.tellQueue(3), say();
        run.progress = { total: 500, cache: 100, processed: 200, time_ms: 5 };
        answer.draw(), say();
        const { value, max } = wait.querySelector("progress");
        turn.content = "Well";
        answer.draw(), say();
        return [...said, value / max];
    }"""
    assert renderer.evaluate(script) == [
        "Waiting for a free place: 3 requests are queued",
        "Reading the prompt: 200 of 500 tokens, 100 of them known from earlier",
        "",
        0.4,
    ]


@pytest.mark.slow
@needs_chromium
def test_the_page_shows_how_much_of_a_long_prompt_was_read(
    browser: Browser, start_server: StartServer
) -> None:
    slow = start_server(TINY, "--prefill-chunk", "1", "--dram-budget", "1500kB").await_ready()
    page = browser.new_page()
    set_up(page, slow.url)
    write(page, "word " * 500)
    expect(page.locator(".wait")).to_have_text(
        re.compile(r"^Reading the prompt: [1-9]\d* of 1[0-9]{3} tokens$")
    )
    page.keyboard.press("Escape")

    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.locator(".wait")).to_be_hidden()
    page.close()


@pytest.mark.slow
@needs_chromium
def test_the_context_is_that_of_the_shown_conversation(page: Page, server: LociServer) -> None:
    context = page.locator(".context")
    with page.expect_response("**/v1/chat/completions") as answered:
        say(page, "Hello")
    usage = [line for line in answered.value.text().splitlines() if '"usage":{' in line][-1]
    counted = json.loads(usage.removeprefix("data: "))["usage"]
    room = httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"]
    expect(context).to_have_attribute("title", re.compile(f"used {counted['total_tokens']} of {room} tokens"))
    page.get_by_role("button", name="New").click()
    expect(context).to_have_attribute("title", re.compile(f"^The model has {room} tokens"))
