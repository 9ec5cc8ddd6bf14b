"""Prompts whose experts stream past: the same bits, nothing displaced but what was borrowed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.experts import store as store_module
from memory.experts.copies import SlotCopier
from memory.experts.store import ExpertStore
from memory.experts.streaming import MANY_USES, RING_SHARE, carrying_s, split
from quant.errors import CheckpointError
from tests.memory.experts.experts_on_disk import LIMIT, ExpertsOnDisk, steps
from tests.memory.experts.test_store import failing

LAYERS, EXPERTS, TOP_K = 3, 16, 4
TOKENS = MANY_USES * EXPERTS // TOP_K


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ExpertsOnDisk:
    return ExpertsOnDisk.write(tmp_path_factory.mktemp("experts") / "shard", LAYERS, EXPERTS, 64, 32)


def prompt(store: ExpertStore, files: ExpertsOnDisk, tokens: list[int], seed: int = 0) -> torch.Tensor:
    """Outputs of a prompt's chunk, of which each layer computes so many last tokens."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens[0], files.hidden, generator=random)
    store.begin(tokens, TOP_K)
    try:
        for layer, count in enumerate(tokens):
            x = x[len(x) - count :]
            chosen = torch.rand(count, EXPERTS - 2, generator=random).argsort(1)[
                :, :TOP_K
            ]  # two are never used
            if store.wants_guesses(layer):
                store.prefetch(layer, chosen.flatten().tolist())
            with store.stream(layer, chosen) or store.acquire(layer, chosen) as step:
                x = step.run(x, torch.full((count, TOP_K), 1 / TOP_K), LIMIT)
    finally:
        store.end()
    return x


