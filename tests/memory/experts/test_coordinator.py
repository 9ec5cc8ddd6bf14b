"""Hand-overs between GPUs and the thread that answers them, with threads that play the GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from memory.experts.coordinator import Answer, Coordinator, Round
from quant.kernels.cuda.mailbox import Mailbox, StalledError

LAYERS, ROWS, TOP_K, HIDDEN = 6, 2, 3, 4
CPU = torch.device("cpu")


class Card(threading.Thread):
    """Runs steps as a GPU would: leaves mail, sets a word, waits for a word, adds up what was answered.

    held  experts of each layer that it has itself
    other whether another card has as many after these
    """

    def __init__(self, layers: range, held: int, pause_s: float = 0.0, *, other: bool = False) -> None:
        super().__init__(daemon=True)
        others = ["card 1"] if other else []
        self.box = Mailbox(len(layers), ROWS, TOP_K, HIDDEN, pinned=False, others=others)
        self._shared = range(held, 2 * held) if other else range(0)
        self.round = Round(self.box, layers)
        self._held = held
        self._pause_s = pause_s
        self.ids = torch.randint(
            0, 10, (len(layers), ROWS * TOP_K), generator=torch.Generator().manual_seed(held)
        )
        self.found = torch.zeros(len(layers), ROWS * TOP_K, HIDDEN)
        self.is_through = False

    def run(self) -> None:
        for number in range(len(self.round.layers)):
            ids, box = self.ids[number], self.box
            here = ids < self._held
            shared = (ids >= self._shared.start) & (ids < self._shared.stop)
            box.ids[number] = ids
            box.places[number] = torch.where(here, 0, torch.where(shared, -2, -1))
            box.inputs[:] = torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN) + number
            for answerer in range(len(box.answerers)):
                if not len(box.missing(number, answerer)):
                    box.answer(number, answerer)
            time.sleep(self._pause_s)
            box.post(number)
            box.wait_for_answer(number)
            self.found[number] = torch.where(here.unsqueeze(1), -1.0, box.outputs)
        self.is_through = True

    def expected(self) -> torch.Tensor:
        found = torch.full_like(self.found, -1.0)
        for number, layer in enumerate(self.round.layers):
            x = torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN).repeat_interleave(TOP_K, 0) + number
            missing = self.ids[number] >= self._held
            found[number][missing] = outputs(layer, self.ids[number], x)[missing]
        return found


class OtherCard(threading.Thread):
    """Computes what a card leaves to it, as another GPU would: waits for a word, reads, writes, sets a word.

    answers  of how many hand-overs, before it answers no more
    """

    def __init__(self, card: Card, pause_s: float = 0.0, answers: int = LAYERS) -> None:
        super().__init__(daemon=True)
        self._card = card
        self._pause_s = pause_s
        self._answers = answers
        self.computed = 0
        self.is_through = False

    def run(self) -> None:
        box = self._card.box
        for number, layer in enumerate(self._card.round.layers):
            box.call_word(number).on_host(CPU)
            time.sleep(self._pause_s)
            pairs = box.missing(number, 1)
            if number < self._answers:
                box.outputs[pairs] = outputs(layer, box.ids[number][pairs], box.inputs[pairs // TOP_K])
                box.reply_word(number, 1).on_host(CPU)
                self.computed += len(pairs)
        self.is_through = True


def outputs(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * (100 * layer + ids.unsqueeze(1)).float()


@contextmanager
def coordinator(answer: Answer, patience_s: float = 20.0) -> Iterator[Coordinator]:
    made = Coordinator(answer, patience_s=patience_s)
    yield made
    made.close()


def play(
    to: Coordinator,
    *cards: Card,
    others: Sequence[OtherCard] = (),
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """A step of all cards; raises what makes it fail. No card is left waiting."""
    everyone: list[Card | OtherCard] = [*cards, *others]
    to.begin([card.round for card in cards])
    for each in everyone:
        each.start()
    if meanwhile is not None:
        meanwhile()
    try:
        to.end()
    finally:
        for each in everyone:
            each.join(10)
            assert each.is_through


def test_missing_experts_are_answered_and_others_are_not_asked_for() -> None:
    asked: list[int] = []

    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        asked.extend(ids.tolist())
        return outputs(layer, ids, x)

    with coordinator(answer) as made:
        for held in (5, 0, 10):
            card = Card(range(LAYERS), held)
            play(made, card)
            assert torch.equal(card.found, card.expected())
    assert min(asked[: len(asked) // 2]) >= 0
    assert not [expert for expert in asked if expert >= 10]
    assert len(asked) == sum(int((Card(range(LAYERS), held).ids >= held).sum()) for held in (5, 0))


@pytest.mark.parametrize("late", ["neither", "card", "other", "answer"])
def test_another_card_and_the_processor_share_what_a_card_lacks(late: str) -> None:
    asked: list[int] = []

    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 if late == "answer" else 0)
        asked.extend(ids.tolist())
        return outputs(layer, ids, x)

    with coordinator(answer) as made:
        for held in (4, 5, 1):  # four of ten, none, and eight are left to the processor
            card = Card(range(LAYERS), held, 0.01 if late == "card" else 0, other=True)
            other = OtherCard(card, 0.01 if late == "other" else 0)
            play(made, card, others=[other])
            assert torch.equal(card.found, card.expected())
            assert other.computed == int(((card.ids >= held) & (card.ids < 2 * held)).sum()) > 0
            assert all(expert >= 2 * held for expert in asked)
            asked.clear()


def test_each_card_of_two_helps_the_other() -> None:
    cards = Card(range(3), 4, other=True), Card(range(3, LAYERS), 3, other=True)
    with coordinator(outputs) as made:
        play(made, *cards, others=[OtherCard(card) for card in cards])
    for card in cards:
        assert torch.equal(card.found, card.expected())


def test_a_card_that_stops_answering_ends_in_an_error_that_names_it() -> None:
    card = Card(range(LAYERS), 3, other=True)
    with coordinator(outputs, patience_s=0.1) as made:
        begun = time.monotonic()
        with pytest.raises(StalledError, match="no answer from card 1;"):
            play(made, card, others=[OtherCard(card, answers=2)])
        assert time.monotonic() - begun < 5
        again = Card(range(LAYERS), 3, other=True)
        play(made, again, others=[OtherCard(again)])
    assert torch.equal(again.found, again.expected())


def test_an_error_of_another_card_fails_the_step() -> None:
    card = Card(range(LAYERS), 3, other=True)
    with (
        coordinator(outputs) as made,
        pytest.raises(RuntimeError, match="the card fell off the bus"),
    ):
        play(made, card, meanwhile=lambda: made.fail(RuntimeError("the card fell off the bus")))


def test_a_step_leaves_nothing_in_a_mailbox_for_the_next() -> None:
    card = Card(range(LAYERS), 3, other=True)
    with coordinator(outputs) as made:
        play(made, card, others=[OtherCard(card)])
        made.begin([card.round])
        assert card.box.unanswered() is None
        assert card.box.chosen(0) == ([], [[], []])
        made.give_up()


@pytest.mark.parametrize("late", ["card", "answer"])
def test_two_cards_are_served_at_once_however_late_either_side_is(late: str) -> None:
    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01 if late == "answer" else 0)
        return outputs(layer, ids, x)

    cards = Card(range(3), 4, 0.02 if late == "card" else 0), Card(range(3, LAYERS), 2)
    with coordinator(answer) as made:
        play(made, *cards)
    for card in cards:
        assert torch.equal(card.found, card.expected())


def test_an_expert_that_cannot_be_read_fails_its_step_and_no_other() -> None:
    broken = [True]

    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if broken[0] and layer == 2:
            raise OSError("the drive is gone")
        return outputs(layer, ids, x)

    with coordinator(answer) as made:
        with pytest.raises(OSError, match="the drive is gone"):
            play(made, Card(range(LAYERS), 1))
        broken[0] = False
        card = Card(range(LAYERS), 1)
        play(made, card)
    assert torch.equal(card.found, card.expected())


def test_an_answer_that_never_comes_ends_in_an_error_and_not_in_a_hang() -> None:
    for_ever = threading.Event()

    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for_ever.wait(10)
        return outputs(layer, ids, x)

    with coordinator(answer, patience_s=0.1) as made:
        begun = time.monotonic()
        with pytest.raises(StalledError, match="were not there after"):
            play(made, Card(range(LAYERS), 0))
        assert time.monotonic() - begun < 5
        for_ever.set()


def test_a_card_that_asks_for_nothing_ends_in_an_error_and_not_in_a_hang() -> None:
    made = Coordinator(outputs, silence_s=0.6)
    for posts in (0, 2):
        card = Card(range(LAYERS), 10)
        made.begin([card.round])
        for number in range(posts):
            card.box.answer(number)
            card.box.post(number)
        with pytest.raises(StalledError, match="no GPU has come to its next experts"):
            made.end()
        assert card.box.is_posted(LAYERS - 1), "abandoned: no GPU waits"
    slow = Card(range(LAYERS), 3, pause_s=0.15)  # silent for longer in all, but not at once
    play(made, slow)
    made.close()
    assert torch.equal(slow.found, slow.expected())


def test_closing_in_the_middle_of_a_step_fails_it_and_leaves_nobody_waiting() -> None:
    is_asked, may_go_on = threading.Event(), threading.Event()

    def answer(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        is_asked.set()
        may_go_on.wait(10)
        return outputs(layer, ids, x)

    made = Coordinator(answer, patience_s=20.0)
    closing = threading.Thread(target=made.close)

    def close() -> None:
        is_asked.wait(10)
        closing.start()

    with pytest.raises(StalledError, match="is being closed"):
        play(made, Card(range(LAYERS), 0), meanwhile=close)
    may_go_on.set()
    closing.join(10)
    assert not closing.is_alive()
    with pytest.raises(StalledError, match="is being closed"):
        made.begin([])


def test_a_step_that_fails_elsewhere_lets_its_cards_go_on() -> None:
    with coordinator(outputs) as made:
        card = Card(range(LAYERS), 0, pause_s=0.05)
        made.begin([card.round])
        card.start()
        made.give_up()
        card.join(10)
        assert card.is_through
        again = Card(range(LAYERS), 0)
        play(made, again)
    assert torch.equal(again.found, again.expected())
