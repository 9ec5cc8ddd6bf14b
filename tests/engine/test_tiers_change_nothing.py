"""Budgets decide where experts are and what moves, never what the model answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from engine.families.base import Batch
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.registry import family_of
from engine.layers.engram import EngramMix
from engine.layers.engram_lookup import StepRows
from memory.checkpoint.safetensors_files import open_safetensors
from memory.experts.store import ExpertStore
from memory.planner.budget import MemoryBudget
from memory.tiers import Tier
from quant.errors import BudgetError
from quant.kernels.choice import choose
from quant.kernels.interface import Kernels
from tests.conftest import golden_path

CPU = torch.device("cpu")
DENSE = 4 << 20  # more than the dense weights of v41-a
SLOT = 13056  # bytes of one expert of v41-a: 3 x 128 x 64 codes of four bits, and their scales
EXPERTS = 8 * 16


@contextmanager
def loaded(budget: MemoryBudget) -> Iterator[DeepseekV41]:
    checkpoint = open_safetensors(golden_path("v41-a"))
    model = family_of(checkpoint).load(checkpoint, choose(), budget)
    assert isinstance(model, DeepseekV41)
    try:
        yield model
    finally:
        model.close()


def budget(dram_experts: float, *gpu_experts: float, bytes_per_s: float | None = 50e6) -> MemoryBudget:
    """Room for so many experts in DRAM, beside dense weights, and for as many bytes on virtual GPUs."""
    gpus = tuple(
        Tier(f"vram:{i}", int(n * SLOT), CPU, link_bytes_per_s=bytes_per_s) for i, n in enumerate(gpu_experts)
    )
    with loaded(MemoryBudget(1 << 30, gpus)) as model:
        dense = model.weights.places.nbytes["dram"]
        tables = model.weights.engram.nbytes
        if dram_experts < 2 * model.config.num_experts_per_tok:  # then the embedding stays on disk
            assert isinstance(model.weights.embed, torch.Tensor)
            dense -= model.weights.embed.nbytes
    if dram_experts >= EXPERTS:  # then everything fits: with room for the tables too
        return MemoryBudget(dense + tables + int(dram_experts * SLOT * 1.02), gpus)
    return MemoryBudget(dense + int(dram_experts * SLOT / 0.95) + 1, gpus)


def answer(model: DeepseekV41, ids: list[int]) -> torch.Tensor:
    """Logits of a prompt in two chunks and 30 tokens one by one."""
    cache = model.new_cache(1, len(ids))
    cuts = [0, 40, 100, *range(101, 131)]
    return torch.cat(
        [model.forward(Batch.of([(0, a, ids[a:b])], all_logits=True), cache) for a, b in pairwise(cuts)]
    )


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(golden_path("v41-a") / "expected.safetensors")


@pytest.fixture(scope="module")
def everything_in_dram(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    with loaded(budget(EXPERTS)) as model:
        logits = answer(model, golden["input_ids"].tolist())
    assert (logits - golden["logits"][:130]).abs().max() < 1e-4
    return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dram", "gpus"),
    [
        (2, ()),
        (3, ()),
        (17, ()),
        (64, ()),
        (EXPERTS, (8, 8)),
        (EXPERTS, (EXPERTS, EXPERTS)),
        (3, (4,)),
        (20, (16, 16)),
        (40, (24, 1)),
        (60, (0, 32)),
    ],
)
def test_logits_are_bit_identical_for_any_budgets(
    dram: int, gpus: tuple[int, ...], golden: dict[str, torch.Tensor], everything_in_dram: torch.Tensor
) -> None:
    limits = budget(dram, *gpus)
    with loaded(limits) as model:
        logits = answer(model, golden["input_ids"].tolist())
        bytes_by_tier = model.tier_bytes
        kv_room = model.weights.places.kv_room
    assert torch.equal(logits, everything_in_dram)
    assert bytes_by_tier["dram"] <= limits.dram_bytes
    for gpu in limits.gpus:
        assert bytes_by_tier[gpu.name] + kv_room.get(gpu.name, 0) <= gpu.budget_bytes


@pytest.mark.slow
def test_what_moved_and_hit_adds_up(golden: dict[str, torch.Tensor]) -> None:
    with loaded(budget(20, 90, 90)) as model:
        answer(model, golden["input_ids"].tolist())
        seen = model.telemetry.snapshot()
    assert seen.hits["vram:0"] > 0
    assert seen.hits["vram:1"] > 0
    assert seen.hits["dram"] > 0
    assert seen.hits["nvme"] > 0
    assert sum(seen.hits.values()) == sum(seen.computed.values())
    assert seen.moved_bytes["nvme"] % (SLOT // 3) == 0  # matrices: of some guesses not all are read
    assert seen.moved_bytes["vram:0"] > 0
    assert seen.stalled_on("nvme") > 0
    assert seen.moves["nvme demand"] >= seen.hits["nvme"]


@pytest.mark.slow
def test_experts_are_read_ahead_of_need(golden: dict[str, torch.Tensor]) -> None:
    with loaded(budget(60)) as model:
        answer(model, golden["input_ids"].tolist())
        seen = model.telemetry.snapshot()
    assert seen.moves["nvme prefetch"] > 0
    assert seen.prefetches["used"] > 0


@pytest.mark.slow
def test_experts_of_every_layer_are_guessed_the_first_ones_from_the_token_alone(
    golden: dict[str, torch.Tensor],
) -> None:
    with loaded(budget(20)) as model:
        cache = model.new_cache(1, 30)
        for at, token in enumerate(golden["input_ids"].tolist()[:30]):
            model.forward(Batch.of([(0, at, [token])]), cache)
        seen = model.telemetry.snapshot().guesses
        every_choice = cache.length(0) * model.config.num_hidden_layers * model.config.num_experts_per_tok
    assert seen["made"] == every_choice
    assert seen["right"] > every_choice / 2


@pytest.mark.slow
def test_engram_rows_come_from_disk_where_tables_do_not_fit(golden: dict[str, torch.Tensor]) -> None:
    with loaded(budget(20)) as model:
        answer(model, golden["input_ids"].tolist())
        seen = model.telemetry.snapshot().rows
    assert seen["asked"] == 130 * 2 * 6
    assert seen["unique"] < seen["asked"]
    assert seen["cached"] > 0
    assert seen["read"] > 0
    assert seen["cached"] + seen["read"] == seen["unique"]


def test_a_machine_with_everything_in_dram_reads_each_expert_once(golden: dict[str, torch.Tensor]) -> None:
    with loaded(budget(EXPERTS)) as model:
        answer(model, golden["input_ids"].tolist())
        seen = model.telemetry.snapshot()
    assert seen.moves["nvme demand"] == EXPERTS
    assert seen.hits.keys() == {"dram"}


def test_a_dram_budget_too_small_for_two_experts_is_refused() -> None:
    limits = budget(1.5)
    with pytest.raises(BudgetError, match="holds fewer than 2 experts"), loaded(limits):
        pass


@pytest.mark.slow
def test_a_read_that_fails_fails_its_step_and_can_be_tried_again(
    golden: dict[str, torch.Tensor], everything_in_dram: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = golden["input_ids"].tolist()
    with loaded(budget(3)) as model:
        with monkeypatch.context() as broken:

            def failing(*_: object) -> None:
                raise OSError("the drive is gone")

            broken.setattr("memory.checkpoint.direct_reads.DirectFiles.read", failing)
            with pytest.raises(OSError, match="the drive is gone"):
                answer(model, ids)
        assert torch.equal(answer(model, ids), everything_in_dram)


def test_a_guess_before_a_layer_with_a_table_takes_its_rows_into_account(
    golden: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    guesses: list[tuple[int, list[int]]] = []
    prefetch = ExpertStore.prefetch

    def noted(self: ExpertStore, layer: int, expert_ids: list[int]) -> None:
        guesses.append((layer, expert_ids))
        prefetch(self, layer, expert_ids)

    def no_gate(
        self: EngramMix, _: Kernels, streams: torch.Tensor, kv: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return torch.zeros(streams.shape[:2]), torch.zeros(streams.shape[0], streams.shape[2])

    monkeypatch.setattr(ExpertStore, "prefetch", noted)
    monkeypatch.setattr(StepRows, "is_there", lambda self, table: self.wait(table) is not None)
    ids = golden["input_ids"].tolist()[:8]  # few enough that experts do not stream past
    with loaded(budget(20)) as model:
        table = model.config.engram_layer_ids[0]
        model.forward(Batch.of([(0, 0, ids)]), model.new_cache(1, 64))
        with_rows = dict(reversed(guesses))[table]  # the first of this layer
        guesses.clear()
        monkeypatch.setattr(EngramMix, "gates_and_value", no_gate)
        model.forward(Batch.of([(0, 0, ids)]), model.new_cache(1, 64))
    assert with_rows != dict(reversed(guesses))[table]