COUNTS = [[TOKENS] * 3, [3 * TOKENS, 2 * TOKENS, TOKENS // 2], [TOKENS // 2, TOKENS // 2, TOKENS // 2]]


@pytest.fixture(scope="module")
def expected(files: ExpertsOnDisk) -> list[torch.Tensor]:
    store = files.store(LAYERS * EXPERTS * 1.1)
    outputs = [prompt(store, files, counts) for counts in COUNTS]
    store.close()
    assert all(out.isfinite().all() and out.std() > 0 for out in outputs)
    return outputs


@pytest.fixture(scope="module")
def short_chunks() -> Iterator[None]:
    """Chunks of more than a few tokens are long ones, for which GPUs lend slots."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store_module, "BLOCK_TOKENS", TOKENS - 1)
        yield


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    dram=st.floats(2.2, LAYERS * EXPERTS * 1.2),
    gpus=st.lists(st.floats(0, LAYERS * EXPERTS * 1.2), max_size=3),
    paced=st.booleans(),
    lent=st.floats(0, 20),
)
def test_any_budgets_give_the_same_outputs(
    short_chunks: None,
    files: ExpertsOnDisk,
    expected: list[torch.Tensor],
    dram: float,
    gpus: list[float],
    paced: bool,
    lent: float,
) -> None:
    store = files.store(dram, *gpus, bytes_per_s=1e8 if paced else None, lent=lent)
    try:
        for counts, out in zip(COUNTS, expected, strict=True):
            assert torch.equal(prompt(store, files, counts), out)
            steps(files, store, 2)
    finally:
        store.close()


def held(store: ExpertStore) -> dict[tuple[int, int], str]:
    """Where each expert is that is not on disk alone."""
    tiers = store.expert_locations()
    return {
        (layer, expert): tier
        for layer, of_layer in enumerate(tiers)
        for expert, tier in enumerate(of_layer)
        if tier != "nvme"
    }


def test_a_prompt_displaces_what_it_borrows_and_that_comes_back(files: ExpertsOnDisk) -> None:
    store = files.store(24, 12, bytes_per_s=1e9)
    steps(files, store, 12)  # so that some experts are worth more than others
    before = held(store)
    store.begin([TOKENS] * LAYERS, TOP_K)
    during = held(store)
    store.end()
    assert during.items() <= before.items()
    assert len(before) - len(during) <= 24 // RING_SHARE + 12 // RING_SHARE
    prompt(store, files, [TOKENS] * LAYERS)
    for _ in range(200):
        store.slots.wait_for_transfers()
        store.lent.refill()
    kept_free = store.slots.reserved  # which steps may have used
    assert len(before.keys() - held(store).keys()) <= kept_free
    store.close()


def test_each_missing_expert_is_read_once_and_each_other_one_not_at_all(files: ExpertsOnDisk) -> None:
    store = files.store(20, 8)
    store.begin([TOKENS] * LAYERS, TOP_K)
    missing = LAYERS * EXPERTS - len(held(store))
    store.end()
    store.slots.wait_for_transfers()
    before = store.telemetry.snapshot()
    prompt(store, files, [4 * TOKENS] * LAYERS)
    after = store.telemetry.snapshot()
    read = after.hits["nvme"] - before.hits.get("nvme", 0)
    # Two of each layer are never used, and what was refilled in between is not missing any more.
    assert missing - 2 * LAYERS - 20 // RING_SHARE - 8 // RING_SHARE <= read <= missing
    assert sum(after.hits.values()) == sum(after.computed.values())
    store.close()


def test_a_read_that_fails_fails_the_prompt_alone(
    files: ExpertsOnDisk, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = files.store(9, 4)
    for fails in (lambda n: n == 5, lambda n: n > 7, lambda n: n % 3 == 0):
        with monkeypatch.context() as broken:
            failing(broken, fails, CheckpointError("shard: cannot be read at byte 4096"))
            with contextlib.suppress(CheckpointError):
                for seed in range(3):
                    prompt(store, files, COUNTS[0], seed)
        assert torch.equal(prompt(store, files, COUNTS[0]), expected[0])
        steps(files, store, 2)
    store.close()


def test_an_expert_that_does_not_reach_its_gpu_is_computed_in_dram(
    files: ExpertsOnDisk, expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the link is gone")

    for dram in (20, LAYERS * EXPERTS * 1.1):
        store = files.store(dram, 16)
        with monkeypatch.context() as patched:
            patched.setattr(SlotCopier, "upload", broken)
            assert torch.equal(prompt(store, files, COUNTS[0]), expected[0])
        assert torch.equal(prompt(store, files, COUNTS[0]), expected[0])
        store.close()


def test_processor_and_links_finish_together() -> None:
    assert split([1.0] * 10, 1.0) == 5
    assert split([1.0] * 10, 0.0) == 0
    assert split([0.0] * 10, 1.0) == 10
    assert split([1, 2, 3, 4, 5], 0.5) == 1
    assert split([], 1.0) == 0
    assert split([1.0] * 10, 0.0, starting_s=1.0) == 5
    assert split([1.0] * 10, 0.0, starting_s=1.0, held=4) == 7
    assert split([1.0] * 10, 1.0, carrying=4.0) == 7
    assert carrying_s(600, 100, 4, [10.0]) == 0
    assert carrying_s(600, 100, 4, [10.0, 10.0]) == 300 * 4 / 10


def test_slots_that_a_long_chunk_is_computed_in_are_filled_again_afterwards(
    short_chunks: None, files: ExpertsOnDisk
) -> None:
    store = files.store(LAYERS * EXPERTS * 1.1, 16.5, lent=6)
    (gpu,) = store.slots.gpus
    kept = gpu.arena.kept
    assert gpu.arena.slots - kept == 6
    steps(files, store, 8)
    before = {key for key, tier in held(store).items() if tier == "vram:0"}
    assert len(before) == 16
    store.begin([TOKENS] * LAYERS, TOP_K)
    assert not gpu.arena.can_lend
    entries = [entry.slot for entries in gpu.by_layer for entry in entries.values()]
    assert len(entries) == 16 - 6 - 16 // RING_SHARE
    assert max(entries) < kept
    store.end()
    assert gpu.arena.can_lend
    for _ in range(100):
        store.slots.wait_for_transfers()
        store.lent.refill()
    assert {key for key, tier in held(store).items() if tier == "vram:0"} == before
    store.close()


def test_slots_stay_lent_while_something_else_has_their_memory(
    files: ExpertsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = files.store(LAYERS * EXPERTS * 1.1, 16.5, lent=6)
    (gpu,) = store.slots.gpus
    store.lent.lend()

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr("memory.tiers._allocate", full)
        store.lent.take_back()
        steps(files, store, 2)
        assert not gpu.arena.can_lend
    steps(files, store, 1)
    assert gpu.arena.can_lend
    store.close()
