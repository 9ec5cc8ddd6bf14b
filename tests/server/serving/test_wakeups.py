"""From the engine's thread to the event loop: what a step generated is told together, and not too often."""

from __future__ import annotations

import asyncio
import threading

from server.serving.wakeups import Wakeups

HOUR = 3600.0


async def tell(wakeups: Wakeups, *events: asyncio.Event, at_once: bool = False) -> None:
    """Have the events told by another thread, and let the loop go on until it has had its chance to."""

    def engine() -> None:
        for event in events:
            wakeups.add(event, at_once=at_once)
        wakeups.flush()

    await asyncio.to_thread(engine)
    for _ in range(3):
        await asyncio.sleep(0)


def test_one_wake_tells_all_readers_what_a_step_generated() -> None:
    async def talk() -> list[str]:
        wakeups, events, read = Wakeups(0), [asyncio.Event(), asyncio.Event()], []

        async def reader(name: str, event: asyncio.Event) -> None:
            await event.wait()
            read.append(name)

        async with asyncio.timeout(20), asyncio.TaskGroup() as readers:
            for name, event in zip("ab", events, strict=True):
                readers.create_task(reader(name, event))
            await tell(wakeups, *events)
        return read

    assert sorted(asyncio.run(talk())) == ["a", "b"]


def test_what_comes_soon_after_a_wake_waits_for_the_next_one() -> None:
    async def talk() -> None:
        wakeups, event = Wakeups(HOUR), asyncio.Event()
        await tell(wakeups, event)
        assert event.is_set()
        event.clear()
        await tell(wakeups, event)
        assert not event.is_set()

    asyncio.run(talk())


def test_first_tokens_and_ends_wait_for_nothing_and_take_nothing_along() -> None:
    async def talk() -> None:
        wakeups, running, ending = Wakeups(HOUR), asyncio.Event(), asyncio.Event()
        await tell(wakeups, running)
        running.clear()
        await tell(wakeups, running)
        await tell(wakeups, ending, at_once=True)
        assert ending.is_set()
        assert not running.is_set()

    asyncio.run(talk())


def test_nothing_waits_longer_than_the_interval_though_the_engine_says_no_more() -> None:
    async def talk() -> None:
        wakeups, event = Wakeups(0.01), asyncio.Event()
        await tell(wakeups, event)
        event.clear()
        await tell(wakeups, event)
        await asyncio.wait_for(event.wait(), 20)

    asyncio.run(talk())


def test_after_a_pause_a_token_is_told_at_once() -> None:
    async def talk() -> None:
        wakeups, event = Wakeups(0.01), asyncio.Event()
        await tell(wakeups, event)
        await asyncio.sleep(0.05)  # the rest ends before this does
        wakeups._interval_s = HOUR
        event.clear()
        await tell(wakeups, event)
        assert event.is_set()

    asyncio.run(talk())


def test_without_an_interval_every_step_is_told() -> None:
    async def talk() -> None:
        wakeups, event = Wakeups(0), asyncio.Event()
        for _ in range(3):
            event.clear()
            await tell(wakeups, event)
            assert event.is_set()

    asyncio.run(talk())


def test_an_event_loop_that_is_busy_does_not_hold_the_engine_up() -> None:
    async def talk() -> None:
        wakeups, event, is_through = Wakeups(0), asyncio.Event(), threading.Event()

        def engine() -> None:
            wakeups.add(event)
            wakeups.flush()
            is_through.set()

        thread = threading.Thread(target=engine)
        thread.start()
        assert is_through.wait(20)  # and this loop turns no round meanwhile
        thread.join()
        await asyncio.wait_for(event.wait(), 20)

    asyncio.run(talk())


def test_without_an_event_loop_nobody_is_told_and_nothing_fails() -> None:
    async def make() -> tuple[Wakeups, asyncio.Event]:
        return Wakeups(0), asyncio.Event()

    wakeups, event = asyncio.run(make())
    wakeups.add(event)
    wakeups.flush()

    assert not event.is_set()
