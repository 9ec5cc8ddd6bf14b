"""Layers of routed experts that two GPUs in name only compute at once, in Triton's interpreter."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_recorded_on_gpus.py", allow_module_level=True)

from memory.experts.coordinator import Coordinator, Round
from memory.experts.gpu_places import publish
from memory.experts.store import ExpertStore
from memory.tiers import Tier
from quant.kernels.choice import choose
from quant.kernels.cuda.helper import Helper, comes_true
from quant.kernels.cuda.mailbox import Mailbox, StalledError
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.devices import DeviceKernels
from quant.kernels.interface import NO_EXTRAS, ExpertExtras
from quant.kernels.layers import RoutingRule
from tests import pretend_gpus as pretend
from tests.interpreted_gpus import InterpretedGpu
from tests.memory.experts.experts_on_disk import LIMIT, ExpertsOnDisk

LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K, ROWS = 2, 8, 64, 32, 3, 4
RULE = RoutingRule(TOP_K, "sqrt softplus", is_renormalised=True, epsilon=1e-20)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ExpertsOnDisk:
    return ExpertsOnDisk.write(tmp_path_factory.mktemp("experts") / "shard", LAYERS, EXPERTS, HIDDEN, WIDTH)


def of(layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(layer)


class Machine:
    """Layers of experts alone, recorded on the first of some GPUs; all of them have room for `held` together.

    dram  experts that it has room for
    lent  slots of each GPU that prompts may borrow
    """

    def __init__(
        self, files: ExpertsOnDisk, gpus: Sequence[torch.device], held: int, dram: float, lent: int = 0
    ) -> None:
        each = held // len(gpus) * (files.slot_bytes + 64)
        tiers = [Tier(f"vram:{n}", each, gpu, 1e12) for n, gpu in enumerate(gpus)]
        self.interpreted = {gpu: InterpretedGpu(gpu) for gpu in gpus}
        kernels = DeviceKernels(choose(), dict(self.interpreted))
        room = Tier("dram", int(dram * (files.slot_bytes + 64)), torch.device("cpu"))
        self.store = ExpertStore(files, kernels, room, tiers, lent_bytes=lent * files.slot_bytes)
        self.places = list(self.store.on_gpus.values())
        self._gates = [torch.randn(EXPERTS, HIDDEN, generator=of(n)) for n in range(LAYERS)]
        self._bias = torch.linspace(0, 0.1, EXPERTS)
        self.box = Mailbox(LAYERS, ROWS, TOP_K, HIDDEN, pinned=False, others=[str(gpu) for gpu in gpus[1:]])
        main, *others = (GpuRecorder(self.interpreted[gpu], ROWS) for gpu in gpus)
        source = x = main.input(HIDDEN)
        brought = [[other.serve(*self._asked(n, at), self.box, n, at) for n in range(LAYERS)]
                   for at, other in enumerate(others, 1)]  # fmt: skip
        for n in range(LAYERS):
            slots = self.places[0].slots(n)
            (logits,) = main.linears(x, [self._gates[n].to(gpus[0])])
            ids, weights = main.route(logits, self._bias, RULE, slots.places[n])
            x = main.add(main.experts(x, ids, weights, slots, (LIMIT, NO_EXTRAS), self.box, n, None), x)
        self.program = main.finish(source, x)
        self.helpers = [
            Helper(other.finish(of_other[0], of_other[0]))
            for other, of_other in zip(others, brought, strict=True)
        ]
        answer = pretend.on_any_thread(
            torch.inference_mode()(lambda n, ids, x: self.store.outputs(n, ids, x, LIMIT))
        )
        self.coordinator = Coordinator(answer)

    def _asked(self, layer: int, at: int) -> tuple[SlotsOnGpu, torch.Tensor, tuple[float, ExpertExtras]]:
        slots = self.places[at].slots(layer)
        return slots, slots.places[layer], (LIMIT, NO_EXTRAS)

    @torch.inference_mode()
    def step(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, hidden]` through all layers, by programs."""
        self.store.slots.settle()
        publish(self.places)
        self.store.slots.gpus_rest = True
        self.coordinator.begin([Round(self.box, range(LAYERS))])
        for helper in self.helpers:
            helper.start(len(x), self.coordinator.fail)
        self.program.source[: len(x)].copy_(x)
        self.program.run(list(range(len(x))), [0] * len(x))
        self.coordinator.end()
        assert all(comes_true(helper.is_done, 10) for helper in self.helpers)
        self.store.slots.gpus_rest = False
        return self.program.result[: len(x)].cpu()

    @torch.inference_mode()
    def eager(self, x: torch.Tensor) -> torch.Tensor:
        """The same, operation by operation, in plain torch."""
        device = self.places[0].slots(0).places.device
        for n in range(LAYERS):
            logits = x @ self._gates[n].T
            ids, weights = choose().route(logits, self._bias, RULE)
            y = self.store.acquire(n, ids).run(x.to(device), weights.to(device), LIMIT)
            x = x + y.cpu()
        return x

    def close(self) -> None:
        self.coordinator.close()
        self.store.close()


