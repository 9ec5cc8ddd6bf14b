"""Pages that slots and the prefix cache share: nobody sees what another writes, and none is lost or kept too
long."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.aside import Aside, Kept
from engine.cache.prefix import PrefixCache
from engine.cache.shared_rows import LEAST_BYTES, SharedRows
from engine.cache.sparse import CacheShape, SparseCache
from memory.pages.shelf import PAGE

HOST = torch.device("cpu")
SLOTS, CAPACITY, MARGIN = 3, 512, 16
SHAPE = CacheShape(
    layers=2, window=4, head_dim=256, index_dim=72, sources={0: 2, 1: 1}, history=0, history_pad=0,
    margin=MARGIN, devices=(HOST, HOST),
)  # fmt: skip


def marks(tokens: list[int]) -> torch.Tensor:
    """A number for each token that all tokens up to it determine, `[tokens]`."""
    found, mark = [], 7
    for token in tokens:
        mark = (mark * 31 + token) % 65521
        found.append(mark)
    return torch.tensor(found, dtype=torch.float32)


def write(cache: SparseCache, slot: int, tokens: list[int], start: int) -> None:
    """What a forward would append for tokens from `start` on."""
    cache.pages.hold(slot, len(tokens))
    values = marks(tokens)
    for ratio, view in cache.appended(slot):
        first, stop = start // ratio, len(tokens) // ratio
        view[first:stop] = values[ratio - 1 :: ratio][first:stop].unsqueeze(1)
    cache.resume(slot, len(tokens), max(0, len(tokens) - MARGIN))


def is_right(cache: SparseCache, slot: int, tokens: list[int]) -> bool:
    values = marks(tokens)
    return all(
        torch.equal(
            view[: len(tokens) // ratio], values[ratio - 1 :: ratio].unsqueeze(1).expand(-1, view.shape[1])
        )
        for ratio, view in cache.appended(slot)
    )


def kept_rows(prefixes: PrefixCache) -> list[SharedRows]:
    found, nodes = [], list(prefixes._roots.values())
    while nodes:
        node = nodes.pop()
        nodes += node.children.values()
        found += [rows for rows in node.rows if isinstance(rows, SharedRows)]
    return found


def check_counts(cache: SparseCache, prefixes: PrefixCache) -> None:
    shelf, kept = prefixes.rows.shelf, kept_rows(prefixes)
    assert shelf is not None
    assert shelf.nbytes == shelf.allocated_bytes
    for rows in kept:
        assert rows.pages.users == 1 + cache.pages.shared_with(rows.pages)
    of_slots = {id(shared.kept): shared.kept for some in cache.pages._shared.values() for shared in some}
    for slot, some in cache.pages._shared.items():
        assert sum(shared.memory.nbytes for shared in some) <= cache.pages.held_bytes(slot)
    everything = of_slots | {id(rows.pages): rows.pages for rows in kept}
    assert shelf.nbytes == sum(pages.nbytes for pages in everything.values())


TEXTS = [[(seed * 7 + i * i) % 50 for i in range(400)] for seed in range(2)]
OPERATIONS = ("begin", "go on", "save", "roll back", "abort", "put aside", "bring back", "forget")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slots_have_their_own_text_and_pages_their_users(data: st.DataObject) -> None:
    cache = SparseCache(SHAPE, SLOTS, CAPACITY)
    prefixes = PrefixCache(cache, 3 << 20)
    aside = Aside(cache, prefixes, None)
    running: dict[int, list[int]] = {}
    waiting: list[tuple[list[int], Kept]] = []
    for _ in range(data.draw(st.integers(3, 14))):
        operation = data.draw(st.sampled_from(OPERATIONS))
        slot = data.draw(st.integers(0, SLOTS - 1))
        tokens = running.get(slot)
        if operation == "begin" and tokens is None:
            text = data.draw(st.sampled_from(TEXTS))[: data.draw(st.integers(100, 400))]
            tokens = [*text[:-5], *data.draw(st.lists(st.integers(0, 50), min_size=5, max_size=5))]
            write(cache, slot, tokens, prefixes.restore(slot, tokens).length)
            running[slot] = tokens
            prefixes.save(slot, tokens)
        elif operation == "go on" and tokens is not None:
            more = data.draw(st.integers(1, 100))
            running[slot] = [*tokens, *range(more)][:CAPACITY]
            write(cache, slot, running[slot], len(tokens))
        elif operation == "save" and tokens is not None:
            prefixes.save(slot, tokens)
        elif operation == "roll back" and tokens is not None:
            length = len(tokens) - data.draw(st.integers(1, MARGIN))
            running[slot] = [*tokens[:length], 99, 98]
            write(cache, slot, running[slot], length)
        elif operation == "abort" and tokens is not None:
            cache.release(slot)
            del running[slot]
        elif operation == "put aside" and tokens is not None:
            kept = aside.put(slot)
            if kept is not None:
                waiting.append((tokens, kept))
            cache.release(slot)
            del running[slot]
        elif operation == "bring back" and tokens is None and waiting:
            tokens, kept = waiting.pop()
            cache.pages.hold(slot, len(tokens))
            assert aside.bring_back(slot, kept)
            running[slot] = tokens
        elif operation == "forget" and prefixes._ends:
            prefixes._evict()
        assert all(is_right(cache, at, text) for at, text in running.items())
        check_counts(cache, prefixes)
    for slot in running:
        cache.release(slot)
    while prefixes._ends:
        prefixes._evict()
    assert prefixes.rows.shelf is not None
    assert prefixes.rows.shelf.nbytes == prefixes.rows.shelf.allocated_bytes == 0


def test_a_restored_text_takes_no_memory_but_for_its_open_page() -> None:
    cache = SparseCache(SHAPE, SLOTS, CAPACITY)
    prefixes = PrefixCache(cache, 1 << 30)
    tokens = TEXTS[0]
    write(cache, 0, tokens, 0)
    prefixes.save(0, tokens)
    assert prefixes.rows.shelf is not None
    shared = prefixes.rows.shelf.nbytes
    assert shared > 0.8 * sum(rows.nbytes for rows in kept_rows(prefixes)) > LEAST_BYTES
    for slot in (1, 2):
        assert prefixes.restore(slot, [*tokens, 3]).length == len(tokens)
        assert is_right(cache, slot, tokens)
    assert prefixes.rows.shelf.nbytes == shared
    assert cache.pages.held_bytes(1) >= shared // PAGE * PAGE, "counted as if it had all of them"


@pytest.mark.parametrize("back", [1, MARGIN])
def test_what_one_writes_after_a_roll_back_is_no_others(back: int) -> None:
    cache = SparseCache(SHAPE, SLOTS, CAPACITY)
    prefixes = PrefixCache(cache, 1 << 30)
    tokens = TEXTS[0][:384]
    write(cache, 0, tokens, 0)
    prefixes.save(0, tokens)
    prefixes.restore(1, [*tokens, 3])
    write(cache, 1, [*tokens[:-back], *range(60, 60 + back)], len(tokens) - back)
    assert is_right(cache, 0, tokens)
    prefixes.restore(2, [*tokens, 3])
    assert is_right(cache, 2, tokens)
