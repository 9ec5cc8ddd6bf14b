"""Conversations on the chat page: kept, found, renamed, taken along, deleted; and what happens within one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FilePayload, Page, expect

from tests.server.harness import LociServer
from tests.server.web.pages import await_words, limited, needs_chromium, say, set_up, show, slow_down, write


def entries(page: Page) -> list[str]:
    """What the list of conversations shows."""
    return page.locator("#conversations .open").all_inner_texts()


@pytest.mark.slow
@needs_chromium
def test_turns_and_the_draft_survive_a_reload_and_new_begins_another(page: Page) -> None:
    say(page, "Hello")
    say(page, "And again")
    expect(page.locator(".figures").last).to_contain_text("stopped at the token limit · 12 tokens")
    before = page.locator(".answer").last.inner_text()
    page.get_by_label("Message", exact=True).fill("Not said yet")
    page.locator("#choose-files").set_input_files({"name": "a.txt", "mimeType": "", "buffer": b"one"})
    expect(page.locator("#files li")).to_have_count(1)
    page.reload()

    expect(page.locator(".question")).to_have_count(2)
    assert page.locator(".answer").last.inner_text() == before
    expect(page.get_by_label("Message", exact=True)).to_have_value("Not said yet")
    expect(page.locator("#files li")).to_contain_text("a.txt")
    page.get_by_role("button", name="New").click()
    expect(page.locator("#messages > li")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    page.get_by_role("button", name="Hello", exact=True).click()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Not said yet")


@pytest.mark.slow
@needs_chromium
def test_conversations_are_found_renamed_exported_and_deleted(page: Page, tmp_path: Path) -> None:
    show(page, "About birds", "They *fly*.")
    page.get_by_role("button", name="New").click()
    show(page, "About fish", "They swim.")
    assert sorted(entries(page)) == ["About birds", "About fish"]

    page.get_by_label("Search conversations").fill("FLY birds")
    expect(page.locator("#conversations .open")).to_have_text(["About birds"])
    page.locator("#conversations summary").click()
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Title").fill("Of wings")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations .open")).to_have_text(["Of wings"])
    page.locator("#conversations summary").click()
    with page.expect_download() as one:
        page.get_by_role("button", name="Export", exact=True).click()
    assert one.value.suggested_filename == "Of wings.md"
    assert Path(one.value.path()).read_text() == (
        "# Of wings\n\n## Question\n\nAbout birds\n\n## Answer\n\nThey *fly*.\n"
    )
    page.get_by_role("button", name="Delete", exact=True).first.click()
    expect(page.locator("#no-conversations")).to_have_text("Nothing found.")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".answer em")).to_have_text("fly")
    page.get_by_label("Search conversations").fill("")
    expect(page.locator("#conversations .open")).to_have_count(2)
    with page.expect_download() as all_of_them:
        page.get_by_role("button", name="Export all").click()
    taken = all_of_them.value.path()
    texts = [each["turns"][1]["content"] for each in json.loads(Path(taken).read_text())]
    assert sorted(texts) == ["They *fly*.", "They swim."]
    page.locator("#conversations summary").last.click()
    page.get_by_role("button", name="Delete", exact=True).first.click()
    expect(page.locator("#conversations .open")).to_have_count(1)
    page.locator("#choose-import").set_input_files(taken)
    expect(page.locator("#notice")).to_contain_text("1 of 2 conversations")
    expect(page.locator("#conversations .open")).to_have_count(2)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(
    "damage",
    ["{", "{}", "[1]", '["turns"]', '"parent": "zzz"', '"content": 7', '"role": "system"', '"chosen": null'],
)
def test_what_is_no_export_is_not_imported(renderer: Page, damage: str) -> None:
    turn = '{"id": "a", "parent": "", "role": "user", "content": "x"}'
    record = f'{{"id": "{"0" * 24}", "title": "", "changed": 1, "turns": [{turn}], "chosen": {{}}}}'
    text = f"[{record}]" if damage.startswith('"') else damage
    for field in ('"parent": ""', '"content": "x"', '"role": "user"', '"chosen": {}'):
        if damage.startswith(field.partition(":")[0]):
            text = text.replace(field, damage)
    script = """async (text) => {
        const { Library } = await import("/web/library.js");
        const { importAll } = await import("/web/exchange.js");
        const library = await Library.open();
        await importAll(library, new File([text], "taken.json"));
        return [library.summaries.length, document.querySelector("#notice").textContent];
    }"""
    kept, said = renderer.evaluate(script, text)

    assert kept == 0
    assert "taken.json cannot be imported" in said


@pytest.mark.slow
@needs_chromium
def test_two_tabs_with_one_conversation_lose_nothing(browser: Browser, server: LociServer) -> None:
    context = browser.new_context()
    page, other = context.new_page(), context.new_page()
    set_up(page, server.url)
    show(page, "One", "Two")
    other.goto(page.url)
    say(page, "Three")
    expect(other.locator("li > .text").nth(2)).to_have_text("Three")
    expect(other.locator(".figures").last).to_contain_text("12 tokens")
    set_up(other, server.url, limited(1900, "ignore_eos: 'true'"))
    other.get_by_role("button", name="One", exact=True).click()
    slow_down(other)
    write(other, "Four")
    await_words(other)
    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("One, changed")
    page.get_by_role("button", name="Save").click()
    expect(other.locator(".question .text").first).to_have_text("One, changed")
    other.keyboard.press("Escape")
    expect(other.locator(".figures").last).to_contain_text("stopped")
    page.reload()

    expect(page.locator(".question .text")).to_have_text(["One, changed", "Three", "Four"])
    expect(page.locator(".figures").last).to_contain_text("stopped")
    context.close()


@pytest.mark.slow
@needs_chromium
def test_nothing_that_was_said_is_lost_by_saying_it_anew(page: Page) -> None:
    say(page, "Hello")
    say(page, "More")
    first = page.locator(".answer").first
    first.hover()
    first.get_by_role("button", name="Retry").click()
    expect(page.locator(".question")).to_have_count(1)  # the other version goes on elsewhere
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    expect(page.locator(".versions")).to_contain_text("2/2")
    page.get_by_role("button", name="Earlier version").press("Enter")
    expect(page.locator(".question .text")).to_have_text(["Hello", "More"])
    expect(page.get_by_role("button", name="Later version")).to_be_focused()

    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("Goodbye")
    page.get_by_label("Edit message").press("Control+Enter")
    expect(page.locator(".question .text")).to_have_text(["Goodbye"])
    expect(page.locator(".figures")).to_contain_text("12 tokens")
    page.reload()
    expect(page.locator(".question .text")).to_have_text(["Goodbye"])
    page.get_by_role("button", name="Earlier version").click()
    expect(page.locator(".question .text")).to_have_text(["Hello", "More"])


@pytest.mark.slow
@needs_chromium
def test_an_answer_that_ended_early_is_continued(page: Page, server: LociServer) -> None:
    set_up(page, server.url, limited(more="reasoning_effort: 'none', ignore_eos: 'true'"))
    say(page, "Hello")
    before = page.locator(".answer > .text").inner_text()
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".answer > .text")).not_to_have_text(before)
    expect(page.locator(".figures")).to_contain_text("12 tokens")

    assert page.locator(".answer > .text").inner_text().startswith(before[:40])
    expect(page.locator(".answer")).to_have_count(1)
    expect(page.get_by_role("alert")).to_have_count(0)


@pytest.mark.slow
@needs_chromium
def test_single_messages_are_changed_and_deleted_and_the_model_is_sent_what_is_left(page: Page) -> None:
    show(page, "One", "Two")
    answer = page.locator(".answer")
    answer.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("Two, *changed*")
    page.get_by_role("button", name="Save").click()
    expect(answer.locator("em")).to_have_text("changed")
    page.locator(".question").hover()
    page.locator(".question").get_by_role("button", name="Delete").click()
    expect(page.locator(".question")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("li > .text")).to_have_text(["One", "Two, changed"])
    answer.get_by_role("button", name="Delete").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Three")

    assert (asked.value.post_data_json or {})["messages"] == [{"role": "user", "content": "One\n\nThree"}]


@pytest.mark.slow
@needs_chromium
def test_text_files_go_along_and_others_are_refused(page: Page) -> None:
    chooser = page.locator("#choose-files")
    chooser.set_input_files({"name": "photo.png", "mimeType": "", "buffer": b"\x89PNG\0\xff"})
    expect(page.locator("#notice")).to_contain_text("photo.png is no text file")
    chooser.set_input_files({"name": "big.txt", "mimeType": "", "buffer": b"x" * 1_000_001})
    expect(page.locator("#notice")).to_contain_text("big.txt is larger than 1 MB")
    both: list[FilePayload] = [
        {"name": "a.md", "mimeType": "", "buffer": "```\nä\n```\n".encode()},
        {"name": "b.txt", "mimeType": "", "buffer": "b".encode("utf-16")},
    ]
    chooser.set_input_files(both)
    page.get_by_role("button", name="Remove b.txt").click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "What is this?")

    sent = (asked.value.post_data_json or {})["messages"][0]["content"]
    assert sent == "a.md\n````\n```\nä\n```\n````\n\nWhat is this?"
    expect(page.locator(".attached summary")).to_contain_text("a.md")
    expect(page.locator("#files")).to_be_hidden()


@pytest.mark.slow
@needs_chromium
def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, server: LociServer) -> None:
    set_up(page, server.url, limited(1900, "ignore_eos: 'true'"))
    show(page, "Fish", "swim")
    page.get_by_role("button", name="New").click()
    slow_down(page)
    write(page, "Hello")
    await_words(page)
    page.get_by_role("button", name="Fish", exact=True).click()
    expect(page.locator(".answer > .text")).to_have_text("swim")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="Hello answering").click()
    await_words(page)
    page.keyboard.press("Escape")

    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.locator(".answering")).to_have_count(0)


@pytest.mark.slow
@needs_chromium
def test_a_full_library_says_so(page: Page) -> None:
    script = """async () => {
        const { Library } = await import("/web/library.js");
        const { Conversation } = await import("/web/conversation.js");
        const conversation = new Conversation({ changed: 1, title: "Large" });
        conversation.add({ role: "user", content: "x".repeat(64e6 - 500) }, null);
        await (await Library.open()).put(conversation);
    }"""
    page.evaluate(script)
    say(page, "Hello")

    expect(page.locator("#notice")).to_contain_text("Export and delete older ones")
    expect(page.locator(".figures")).to_contain_text("12 tokens")  # it can be talked with all the same