def test_two_gpus_give_the_bits_that_one_gives(
    gpus: tuple[torch.device, torch.device], files: ExpertsOnDisk
) -> None:
    """Both hold the same experts, three quarters of all; the processor computes the others."""
    one, two = (Machine(files, on, 12, 20) for on in (gpus[:1], gpus))
    random = of(7)
    shares = [0, 0, 0]
    for step in range(10):
        x = torch.randn((1, 2, 1, 3, 1)[step % 5], HIDDEN, generator=random)
        assert torch.equal(one.step(x), two.step(x)), step
        assert two.box.chosen(1)[0] == one.box.chosen(1)[0]
        for layer in range(LAYERS):
            needed, left = two.box.chosen(layer)
            parts = [len(needed) - sum(map(len, left)), *map(len, left)]
            shares = [old + new for old, new in zip(shares, parts, strict=True)]
    assert min(shares) > 10  # of the first GPU, of the processor, of the other GPU
    assert two.program.launches(None) == one.program.launches(None)
    one.close()
    two.close()


def test_slots_that_lie_below_the_first_one_are_found(
    gpus: tuple[torch.device, torch.device], files: ExpertsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that prompts may borrow are an allocation of their own, which may lie anywhere."""
    usual = Machine(files, gpus, 12, 20)
    room: dict[str, tuple[torch.Tensor, int]] = {}

    def downwards(nbytes: int, tier: Tier) -> torch.Tensor:
        whole, end = room.get(tier.name) or (
            torch.empty(1 << 20, dtype=torch.uint8, device=tier.device),
            1 << 20,
        )
        room[tier.name] = whole, end - nbytes
        return whole[end - nbytes : end]

    monkeypatch.setattr("memory.tiers._allocate", downwards)
    below = Machine(files, gpus, 12, 20, lent=2)
    for table in below.store.slots.gpus:
        assert table.arena.slot(table.arena.kept).data_ptr() < table.arena.slot(0).data_ptr()
    random = of(7)
    for step in range(4):
        x = torch.randn(2, HIDDEN, generator=random)
        assert torch.equal(below.step(x), usual.step(x)), step
        assert [below.box.chosen(n) for n in range(LAYERS)] == [usual.box.chosen(n) for n in range(LAYERS)]
    usual.close()
    below.close()


def test_experts_that_move_between_steps_are_found_where_they_are(
    gpus: tuple[torch.device, torch.device], files: ExpertsOnDisk
) -> None:
    """GPUs and DRAM hold different ones, not all; what a step has used replaces others on both GPUs."""
    machine = Machine(files, gpus, 6, 7)
    random = of(8)
    seen = set()
    for step in range(8):
        x = torch.randn(1 + step % 2, HIDDEN, generator=random)
        assert (machine.step(x) - machine.eager(x)).abs().max() < 1e-5
        for layer in range(LAYERS):
            needed, (elsewhere, others) = machine.box.chosen(layer)
            count = {"vram:0": len(needed) - len(elsewhere) - len(others), "vram:1": len(others)}
            machine.store.used_in_step(layer, needed, elsewhere, count)
        seen.add(tuple(str(places._places.tolist()) for places in machine.places))
    assert len(seen) > 3
    machine.close()


def test_an_expert_that_cannot_be_read_fails_the_step_and_no_gpu_waits(
    gpus: tuple[torch.device, torch.device], files: ExpertsOnDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(files, gpus, 4, 20)
    x = torch.randn(2, HIDDEN, generator=of(9))
    expected = machine.step(x)

    def broken(*asked: object) -> torch.Tensor:
        raise OSError("the drive is gone")

    with monkeypatch.context() as patch:
        patch.setattr(machine.store, "outputs", broken)
        with pytest.raises(OSError, match="the drive is gone"):
            machine.step(x)
    assert comes_true(machine.helpers[0].is_done, 10)
    assert torch.equal(machine.step(x), expected)
    machine.close()


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_a_gpu_that_does_not_answer_fails_the_step_and_no_other(
    gpus: tuple[torch.device, torch.device], files: ExpertsOnDisk, how: str
) -> None:
    machine = Machine(files, gpus, 16, 20)
    (helper,) = machine.helpers
    start, may_go_on = helper.program.start, threading.Event()
    x = torch.randn(2, HIDDEN, generator=of(9))
    expected = machine.step(x)

    def broken(rows: int) -> None:
        if how == "fails":
            raise RuntimeError("an illegal memory access was encountered")
        may_go_on.wait(20)

    helper.program.start = broken  # type: ignore[method-assign]
    machine.coordinator._patience_s = 0.2
    begun = time.monotonic()
    match = "no answer from gpu:1" if how == "hangs" else "illegal memory access"
    with pytest.raises((StalledError, RuntimeError), match=match):
        machine.step(x)
    assert time.monotonic() - begun < 10
    machine.coordinator.give_up()
    assert helper.is_done() == (how == "fails")
    may_go_on.set()
    assert comes_true(helper.is_done, 5)
    helper.program.start = start  # type: ignore[method-assign]
    machine.coordinator._patience_s = 60
    assert torch.equal(machine.step(x), expected)
    machine.close()


def test_closing_in_the_middle_of_a_step_leaves_no_gpu_waiting(
    gpus: tuple[torch.device, torch.device], files: ExpertsOnDisk
) -> None:
    machine = Machine(files, gpus, 16, 20)
    (helper,) = machine.helpers
    machine.coordinator.begin([Round(machine.box, range(LAYERS))])
    helper.start(1, machine.coordinator.fail)  # and the first GPU never posts
    machine.coordinator.close()
    assert comes_true(helper.is_done, 5)
    with pytest.raises(StalledError, match="is being closed"):
        machine.coordinator.end()
    machine.store.close()
