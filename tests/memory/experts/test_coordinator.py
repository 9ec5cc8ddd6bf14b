"""Hand-overs between GPUs and the thread that answers them, with threads that play the GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from memory.experts.coordinator import Answer, Coordinator, Round
from quant.kernels.cuda.mailbox import Mailbox, StalledError

LAYERS, ROWS, TOP_K, HIDDEN = 6, 2, 3, 4


class Card(threading.Thread):
    """Runs steps as a GPU would: leaves mail, sets a word, waits for a word, adds up what was answered.

    held  experts of each layer that it has itself
    """

    def __init__(self, layers: range, held: int, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.box = Mailbox(len(layers), ROWS, TOP_K, HIDDEN, pinned=False)
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
            box.ids[number], box.places[number] = ids, torch.where(here, 0, -1)
            box.inputs[:] = torch.arange(ROWS * HIDDEN).view(ROWS, HIDDEN) + number
            if bool(here.all()):
                box.answer(number)
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


def outputs(layer: int, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x * (100 * layer + ids.unsqueeze(1)).float()


@contextmanager
def coordinator(answer: Answer, patience_s: float = 20.0) -> Iterator[Coordinator]:
    made = Coordinator(answer, patience_s=patience_s)
    yield made
    made.close()


def play(to: Coordinator, *cards: Card, meanwhile: Callable[[], None] | None = None) -> None:
    """A step of all cards; raises what makes it fail. No card is left waiting."""
    to.begin([card.round for card in cards])
    for card in cards:
        card.start()
    if meanwhile is not None:
        meanwhile()
    try:
        to.end()
    finally:
        for card in cards:
            card.join(10)
            assert card.is_through


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
