"""`loci economics`: what the tokens that a server has computed cost, and would have cost elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import ApiKey
from server.cli.money_arguments import Against, CostFiles, CostsFile, Plot, Price, PricesFile

HERE = "http://127.0.0.1:8000"


def economics(
    metrics: Annotated[
        str | None,
        typer.Option(
            help=f"A server's address, or a file with what its /metrics said. Default: {HERE}.",
            show_default=False,
        ),
    ] = None,
    api_key: ApiKey = None,
    prometheus: Annotated[
        str | None,
        typer.Option(help="Address of a Prometheus server that scrapes it, instead.", show_default=False),
    ] = None,
    days: Annotated[
        float | None,
        typer.Option(
            min=0.05,
            max=3660,
            help="Days to look back at. Default: 30 of Prometheus; of a server, since it started.",
            show_default=False,
        ),
    ] = None,
    watts_query: Annotated[
        str | None,
        typer.Option(
            help="Expression of Prometheus that says what the machine draws, such as "
            "'sum(DCGM_FI_DEV_POWER_USAGE)'. Default: watts are assumed.",
            show_default=False,
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Profile whose [costs] say what the machine cost and draws (docs/economics.md).",
            show_default=False,
        ),
    ] = None,
    price: Price = None,
    costs: CostsFile = None,
    prices: PricesFile = None,
    against: Against = None,
    plot: Plot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what recorded use costs on this machine, and would cost elsewhere. A calculation, not a quote.

    Asks the address that you name, and nothing else; prices are those of a file.

    Example: loci economics --prometheus http://127.0.0.1:9090 --days 30 --price 5200
    """
    from memory.hardware.profiles import load_profile
    from server.cli.economics_case import report_of
    from server.cli.economics_report import show_report
    from server.cli.plotting import need_matplotlib
    from server.cli.recorded_usage import from_metrics, from_prometheus

    if metrics is not None and prometheus is not None:
        raise ConfigError("--metrics and --prometheus: give one of them")
    if watts_query is not None and prometheus is None:
        raise ConfigError("--watts-query: asks a Prometheus server; give --prometheus too")
    if plot is not None:
        need_matplotlib()
    known = None if hardware in (None, "this") else load_profile(hardware).costs
    if prometheus is not None:
        found = from_prometheus(prometheus, days or 30.0, watts_query)
    else:
        found = from_metrics(metrics or HERE, days, api_key=api_key)
    report = report_of(
        f"use of {found.days:.3g} days",
        found.rates,
        f"{found.source}; the seconds of computing shared out as sequences waited for their first and their "
        "next tokens",
        found.tokens,
        f"{found.source}, on average",
        files=CostFiles(price, costs, prices, against),
        known=known,
        watts=found.watts,
    )
    show_report(report, plot, as_json=as_json)
