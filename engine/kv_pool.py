"""The pool that sequences take their KV from: how large it is, and how long a sequence may be in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.base import KvCache, Model
from memory.hardware.detect import available_memory_bytes
from memory.planner.serving import MIN_CONTEXT, no_room, too_long
from quant.errors import BudgetError

USELESS = 16  # shorter sequences are of no use to anybody


@dataclass(frozen=True)
class PoolSize:
    """What is asked for.

    nbytes       of rows in all; None for what all slots could take
    is_given     False: it may be more, where the longest sequence needs it
    may_shorten  sequences may be shorter than asked for, where the pool holds no longer one
    on_host      of `nbytes`, how many are in host memory; None for all
    """

    nbytes: int | None = None
    is_given: bool = False
    may_shorten: bool = False
    on_host: int | None = None


WHOLE = PoolSize()  # all slots may be full


@dataclass(frozen=True)
class KvPool:
    """A cache with its budgets.

    tokens   of all sequences together
    context  of one sequence at most
    """

    cache: KvCache
    tokens: int
    context: int

    @property
    def nbytes(self) -> int:
        """Bytes of pages that all sequences together may take."""
        return sum(self.by_device.values())

    @property
    def by_device(self) -> dict[torch.device, int]:
        """The same by device."""
        pages, slots = self.cache.pages, self.cache.slots
        if pages.budgets is not None:
            return dict(pages.budgets)
        return {device: slots * pages.nbytes(self.context, device) for device in pages.devices}


def new_pool(model: Model, slots: int, context: int, size: PoolSize, prefix_bytes: int) -> KvPool:
    """A pool for up to `slots` sequences of up to `context` tokens, beside a prefix cache.

    Raises BudgetError where memory has no room for it, or the pool none for one sequence.
    """
    rooms = model.kv_rooms(slots)
    if size.may_shorten and rooms.longest is not None:
        context = min(context, rooms.longest)
    _check_memory(model, slots, context, size, prefix_bytes)
    cache = model.new_cache(slots, context)
    cache.shares_logits = True  # a step's tokens are sampled before the next one begins
    pages, most = cache.pages, slots * context
    if size.nbytes is None and rooms.tokens is None:
        return KvPool(cache, most, context)
    nbytes = size.nbytes
    if nbytes is not None and not size.is_given:
        nbytes = max(nbytes, pages.nbytes(context))
    limit = most if rooms.tokens is None else min(most, rooms.tokens)
    tokens = pages.fit(context, rooms.by_device, nbytes, limit)
    longest = pages.longest(context)
    if longest < context and not size.may_shorten:
        raise too_long(nbytes or pages.budget_bytes or 0, context, longest, pages.nbytes(context))
    if longest < min(context, USELESS):
        raise no_room(nbytes or 0, pages.nbytes(min(context, MIN_CONTEXT)))
    return KvPool(cache, tokens, longest)


def _check_memory(model: Model, slots: int, context: int, size: PoolSize, prefix_bytes: int) -> None:
    """Raises BudgetError where the host has no room."""
    needed, available = model.cache_bytes(slots, context), available_memory_bytes()
    if size.nbytes is not None:
        rows = size.nbytes if size.on_host is None else size.on_host
        needed = min(needed, model.cache_bytes(slots, 1) + rows)
        if not size.is_given:
            needed = max(needed, model.cache_bytes(1, context))
    if needed + prefix_bytes > available:
        raise BudgetError(
            f"the KV cache of {slots} sequences needs {needed / 1e9:.1f} GB and the prefix cache "
            f"{prefix_bytes / 1e9:.1f} GB, but only {available / 1e9:.1f} GB of memory is free; lower "
            "--kv-budget, --max-model-len, --max-num-seqs or --prefix-cache"
        )
