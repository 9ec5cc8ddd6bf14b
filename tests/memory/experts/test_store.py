"""The expert store: same outputs whatever the budgets, bytes within them, failures that pass."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memory.checkpoint.direct_reads
from memory.checkpoint.direct_reads import DirectFiles
from memory.checkpoint.reads import read_into
from memory.experts.copies import Fence, SlotCopier
from memory.experts.reader import ExpertReader
from memory.experts.store import ExpertStore
from memory.hardware.detect import resident_bytes
from memory.transfer import Priority, Ticket
from quant.errors import BudgetError, CheckpointError
from tests.memory.experts.experts_on_disk import LIMIT, ExpertsOnDisk, steps

LAYERS, EXPERTS = 3, 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ExpertsOnDisk:
    return ExpertsOnDisk.write(tmp_path_factory.mktemp("experts") / "shard", LAYERS, EXPERTS, 64, 32)


@pytest.fixture(scope="module")
def expected(files: ExpertsOnDisk) -> torch.Tensor:
    store = files.store(LAYERS * EXPERTS * 1.1)
    outputs = steps(files, store, 6)
    store.close()
    assert outputs.isfinite().all()
    assert outputs.std() > 0
    return outputs


@pytest.mark.slow
@settings(max_examples=40)
@given(
    dram=st.floats(0, LAYERS * EXPERTS * 1.2),
    gpus=st.lists(st.floats(0, LAYERS * EXPERTS * 1.2), max_size=3),
    paced=st.booleans(),
)
def test_any_budgets_give_the_same_outputs_or_are_refused(
    files: ExpertsOnDisk, expected: torch.Tensor, dram: float, gpus: list[float], paced: bool
) -> None:
    try:
        store = files.store(dram, *gpus, bytes_per_s=1e8 if paced else None)
    except BudgetError:
        assert dram < 2.1  # slots begin on cache lines
        return
    try:
        assert torch.equal(steps(files, store, 6), expected)
        for tier, allowed in {"dram": dram, **{f"vram:{i}": n for i, n in enumerate(gpus)}}.items():
            assert store.tier_bytes[tier] <= allowed * files.slot_bytes
    finally:
        store.close()


@pytest.mark.parametrize("readers", [1, 7])
def test_the_number_of_readers_changes_nothing(
    files: ExpertsOnDisk, expected: torch.Tensor, readers: int
) -> None:
    store = files.store(5, 3, readers=readers)
    assert torch.equal(steps(files, store, 6), expected)
    store.close()


def test_memory_grows_by_no_more_than_the_budgets(tmp_path: Path) -> None:
    files = ExpertsOnDisk.write(tmp_path / "shard", 4, 24, 1024, 768)  # 120 MB
    buffers = 4 * files.slot_bytes  # of readers, and what a step computes with
    warm = files.store(2)
    steps(files, warm, 1)
    warm.close()
    gc.collect()
    before = resident_bytes()
    store = files.store(12, 6, 6)
    budget = 24 * files.slot_bytes
    for seed in range(10):
        steps(files, store, 1, seed=seed)
        assert resident_bytes() - before <= budget + buffers
    seen = store.telemetry.snapshot()
    store.close()
    assert seen.moved_bytes["nvme"] > 2 * budget
    assert seen.evictions["dram"] > 0


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool], error: Exception) -> list[int]:
    """Let reads fail of which `fails` says so by their number; returns the numbers, growing."""
    read, numbers, lock = DirectFiles.read, [0], threading.Lock()

    def sometimes(self: DirectFiles, *args: object) -> object:
        with lock:
            numbers[0] += 1
            number = numbers[0]
        if fails(number):
            raise error
        return read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectFiles, "read", sometimes)
    return numbers


def test_a_step_whose_read_fails_says_so_and_the_slot_is_read_anew(
    files: ExpertsOnDisk, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = files.store(4, 2)
    for fails in (lambda n: n == 5, lambda n: n > 3, lambda n: n % 3 == 0):
        with monkeypatch.context() as broken:
            failing(broken, fails, CheckpointError("shard: cannot be read at byte 4096"))
            with pytest.raises(CheckpointError, match="cannot be read at byte 4096"):
                steps(files, store, 50)
        assert torch.equal(steps(files, store, 6), expected)
    assert store.telemetry.snapshot().failed["nvme demand"] > 0
    store.close()


def test_a_guess_that_cannot_be_read_fails_nobody(
    files: ExpertsOnDisk, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ExpertReader._part

    def only_demand(
        self: ExpertReader, key: tuple[int, int], slot: torch.Tensor, priority: Priority
    ) -> Ticket:
        def fail() -> None:
            raise CheckpointError("shard: cannot be read")

        parts = [part(self, key, (number,), slot, threading.Event()) for number in range(3)]
        if priority is Priority.PREFETCH:
            parts[1] = fail
        return self.link.submit(parts, self._layouts[key[0]].nbytes, priority)

    store = files.store(8)
    monkeypatch.setattr(ExpertReader, "read", only_demand)
    assert torch.equal(steps(files, store, 6), expected)
    seen = store.telemetry.snapshot()
    assert seen.failed["nvme prefetch"] > 0
    assert "nvme demand" not in seen.failed
    store.close()


def test_a_slow_disk_is_waited_for(
    files: ExpertsOnDisk, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DirectFiles.read

    def slowly(self: DirectFiles, *args: object) -> object:
        time.sleep(0.002)
        return read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(DirectFiles, "read", slowly)
    store = files.store(5, 2)
    assert torch.equal(steps(files, store, 6), expected)
    seen = store.telemetry.snapshot()
    assert seen.stalled_on("nvme") > 0.002
    assert seen.busy_s["nvme"] >= seen.stalled_on("nvme") * 0.5
    store.close()


def test_a_drive_that_reports_an_error_is_named(
    files: ExpertsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> int:
        raise OSError(5, "Input/output error")

    store = files.store(3)
    monkeypatch.setattr(os, "preadv", gone)
    with pytest.raises(CheckpointError, match=r"shard: cannot be read at byte \d+ \(Input/output error\)"):
        steps(files, store, 6)
    store.close()


def test_wrong_guesses_are_taken_back_or_dropped_and_right_ones_used(files: ExpertsOnDisk) -> None:
    store = files.store(10, readers=1)
    steps(files, store, 30)
    seen = store.telemetry.snapshot()
    assert seen.prefetches["used"] > 0
    assert seen.prefetches.get("cancelled", 0) + seen.prefetches.get("dropped", 0) > 0
    assert 0 < seen.guesses["right"] < seen.guesses["made"]  # three of four, and a wrong one
    assert seen.slots["dram"] >= 0
    store.close()


def test_an_expert_goes_to_a_full_gpu_only_if_it_is_worth_the_exchange(files: ExpertsOnDisk) -> None:
    store = files.store(20.4, 3.1)  # an expert is in one place, and no GPU has room for another
    gpu = store.slots.gpus[0]
    assert gpu.arena.free == 0
    x, ones = torch.ones(1, files.hidden), torch.ones(1, 1)
    newcomer = next(expert for expert in range(EXPERTS) if gpu.find((0, expert)) is None)
    held = list(gpu.by_layer[0])
    assert held
    for expert in held * 8:
        store.acquire(0, torch.tensor([[expert]])).run(x, ones, LIMIT)
    scores = []
    for turn in range(1000):
        scores.append(
            store.slots.score((0, newcomer)) / min(store.slots.score((0, expert)) for expert in held)
        )
        used = newcomer if turn % 3 else held[turn % len(held)]
        store.acquire(0, torch.tensor([[used]])).run(x, ones, LIMIT)
        if gpu.find((0, newcomer)) is not None:
            break
    store.slots.settle(wait=True)
    assert max(scores) > 1.0  # worth more, but not enough
    assert store.telemetry.snapshot().evictions["vram:0"] == 1
    store.close()


def one_in_dram_only(store: ExpertStore) -> int:
    """An expert of layer 0 that its GPU has no copy of."""
    return next(e for e in range(EXPERTS) if all(gpu.find((0, e)) is None for gpu in store.slots.gpus))


def test_a_guessed_expert_goes_up_an_idle_link_and_is_used_there(files: ExpertsOnDisk) -> None:
    store = files.store(LAYERS * EXPERTS * 1.1, 6.1, 6.1)
    expert = one_in_dram_only(store)
    store.prefetch(0, [expert])
    found = store.slots.find((0, expert))
    assert found is not None
    table, entry = found
    assert table in store.slots.gpus
    assert entry.ticket is not None
    entry.ticket.wait()
    store.acquire(0, torch.tensor([[expert]])).run(torch.ones(1, files.hidden), torch.ones(1, 1), LIMIT)
    seen = store.telemetry.snapshot()
    assert seen.hits == {table.tier.name: 1}
    assert seen.prefetches == {"used": 1}
    assert seen.moves[f"{table.tier.name} prefetch"] == 1
    store.close()


def test_a_guessed_copy_that_has_not_begun_when_its_layer_is_reached_is_taken_back(
    files: ExpertsOnDisk, expected: torch.Tensor
) -> None:
    store = files.store(LAYERS * EXPERTS * 1.1, 6.1)
    expert = one_in_dram_only(store)
    is_free = threading.Event()

    def occupy() -> None:
        assert is_free.wait(60)

    ahead = store.slots._links[0].submit([occupy], 1, Priority.DEMAND)
    store.prefetch(0, [expert])
    step = store.acquire(0, torch.tensor([[expert]]))
    assert store.telemetry.snapshot().hits == {"dram": 1}
    assert store.telemetry.snapshot().prefetches == {"cancelled": 1}
    is_free.set()
    ahead.wait()
    step.run(torch.ones(1, files.hidden), torch.ones(1, 1), LIMIT)
    assert torch.equal(steps(files, store, 6), expected)
    store.close()


@pytest.mark.parametrize("dram", [LAYERS * EXPERTS * 1.1, 8], ids=["copies", "exchanges"])
def test_an_expert_whose_way_to_a_gpu_fails_is_computed_without_it(
    files: ExpertsOnDisk, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, dram: float
) -> None:
    upload, calls = SlotCopier.upload, itertools.count()

    def sometimes(
        self: SlotCopier, layer: int, slot: torch.Tensor, source: torch.Tensor, after: Fence
    ) -> None:
        if next(calls) % 2:
            slot.zero_()  # half-way
            raise RuntimeError("the GPU has fallen off the bus")
        upload(self, layer, slot, source, after)

    store = files.store(dram, 3.1, 3.1)
    monkeypatch.setattr(SlotCopier, "upload", sometimes)
    assert torch.equal(steps(files, store, 6), expected)
    seen = store.telemetry.snapshot()
    assert sum(n for label, n in seen.failed.items() if label.startswith("vram")) > 0
    monkeypatch.undo()
    assert torch.equal(steps(files, store, 6), expected)
    store.slots.settle(wait=True)
    assert (
        store.residency()["dram"] + store.slots.dram.arena.free == store.slots.dram.arena.slots
    )  # none was lost
    store.close()


def test_a_guessed_copy_that_fails_once_begun_is_not_missed(
    files: ExpertsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = files.store(LAYERS * EXPERTS * 1.1, 6.1)
    expert = one_in_dram_only(store)
    x, ones, chosen = torch.ones(1, files.hidden), torch.ones(1, 1), torch.tensor([[expert]])
    whole = files.store(LAYERS * EXPERTS * 1.1)
    wanted = whole.acquire(0, chosen).run(x, ones, LIMIT)
    whole.close()
    begun, is_asked_for = threading.Event(), threading.Event()

    def fail(*_: object) -> None:
        begun.set()
        assert is_asked_for.wait(60)
        raise RuntimeError("the GPU has fallen off the bus")

    with monkeypatch.context() as broken:
        broken.setattr(SlotCopier, "upload", fail)
        store.prefetch(0, [expert])
        assert begun.wait(60)
        step = store.acquire(0, chosen)
        is_asked_for.set()
        assert torch.equal(step.run(x, ones, LIMIT), wanted)
    seen = store.telemetry.snapshot()
    assert seen.failed == {"vram:0 prefetch": 1}
    assert seen.computed == {"dram": 1}
    assert store.slots.gpus[0].find((0, expert)) is None
    store.close()


def test_what_a_failed_step_would_have_used_may_leave_again(files: ExpertsOnDisk) -> None:
    store = files.store(4)
    with pytest.raises(RuntimeError, match="before its experts"), store.acquire(0, torch.tensor([[0, 1]])):
        raise RuntimeError("the step failed before its experts were computed")
    assert not store.slots.claims
    store.close()


def test_a_wrong_guess_that_is_half_read_is_read_no_further(
    files: ExpertsOnDisk, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def held(*args: object) -> None:
        begun.set()
        assert may_end.wait(60)
        read_into(*args)  # type: ignore[arg-type]

    store = files.store(8, readers=1)
    on_disk = next(e for e in range(EXPERTS) if store.slots.find((0, e)) is None)
    here = next(e for e in range(EXPERTS) if store.slots.find((0, e)) is not None)
    before = store.telemetry.snapshot().moved_bytes["nvme"]
    with monkeypatch.context() as slow:
        slow.setattr(memory.checkpoint.direct_reads, "read_into", held)
        store.prefetch(0, [on_disk])
        assert begun.wait(60)
        step = store.acquire(0, torch.tensor([[here]]))
        may_end.set()
        step.run(torch.ones(1, files.hidden), torch.ones(1, 1), LIMIT)
        store.slots.settle(wait=True)
    seen = store.telemetry.snapshot()
    assert seen.prefetches == {"cancelled": 1}
    assert 0 < seen.moved_bytes["nvme"] - before < store.slots.dram.layouts[0].nbytes
    assert torch.equal(steps(files, store, 6), expected)
    store.close()
