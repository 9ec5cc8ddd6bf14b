"""What the corpus promises: right answers, clean small talk, a clean split, the serving prompt form."""

from __future__ import annotations

import random
import re

import pytest

from corpus import Document, chat, composed, facts, prose, sampled, smalltalk, stories
from data import hold_out
from prompts import EOS, SPECIAL_TOKENS, prompt, render, train_tokenizer


def test_generators_repeat_themselves_from_the_same_seed() -> None:
    for make in (stories.document, composed.document):
        assert make(random.Random("x")) == make(random.Random("x"))
        assert make(random.Random("x")) != make(random.Random("y"))


def test_story_questions_are_answered_from_the_state_of_the_world() -> None:
    asked = 0
    for seed in range(300):
        world = stories.World.begin(random.Random(seed), people=2, things=2)
        for _ in range(5):
            world.step()
        question, answer = world.question()
        where = re.fullmatch(r"Where is ([A-Z]\w+)\?", question)
        if where:
            assert answer == f"{where[1]} is in the {world.at[where[1]]}."
            asked += 1
        has = re.fullmatch(r"Who has the (\w+)\?", question)
        if has:
            assert world.things[has[1]] in answer
            asked += 1
    assert asked > 50


def test_arithmetic_is_right() -> None:
    for seed in range(200):
        question, answer = facts.arithmetic(random.Random(seed))
        found = re.search(r"(\d+) ([+-]) (\d+)", question)
        if found:
            a, b = int(found[1]), int(found[3])
            assert re.findall(r"\d+", answer)[-1] == str(a + b if found[2] == "+" else a - b)


def test_small_talk_is_tidied() -> None:
    assert smalltalk.tidy("im   good, thx!!!!") == "I'm good, thanks!"
    assert smalltalk.tidy("what r u up to") == "What are you up to."
    assert smalltalk.tidy("😀") == ""


@pytest.mark.parametrize(
    "text", ["call me 801-555-1234", "see https://x.org", "add me on snapchat", "me@example.org"]
)
def test_contact_details_are_recognised(text: str) -> None:
    assert smalltalk.CONTACT.search(text)


def test_answers_that_repeat_themselves_are_not_learned() -> None:
    assert sampled.is_good("Bees live in hives and collect nectar from many flowers.")
    assert not sampled.is_good("I like tea and I like tea and I like tea and I like tea and I like tea.")
    assert not sampled.is_good("Yes.")


def test_held_out_documents_are_not_trained_on_and_stay_held_out() -> None:
    documents: list[tuple[str, Document]] = [(f"d{i}", prose(str(i))) for i in range(2000)]
    training, held_out = hold_out(documents)
    assert {n for n, _ in training}.isdisjoint(n for n, _ in held_out)
    assert len(training) + len(held_out) == 2000
    assert 30 < len(held_out) < 100
    _, still = hold_out([*documents, ("new", prose("new"))])
    assert {n for n, _ in held_out} <= {n for n, _ in still}


def test_documents_take_the_form_that_serving_renders() -> None:
    conversation = chat("Hello", "Hi.", "Bye", "See you.")
    assert render(conversation) == prompt(conversation[:-1]) + "See you." + EOS
    assert render(conversation, thinking=True).endswith("<think></think>See you." + EOS)
    assert render(conversation[:-1]).endswith("<｜User｜>Bye" + EOS)


def test_special_tokens_are_single_ids_and_digits_stand_alone() -> None:
    tokenizer = train_tokenizer([chat("What is 12 + 34?", "12 + 34 is 46.")])
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False).ids == [number]
    assert tokenizer.encode("46", add_special_tokens=False).tokens == ["4", "6"]
    text = render(chat("Grüße 12!", "Ja."))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
