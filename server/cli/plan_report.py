"""A plan as people read it, and as programs do."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from memory.hardware.profiles import HardwareProfile
    from memory.planner.cost_model import StepCost
    from memory.planner.forecast import Doubling, Forecast, Remedy
    from memory.planner.placement import Place, Placement, Workload
    from memory.planner.routing import Routing
    from memory.planner.shape import ModelShape

DEFAULT_CONTEXT = 8192
DEFAULT_BATCH = 8
WORTH_SAYING = 1.02  # a gain of less is within the model's own error


def workload_of(
    shape: ModelShape, machine: HardwareProfile, context: int | None, batch: int, prefill_chunk: int | None
) -> Workload:
    """What a plan is made for; the context is as long as the model's, at most 8192, and a chunk as large as
    pays, unless given."""
    from memory.planner.placement import Workload
    from memory.planner.prefill import planned_chunk

    asked = Workload(context or min(DEFAULT_CONTEXT, shape.max_context), batch)
    return replace(asked, prefill_chunk=prefill_chunk or planned_chunk(shape, machine, asked))


def print_plan(
    shape: ModelShape,
    machine: HardwareProfile,
    workload: Workload,
    *,
    recorded: Routing | None = None,
    by_layer: bool = False,
) -> bool:
    """Print the plan for people, with a forecast for `recorded` routing too; whether the model fits."""
    from memory.planner.forecast import doublings, forecast, remedy
    from memory.planner.placing import plan as make_plan

    placement = make_plan(shape, machine, workload)
    _print_head(shape, machine, workload, "fits" if placement.fits else "does not fit")
    _print_placement(shape, placement, by_layer)
    if not placement.fits:
        _print_remedy(remedy(shape, machine, workload))
        return False
    routings = _routings(shape, recorded)
    forecasts = [forecast(shape, machine, workload, routing) for routing in routings]
    _print_forecasts(forecasts, workload)
    _print_launches(shape, placement, machine, forecasts[-1])
    _print_doublings(doublings(shape, machine, workload, routings[-1]), workload)
    if machine.assumed:
        print("\nAssumed, not measured:\n" + "\n".join(f"  - {line}" for line in machine.assumed))
    return True


def _routings(shape: ModelShape, recorded: Routing | None) -> list[Routing]:
    from memory.planner.routing import SKEWED, UNIFORM

    known = [UNIFORM, SKEWED] if shape.expert_nbytes else [UNIFORM]
    return known if recorded is None else [*known, recorded]


def plan_report(
    shape: ModelShape, machine: HardwareProfile, placement: Placement, recorded: Routing | None
) -> dict[str, Any]:
    """The plan for programs, ready for JSON."""
    return _report(shape, machine, placement) | _expected(shape, machine, placement, recorded)


def _report(shape: ModelShape, machine: HardwareProfile, placement: Placement) -> dict[str, Any]:
    from memory.planner.workspace import lent_bytes, workspace_bytes

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
        "prefill_workspace_bytes": workspace_bytes(shape, placement.workload),
        "prefill_lent_bytes": lent_bytes(shape, placement.workload),
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


def _expected(
    shape: ModelShape, machine: HardwareProfile, placement: Placement, recorded: Routing | None
) -> dict[str, Any]:
    """What a report says besides the placement: the forecasts, or what would make the model fit."""
    from memory.planner.forecast import doublings, forecast, remedy

    workload = placement.workload
    if not placement.fits:
        return {"remedy": asdict(remedy(shape, machine, workload))}
    routings = _routings(shape, recorded)
    return {
        "forecasts": [_forecast_report(forecast(shape, machine, workload, routing)) for routing in routings],
        "doubling": [asdict(gain) for gain in doublings(shape, machine, workload, routings[-1])],
    }


def _print_head(shape: ModelShape, machine: HardwareProfile, workload: Workload, verdict: str) -> None:
    from memory.planner.workspace import lent_bytes, workspace_bytes

    lent = lent_bytes(shape, workload) if any(gpu.kind == "cuda" for gpu in machine.gpus) else 0
    print(f"{shape.name} on {machine.name}: {verdict}")
    print(f"{machine.description or machine.name}")
    print(
        f"{bytes_text(shape.nbytes)} of weights; {workload.sequences} sequence(s) of up to "
        f"{workload.context} tokens; prompts in chunks of {workload.prefill_chunk}, in "
        f"{bytes_text(workspace_bytes(shape, workload))} of workspace"
        + (f", {bytes_text(lent)} of it lent by each GPU's experts\n" if lent else "\n")
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
    work = placement.workload
    tokens, most = work.sequences * work.context, shape.max_context
    pool, longest = sum(placement.pool_bytes().values()), shape.kv_bytes(most, 1)
    if work.context < most and pool:
        print(
            f"KV is one pool of {bytes_text(pool)} in pages: {tokens:,} tokens in all, of which one sequence "
            f"may have {min(tokens, most):,}; the {most:,} that the model can take {bytes_text(longest)}\n"
        )
    rows = [
        (kind.replace("_", " "), span, held, bytes_text(nbytes), tier, reason)
        for kind, span, held, nbytes, tier, reason in _grouped(shape, placement, by_layer)
    ]
    rows += [(r.name, "", "", bytes_text(r.nbytes), r.tier, r.reason) for r in placement.reserves]
    print_table(["part", "layers", "", "bytes", "tier", "why"], rows, right=(3,))


_KINDS = (
    "embedding", "dense", "shared_experts", "kv", "kv_states", "head", "look_ups", "routed_experts", "engram",
)  # fmt: skip


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
        print(f"  {LATENCY}: starting a layer's operations, and waits between devices")
    last = forecasts[-1]
    read = ", ".join(
        f"{tier} {bytes_text(int(nbytes))}"
        for tier, nbytes in sorted(last.alone.nbytes.items())
        if nbytes >= 1
    )
    print(f"A decoded token reads or moves: {read}")


def _print_launches(
    shape: ModelShape, placement: Placement, machine: HardwareProfile, last: Forecast
) -> None:
    """What starting kernels on GPUs is taken to cost: counted, and not measured."""
    from memory.planner.cost_model import LATENCY, Efficiency
    from memory.planner.launches import SHARE

    real = {f"vram:{n}" for n, gpu in enumerate(machine.gpus) if gpu.kind == "cuda"}
    tiers = {n: placement.tier_of("dense", n) for n in range(len(shape.layers))}
    counts = [layer.launches for n, layer in enumerate(shape.layers) if tiers[n] in real and layer.launches]
    if not counts:
        return
    most = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    waits = last.alone.seconds.get(LATENCY, 0.0)
    held = {tier for n in tiers for tier in placement.experts(n)} & real
    shared = f", and {SHARE} on each other GPU for its experts at the same time," if len(held) > 1 else ""
    print(
        f"GPUs start {most} kernels a layer{shared or ','} as the recorded step counts them; that they take "
        f"{Efficiency().launch_s * 1e6:.0f} us each is a forecast, which no GPU has measured. With "
        f"waits between devices: {1e3 * waits:.0f} of {1e3 * last.alone.total_s:.0f} ms of a token."
    )


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
