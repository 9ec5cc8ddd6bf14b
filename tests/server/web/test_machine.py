"""The chat page's second view: the machine as a picture, in a real browser with a real server."""

from __future__ import annotations

import re
from typing import Any, Literal

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.server.conftest import StartServer
from tests.server.harness import TINY, LociServer
from tests.server.web.pages import needs_chromium, say, set_up

TIERED = ("--dram-budget", "1.34MB", "--devices", "virtual:64KB@100MB/s,virtual:64KB@100MB/s")
# Opaque colours of the painted cells, mixed with nothing: how many there are.
COLOURS = """() => {
    const { width, height } = document.querySelector("#experts");
    const pixels = document.querySelector("#experts").getContext("2d").getImageData(0, 0, width, height).data;
    const seen = new Set();
    for (let at = 0; at < pixels.length; at += 4)
        if (pixels[at + 3] > 0) seen.add(pixels.slice(at, at + 3).map((each) => each >> 4).join());
    return seen.size;
}"""


def asked(server: LociServer) -> None:
    body = {"model": TINY.name, "prompt": "A test of tiers", "max_tokens": 24, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


@pytest.mark.slow
@needs_chromium
def test_the_machine_is_shown_as_a_picture(browser: Browser, start_server: StartServer) -> None:
    tiered = start_server(TINY, *TIERED).await_ready()
    asked(tiered)
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(10_000)
    set_up(page, tiered.url)
    page.get_by_role("button", name="Machine").tap()

    expect(page.locator("#tiers strong")).to_have_text(["VRAM 0", "VRAM 1", "DRAM", "NVMe"])
    expect(page.locator("#tiers .served").first).to_contain_text("% of uses")
    expect(page.locator("#tiers li").last).to_contain_text("experts on disk only")
    expect(page.locator("#links tbody th").filter(has_text="nvme")).to_have_count(1)
    expect(page.locator("#waiting li").first).to_contain_text("0 in the queue")
    expect(page.locator("#experts")).to_have_attribute("aria-label", re.compile(r"\d+ in DRAM, \d+ in NVMe"))
    assert page.evaluate(COLOURS) >= 4
    page.get_by_text("As a table").tap()
    rows = page.locator("#expert-counts tbody tr").all_inner_texts()
    told = httpx.get(f"{tiered.url}/tiers").json()
    assert len(rows) == len(told["layers"])
    for row, layer in zip(rows, told["layers"], strict=True):
        assert sum(map(int, row.split()[1:])) == len(layer["experts"])

    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing sticks out on a phone
    assert page.url.endswith("#machine")
    page.go_back()
    expect(page.locator("#machine")).to_be_hidden()
    expect(page.get_by_label("Message", exact=True)).to_be_visible()
    context.close()


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_who_sees_or_types_otherwise(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    say(page, "Hello")
    button = page.get_by_role("button", name="Machine")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#experts-note")).to_contain_text("A row for each of")
    expect(button).to_have_attribute("aria-pressed", "true")
    page.get_by_text("As a table").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#expert-counts")).to_be_visible()
    page.get_by_label("hottest first").focus()
    page.keyboard.press("Space")
    expect(page.get_by_label("hottest first")).not_to_be_checked()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()

    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_be_visible()  # the conversation is as it was
    page.keyboard.press("Enter")
    page.get_by_role("button", name="New").click()
    expect(page.locator("#machine")).to_be_hidden()
    expect(page.locator("#welcome")).to_be_visible()


@pytest.mark.slow
@needs_chromium
def test_heat_is_of_late_or_of_all(renderer: Page) -> None:
    script = """async ([layers, before]) => {
        const { heatOf } = await import("/web/machine.js");
        return heatOf(layers, before);
    }"""

    def heat(uses: list[float] | None, before: list[float] | None) -> Any:
        layers = [{"layer": 0, "experts": [0, 0, 1], "uses": uses}]
        found = renderer.evaluate(script, [layers, None if before is None else [before]])
        return None if found is None else found[0]

    assert heat([16, 4, 0], None) == [1, 0.5, 0]  # the square root of shares of the most used
    assert heat([16, 8, 1], [16, 4, 0]) == [0, 1, 0.5]
    assert heat([16, 4, 0], [16, 4, 0]) == [1, 0.5, 0]  # nothing was used since
    assert heat([8, 6, 0], [16, 4, 0]) == [0, 1, 0]  # old uses have faded
    assert heat(None, None) is None


@pytest.mark.slow
@needs_chromium
def test_what_waits_is_said_with_its_share_of_the_time(renderer: Page) -> None:
    def metrics(stalled: float) -> str:
        return (
            "loci_sequences_running 1\nloci_sequences_waiting 3\nloci_sequences_aside 2\n"
            f'loci_stall_seconds_total{{link="nvme",reason="demand"}} {stalled}\n'
            'loci_stall_seconds_total{link="vram:0",reason="demand"} 0.01\n'
        )

    script = """async ([before, now]) => {
        const { Reading } = await import("/web/reading.js");
        const { waitingOf } = await import("/web/machine.js");
        return waitingOf(new Reading(now, 2000), new Reading(before, 1000));
    }"""
    assert renderer.evaluate(script, [metrics(1.0), metrics(1.25)]) == [
        "1 request is answered, 3 in the queue, 2 put aside",
        "Computing waits for nvme, for what a step needs: 25 % of the time now, 1.3 s in all",
    ]


def test_tiers_are_told_as_numbers(http: httpx.Client) -> None:
    told = http.get("/tiers").json()
    assert told["object"] == "tiers"
    assert told["tiers"] == ["dram", "nvme"]
    assert all(set(layer["experts"]) == {0} for layer in told["layers"])
    assert all(layer["uses"] is None for layer in told["layers"])  # nothing moves


@pytest.mark.slow
def test_tiers_count_uses_and_need_a_key(start_server: StartServer) -> None:
    guarded = start_server(TINY, *TIERED, "--api-key", "secret").await_ready()
    assert httpx.get(f"{guarded.url}/tiers").status_code == 401
    headers = {"Authorization": "Bearer secret"}
    before = httpx.get(f"{guarded.url}/tiers", headers=headers).json()
    body = {"model": TINY.name, "prompt": "A test", "max_tokens": 16, "ignore_eos": True}
    httpx.post(f"{guarded.url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
    after = httpx.get(f"{guarded.url}/tiers", headers=headers).json()
    assert after["tiers"] == ["vram:0", "vram:1", "dram", "nvme"]
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert sum(new["uses"]) > sum(old["uses"])
        assert set(new["experts"]) <= {0, 1, 2, 3}
