"""Price lists and assumptions about costs, from TOML files that their owner edits."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field

from memory.planner.economics import ApiPrice, Tokens
from memory.toml_files import Section, Whole, parse_toml, read_toml
from quant.errors import ConfigError

PAGE = "docs/economics.md"

Amount = Annotated[float, Field(ge=0, lt=1e9)]
Positive = Annotated[float, Field(gt=0, lt=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Currency = Annotated[str, Field(pattern="^[A-Z]{3}$")]


class _Entry(Section):
    name: str
    cached_input: Amount
    input: Amount
    output: Amount
    checked: datetime.date
    source: str
    verified: bool = False


class _PriceFile(Section):
    currency: Currency
    api: Annotated[list[_Entry], Field(min_length=1)]


@dataclass(frozen=True)
class PriceList:
    """What tokens cost elsewhere, in one currency."""

    currency: str
    entries: tuple[ApiPrice, ...]


class _Machine(Section):
    resale_share: Share
    years: Positive
    other_per_month: Amount
    idle_watts: Positive
    busy_watts: Positive


class _Electricity(Section):
    per_kwh: Amount


class _Usage(Section):
    utilisation: Annotated[float, Field(gt=0, le=1)]
    cached_per_output: Amount
    input_per_output: Amount


class _CostFile(Section):
    currency: Currency
    machine: _Machine
    electricity: _Electricity
    usage: _Usage


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of a machine and its use, unless something better is known.

    utilisation  of the day in which it computes
    mix          tokens of prompts for one of an answer
    """

    currency: str
    resale_share: float
    years: float
    other_per_month: float
    idle_watts: float
    busy_watts: float
    per_kwh: float
    utilisation: float
    mix: Tokens


def load_prices(path: Path | None) -> PriceList:
    """A price list; None: the one that comes with Loci. Raises ConfigError."""
    found = _read(_PriceFile, path, "prices.toml")
    names = [each.name for each in found.api]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path or 'the shipped prices.toml'}: two prices are called {name!r}")
    entries = tuple(
        ApiPrice(
            each.name,
            each.cached_input,
            each.input,
            each.output,
            each.checked.isoformat(),
            each.source,
            each.verified,
        )
        for each in found.api
    )
    return PriceList(found.currency, entries)


def load_assumptions(path: Path | None) -> Assumptions:
    """Assumptions about costs; None: those that come with Loci. Raises ConfigError."""
    f = _read(_CostFile, path, "costs.toml")
    return Assumptions(
        currency=f.currency,
        resale_share=f.machine.resale_share,
        years=f.machine.years,
        other_per_month=f.machine.other_per_month,
        idle_watts=f.machine.idle_watts,
        busy_watts=f.machine.busy_watts,
        per_kwh=f.electricity.per_kwh,
        utilisation=f.usage.utilisation,
        mix=Tokens(f.usage.cached_per_output, f.usage.input_per_output, 1.0),
    )


def shipped_text(name: str) -> str:
    """A file that comes with Loci, as a beginning for one's own."""
    return (files("memory.planner") / "shipped" / name).read_text(encoding="utf-8")


def _read(kind: type[Whole], path: Path | None, shipped: str) -> Whole:
    if path is None:
        return parse_toml(kind, shipped_text(shipped), f"the shipped {shipped}", PAGE)
    return read_toml(kind, path, PAGE)
