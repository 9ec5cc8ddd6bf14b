"""Where in a JSON schema other schemas stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Keywords whose value is data, whatever it looks like, and those whose value names schemas.
DATA = {"const", "enum", "default", "examples", "example"}
NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}


def with_each(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """`schema` with `change` applied to each schema that stands directly in it.

    What an unknown keyword holds counts as schemas too, because references may lead there. `change` also sees
    items of lists that are none (names in `required`); it should give back what is no object.
    """
    changed = dict(schema)
    for keyword, value in schema.items():
        if keyword in DATA:
            continue
        if isinstance(value, list):
            changed[keyword] = [change(each) for each in value]
        elif isinstance(value, Mapping) and keyword in NAMED:
            changed[keyword] = {name: change(each) for name, each in value.items()}
        elif isinstance(value, Mapping):
            changed[keyword] = change(value)
    return changed
