"""How large the pool for KV is, and how long a sequence may be in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.families.base import Model
from engine.families.loader import load
from engine.kv_pool import WHOLE, KvPool, PoolSize, new_pool
from memory.planner.budget import MemoryBudget
from quant.errors import BudgetError
from tests.conftest import golden_path

CONTEXT = 2000
SLOTS = 4


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    loaded = load(golden_path("v41-c"), MemoryBudget(dram_bytes=1 << 30))
    yield loaded.model
    loaded.model.close()


def bytes_of(model: Model, tokens: int) -> int:
    """Pages of one sequence of so many tokens."""
    return model.new_cache(1, max(tokens, 1)).pages.nbytes(tokens)


def pool_of(model: Model, nbytes: int | None, context: int = CONTEXT, *, given: bool, short: bool) -> KvPool:
    return new_pool(model, SLOTS, context, PoolSize(nbytes, given, short), prefix_bytes=0)


def test_without_a_size_all_slots_may_be_full(model: Model) -> None:
    pool = new_pool(model, SLOTS, CONTEXT, WHOLE, prefix_bytes=0)
    assert (pool.tokens, pool.context) == (SLOTS * CONTEXT, CONTEXT)
    assert pool.cache.nbytes == model.cache_bytes(SLOTS, CONTEXT)


def test_a_sequence_may_be_as_long_as_the_model_can_while_the_pool_holds_it(model: Model) -> None:
    pool = pool_of(model, bytes_of(model, CONTEXT), given=True, short=True)
    assert pool.context == CONTEXT
    assert CONTEXT <= pool.tokens < 2 * CONTEXT
    assert pool.cache.pages.budget_bytes == bytes_of(model, CONTEXT)


def test_a_sequence_is_as_long_as_the_pool_holds_where_it_holds_no_longer_one(model: Model) -> None:
    pool = pool_of(model, bytes_of(model, 1000), given=True, short=True)
    assert 1000 <= pool.context < CONTEXT
    assert pool.cache.nbytes < model.cache_bytes(1, CONTEXT) + model.cache_bytes(SLOTS, 1)
    with pytest.raises(BudgetError, match="no room"):
        pool.cache.pages.hold(0, CONTEXT)


def test_a_length_that_was_asked_for_and_does_not_fit_is_an_error_that_says_what_helps(model: Model) -> None:
    nbytes = bytes_of(model, 1000)
    with pytest.raises(BudgetError, match=r"a sequence of 2,000 tokens needs .* raise --kv-budget to \dMiB"):
        pool_of(model, nbytes, given=True, short=False)
    lower = pool_of(model, nbytes, given=True, short=True).context
    assert pool_of(model, nbytes, lower, given=True, short=False).context == lower


def test_a_pool_of_no_given_size_holds_the_length_that_was_asked_for(model: Model) -> None:
    pool = pool_of(model, 1, given=False, short=False)
    assert pool.context == CONTEXT
    assert pool_of(model, 1, given=False, short=True).context >= 512


def test_a_pool_without_room_for_anything_is_refused(model: Model) -> None:
    with pytest.raises(BudgetError, match="has no room for a sequence; raise --kv-budget"):
        pool_of(model, 1, given=True, short=True)


def test_a_pool_larger_than_memory_is_refused(model: Model) -> None:
    with pytest.raises(BudgetError, match="lower --kv-budget, --max-model-len"):
        new_pool(model, 10**7, CONTEXT, PoolSize(1 << 50, is_given=True), prefix_bytes=0)
