"""What recorded steps of V4 and of V4.1 promise alike."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from engine.families.base import Batch
from engine.families.deepseek_v4.forward import DeepseekV4, V4Cache
from engine.families.deepseek_v41.forward import DeepseekV41, V41Cache
from engine.families.streams.operations import MAX_ROWS
from quant.errors import CheckpointError
from quant.kernels.cpu.program import Program


def forget(cache: V4Cache | V41Cache) -> None:
    """Make further steps with the cache eager."""
    assert cache.decoder is not None
    cache.decoder = None


def assert_any_number_of_sequences_is_computed(model: DeepseekV4 | DeepseekV41) -> None:
    """Also more than a program takes."""
    rows = MAX_ROWS + 2
    cache, eager = model.new_cache(rows, 8), model.new_cache(rows, 8)
    forget(eager)
    batch = Batch.of([(slot, 0, [slot]) for slot in range(rows)])

    assert torch.equal(model.forward(batch, cache), model.forward(batch, eager))


def failures(model: DeepseekV4 | DeepseekV41, cache: V4Cache | V41Cache, places: Iterable[int]) -> int:
    """How many of a step's hand-overs, of those at `places`, fail where the disk does; after each the same
    step can be computed again."""
    eager = model.new_cache(1, 16)
    forget(eager)
    for each in (cache, eager):
        model.forward(Batch.of([(0, 0, [5, 6, 7])]), each)
    batch, failed = Batch.of([(0, 3, [8])]), 0
    for at in places:
        with pytest.MonkeyPatch.context() as broken:
            broken.setitem(program_of(cache).hand_overs, at, _gone)
            try:
                model.forward(batch, cache)
            except CheckpointError:
                failed += 1
            else:  # everything was at hand there
                cache.resume(0, 3, 0)
        assert cache.length(0) == 3
        assert not model.weights.experts.slots.claims
    assert torch.equal(model.forward(batch, cache), model.forward(batch, eager))
    return failed


def program_of(cache: V4Cache | V41Cache) -> Program:
    """The recorded step of a cache that has one."""
    assert cache.program is not None
    return cache.program


def _gone(rows: int) -> None:
    raise CheckpointError("shard: cannot be read at byte 0 (Input/output error)")
