"""The same sequences twice: decoded by a recorded program, and operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from hypothesis import strategies as st

from engine.cache.prefix import PrefixCache
from engine.families.base import Batch, KvCache, Model

Cache = TypeVar("Cache", bound=KvCache)


class Pair(Generic[Cache]):
    """Two caches of a model, of which `forget` has made the second one's steps eager."""

    def __init__(self, model: Model, new_cache: Callable[[], Cache], forget: Callable[[Cache], None]) -> None:
        self._model = model
        self.replayed, self.eager = new_cache(), new_cache()
        forget(self.eager)
        self.known = [PrefixCache(cache, 1 << 22) for cache in self.caches]
        self.texts: list[list[int]] = [[] for _ in range(self.eager.slots)]

    @property
    def caches(self) -> tuple[Cache, Cache]:
        return self.replayed, self.eager

    def run(self, parts: list[tuple[int, list[int]]]) -> None:
        """Compute further tokens of some slots; the logits must be the same bits."""
        batch = Batch.of([(slot, len(self.texts[slot]), ids) for slot, ids in parts])
        first, second = (self._model.forward(batch, cache).clone() for cache in self.caches)
        assert torch.equal(first, second)
        for slot, ids in parts:
            self.texts[slot] += ids

    def drop(self, slot: int) -> None:
        """What an abort does, or an end: the slot is kept as a prefix and given to another."""
        for cache, known in zip(self.caches, self.known, strict=True):
            if len(self.texts[slot]) > 1:
                known.save(slot, self.texts[slot], "", None)
            cache.reset(slot)
        self.texts[slot] = []

    def restore(self, slot: int, ids: list[int]) -> None:
        """Begin a prompt with what is known of it."""
        lengths = {known.restore(slot, ids, "").length for known in self.known}
        assert len(lengths) == 1
        self.texts[slot] = ids[: lengths.pop()]

    def do_anything(self, data: st.DataObject, vocab: int, context: int, longest: int = 6) -> None:
        """Prompts of up to `longest` tokens, decodes, aborts and prefixes, in any order."""
        token, count = st.integers(0, vocab - 1), len(self.texts)
        for _ in range(data.draw(st.integers(1, 12))):
            slots = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
            act = data.draw(st.sampled_from(["prompt", "decode", "decode", "mixed", "drop", "restore"]))
            if act == "drop":
                self.drop(slots[0])
                continue
            if act == "restore":
                self.drop(slots[0])
                self.restore(slots[0], data.draw(st.lists(token, min_size=2, max_size=8)))
            most = {"prompt": longest, "mixed": 3}.get(act, 1)
            parts = [(slot, data.draw(st.lists(token, min_size=1, max_size=most))) for slot in slots]
            fitting = [(slot, ids) for slot, ids in parts if len(self.texts[slot]) + len(ids) <= context]
            if fitting:
                self.run(fitting)
