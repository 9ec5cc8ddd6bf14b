"""From the engine's thread to the event loop: what a step generated is told before the next one begins."""

from __future__ import annotations

import asyncio
import threading

from server.generation import Wakeups


def test_readers_have_read_their_news_when_the_engine_goes_on() -> None:
    read: list[str] = []
    seen_by_engine: list[str] = []

    async def talk() -> None:
        wakeups, events = Wakeups(), [asyncio.Event(), asyncio.Event()]

        async def reader(name: str, event: asyncio.Event) -> None:
            await event.wait()
            read.append(name)

        def engine() -> None:
            for event in events:
                wakeups.add(event)
            wakeups.flush()
            seen_by_engine.extend(read)

        readers = [
            asyncio.ensure_future(reader(name, event)) for name, event in zip("ab", events, strict=True)
        ]
        await asyncio.sleep(0)
        await asyncio.to_thread(engine)
        await asyncio.gather(*readers)

    asyncio.run(talk())

    assert sorted(seen_by_engine) == ["a", "b"]


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
