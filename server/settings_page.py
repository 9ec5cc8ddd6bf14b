"""Keeps the table in docs/configuration.md true: `python -m server.settings_page` writes it from Settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from server.settings import SEVERAL, Settings

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN, END = "<!-- settings begin -->", "<!-- settings end -->"
_KINDS = {str: "text", int: "whole number", float: "number", Path: "path"}


def updated(page: str) -> str:
    """`page` with the table between its two marks written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_table()}\n{END}{after}"


def _table() -> str:
    head = "| in the file | flag | variable | value | default | |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(_row(name, field) for name, field in Settings.model_fields.items())])


def _row(name: str, field: FieldInfo) -> str:
    flag = "`MODEL`" if name == "model" else f"`--{name.replace('_', '-')}`"
    default = "" if field.default in (None, ()) else f"`{field.default}`"
    cells = [f"`{name}`", flag, f"`LOCI_{name.upper()}`", _kind(name, field.annotation), default]
    return f"| {' | '.join(cells)} | {field.description} |"


def _kind(name: str, annotation: Any) -> str:
    if name in SEVERAL:
        return "one or more texts"
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    return _KINDS[kinds[0]]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
