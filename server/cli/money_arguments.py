"""Options about money that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import can_be_written


def not_negative(amount: float | None) -> float | None:
    """An amount of money, refused where it is less than nothing."""
    if amount is not None and not 0 <= amount < 1e9:
        raise ConfigError(f"{amount:g} is no amount of money: give 0 or more")
    return amount


CostsFile = Annotated[
    Path | None,
    typer.Option(
        "--costs",
        help="TOML of what is assumed of costs and use (docs/economics.md). Default: the shipped one.",
        show_default=False,
    ),
]
PricesFile = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        help="TOML of what tokens cost elsewhere (docs/economics.md). Default: the shipped one.",
        show_default=False,
    ),
]
Price = Annotated[
    float | None,
    typer.Option(
        "--price",
        help="What the machine costs, or would. Default: as its profile says.",
        callback=not_negative,
        show_default=False,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="Entry of the price list that the last table is about. Default: the first.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Also draw costs by tokens a day (PNG; needs matplotlib).",
        callback=can_be_written,
        show_default=False,
    ),
]


@dataclass(frozen=True)
class CostFiles:
    """What the options above say of costs."""

    price: float | None
    costs: Path | None
    prices: Path | None
    against: str | None
