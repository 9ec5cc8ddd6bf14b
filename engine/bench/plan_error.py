"""Plans beside what runs: decoding, and a prompt, of a model within budgets.

Rates are measured while it runs, in pauses: a shared machine is another one a minute later. What the plan
says is what it would have said of a machine with these rates; nothing of the run itself enters it, but the
length of the prompt and of its chunks.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from engine.bench.prefill import run_prefill
from engine.bench.slice import run_slice, workload
from memory.hardware.detect import Machine
from memory.hardware.measure import measure_cpu, measure_dram, read_rates
from memory.hardware.profiles import HardwareProfile
from memory.hardware.this_machine import this_machine
from memory.planner.budget import MemoryBudget
from memory.planner.cost_model import StepCost
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.prefill import PrefillModel, planned_chunk
from memory.planner.routing import UNIFORM
from memory.planner.serving import memory_bytes
from memory.planner.shape import ModelShape
from memory.telemetry import Snapshot
from quant.errors import LociError

DRAM_BYTES, CPU_BYTES = 128 << 20, 128 << 20  # beyond most caches
DISK_SECONDS = 0.2  # at each depth
SHARES = (0.3, 0.6, 1.0)  # of the experts


class Rates:
    """What the machine does at the moment, again and again; the middle of what was seen counts, and of the
    disk the mean at the best depth.

    file  a large one on the disk that the model is read from
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: dict[str, list[float]] = defaultdict(list)
        self._of_disk: list[list[float]] = []  # by look and depth

    def look(self) -> None:
        """Measure all once, in about a second; nothing where other programs are in the way."""
        try:
            results = [*measure_dram(DRAM_BYTES), *measure_cpu(CPU_BYTES)]
        except LociError:
            return
        for result in results:
            self._seen[result.name].append(result.value)
        if of_disk := read_rates(self._file, DISK_SECONDS):
            self._of_disk.append(of_disk)

    @property
    def measured(self) -> dict[str, float]:
        """By name, as `this_machine` takes them. Raises LociError where the machine was never idle enough."""
        if not self._seen:
            raise LociError("the machine is too busy to be measured: try again when it is idle")
        found = {name: median(values) for name, values in self._seen.items()}
        if self._of_disk:  # it is slow for a while: what was waited for then counts too
            found["disk_read"] = max(map(mean, zip(*self._of_disk, strict=True))) / 1e9
        return found


@dataclass(frozen=True)
class Compared:
    """A run beside its plan.

    what     `decode` or `prompt`
    measured_s, planned  of a token, or of the prompt
    hits     share of the experts found in each tier
    read_bytes  from disk, for each token
    rates    of the machine meanwhile
    """

    what: str
    dram_bytes: int
    tokens: int
    measured_s: float
    planned: StepCost
    hits: Mapping[str, float]
    read_bytes: float
    rates: Mapping[str, float]

    @property
    def measured_tokens_per_s(self) -> float:
        """That the run reached."""
        return self.tokens / self.measured_s

    @property
    def planned_read_bytes(self) -> float:
        """From disk for each token, as planned."""
        return self.planned.nbytes.get("nvme", 0.0) / self.planned.tokens

    @property
    def error(self) -> float:
        """By which the plan's rate is above the measured one, as a share of that."""
        return self.planned.tokens_per_s / self.measured_tokens_per_s - 1.0


def budgets(shape: ModelShape, most: int) -> list[int]:
    """Bytes of DRAM that hold SHARES of the experts and all that is in memory beside them, up to `most`: the
    embedding, where it can stay on disk, only beside all experts."""
    experts = sum(layer.experts for layer in shape.layers) * shape.slot_nbytes
    rest = memory_bytes(shape) - experts
    on_disk = shape.embedding.nbytes if shape.embedding_stays else 0
    wanted = [int(rest - (on_disk if share < 1 else 0) + 1.02 * share * experts) for share in SHARES]
    return sorted({min(most, nbytes) for nbytes in wanted})


def compare_decode(
    path: Path,
    shape: ModelShape,
    machine: Machine,
    budget: MemoryBudget,
    tokens: int,
    on_progress: Callable[[int], None],
) -> Compared:
    """Decode so many random tokens, one sequence alone."""
    _forget_models()
    rates = Rates(_largest(path))
    budget = replace(budget, workload=workload(tokens))
    run = run_slice(path, budget, tokens, on_progress, in_pause=rates.look)
    profile = _profile(machine, rates, shape, budget)
    placement = plan(shape, profile, budget.limited_workload)
    model = PrefillModel(shape, profile, placement, UNIFORM)
    planned = model.decode(1, budget.workload.context // 2)
    return Compared(
        "decode",
        budget.dram_bytes,
        1,
        run.total_s / run.tokens,
        planned,
        _hits(run.counts),
        run.counts.moved_bytes.get("nvme", 0) / run.tokens,
        rates.measured,
    )


def compare_prompt(
    path: Path, shape: ModelShape, machine: Machine, budget: MemoryBudget, tokens: int, chunk: int | None
) -> Compared:
    """Compute a random prompt, in chunks as planned unless given."""
    _forget_models()
    rates = Rates(_largest(path))
    rates.look()
    limited = Workload(tokens, weights_bytes=budget.dram_bytes)
    chunk = chunk or planned_chunk(shape, _profile(machine, rates, shape, budget), limited)
    asked = replace(limited, prefill_chunk=chunk)
    run = run_prefill(path, replace(budget, workload=asked), tokens, chunk, in_pause=rates.look)
    profile = _profile(machine, rates, shape, budget)
    model = PrefillModel(shape, profile, plan(shape, profile, asked), UNIFORM)
    planned = model.prefill(chunk, tokens)
    return Compared(
        "prompt",
        budget.dram_bytes,
        tokens,
        run.total_s,
        planned,
        _hits(run.counts),
        run.counts.moved_bytes.get("nvme", 0) / tokens,
        rates.measured,
    )


def _forget_models() -> None:
    """Free what a closed model held: it refers to itself, and two of them are more than was planned for."""
    gc.collect()


def _profile(machine: Machine, rates: Rates, shape: ModelShape, budget: MemoryBudget) -> HardwareProfile:
    """The machine with the rates that were seen, and the budget's GPUs."""
    profile = this_machine(machine, rates.measured)
    disk_bytes = machine.disk_free_bytes + shape.disk_bytes  # it lies there already
    budget = replace(budget, machine=profile)
    return replace(budget.machine_for(shape), disk_bytes=disk_bytes)


def _hits(counts: Snapshot) -> dict[str, float]:
    asked = max(1, sum(counts.hits.values()))
    return {tier: count / asked for tier, count in counts.hits.items()}


def _largest(path: Path) -> Path:
    return max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
