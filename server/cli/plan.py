"""`loci plan`: where a model would lie on a machine, how fast it would be there, what would help."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.embedded import EMBEDDED, model_path
from quant.errors import ConfigError
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from memory.hardware.profiles import HardwareProfile
    from memory.planner.cost_model import StepCost
    from memory.planner.forecast import Doubling, Forecast, Remedy
    from memory.planner.placement import Place, Placement, Workload
    from memory.planner.shape import ModelShape

DEFAULT_CONTEXT = 8192
DOES_NOT_FIT = 3  # exit code
WORTH_SAYING = 1.02  # a gain of less is within the model's own error


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, GGUF file, config.json, demo, smollm2, or a name like gpt-oss-20b.",
            show_default=False,
        ),
    ],
    hardware: Annotated[
        str,
        typer.Option(help="A shipped profile, `this` for this machine, or a TOML file (docs/planner.md)."),
    ] = "this",
    context: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of a sequence. Default: 8192, or the model's context length if shorter.",
            min=1,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.", min=1, max=4096)] = 8,
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens per step.", min=1)] = 512,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Use only these GPUs, with budgets: cuda:22GiB,... or virtual:24GiB@12.5GB/s,...",
            show_default=False,
        ),
    ] = None,
    dram: Annotated[
        str | None,
        typer.Option(help="DRAM to use, e.g. 64GiB. Default: all.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Routing trace recorded by `loci profile`, for hit rates.", show_default=False),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer on its own line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where everything goes, how fast it runs, what limits it and what would help. Loads nothing.

    The exit code is 3 if the model does not fit.

    Example: loci plan deepseek-v4.1-flash --hardware 2x4090-256g --context 32768
    """
    from memory.experts.traces import RoutingTrace
    from memory.planner.forecast import doublings, forecast, remedy
    from memory.planner.placement import Workload
    from memory.planner.placement import plan as make_plan
    from memory.planner.routing import SKEWED, UNIFORM, of_trace

    shape = _shape(model)
    machine = _hardware(hardware, devices, dram, shape if _on_disk(model) else None)
    if context is not None and context > shape.max_context:
        raise ConfigError(f"--context {context}: {shape.name} supports at most {shape.max_context} tokens")
    workload = Workload(context or min(DEFAULT_CONTEXT, shape.max_context), batch, prefill_chunk)
    placement = make_plan(shape, machine, workload)
    if not placement.fits:
        found = remedy(shape, machine, workload)
        if as_json:
            print(json.dumps(_report(shape, machine, placement) | {"remedy": asdict(found)}, indent=1))
        else:
            _print_head(shape, machine, workload, "does not fit")
            _print_placement(shape, placement, layers)
            _print_remedy(found)
        raise typer.Exit(DOES_NOT_FIT)
    routings = [UNIFORM, SKEWED] if shape.expert_nbytes else [UNIFORM]
    if trace is not None:
        routings.append(of_trace(RoutingTrace.load(trace), shape, str(trace)))
    forecasts = [forecast(shape, machine, workload, routing) for routing in routings]
    gains = doublings(shape, machine, workload, routings[-1])
    if as_json:
        expected = {
            "forecasts": [_forecast_report(f) for f in forecasts],
            "doubling": [asdict(gain) for gain in gains],
        }
        print(json.dumps(_report(shape, machine, placement) | expected, indent=1))
        return
    _print_head(shape, machine, workload, "fits")
    _print_placement(shape, placement, layers)
    _print_forecasts(forecasts, workload)
    _print_doublings(gains, workload)
    if machine.assumed:
        print("\nAssumed, not measured:\n" + "\n".join(f"  - {line}" for line in machine.assumed))


def _shape(model: str) -> ModelShape:
    from engine.families.released import NAMES, released_shape

    if model.endswith(".json") and Path(model).is_file():
        from engine.families.decoder.config_only import config_shape
        from memory.checkpoint.safetensors_files import read_json

        config = Path(model)
        return config_shape(read_json(config), config.resolve().parent.name)
    path = _on_disk(model)
    if path is not None:
        from engine.families.loader import open_model
        from engine.families.shapes import shape_of

        return shape_of(open_model(path).checkpoint)
    if model in NAMES:
        return released_shape(model)
    names = ", ".join((*EMBEDDED, *NAMES))
    raise ConfigError(f"{model}: no such file or directory, and not one of {names}")


