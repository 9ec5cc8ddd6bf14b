"""One part of a model where it runs: its layers, with their keys and values and the states of prefixes."""

from __future__ import annotations

import time
import uuid
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cache.prefix import PrefixCache
from engine.cluster.messages import (
    Handed,
    OpenedCache,
    Order,
    PartInfo,
    PlannedKv,
    Release,
    Restored,
    Resume,
    StageLostError,
    Trim,
    Work,
)
from engine.families.base import KvCache, Model
from engine.families.places import HOST

KNOWN = torch.empty(0)  # in place of logits, where these are with another part


class Part:
    """Serves one engine. Calls come one after the other, in the order in which the engine made them.

    is_last       it makes logits
    kv            what was planned for its rows in host memory
    prefix_bytes  for states of prefixes
    """

    def __init__(self, model: Model, *, is_last: bool, kv: PlannedKv, prefix_bytes: int) -> None:
        self.model = model
        self._is_last = is_last
        self._kv, self._prefix_bytes = kv, prefix_bytes
        self._session = ""
        self._cache: KvCache | None = None
        self._prefixes: PrefixCache | None = None
        self._last: dict[int, NDArray[np.float32]] = {}  # by slot: logits after its last token

    def describe(self, slots: int) -> PartInfo:
        """What the engine must know before it opens a cache of so many slots."""
        model, rooms = self.model, self.model.kv_rooms(slots)
        tokens = self._kv.tokens if rooms.tokens is None else min(rooms.tokens, self._kv.tokens)
        nbytes = {str(device): room for device, room in rooms.by_device.items()}
        nbytes[str(HOST)] = self._kv.nbytes
        return PartInfo(
            info=model.info,
            keeps_whole_states=model.keeps_whole_states,
            tokens=tokens,
            longest=rooms.longest,
            kv_bytes=nbytes,
            held_bytes=model.held_bytes,
            prefix_bytes=self._prefix_bytes,
        )

    def open(self, slots: int, capacity: int) -> OpenedCache:
        """A new cache; one that was there before is dropped. Raises BudgetError."""
        self._cache = self._prefixes = None
        self._last.clear()
        cache = self._cache = self.model.new_cache(slots, capacity)
        cache.shares_logits = True
        if self._prefix_bytes:
            self._prefixes = PrefixCache(cache, self._prefix_bytes)
        self._session = uuid.uuid4().hex
        return OpenedCache(self._session, cache.margin, cache.bytes_at(0), cache.pages.geometry)

    def session(self) -> str:
        """Of the open cache; empty where there is none."""
        return self._session

    def work(self, work: Work, received: Handed | None = None) -> Handed:
        """Follow orders and compute a batch; `received` is what the part before this one has made of it."""
        cache = self._opened(work.session)
        for order in work.orders:
            self._follow(cache, order)
        if not work.ids:
            return Handed(np.empty((0, 0), np.float32))
        batch = work.batch()
        if received is not None:
            batch = replace(batch, states=_tensor(received.values))
        begun = time.perf_counter()
        found = self.model.forward(batch, cache)
        seconds = time.perf_counter() - begun
        before = received or Handed(np.empty((0, 0), np.float32))
        values: NDArray[np.float32] = found.numpy().copy()
        if self._is_last:
            self._remember(work, values)
        return Handed(values, (*before.seconds, seconds), (*before.nbytes, values.nbytes))

    def restore(self, work: Work, slot: int, prompt: NDArray[np.int32], salt: str) -> Restored:
        """Follow orders and restore the longest prefix of a prompt that this part has into a slot."""
        cache = self._opened(work.session)
        for order in work.orders:
            self._follow(cache, order)
        if self._prefixes is None:
            return Restored(0, 0, (), None)
        found = self._prefixes.restore(slot, prompt.tolist(), salt)
        logits = None if found.logits is None else found.logits.numpy()
        return Restored(found.length, cache.shortest(slot), found.stops, logits)

    def kept_bytes(self) -> tuple[int, int]:
        """Bytes of states that are kept, and how often one was evicted."""
        stats = None if self._prefixes is None else self._prefixes.stats
        return (0, 0) if stats is None else (stats.nbytes, stats.evictions)

    @property
    def held_pages(self) -> int:
        """Bytes of pages that slots have."""
        return 0 if self._cache is None else self._cache.pages.taken_bytes

    def close(self) -> None:
        """Release threads and files."""
        self.model.close()

    def _opened(self, session: str) -> KvCache:
        if self._cache is None or session != self._session:
            raise StageLostError("a part of the model was started again; what it held of sequences is lost")
        return self._cache

    def _follow(self, cache: KvCache, order: Order) -> None:
        if isinstance(order, Resume):
            cache.resume(order.slot, order.length, min(cache.shortest(order.slot), order.length))
        elif isinstance(order, Release):
            cache.release(order.slot)
            self._last.pop(order.slot, None)
        elif isinstance(order, Trim):
            cache.pages.trim(order.slot, order.tokens)
        elif self._prefixes is not None:
            logits = self._logits_of(order.slot) if order.with_logits else None
            self._prefixes.save(order.slot, order.tokens.tolist(), order.salt, logits)

    def _logits_of(self, slot: int) -> torch.Tensor | None:
        if not self._is_last:
            return KNOWN
        return torch.from_numpy(self._last[slot]) if slot in self._last else None

    def _remember(self, work: Work, logits: NDArray[np.float32]) -> None:
        """Keep the logits after each sequence's last token, as long as no others follow."""
        rows = range(len(work.ids)) if work.wanted is None else work.wanted
        of_rows = {row: at for at, row in enumerate(rows)}
        stop = 0
        for slot, _, length in work.segments:
            stop += length
            self._last.pop(slot, None)
            if stop - 1 in of_rows:
                self._last[slot] = logits[of_rows[stop - 1]]


def _tensor(values: NDArray[np.float32]) -> torch.Tensor:
    """A transport may hand on memory that is not to be written, which torch takes no view of."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())
