"""`loci bench slice`: what a token costs within budgets, layer by layer, and what bounds it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import LociError
from server.cli.arguments import JsonFile, Model
from server.cli.progress import progress
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from engine.bench.slice import SliceRun
    from memory.hardware.detect import Machine
    from memory.hardware.profiles import HardwareProfile
    from memory.hardware.this_machine import Result
    from memory.planner.budget import MemoryBudget
    from memory.planner.placement import Workload

# Of the time that bytes need at the measured rates, what decoding should take at most the inverse of.
BOUND_TARGET = 0.8
PLAN_TARGET = 0.2
DISK_BYTES = 1 << 30
PAUSE_S = 0.25  # for each depth of reads
FULL_LAYERS, FULL_TABLES = 40, 2


def slice_(
    model: Model,
    dram_budget: Annotated[
        str | None,
        typer.Option(help="Memory for weights, e.g. 4GiB. Default: three quarters of free memory."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs, e.g. cuda:24GiB or virtual:1GiB@12.5GB/s. Default: none.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Tokens to decode.")] = 64,
    json_file: JsonFile = None,
) -> None:
    """Decode within budgets and report time by layer, bytes by tier, hits, stalls, memory and the bound.

    The disk is measured in pauses between tokens, and again with DRAM and real GPUs afterwards, which takes
    half a minute and 1 GB of disk space. On real GPUs, the time by layer comes from extra, slower tokens.

    Example: loci bench slice ./slice --dram-budget 4GiB --devices virtual:1GiB@12.5GB/s
    """
    from engine.bench.slice import run_slice, steps, workload
    from memory.hardware.detect import detect
    from memory.hardware.measure import (
        measure_cpu,
        measure_disk,
        measure_dram,
        measure_gpus,
        read_rates,
        working_bytes,
    )
    from memory.hardware.profiles import parse_devices
    from memory.hardware.this_machine import Result, this_machine
    from memory.planner.budget import MemoryBudget, unused_gpus_notice

    if notice := unused_gpus_notice(devices):
        print(f"loci: {notice}", file=sys.stderr)
    specs = parse_devices(devices) if devices is not None else ()
    has_real_gpus = any(device.kind == "cuda" for device in specs)
    asked_for = workload(tokens)
    machine = detect(model)  # as it is before the model takes memory
    budget = MemoryBudget.of_this_machine(dram_budget, devices, asked_for)
    disk_rates: list[list[float]] = []  # by pause and depth

    def measure_beside() -> None:
        """A disk that is shared with others may be another one afterwards."""
        largest = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        disk_rates.append(read_rates(largest, PAUSE_S))

    total = steps(tokens)
    with progress("tokens") as on_progress:
        run = run_slice(model, budget, tokens, lambda done: on_progress(done, total), in_pause=measure_beside)
    _print_layers(run)
    try:
        measured = [
            *measure_dram(working_bytes() // 2),
            *measure_cpu(working_bytes() // 2),
            *measure_disk(model, min(DISK_BYTES, machine.disk_free_bytes // 10)),
            *(measure_gpus() if has_real_gpus else ()),
        ]
    except (LociError, OSError) as refusal:  # what was decoded stays true
        _print_bytes(run, {})
        _print_memory(run, budget)
        speed = run.tokens / run.total_s
        print(
            f"\n{speed:.3g} tokens/s decoded; without the machine's own rates there is no bound and no plan"
        )
        _write(json_file, machine, _counted(run, budget))
        raise LociError(f"the machine could not be measured afterwards: {refusal}") from None
    if best := max(map(mean, zip(*disk_rates, strict=True)), default=0.0):
        measured.append(Result("checkpoint_read", best / 1e9, "GB/s"))
    rates = {result.name: result.value for result in measured}
    # What was just written may come from a cache below the disk.
    disk = rates.get("checkpoint_read", rates.get("disk_read", float("inf")))
    real = {gpu.name: gpu.device.index for gpu in budget.gpus if not gpu.is_virtual}
    links = {gpu.name: gpu.link_bytes_per_s or float("inf") for gpu in budget.gpus}
    links |= {gpu: rates[f"link_{index}"] * 1e9 for gpu, index in real.items()}
    memories = {gpu: rates[f"vram_{index}"] * 1e9 for gpu, index in real.items()}
    bounds = run.bound_s(rates["dram_read"] * 1e9, disk * 1e9, links, memories)
    ratio = max(bounds.values()) / run.total_s
    ordered = run.ordered_bound_s(bounds) / run.total_s
    # The disk is shared with others: a plan made with its rate at another moment would say little.
    seen = {**rates, "disk_read": run.disk_bytes_per_s / 1e9} if run.disk_bytes_per_s else rates
    profile = this_machine(machine, seen).with_devices(specs)
    expected = _planned_tokens_per_s(model, profile, budget, asked_for)
    speed = run.tokens / run.total_s
    plan_error = abs(expected - speed) / speed

    _print_bytes(run, bounds)
    _print_memory(run, budget)
    print(
        f"\n{speed:.3g} tokens/s decoded; the slowest resource alone allows {speed / ratio:.3g} "
        f"(ratio {ratio:.2f}), in the order that experts become known {speed / ordered:.3g} "
        f"({ordered:.2f}); the plan, with the disk at {seen.get('disk_read', 0):.3g} GB/s, said "
        f"{expected:.3g} (off by {plan_error:.0%})"
    )
    prefetched = ", ".join(f"{n} {outcome}" for outcome, n in run.counts.prefetches.items()) or "none"
    print(
        f"a layer ahead, routing was predicted correctly in {_guessed(run):.0%}; prefetched experts: "
        f"{prefetched}"
    )
    whole = 1 / run.like(FULL_LAYERS, FULL_TABLES)
    print(
        f"Extrapolated, not measured: {whole:.3g} tokens/s with {FULL_LAYERS} layers and {FULL_TABLES} "
        "tables, if every layer behaved like the average of these"
    )
    judged = [
        Result("slice_decode_bound_ratio", ratio, "ratio", BOUND_TARGET, ratio >= BOUND_TARGET),
        Result("slice_decode_ordered_ratio", ordered, "ratio"),
        Result("plan_error_slice", plan_error, "fraction", PLAN_TARGET, plan_error <= PLAN_TARGET),
        Result(f"slice_decode_extrapolated_to_{FULL_LAYERS}_layers", whole, "tokens/s"),
    ]
    _write(json_file, machine, [*_counted(run, budget), *judged, *measured])


def _guessed(run: SliceRun) -> float:
    """Of the routers' choices guessed a layer ahead, the share that was right."""
    guesses = run.counts.guesses
    return guesses.get("right", 0) / max(1, guesses.get("made", 0))


