"""A cache's digest says of any prompt how much of its beginning the cache holds."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from engine.cache import digest as digests
from engine.cache.digest import BLOCK, HASH_BYTES, PrefixDigest, block_hashes
from engine.cache.prefix import PrefixCache
from engine.families.base import Batch, KvCache, Model
from engine.families.loader import open_model
from memory.planner.budget import MemoryBudget
from tests.conftest import golden_path


def known(held: bytes, ids: list[int], salt: str = "") -> int:
    """Blocks of a prompt's beginning that are held."""
    hashes = set(_cut(held))
    blocks = block_hashes(np.asarray(ids, np.int32), salt)
    return next((n for n, block in enumerate(blocks) if block not in hashes), len(blocks))


def held_hashes(cache: PrefixCache) -> bytes:
    """As who looks for the first time finds them."""
    digest = PrefixDigest(cache)
    digest.refresh(at_once=True)
    return digest.hashes


def keep(cache: PrefixCache, model: Model, slots: KvCache, salt: str, prompt: list[int]) -> None:
    slots.reset(0)
    model.forward(Batch.of([(0, 0, prompt)]), slots)
    cache.save(0, prompt, salt)


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(golden_path("v41-c")).load(MemoryBudget(1 << 30)).model


@pytest.fixture(scope="module")
def slots(model: Model) -> KvCache:
    return model.new_cache(1, 400)


@pytest.fixture(scope="module")
def cache(model: Model, slots: KvCache) -> PrefixCache:
    """With three prompts, two of which begin alike."""
    kept = PrefixCache(slots, 1 << 26)
    for salt, prompt in PROMPTS:
        keep(kept, model, slots, salt, prompt)
    return kept


def drawn(seed: int, count: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(3, 100) for _ in range(count)]


COMMON = drawn(1, 150)
PROMPTS = [("", COMMON + drawn(2, 100)), ("", COMMON + drawn(3, 30)), ("theirs", drawn(4, 90))]


def test_whole_blocks_of_what_is_held_are_known(cache: PrefixCache) -> None:
    held = held_hashes(cache)
    for salt, prompt in PROMPTS:
        assert known(held, prompt, salt) == len(prompt) // BLOCK
        assert known(held, [*prompt, *drawn(9, 200)], salt) == len(prompt) // BLOCK
    assert known(held, COMMON + drawn(5, 100)) == len(COMMON) // BLOCK
    distinct = {h for salt, prompt in PROMPTS for h in block_hashes(np.asarray(prompt, np.int32), salt)}
    assert len(held) == HASH_BYTES * len(distinct)  # what prompts share is told once


def test_nothing_is_known_of_other_prompts_and_other_salts(cache: PrefixCache) -> None:
    held = held_hashes(cache)
    assert known(held, [7, *COMMON]) == 0
    assert known(held, COMMON, "mine") == 0
    assert known(held, PROMPTS[2][1]) == 0


def test_only_what_is_new_is_hashed(model: Model, slots: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of looking again is that of what was added, however much is kept."""
    hashed: list[int] = []
    extend = digests._Chain.extend

    def counted(chain: digests._Chain, tokens: digests.Ids) -> Iterator[bytes]:
        hashed.append(len(tokens))
        return extend(chain, tokens)

    monkeypatch.setattr(digests._Chain, "extend", counted)
    cache = PrefixCache(slots, 1 << 26)
    long, branch = drawn(6, 320), drawn(7, 64)
    keep(cache, model, slots, "", long)
    digest = PrefixDigest(cache)
    digest.refresh(at_once=True)
    hashed.clear()
    keep(cache, model, slots, "theirs", branch)
    digest.refresh(at_once=True)
    assert sum(hashed) == len(branch)
    keep(cache, model, slots, "", [*long[:160], *branch])  # splits the edge of the long one
    digest.refresh(at_once=True)
    assert set(_cut(digest.hashes)) == set(_cut(held_hashes(cache)))
    for prompt in (long, [*long[:160], *branch]):
        assert known(digest.hashes, prompt) == len(prompt) // BLOCK


def _cut(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def test_a_digest_follows_what_is_saved_and_forgotten(cache: PrefixCache) -> None:
    digest = PrefixDigest(cache)
    assert digest.hashes == b""
    digest.refresh(at_once=True)
    before = digest.hashes
    assert known(before, COMMON) == len(COMMON) // BLOCK
    budget = cache.stats.budget_bytes
    assert cache.lend(budget - 1)  # forgets all
    digest.refresh(at_once=True)
    cache.take_back(budget - 1)
    assert digest.hashes == b""
