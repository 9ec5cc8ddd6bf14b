"""Where in a JSON schema other schemas stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# What Python calls JSON's types.
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}

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


def types_of(schema: Any) -> set[str] | None:
    """The types of JSON that a schema takes; None where that is not plain to see."""
    if not isinstance(schema, Mapping):
        return None
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {type_of(value) for value in values} if isinstance(values, list) else None
    types = schema.get("type")
    if isinstance(types, str):
        return {types}
    if isinstance(types, list):
        return {each for each in types if isinstance(each, str)}
    for union in ("anyOf", "oneOf"):
        if isinstance(schema.get(union), list):
            each = [types_of(part) for part in schema[union]]
            return None if None in each else {name for names in each for name in names or ()}
    return None


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    return TYPES.get(type(value), "null")