def _counted(run: SliceRun, budget: MemoryBudget) -> list[Result]:
    """What decoding itself tells, whatever the machine could do."""
    from memory.hardware.this_machine import Result
    from memory.planner.placing import PROCESS_BYTES

    # Budgets are for weights; tokenizer, buffers and activations are what plans reserve for the process.
    allowed = _host_bytes(budget) + PROCESS_BYTES
    counts, grown = run.counts, run.grown_bytes
    asked = sum(counts.hits.values())
    return [
        Result("slice_decode", run.tokens / run.total_s, "tokens/s"),
        Result("slice_memory_growth", grown / 1e9, "GB", allowed / 1e9, grown <= allowed),
        Result("slice_disk_read", run.disk_bytes_per_s / 1e9, "GB/s"),
        Result("slice_guessed_right", _guessed(run), "ratio"),
        *(Result(f"slice_hits_{tier}", n / asked, "ratio") for tier, n in counts.hits.items()),
        *(Result(f"slice_bytes_{link}", n / run.tokens / 1e6, "MB/token")
          for link, n in counts.moved_bytes.items()),
        *(Result(f"slice_stall_{link}", 1e3 * s / run.tokens, "ms/token")
          for link, s in counts.stalled_s.items()),
        *(Result(f"slice_time_{kind}", 1e3 * sum(by_layer.values()) / run.tokens, "ms/token")
          for kind, by_layer in run.seconds.items()),
    ]  # fmt: skip


