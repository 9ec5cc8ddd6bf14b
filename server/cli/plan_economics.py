"""`loci plan --economics`: what tokens would cost on a machine as it is planned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.cli.money_arguments import CostFiles

if TYPE_CHECKING:
    from memory.hardware.profiles import HardwareProfile
    from memory.planner.placement import Workload
    from memory.planner.routing import Routing
    from memory.planner.shape import ModelShape


def show_economics(
    shape: ModelShape,
    machine: HardwareProfile,
    workload: Workload,
    recorded: Routing | None,
    files: CostFiles,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print what tokens cost at the speeds that a plan forecasts of a model that fits."""
    from memory.planner.economics import Rates
    from memory.planner.forecast import forecast
    from memory.planner.routing import SKEWED, UNIFORM
    from server.cli.economics_case import report_of
    from server.cli.economics_report import show_report
    from server.cli.plotting import need_matplotlib

    if plot is not None:
        need_matplotlib()
    routing = recorded or (SKEWED if shape.expert_nbytes else UNIFORM)
    found = forecast(shape, machine, workload, routing)
    reading = found.prefill.tokens_per_s
    report = report_of(
        f"{shape.name} on {machine.name}",
        Rates(reading, found.alone.tokens_per_s),
        f"a forecast of `loci plan`, not measured: prompts of {workload.context:,} tokens, one answer at a "
        f"time, routing {routing.name} ({routing.source})",
        None,
        "",
        files=files,
        known=machine.costs,
        together=Rates(reading, found.together.tokens_per_s) if workload.sequences > 1 else None,
    )
    show_report(report, plot, as_json=as_json)
