"""The meaning of a plan: tokens per second, the gain from more of each resource, what would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from memory.hardware.profiles import GpuSpec, HardwareProfile
from memory.planner.cost_model import Efficiency, StepCost
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.prefill import PrefillModel
from memory.planner.routing import Routing
from memory.planner.shape import ModelShape

MAX_BYTES = 1 << 50


@dataclass(frozen=True)
class Forecast:
    """A placed model: a step of one sequence, one of all of the workload's, and a prompt that fills the
    context."""

    routing: Routing
    alone: StepCost
    together: StepCost
    prefill: StepCost


def forecast(
    shape: ModelShape,
    hardware: HardwareProfile,
    workload: Workload,
    routing: Routing,
    efficiency: Efficiency | None = None,
) -> Forecast:
    """Typical steps, of sequences that hold half the workload's context, and a prompt as long as that."""
    placement = plan(shape, hardware, workload)
    model = PrefillModel(shape, hardware, placement, routing, efficiency)
    half = workload.context // 2
    chunk = min(workload.prefill_chunk, workload.context)
    return Forecast(
        routing,
        model.decode(1, half),
        model.decode(workload.sequences, half),
        model.prefill(chunk, workload.context),
    )


@dataclass(frozen=True)
class Doubling:
    """What twice as much of a resource does to tokens per second, as factors."""

    resource: str
    alone: float
    together: float
    prefill: float


def doublings(
    shape: ModelShape, hardware: HardwareProfile, workload: Workload, routing: Routing
) -> list[Doubling]:
    """Each resource doubled by itself, the model placed anew, best for decoding first."""
    before = forecast(shape, hardware, workload, routing)
    found = []
    for resource, machine, asked in _doubled(hardware, workload):
        after = forecast(shape, machine, asked, routing)
        found.append(
            Doubling(
                resource,
                after.alone.tokens_per_s / before.alone.tokens_per_s,
                after.together.tokens_per_s / before.together.tokens_per_s,
                after.prefill.tokens_per_s / before.prefill.tokens_per_s,
            )
        )
    return sorted(found, key=lambda d: -d.alone * d.together)


def _doubled(h: HardwareProfile, workload: Workload) -> list[tuple[str, HardwareProfile, Workload]]:
    def gpus(change: Callable[[GpuSpec], GpuSpec]) -> HardwareProfile:
        return replace(h, gpus=tuple(change(gpu) for gpu in h.gpus))

    fp8_rate = 2 * h.cpu_fp8_flops if h.cpu_fp8_flops else None
    expert_rate = 2 * h.expert_bytes_per_s if h.expert_bytes_per_s else None
    found = [
        ("DRAM size", replace(h, dram_bytes=2 * h.dram_bytes), workload),
        (
            "DRAM bandwidth",
            replace(
                h,
                dram_bytes_per_s=2 * h.dram_bytes_per_s,
                expert_bytes_per_s=expert_rate,
                dram_rows_per_s=2 * h.dram_rows_per_s,
            ),
            workload,
        ),
        (
            "CPU arithmetic",
            replace(h, cpu_matmul_flops=2 * h.cpu_matmul_flops, cpu_fp8_flops=fp8_rate),
            workload,
        ),
        (
            "disk speed",
            replace(h, disk_bytes_per_s=2 * h.disk_bytes_per_s, disk_reads_per_s=2 * h.disk_reads_per_s),
            workload,
        ),
        ("prefill chunk", h, replace(workload, prefill_chunk=2 * workload.prefill_chunk)),
    ]
    if h.gpus:
        found += [
            ("VRAM size", gpus(lambda g: replace(g, memory_bytes=2 * g.memory_bytes)), workload),
            (
                "VRAM bandwidth",
                gpus(lambda g: replace(g, memory_bytes_per_s=2 * g.memory_bytes_per_s)),
                workload,
            ),
            ("GPU arithmetic", gpus(lambda g: replace(g, matmul_flops=2 * g.matmul_flops)), workload),
            (
                "PCIe links",
                gpus(
                    lambda g: replace(
                        g,
                        link_bytes_per_s=2 * g.link_bytes_per_s,
                        link_together_bytes_per_s=2 * g.link_together_bytes_per_s,
                    )
                ),
                workload,
            ),
        ]
    return found


@dataclass(frozen=True)
class Remedy:
    """How to make a plan fit: any one of `options`, and all of `required` besides."""

    options: tuple[str, ...]
    required: tuple[str, ...]


def remedy(shape: ModelShape, hardware: HardwareProfile, workload: Workload) -> Remedy:
    """The smallest changes that make a model fit that doesn't; each option is enough by itself."""
    required = []
    short = shape.disk_bytes - hardware.disk_bytes
    if short > 0:
        required.append(f"{_gigabytes(short)} more free disk for the checkpoint")
    big = replace(hardware, disk_bytes=max(hardware.disk_bytes, shape.disk_bytes))
    if plan(shape, big, workload).fits:
        return Remedy((), tuple(required))
    options = []
    context = _largest(1, workload.context, lambda n: plan(shape, big, replace(workload, context=n)).fits)
    if context:
        options.append(f"a context of {context} tokens instead of {workload.context}")
    fewer = _largest(1, workload.sequences, lambda n: plan(shape, big, replace(workload, sequences=n)).fits)
    if fewer:
        options.append(f"{fewer} sequence(s) at once instead of {workload.sequences}")
    chunk = _largest(
        1, workload.prefill_chunk, lambda n: plan(shape, big, replace(workload, prefill_chunk=n)).fits
    )
    if chunk:
        options.append(f"prompts in chunks of {chunk} tokens instead of {workload.prefill_chunk}")

    def with_dram(extra: int) -> bool:
        return plan(shape, replace(big, dram_bytes=big.dram_bytes + extra), workload).fits

    options.append(f"{_gigabytes(_smallest(MAX_BYTES, with_dram))} more DRAM")
    if any(gpu.kind == "cuda" for gpu in hardware.gpus):

        def with_vram(extra: int) -> bool:
            gpus = tuple(replace(gpu, memory_bytes=gpu.memory_bytes + extra) for gpu in big.gpus)
            return plan(shape, replace(big, gpus=gpus), workload).fits

        if with_vram(MAX_BYTES):
            options.append(f"{_gigabytes(_smallest(MAX_BYTES, with_vram))} more VRAM on each GPU")
    return Remedy(tuple(options), tuple(required))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number from low up to below high that fits, None if none does; fits must be monotone."""
    if high <= low or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _smallest(high: int, fits: Callable[[int], bool]) -> int:
    """The smallest number up to `high`, to about a thousandth, that fits; `high` must."""
    low = 0
    while high - low > max(1_000_000, low // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _gigabytes(nbytes: int) -> str:
    """Rounded up, so that the stated amount is enough."""
    tenths = -(-nbytes // 100_000_000)
    return f"{tenths / 10:.1f} GB"