def _on_disk(model: str) -> Path | None:
    """Where the model lies on this machine's disk; None for one that is known by its name alone."""
    if model in EMBEDDED or (Path(model).exists() and not model.endswith(".json")):
        return model_path(Path(model))
    return None


def _hardware(
    name: str, devices: str | None, dram: str | None, on_disk: ModelShape | None
) -> HardwareProfile:
    """The machine asked for; on_disk is the model where it lies on this machine's disk already."""
    from memory.hardware.profiles import load_profile, parse_bytes, parse_devices
    from memory.hardware.this_machine import this_machine

    machine = this_machine() if name == "this" else load_profile(name)
    if name == "this" and on_disk is not None:
        machine = replace(machine, disk_bytes=machine.disk_bytes + on_disk.nbytes)
    if devices is not None:
        machine = machine.with_devices(parse_devices(devices))
    return machine if dram is None else replace(machine, dram_bytes=parse_bytes(dram))


def _report(shape: ModelShape, machine: HardwareProfile, placement: Placement) -> dict[str, Any]:
    tiers = {
        tier: {"budget_bytes": budget, "used_bytes": placement.used(tier)}
        for tier, budget in placement.budgets.items()
    }
    return {
        "model": shape.name,
        "model_bytes": shape.nbytes,
        "hardware": machine.name,
        "assumed": list(machine.assumed),
        "workload": asdict(placement.workload),
        "fits": placement.fits,
        "tiers": tiers,
        "places": [asdict(place) for place in placement.places],
        "reserves": [asdict(reserve) for reserve in placement.reserves],
    }


def _forecast_report(f: Forecast) -> dict[str, Any]:
    def step(cost: StepCost) -> dict[str, Any]:
        return {
            "tokens": cost.tokens,
            "tokens_per_s": cost.tokens_per_s,
            "bound": cost.bound,
            "seconds": cost.seconds,
            "bytes": cost.nbytes,
            "hit_rates": cost.hit_rates,
        }

    return {
        "routing": f.routing.name,
        "source": f.routing.source,
        "decode_alone": step(f.alone),
        "decode_together": step(f.together),
        "prefill": step(f.prefill),
    }


def _print_head(shape: ModelShape, machine: HardwareProfile, workload: Workload, verdict: str) -> None:
    print(f"{shape.name} on {machine.name}: {verdict}")
    print(f"{machine.description or machine.name}")
    print(
        f"{bytes_text(shape.nbytes)} of weights; {workload.sequences} sequence(s) of up to "
        f"{workload.context} tokens; prompts in chunks of {workload.prefill_chunk}\n"
    )


def _print_placement(shape: ModelShape, placement: Placement, by_layer: bool) -> None:
    tiers = [
        (
            tier,
            bytes_text(budget),
            bytes_text(placement.used(tier)),
            bytes_text(budget - placement.used(tier)),
        )
        for tier, budget in placement.budgets.items()
    ]
    if not placement.fits:
        tiers.append(("nowhere", "", bytes_text(placement.used("nowhere")), ""))
    print_table(["tier", "budget", "used", "free"], tiers, right=(1, 2, 3))
    print()
    rows = [
        (kind.replace("_", " "), span, held, bytes_text(nbytes), tier, reason)
        for kind, span, held, nbytes, tier, reason in _grouped(shape, placement, by_layer)
    ]
    rows += [(r.name, "", "", bytes_text(r.nbytes), r.tier, r.reason) for r in placement.reserves]
    print_table(["part", "layers", "", "bytes", "tier", "why"], rows, right=(3,))


_KINDS = ("embedding", "dense", "shared_experts", "kv", "head", "routed_experts", "engram")


