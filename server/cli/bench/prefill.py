"""`loci bench prefill`: a long prompt within budgets and its bound; the exact tail; states from disk."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.arguments import JsonFile, Model
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from engine.bench.prefill import PrefillRun
    from memory.hardware.profiles import HardwareProfile
    from memory.hardware.this_machine import Result
    from memory.planner.budget import MemoryBudget
    from memory.planner.shape import ModelShape

BOUND_TARGET, PLAN_TARGET, TAIL_TARGET = 0.8, 0.2, 1.7
DISK_BYTES = 1 << 30
PAUSE_S = 0.25  # for each depth of reads
# As many layers after the last source as the released model has, in a model that is small otherwise.
TAIL_LAYERS, TAIL_TOKENS, TAIL_CHUNK = 40, 6000, 512
RELEASED, RELEASED_TOKENS = "deepseek-v4.1-flash", 32_768
RESTORED_MODEL, RESTORED_TOKENS = Path("smollm2"), 4000


def prefill(
    model: Model,
    dram_budget: Annotated[
        str | None,
        typer.Option(help="Memory for weights, e.g. 8GiB. Default: three quarters of free memory."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs, e.g. virtual:1GiB@12.5GB/s. Default: none.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, max=1_000_000, help="Tokens of the prompt.")] = 8192,
    chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt tokens per step. Default: as planned.", show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of the exact tail and of restored states.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Compute a long prompt within budgets, and compare with what links, disk and arithmetic allow.

    Also what V4.1's exact tail saves, on a small model of as many layers, and how soon a prompt whose state
    is on disk is answered, with SmolLM2. Rates are measured before and after; that takes 1 GB of disk space.

    Example: loci bench prefill ./slice --dram-budget 8GiB --devices virtual:2GiB@12.5GB/s
    """
    from engine.bench.prefill import run_prefill
    from engine.families.loader import open_checkpoint
    from engine.families.shapes import loaded_shape_of
    from memory.hardware.detect import detect
    from memory.hardware.measure import measure_cpu, measure_disk, measure_dram, read_rates, working_bytes
    from memory.hardware.profiles import parse_devices
    from memory.hardware.this_machine import this_machine, write_results
    from memory.planner.budget import MemoryBudget
    from memory.planner.placement import Workload
    from memory.planner.prefill import planned_chunk
    from server.cli.bench.figures import print_figures

    machine = detect(model)
    shape = loaded_shape_of(open_checkpoint(model))
    measured: dict[str, list[float]] = {}
    disk_rates: list[list[float]] = []

    def measure() -> None:
        """A shared machine may be another one afterwards: before and after the prompt."""
        for result in [*measure_dram(working_bytes() // 2), *measure_cpu(working_bytes() // 2)]:
            measured.setdefault(result.name, []).append(result.value)
        largest = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        disk_rates.append(read_rates(largest, PAUSE_S))

    for result in measure_disk(model, min(DISK_BYTES, machine.disk_free_bytes // 10)):
        measured[result.name] = [result.value]
    measure()
    budget = MemoryBudget.of_this_machine(dram_budget, devices)
    asked = Workload(tokens, weights_bytes=budget.dram_bytes)

    def here() -> HardwareProfile:
        rates = {name: mean(values) for name, values in measured.items()}
        if best := max(map(mean, zip(*disk_rates, strict=True)), default=0.0):
            rates["disk_read"] = best / 1e9  # what was just written may come from a cache below the disk
        profile = this_machine(machine, rates).with_devices(parse_devices(devices) if devices else ())
        return replace(
            profile,
            disk_bytes=machine.disk_free_bytes + shape.disk_bytes,  # it lies there already
        )

    size = chunk or planned_chunk(shape, here(), asked)
    run = run_prefill(model, budget, tokens, size, in_pause=measure)
    figures = [*_judged(run, shape, here(), budget), *_tail(rounds), *_restored(rounds)]
    print_figures("prompts", figures)
    if json_file is not None:
        write_results(json_file, machine, figures)
        print(f"written to {json_file}")


def _judged(
    run: PrefillRun, shape: ModelShape, profile: HardwareProfile, budget: MemoryBudget
) -> list[Result]:
    """The prompt beside its bound and its plan."""
    from memory.hardware.this_machine import Result
    from memory.planner.placement import Workload
    from memory.planner.placing import plan
    from memory.planner.prefill import PrefillModel
    from memory.planner.routing import UNIFORM

    links = {gpu.name: gpu.link_bytes_per_s or float("inf") for gpu in budget.gpus}
    experts = profile.cpu_matmul_flops
    bounds = run.bound_s(
        profile.cpu_fp8_flops or experts, experts, profile.dram_bytes_per_s, profile.disk_bytes_per_s, links
    )
    rows = [
        (
            resource,
            bytes_text(run.counts.moved_bytes[resource]) if resource in run.counts.moved_bytes else "",
            f"{bound:.2f}",
            f"{run.counts.busy_s[resource]:.2f}" if resource in run.counts.busy_s else "",
            f"{run.counts.stalled_on(resource):.2f}",
        )
        for resource, bound in bounds.items()
    ]
    print_table(["resource", "moved", "min s", "s busy", "s stalled"], rows, right=(1, 2, 3, 4))
    placement = plan(shape, profile, Workload(run.tokens, 1, run.chunk, weights_bytes=budget.dram_bytes))
    planned = PrefillModel(shape, profile, placement, UNIFORM).prefill(run.chunk, run.tokens).total_s
    ratio, error = max(bounds.values()) / run.total_s, abs(planned - run.total_s) / run.total_s
    print(
        f"\n{run.tokens} tokens in chunks of {run.chunk}: {run.tokens / run.total_s:.3g} tokens/s; the "
        f"slowest resource alone allows {run.tokens / max(bounds.values()):.3g}, the plan said "
        f"{run.tokens / planned:.3g}. Activations: {bytes_text(run.work_bytes)} planned, the process grew by "
        f"{bytes_text(run.grown_bytes)}"
    )
    return [
        Result("slice_prefill", run.tokens / run.total_s, "tokens/s"),
        Result("slice_prefill_chunk", run.chunk, "tokens"),
        Result("slice_prefill_bound_ratio", ratio, "ratio", BOUND_TARGET, ratio >= BOUND_TARGET),
        Result("prefill_plan_error", error, "fraction", PLAN_TARGET, error <= PLAN_TARGET),
        Result("prefill_memory_growth", run.grown_bytes / 1e9, "GB"),
    ]


def _tail(rounds: int) -> list[Result]:
    """What late layers save that compute a prompt's end alone."""
    from engine.bench.prefill import tail_bound, tail_flops_bound, tail_pairs
    from engine.families.deepseek_v41.forward import DeepseekV41
    from engine.families.loader import load, open_checkpoint
    from engine.families.released import released_shape
    from engine.families.shapes import loaded_shape_of
    from engine.synthetic import plan_slice
    from memory.checkpoint.random_files import write_checkpoint
    from memory.hardware.this_machine import Result

    made = plan_slice("v41-narrow", TAIL_LAYERS, 4000)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tail"
        write_checkpoint(made, out, lambda done, total: None)
        model, shape = load(out).model, loaded_shape_of(open_checkpoint(out))
    assert isinstance(model, DeepseekV41)
    try:
        pairs = tail_pairs(model, TAIL_TOKENS, TAIL_CHUNK, rounds)
        gain = median(whole / tail for whole, tail in pairs)
        return [
            Result("exact_tail_gain", gain, "ratio", TAIL_TARGET, gain >= TAIL_TARGET),
            Result("exact_tail_bound", tail_bound(model, TAIL_TOKENS), "ratio"),
            Result("exact_tail_flops_bound", tail_flops_bound(shape, TAIL_TOKENS), "ratio"),
            Result(
                "released_tail_flops_bound",
                tail_flops_bound(released_shape(RELEASED), RELEASED_TOKENS),
                "ratio",
            ),
        ]
    finally:
        model.close()


def _restored(rounds: int) -> list[Result]:
    """How soon a prompt is answered whose state is on disk."""
    from engine.bench.restored import measure
    from engine.embedded import model_path
    from engine.families.loader import load
    from server.cli.bench.figures import results_of

    with tempfile.TemporaryDirectory() as folder:
        loaded = load(model_path(RESTORED_MODEL))
        return results_of(measure(loaded, Path(folder), RESTORED_TOKENS, rounds))