def _write(json_file: Path | None, machine: Machine, results: list[Result]) -> None:
    from memory.hardware.this_machine import write_results

    if json_file is not None:
        write_results(json_file, machine, results)
        print(f"written to {json_file}")


def _planned_tokens_per_s(
    model: Path, machine: HardwareProfile, budget: MemoryBudget, asked_for: Workload
) -> float:
    """What `loci plan` expects of one sequence within the budget, every expert equally likely."""
    from engine.families.loader import open_checkpoint
    from engine.families.shapes import loaded_shape_of
    from memory.planner.forecast import forecast
    from memory.planner.placing import PROCESS_BYTES
    from memory.planner.routing import UNIFORM

    shape = loaded_shape_of(open_checkpoint(model))
    machine = replace(
        machine,
        dram_bytes=budget.dram_bytes + PROCESS_BYTES,  # the budget is for weights alone
        disk_bytes=machine.disk_bytes + shape.disk_bytes,  # it lies there already
    )
    return forecast(shape, machine, asked_for, UNIFORM).alone.tokens_per_s


def _print_layers(run: SliceRun) -> None:
    kinds = [kind for kind in ("engram", "attention", "router", "experts") if kind in run.seconds]
    rows = []
    for layer in range(run.layers):
        times = [run.seconds[kind].get(layer, 0.0) / run.tokens for kind in kinds]
        rows.append((f"layer {layer}", *(f"{1e3 * s:.2f}" for s in times), f"{1e3 * sum(times):.2f}"))
    empty = [""] * len(kinds)
    outside = {kind: run.seconds.get(kind, {}).get(-1, 0.0) for kind in ("addresses", "head")}
    for what, seconds in {**outside, "token": run.total_s}.items():
        rows += [(what, *empty, f"{1e3 * seconds / run.tokens:.2f}")]
    print_table(["ms per token", *kinds, "all"], rows, right=tuple(range(1, len(kinds) + 2)))
    how = ", with a GPU synchronisation after each part" if run.gpu_bytes else ""
    print(
        f"layers and head: from extra tokens, computed operation by operation{how}; such a token took "
        f"{1e3 * run.clocked_s / run.tokens:.2f} ms"
    )


def _print_bytes(run: SliceRun, bounds: dict[str, float]) -> None:
    counts, asked = run.counts, sum(run.counts.hits.values())
    tiers = sorted({*counts.hits, *counts.moved_bytes, *bounds})
    rows = [
        (
            tier,
            f"{counts.hits[tier] / asked:.1%}" if tier in counts.hits else "",
            bytes_text(counts.moved_bytes.get(tier, 0) // run.tokens),
            f"{1e3 * bounds[tier] / run.tokens:.2f}" if tier in bounds else "",
            f"{1e3 * counts.busy_s[tier] / run.tokens:.2f}" if tier in counts.busy_s else "",
            f"{1e3 * counts.stalled_on(tier) / run.tokens:.2f}",
        )
        for tier in tiers
    ]
    print()
    print_table(
        ["tier", "hits", "moved per token", "min ms for its bytes", "ms busy", "ms stalled"],
        rows,
        right=(1, 2, 3, 4, 5),
    )


def _host_bytes(budget: MemoryBudget) -> int:
    """What weights may take of host memory, in which virtual GPUs lie too."""
    return budget.dram_bytes + sum(gpu.budget_bytes for gpu in budget.gpus if gpu.is_virtual)


def _print_memory(run: SliceRun, budget: MemoryBudget) -> None:
    allowed = {"dram": budget.dram_bytes, **{gpu.name: gpu.budget_bytes for gpu in budget.gpus}}
    print()
    print_table(
        ["tier", "allocated", "budget"],
        [
            *((tier, bytes_text(n), bytes_text(allowed[tier])) for tier, n in run.tier_bytes.items()),
            ("process", bytes_text(run.grown_bytes), bytes_text(_host_bytes(budget))),
        ],
        right=(1, 2),
    )
    print("process: growth of its resident memory from before loading to its peak, mapped files included")
