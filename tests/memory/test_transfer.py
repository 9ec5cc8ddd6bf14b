"""Links: order by need, failures handed to whoever waits, speed held."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from memory.telemetry import Telemetry
from memory.transfer import CancelledError, Link, Priority


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link("nvme", Telemetry())
    yield link
    link.close()


class Gate:
    """Keeps a link busy until it is opened."""

    def __init__(self, link: Link) -> None:
        self._open = threading.Event()
        entered = threading.Event()

        def work() -> None:
            entered.set()
            assert self._open.wait(30)

        self.ticket = link.submit([work], 0, Priority.DEMAND)
        assert entered.wait(30)

    def open(self) -> None:
        self._open.set()


def test_what_is_needed_overtakes_what_is_guessed(link: Link) -> None:
    order: list[str] = []
    gate = Gate(link)
    names = [
        ("p1", Priority.PREFETCH),
        ("d1", Priority.DEMAND),
        ("p2", Priority.PREFETCH),
        ("d2", Priority.DEMAND),
    ]
    tickets = [link.submit([partial(order.append, name)], 1, priority) for name, priority in names]
    gate.open()
    for ticket in tickets:
        ticket.wait()
    assert order == ["d1", "d2", "p1", "p2"]


def test_a_guessed_transfer_that_becomes_needed_goes_first(link: Link) -> None:
    order: list[str] = []
    gate = Gate(link)
    tickets = [link.submit([partial(order.append, name)], 1, Priority.PREFETCH) for name in ("a", "b", "c")]
    link.promote(tickets[2])
    gate.open()
    for ticket in tickets:
        ticket.wait()
    assert order == ["c", "a", "b"]


def test_a_failure_reaches_every_wait_and_the_link_goes_on(link: Link) -> None:
    def fail() -> None:
        raise OSError("bad sector")

    ticket = link.submit([fail], 1, Priority.DEMAND)
    for _ in range(2):
        with pytest.raises(OSError, match="bad sector"):
            ticket.wait()
    assert ticket.has_failed
    link.submit([lambda: None], 1, Priority.DEMAND).wait()


def test_moved_bytes_and_stalls_are_counted(link: Link) -> None:
    gate = Gate(link)
    ticket = link.submit([lambda: None], 1000, Priority.DEMAND)
    threading.Timer(0.02, gate.open).start()
    ticket.wait()
    seen = link.telemetry.snapshot()
    assert seen.moved_bytes["nvme"] == 1000
    assert seen.moves["nvme demand"] == 2
    assert seen.stalled_on("nvme") > 0


def test_a_paced_link_is_no_faster_than_its_speed() -> None:
    link = Link("vram:0", Telemetry(), bytes_per_s=1e6, workers=2)
    start = time.perf_counter()
    for ticket in [link.submit([lambda: None], 10_000, Priority.DEMAND) for _ in range(5)]:
        ticket.wait()
    assert time.perf_counter() - start >= 0.05
    link.close()


def test_a_transfer_that_is_cancelled_before_it_begins_ends_at_once(link: Link) -> None:
    gate = Gate(link)
    ticket = link.submit([lambda: pytest.fail("moved")], 1, Priority.PREFETCH)
    assert link.cancel(ticket)
    with pytest.raises(CancelledError):
        ticket.wait()
    gate.open()
    gate.ticket.wait()
    assert link.telemetry.snapshot().failed == {}


def test_of_a_transfer_that_is_cancelled_half_way_only_what_has_begun_is_moved(link: Link) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert may_end.wait(30)

    ticket = link.submit([first, lambda: pytest.fail("moved")], 20, Priority.PREFETCH)
    assert begun.wait(30)
    assert link.cancel(ticket)
    assert not link.cancel(ticket)  # nothing of it waits any more
    assert not ticket.is_done  # its place is still written to
    may_end.set()
    with pytest.raises(CancelledError):
        ticket.wait()
    seen = link.telemetry.snapshot()
    assert seen.moved_bytes["nvme"] == 10
    assert seen.failed == {}
    assert "nvme prefetch" not in seen.moves


def test_a_transfer_under_way_that_looks_whether_it_should_stop_is_cancelled_too(link: Link) -> None:
    begun, stop = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert stop.wait(30)
        raise CancelledError("no longer needed", moved_bytes=7)

    ticket = link.submit([work], 20, Priority.PREFETCH, stop)
    assert begun.wait(30)
    assert link.cancel(ticket)
    assert not link.cancel(ticket)
    with pytest.raises(CancelledError):
        ticket.wait()
    assert not link.cancel(ticket)
    seen = link.telemetry.snapshot()
    assert seen.moved_bytes["nvme"] == 7
    assert seen.failed == {}


def test_a_transfer_that_has_ended_cannot_be_cancelled(link: Link) -> None:
    ticket = link.submit([lambda: None], 20, Priority.PREFETCH, threading.Event())
    ticket.wait()
    assert not link.cancel(ticket)
    assert not ticket.has_failed


def test_closing_fails_what_is_queued() -> None:
    link = Link("nvme", Telemetry())
    gate = Gate(link)
    queued = link.submit([lambda: None], 1, Priority.DEMAND)
    closer = threading.Thread(target=link.close)
    closer.start()
    with pytest.raises(RuntimeError, match="was closed"):
        queued.wait()
    gate.open()
    closer.join(30)
    assert not closer.is_alive()
    with pytest.raises(RuntimeError, match="is closed"):
        link.submit([lambda: None], 1, Priority.DEMAND)
