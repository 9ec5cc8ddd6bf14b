"""A model in parts as the engine sees it: a `Model` and a `KvCache` like any other.

The engine, its scheduler and its sampler are those of one machine; they run beside the first part, or on a
machine of their own. Steps are cut into pieces, so that parts compute at the same time; what a part hands on
goes straight to the next. Sequences' states stay with their layers: what the engine says of slots reaches the
parts as orders before the next piece of work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cache.prefixes import Prefix, PrefixStats
from engine.cluster.messages import (
    Handed,
    OpenedCache,
    Order,
    PartInfo,
    Release,
    Restored,
    Resume,
    Save,
    StageLostError,
    Trim,
    Work,
)
from engine.cluster.pieces import pieces_of
from engine.cluster.stage import Pending, Stage
from engine.families.base import Batch, KvCache, KvRooms, Model, Trace
from memory.checkpoint.part import Span
from quant.errors import LociError

logger = logging.getLogger("loci.engine")

# Attempts to find a prefix that all parts have; each part may have forgotten other states.
ATTEMPTS = 4
MOST_DEVICES = 16  # of a stage, host memory among them
WATCH_S = 2.0  # between looks at parts that answer
RETRY_S = 0.5  # and at parts that do not
BEYOND = -1  # no token: what a prompt is cut with, so that nothing is found behind it


@dataclass
class HopTimes:
    """What steps took: seconds in all, those that each stage computed, and bytes that it handed on."""

    steps: int = 0
    seconds: float = 0.0
    computed: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    lost: int = 0  # times that a stage was lost


class StagedCache(KvCache):
    """Slots whose states are with the parts; here are their lengths, and the count of pages."""

    def __init__(self, model: StagedModel, slots: int, capacity: int, opened: Sequence[OpenedCache]) -> None:
        super().__init__(slots, capacity, margin=min(part.margin for part in opened))
        self._fixed_bytes = sum(part.fixed_bytes for part in opened)
        self._model = model
        self.orders: list[Order] = []  # that the parts have not got yet
        self.lost: set[int] = set()  # slots whose states are gone with a part
        for number, part in enumerate(opened):
            self.pages.count(part.rows, partial(device_here, number))
        self._trimmed = self.pages.tokens
        if model.prefix_bytes:
            self.prefixes = StagedPrefixes(model, self)

    def resume(self, slot: int, length: int, shortest: int) -> None:
        super().resume(slot, length, shortest)
        if not length:
            self.lost.discard(slot)
        self.orders.append(Resume(slot, length))

    def release(self, slot: int) -> None:
        super().release(slot)
        self.orders.append(Release(slot))

    def filled(self, slot: int, length: int, shortest: int) -> None:
        """The parts have restored a state into a slot."""
        super().resume(slot, length, shortest)

    def take_orders(self) -> tuple[Order, ...]:
        """What the parts have not been told yet."""
        held = self.pages.tokens
        for slot, (before, now) in enumerate(zip(self._trimmed, held, strict=True)):
            if now < before:
                self.orders.append(Trim(slot, now))
        self._trimmed = held
        orders, self.orders = tuple(self.orders), []
        return orders

    def lose(self) -> None:
        """What slots held is gone."""
        self.lost = {slot for slot in range(self.slots) if self.length(slot)}
        self.orders.clear()

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return ()

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        return ()

    def bytes_at(self, tokens: int) -> int:
        return self._fixed_bytes + self.slots * self.pages.nbytes(tokens)


class StagedModel(Model):
    """A model whose layers are with several parts."""

    def __init__(self, stages: Sequence[Stage], parts: Sequence[PartInfo], spans: Sequence[Span]) -> None:
        self.info = replace(parts[-1].info, name=parts[0].info.name)
        self.stages, self.spans = list(stages), list(spans)
        self.keeps_whole_states = parts[-1].keeps_whole_states
        self.hops = HopTimes(computed=[0.0] * len(stages), nbytes=[0] * len(stages))
        self.prefix_bytes = min(part.prefix_bytes for part in parts) and sum(p.prefix_bytes for p in parts)
        self._parts = list(parts)
        self._opened: list[OpenedCache] = []
        self._cache: StagedCache | None = None
        self._opening = threading.Lock()  # so that the watcher takes no newer cache for a part that was lost
        self._losing = threading.Lock()
        self._is_up = threading.Event()
        self._is_up.set()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def held_bytes(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for part in self._parts:
            for tier, kinds in part.held_bytes.items():
                sums = found.setdefault(tier, {})
                for kind, nbytes in kinds.items():
                    sums[kind] = sums.get(kind, 0) + nbytes
        return found

    def kv_rooms(self, slots: int) -> KvRooms:
        tokens = [part.tokens for part in self._parts if part.tokens is not None]
        longest = [part.longest for part in self._parts if part.longest is not None]
        by_device = {
            device_here(number, device): nbytes
            for number, part in enumerate(self._parts)
            for device, nbytes in part.kv_bytes.items()
        }
        return KvRooms(min(tokens, default=None), min(longest, default=None), by_device)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        return 0  # none in this process; each part has checked its own

    def new_cache(self, slots: int, capacity: int) -> StagedCache:
        """Raises BudgetError where a part has no room. There is one cache at a time: the newest."""
        with self._opening:
            self._opened = [stage.open(slots, capacity) for stage in self.stages]
            self._cache = StagedCache(self, slots, capacity, self._opened)
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="loci-stages", daemon=True)
            self._watcher.start()
        return self._cache

    def close(self) -> None:
        self._closing.set()

    # ----------------------------------------------------------------------------------------- the forward

    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        assert isinstance(cache, StagedCache)
        self.check(cache, [segment.slot for segment in batch.segments])
        begun = time.perf_counter()
        pieces = pieces_of(batch, len(self.stages))
        orders = cache.take_orders()
        try:
            pending = [self._send(piece, () if number else orders) for number, piece in enumerate(pieces)]
            found = [self.stages[-1].fetch(each) for each in pending]
        except StageLostError as error:
            self.lose(error)
            raise
        except Exception:
            # Parts behind the one that failed have not got them; states to be saved have gone on meanwhile.
            cache.orders[:0] = [order for order in orders if not isinstance(order, Save)]
            raise
        self._count(found, time.perf_counter() - begun)
        rows = [each.values for each in found if each.values.size]
        if len(rows) == 1 and rows[0].flags.writeable:
            return torch.from_numpy(rows[0])
        return torch.from_numpy(np.concatenate(rows or [np.empty((0, self.info.vocab_size), np.float32)]))

    def _send(self, batch: Batch, orders: Sequence[Order]) -> Pending:
        """A piece on its way through all parts."""
        received: Pending | None = None
        for number, stage in enumerate(self.stages):
            is_last = number == len(self.stages) - 1
            work = replace(
                self.work(number, orders),
                ids=tuple(batch.ids),
                segments=tuple((segment.slot, segment.start, segment.length) for segment in batch.segments),
                wanted=None if batch.wanted is None or not is_last else tuple(batch.wanted),
                to_come=batch.to_come if is_last else None,
            )
            received = stage.work(work, received)
        assert received is not None
        return received

    def work(self, number: int, orders: Sequence[Order]) -> Work:
        """Orders for a part."""
        return Work(self._opened[number].session, tuple(orders))

    def _count(self, found: Sequence[Handed], seconds: float) -> None:
        hops = self.hops
        hops.steps += 1
        hops.seconds += seconds
        for each in found:
            hops.computed = [a + b for a, b in zip(hops.computed, each.seconds, strict=True)]
            hops.nbytes = [a + b for a, b in zip(hops.nbytes, each.nbytes, strict=True)]

    # ------------------------------------------------------------------------------------------ lost parts

    @property
    def is_up(self) -> bool:
        """Whether all parts are there."""
        return self._is_up.is_set()

    def check(self, cache: StagedCache, slots: Sequence[int]) -> None:
        """Raises StageLostError where a part is gone, or was, with what these slots held."""
        if not self.is_up:
            raise StageLostError("a part of the model is gone and is being started again; try again soon")
        if cache.lost.intersection(slots):
            raise StageLostError("a part of the model was lost with what it held of this sequence; ask again")

    def lose(self, error: Exception) -> None:
        """A call has failed: until all parts answer, nothing is computed, and what slots held is gone."""
        with self._losing:  # the watcher and a step notice it at the same time
            was_up = self._is_up.is_set()
            self._is_up.clear()
            self.hops.lost += was_up
        if was_up:
            logger.error("a part of the model is lost, and is being started again: %s", error)
        if self._cache is not None:
            self._cache.lose()

    def _watch(self) -> None:
        """Notice parts that are gone, and open the cache again when they are back."""
        while not self._closing.wait(WATCH_S if self.is_up else RETRY_S):
            with self._opening:
                self._look()

    def _look(self) -> None:
        cache = self._cache
        try:
            sessions = [stage.session() for stage in self.stages]
            if self.is_up and sessions == [opened.session for opened in self._opened]:
                return
            if self.is_up:
                self.lose(StageLostError("it was started again"))
            assert cache is not None
            # All of them: what is still on its way to a part is of a session that has ended.
            self._opened = [stage.open(cache.slots, cache.capacity) for stage in self.stages]
            self._is_up.set()
            logger.warning("all parts of the model answer again")
        except StageLostError as error:
            self.lose(error)
        except Exception as error:  # whatever loading raises: nobody else would try again
            self.lose(error)
            trace = None if isinstance(error, LociError) else error
            logger.error("a part of the model cannot be loaded again: %s", error, exc_info=trace)


class StagedPrefixes:
    """`Prefixes` that lie with the parts: each keeps and forgets its own, and all restore the same length."""

    def __init__(self, model: StagedModel, cache: StagedCache) -> None:
        self._model, self._cache = model, cache
        self._queries = self._hits = self._cached_tokens = 0

    @property
    def stats(self) -> PrefixStats:
        """What was found; what parts hold, they know."""
        return PrefixStats(self._queries, self._hits, self._cached_tokens, 0, 0, self._model.prefix_bytes)

    def lend(self, nbytes: int) -> bool:
        """Nothing: the memory is the parts'."""
        return False

    def take_back(self, nbytes: int) -> None:
        """Nothing was lent."""

    def restore(self, slot: int, prompt: list[int], salt: str = "") -> Prefix:
        """See `Prefixes.restore`. Raises StageLostError."""
        self._model.check(self._cache, [slot])
        self._queries += 1
        ids, stops = np.asarray(prompt, dtype=np.int32), set[int]()
        for _ in range(ATTEMPTS):
            found = self._ask(slot, ids, salt)
            stops.update(*(each.stops for each in found))
            length = min(each.length for each in found)
            if length == max(each.length for each in found):
                self._cache.filled(slot, length, max(each.shortest for each in found))
                self._hits += length > 0
                self._cached_tokens += length
                logits = found[-1].logits if length == len(prompt) else None
                kept = tuple(stop for stop in sorted(stops) if stop > length)
                return Prefix(length, None if logits is None else torch.from_numpy(logits.copy()), kept)
            self._cache.resume(slot, 0, 0)
            if not length:
                break
            ids = np.append(np.asarray(prompt[:length], dtype=np.int32), np.int32(BEYOND))
        return Prefix(0, None, tuple(sorted(stops)))

    def save(self, slot: int, tokens: list[int], salt: str = "", logits: torch.Tensor | None = None) -> None:
        """See `Prefixes.save`."""
        ids = np.asarray(tokens, dtype=np.int32)
        self._cache.orders.append(Save(slot, ids, salt, logits is not None))

    def _ask(self, slot: int, ids: NDArray[np.int32], salt: str) -> list[Restored]:
        model = self._model
        orders = self._cache.take_orders()
        try:
            asked = [
                (stage, stage.restore(model.work(number, orders), slot, ids, salt))
                for number, stage in enumerate(model.stages)
            ]
            return [stage.fetch_restored(pending) for stage, pending in asked]
        except StageLostError as error:
            model.lose(error)
            raise


def device_here(stage: int, device: str) -> torch.device:
    """What stands here for a stage's device, so that the pages of each are counted by themselves."""
    kind, _, index = device.partition(":")
    return torch.device("meta", stage * MOST_DEVICES + (0 if kind == "cpu" else 1 + int(index or 0)))
