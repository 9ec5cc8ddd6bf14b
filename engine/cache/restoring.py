"""Saved states back into a cache's slot: all files of one at once, piece by piece, by several threads.

Pieces go straight into the slot's memory. Only when all of them are there and right does the cache hear of
it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest
from typing import TypeVar

import torch

from engine.cache.state_files import StateFile, StateFileError
from engine.cache.state_index import Found, Record
from engine.cache.state_layout import Target, as_it_lies, layout_of, target_in, whole_target
from engine.families.base import KvCache

T = TypeVar("T")
MOST_THREADS = 8  # keep a fast drive busy
LEAST_THREADS = 4  # on few cores: while some wait for the drive, others check what has come


class DamagedStateError(StateFileError):
    """A file of a state turned out to be wrong; `record` is what it was taken for."""

    def __init__(self, record: Record, error: StateFileError) -> None:
        super().__init__(str(error))
        self.record = record


class ReplacedStateError(DamagedStateError):
    """A file is not damaged, but another server's by now: of the same text, but with other rows."""


class StateReader:
    """Reads states into a cache's slots."""

    def __init__(self, cache: KvCache) -> None:
        self._cache = cache
        self._others = max(LEAST_THREADS, min(MOST_THREADS, os.cpu_count() or 1)) - 1
        self._threads = ThreadPoolExecutor(self._others, thread_name_prefix="loci-states")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def restore(self, slot: int, found: Found) -> torch.Tensor | None:
        """Restore a state into the empty slot; the logits `[vocab]` behind its last token, if it has them.

        Raises DamagedStateError; the slot is then empty.
        """
        record = found.record
        chain = record.chain()
        self._cache.pages.hold(slot, found.length)
        with ExitStack() as opened:
            try:
                readings = [_Reading(each, opened) for each in chain]
                for reading, following in zip_longest(readings, chain[1:]):
                    # A text that goes on from another's rows may say something else behind them.
                    stop = found.length if following is None else min(found.length, following.start)
                    reading.rows(self._cache, slot, min(reading.record.stop, stop))
                readings[-1].recent(self._cache, slot)
                logits = readings[-1].logits()
                self._run([piece for reading in readings for piece in reading.pieces])
            except DamagedStateError:
                self._cache.reset(slot)
                raise
        for reading in readings:
            reading.finish()
        self._cache.resume(slot, found.length, record.shortest)
        return logits

    def _run(self, pieces: list[Callable[[], None]]) -> None:
        """Read all pieces, here and in the threads. Raises what one of them raises, after the others."""
        left = deque(pieces)

        def work() -> None:
            try:
                while True:
                    try:
                        piece = left.popleft()
                    except IndexError:
                        return
                    piece()
            except BaseException:
                left.clear()
                raise

        others = [self._threads.submit(work) for _ in range(min(self._others, len(pieces) - 1))]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()


class _Reading:
    """A file that is being read. What is wrong with it is a DamagedStateError.

    pieces  what reads it
    """

    def __init__(self, record: Record, opened: ExitStack) -> None:
        self.record = record
        self.pieces: list[Callable[[], None]] = []
        self._beside: list[tuple[torch.Tensor, torch.Tensor]] = []  # what is to be copied, and from where
        self._file = opened.enter_context(self._checked(partial(StateFile, record.path)))
        header = self._file.header
        there = header.start, len(header.tokens), header.shortest, header.has_logits
        if there != (record.start, record.stop, record.shortest, record.has_logits):
            raise ReplacedStateError(record, StateFileError(f"{record.path}: another server has written it"))

    def rows(self, cache: KvCache, slot: int, stop: int) -> None:
        """Have the rows of the tokens before `stop` read."""
        for number, (ratio, view) in enumerate(cache.appended(slot)):
            first = self.record.start // ratio
            count = self.record.stop // ratio - first
            wanted = max(0, stop // ratio - first)  # none where a state is taken back to before its own rows
            self._read(f"rows.{number}", view[first:], count, wanted)

    def recent(self, cache: KvCache, slot: int) -> None:
        """Have what else the slot holds read."""
        for number, view in enumerate(cache.recent(slot, self.record.stop)):
            self._read(f"recent.{number}", view, len(view), len(view))

    def logits(self) -> torch.Tensor | None:
        """Have the logits read, if there are any."""
        layout = self._file.layouts.get("logits")
        if layout is None:
            return None
        dtype, shape = layout
        values = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        self._begin("logits", whole_target(values))
        return values

    def finish(self) -> None:
        """Once all pieces are read: copy what could not be read to where it belongs."""
        for place, values in self._beside:
            place.copy_(values)

    def _read(self, name: str, view: torch.Tensor, count: int, wanted: int) -> None:
        """Have a tensor of `count` rows read, of which the view gets the first `wanted`."""
        if self._file.layouts.get(name) != layout_of(view, count):
            error = StateFileError(f"{self.record.path}: {name} is laid out otherwise than in the cache")
            raise DamagedStateError(self.record, error)
        target, beside = target_in(view, count, wanted)
        if beside is not None:
            self._beside.append((as_it_lies(view[:wanted]), beside))
        self._begin(name, target)

    def _begin(self, name: str, target: Target) -> None:
        pieces = self._checked(partial(self._file.pieces, name, target))
        self.pieces += [partial(self._checked, piece) for piece in pieces]

    def _checked(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except StateFileError as error:
            raise DamagedStateError(self.record, error) from None