def _grouped(
    shape: ModelShape, placement: Placement, by_layer: bool
) -> list[tuple[str, str, str, int, str, str]]:
    """Places as rows: neighbouring layers that are treated alike in one, unless every layer is wanted."""
    tiers = [*placement.budgets, "nowhere"]

    def alike(item: tuple[int, Place]) -> tuple[object, ...]:
        position, place = item
        layer = place.layer if place.layer is not None else -1
        run = position if by_layer or place.kind == "engram" else layer - position
        return place.tier, place.reason, run

    rows = []
    for kind in _KINDS:
        chosen = [place for place in placement.places if place.kind == kind]
        chosen.sort(key=lambda place: (tiers.index(place.tier), place.layer or 0))
        for _, group in groupby(enumerate(chosen), alike):
            members = [place for _, place in group]
            first, last = members[0].layer, members[-1].layer
            span = "" if first is None else f"{first}" if first == last else f"{first}-{last}"
            total = sum(place.nbytes for place in members)
            rows.append((kind, span, _held(shape, members), total, members[0].tier, members[0].reason))
    return rows


def _held(shape: ModelShape, places: list[Place]) -> str:
    """How many rows, or experts of each layer, these places hold."""
    counts = sorted({place.count for place in places})
    if places[0].kind == "engram":
        return f"{counts[0]} rows"
    if places[0].kind != "routed_experts" or places[0].layer is None:
        return ""
    each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    return f"{each} of {shape.layers[places[0].layer].experts} experts"


def _print_forecasts(forecasts: list[Forecast], workload: Workload) -> None:
    from memory.planner.cost_model import LATENCY

    print("\nExpected tokens per second, and what bounds them:")
    steps = ["decode, 1 sequence", f"decode, {workload.sequences} together", "prefill"]
    speeds = [[_speed(cost) for cost in (f.alone, f.together, f.prefill)] for f in forecasts]
    if any(forecasts[0].alone.hit_rates.values()):
        rows = []
        for f, speed in zip(forecasts, speeds, strict=True):
            hits = " / ".join(f"{f.alone.hit_rates[tier]:.0%}" for tier in ("vram", "dram", "nvme"))
            rows.append((f.routing.name, hits, *speed))
        print_table(["routing", "in vram / dram / nvme", *steps], rows)
        for f in forecasts:
            print(f"  {f.routing.name}: {f.routing.source}")
    else:
        print_table(steps, speeds)
    if any(cost.bound == LATENCY for f in forecasts for cost in (f.alone, f.together, f.prefill)):
        print(f"  {LATENCY}: starting a layer's operations one by one, and waits between devices")
    last = forecasts[-1]
    read = ", ".join(
        f"{tier} {bytes_text(int(nbytes))}"
        for tier, nbytes in sorted(last.alone.nbytes.items())
        if nbytes >= 1
    )
    print(f"A decoded token reads or moves: {read}")


def _speed(cost: StepCost) -> str:
    return f"{cost.tokens_per_s:.3g} tok/s ({cost.bound})"


def _print_doublings(gains: list[Doubling], workload: Workload) -> None:
    print("\nWhat twice as much would bring (times as many tokens per second):")
    useful = [gain for gain in gains if max(gain.alone, gain.together, gain.prefill) >= WORTH_SAYING]
    rows = [
        (gain.resource, f"{gain.alone:.2f}", f"{gain.together:.2f}", f"{gain.prefill:.2f}") for gain in useful
    ]
    headers = ["of", "decode, 1 sequence", f"decode, {workload.sequences} together", "prefill"]
    print_table(headers, rows, right=(1, 2, 3))
    useless = [gain.resource for gain in gains if gain not in useful]
    if useless:
        print(f"Little effect: {', '.join(useless)}")


def _print_remedy(found: Remedy) -> None:
    if found.required:
        print("\nIt needs " + " and ".join(found.required) + ".")
    if found.options:
        besides = " besides" if found.required else ""
        print(f"\nIt would fit with any one of these{besides}:")
        print("\n".join(f"  - {option}" for option in found.options))
