"""From the engine's thread to the event loop: what a step generated is told all at once."""

from __future__ import annotations

import asyncio
import threading

from server.serving.generation import Wakeups


def test_one_wake_tells_all_readers_what_a_step_generated() -> None:
    async def talk() -> list[str]:
        wakeups, events, read = Wakeups(), [asyncio.Event(), asyncio.Event()], []

        async def reader(name: str, event: asyncio.Event) -> None:
            await event.wait()
            read.append(name)

        def engine() -> None:
            for event in events:
                wakeups.add(event)
            wakeups.flush()

        async with asyncio.timeout(20), asyncio.TaskGroup() as readers:
            for name, event in zip("ab", events, strict=True):
                readers.create_task(reader(name, event))
            await asyncio.to_thread(engine)
        return read

    assert sorted(asyncio.run(talk())) == ["a", "b"]


def test_an_event_loop_that_is_busy_does_not_hold_the_engine_up() -> None:
    async def talk() -> None:
        wakeups, event, is_through = Wakeups(), asyncio.Event(), threading.Event()

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
        return Wakeups(), asyncio.Event()

    wakeups, event = asyncio.run(make())
    wakeups.add(event)
    wakeups.flush()

    assert not event.is_set()
