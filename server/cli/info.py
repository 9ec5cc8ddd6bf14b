"""`loci info`: what a checkpoint is, what its parts weigh, where they could lie, what running takes."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.arguments import (
    ApiKey,
    Devices,
    DramBudget,
    ExpertsFormat,
    KvFormatOption,
    OptionalNamedModel,
)
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.families.base import Component
    from engine.families.loader import OpenedModel
    from engine.program_report import StepPart
    from memory.planner.budget import MemoryBudget

# Loading maps files and then touches every weight once; up to here that takes seconds.
LOADED_UNASKED_BYTES = 1_000_000_000
SAMPLE_TOKENS = 32

# Where a kind of component can lie while the model runs. What every token reads must be fast; experts
# are read a few at a time, and of Engram only some rows.
_TIERS = {
    "routed_experts": "vram, dram, nvme",
    "engram": "dram, nvme",
}
_ELSE = "vram, dram"


def info(
    model: OptionalNamedModel = None,
    load: Annotated[
        bool | None,
        typer.Option(
            "--load/--no-load",
            help="Load the model, run a few tokens and print the peak memory. Default: for models up to 1 "
            "GB.",
            show_default=False,
        ),
    ] = None,
    program: Annotated[
        bool,
        typer.Option(
            "--program",
            help="Load the model and print its recorded decode step: operations, the bytes they read, and "
            "where it hands over.",
        ),
    ] = False,
    running: Annotated[
        bool,
        typer.Option(
            "--running",
            help="Print what a running server planned and allocated, and how the plan fares.",
        ),
    ] = False,
    url: Annotated[str, typer.Option(help="That server.")] = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    experts: ExpertsFormat = None,
    kv_format: KvFormatOption = "auto",
    devices: Devices = None,
    dram_budget: DramBudget = None,
) -> None:
    """Describe a model: its parts, their formats and sizes, and the tiers that can hold them.

    Of a model of the Hub that is not on this machine, configuration and headers are fetched for that.

    Example: loci info ./DeepSeek-V4.1-Flash
    """
    from engine.families.loader import open_model
    from memory.planner.budget import MemoryBudget
    from server.cli.fetch import headers_of, is_here

    if running:
        _print_running(url, api_key)
        return
    with headers_of(model) as path:
        found = open_model(path, experts=experts)
    form = found.kv_format(kv_format)
    about, components = found.info, found.components
    total = sum(component.nbytes for component in components)
    parameters = sum(component.parameters for component in components)
    print(f"{about.name}: family {about.family}, {_count(parameters)} parameters, {bytes_text(total)}")
    print(f"vocabulary {about.vocab_size}, context up to {about.max_context} tokens, KV in {form}")
    print()
    _print_components(components)
    if not is_here(model):
        print(f"\nNot on this machine; `loci pull {model}` downloads it.")
    elif program:
        _print_program(found, MemoryBudget.of_this_machine(dram_budget, devices, kv_format=form))
    elif total <= LOADED_UNASKED_BYTES if load is None else load:
        _print_memory(found, MemoryBudget.of_this_machine(kv_format=form))
    else:
        print("\nNot loaded; use --load to load it and print KV cache and peak memory.")


def _print_components(components: list[Component]) -> None:
    groups: dict[tuple[str, str], list[Component]] = defaultdict(list)
    for component in components:
        groups[component.kind, component.format].append(component)
    rows = [
        (
            kind,
            form,
            _count(sum(c.parameters for c in members)),
            f"{sum(c.nbytes for c in members)}",
            bytes_text(sum(c.nbytes for c in members)),
            _TIERS.get(kind, _ELSE),
        )
        for (kind, form), members in groups.items()
    ]
    print_table(["part", "format", "parameters", "bytes", "", "possible tiers"], rows, right=(2, 3, 4))


def _print_memory(opened: OpenedModel, budget: MemoryBudget) -> None:
    from engine.families.base import Batch
    from memory.hardware.detect import peak_resident_bytes
    from server.serving.service import DEFAULT_CONTEXT

    before = peak_resident_bytes()
    model = opened.load(budget).model
    context = min(model.info.max_context, DEFAULT_CONTEXT)
    print()
    for tokens in sorted({context, model.info.max_context}):
        print(f"KV cache of one sequence of {tokens} tokens: {bytes_text(model.cache_bytes(1, tokens))}")
    ids = [i % model.info.vocab_size for i in range(min(SAMPLE_TOKENS, context))]
    cache = model.new_cache(1, context)
    model.forward(Batch.of([(0, 0, ids)]), cache)
    peak = peak_resident_bytes()
    print(
        f"peak RSS after loading and {len(ids)} tokens: {bytes_text(peak)} "
        f"({bytes_text(before)} of it before loading: Python, torch)"
    )


def _print_program(opened: OpenedModel, budget: MemoryBudget) -> None:
    from engine.program_report import layer_kinds, operation_kinds
    from server.serving.service import DEFAULT_CONTEXT

    model = opened.load(budget).model
    cache = model.new_cache(1, min(model.info.max_context, DEFAULT_CONTEXT))
    recorded = cache.program
    print()
    if cache.step_parts:
        _print_parts(cache.step_parts)
        return
    if recorded is None:
        print("The decode step is not recorded: operations are started one by one.")
        return
    kinds, layers = operation_kinds(recorded), layer_kinds(recorded)
    read = sum(kind.nbytes for kind in kinds)
    print(
        f"A decode step of up to {recorded.max_rows} sequences is recorded: {len(recorded.noted)} operations "
        f"in {bytes_text(recorded.nbytes)} of buffers, which read {bytes_text(read)} of weights for a token."
    )
    print()
    rows = [(kind.kind, str(kind.count), bytes_text(kind.nbytes) if kind.nbytes else "") for kind in kinds]
    print_table(["operation", "number", "weights read"], rows, right=(1, 2))
    print()
    print_table(
        ["layers", "operations each", "hand-overs each", "weights read each"],
        [(kind.name, str(kind.operations), str(kind.hand_overs), bytes_text(kind.nbytes)) for kind in layers],
        right=(1, 2, 3),
    )
    print("\nA hand-over is skipped unless bytes must arrive first.")


def _print_parts(parts: Sequence[StepPart]) -> None:
    """What each device does in a step that several have a part in."""
    print("A decode step is recorded for each device; those that help another run at the same time as it.\n")
    print_table(
        ["device", "computes", "layers", "kernels each", "hand-overs each", "answers of GPUs each"],
        [
            (
                part.device,
                "layers" if part.helps is None else f"experts for {part.helps}",
                name,
                "" if work.launches is None else str(work.launches),
                str(work.hand_overs),
                str(work.exchanges),
            )
            for part in parts
            for name, work in part.kinds()
        ],
        right=(3, 4, 5),
    )


def _print_running(url: str, api_key: str | None) -> None:
    """A running server's placement: bytes by tier and part, as planned and as allocated."""
    from rich.console import Console

    from server.cli.top import look_at, plan_of

    now = look_at(url, api_key)
    planned, held = "loci_plan_bytes", "loci_plan_allocated_bytes"
    rows = [
        (
            tier,
            part,
            f"{now.total(planned, tier=tier, part=part):,.0f}",
            f"{now.total(held, tier=tier, part=part):,.0f}",
        )
        for tier in sorted({*now.labels(planned, "tier"), *now.labels(held, "tier")})
        for part in sorted({*now.labels(planned, "part"), *now.labels(held, "part")})
        if now.total(planned, tier=tier, part=part) or now.total(held, tier=tier, part=part)
    ]
    print_table(["tier", "part", "bytes planned", "bytes allocated"], rows, right=(2, 3))
    experts = {tier: now.total("loci_experts", tier=tier) for tier in now.labels("loci_experts", "tier")}
    if experts:
        print("experts: " + ", ".join(f"{count:,.0f} in {tier}" for tier, count in experts.items()))
    print()
    table = plan_of(now)
    if table.row_count:
        Console(width=100).print(table)
    else:
        print("How the plan fares is told after 100 steps of answers alone.")


def _count(number: int) -> str:
    value = float(number)
    for unit in ("", " K", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} B"
