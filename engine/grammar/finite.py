"""Schemas without a finite document: an answer could begin to follow one, but never end.

An object that requires another of its kind is one, and so is a list of at least one such list. Which schemas
do have a finite document is a least fixed point: one whose values need no others, then one whose values need
only such, and so on. What is left over is endless; the grammar leaves it out, and where that is the whole
schema the request is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, urljoin

from engine.grammar.schema import with_each
from quant.errors import RequestError

SCALARS = {"null", "boolean", "number", "string"}
TYPES = SCALARS | {"object", "array"}
MAX_WORK = 100_000  # schemas looked at; whoever asks for more is not helped
# Patterns that can be matched in little time: no groups, few repeats.
_QUICK = re.compile(r"[^(*+?{]*([*+?][^(*+?{]*){0,2}")

Schema = Mapping[str, Any] | bool


class _TooMuchWorkError(Exception):
    pass


def without_endless(schema: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """`schema` with false for every schema in it that has no finite document.

    Raises RequestError naming `field` where nothing is left.
    """
    documents = _Documents(schema)
    try:
        endless = documents.endless()
    except (_TooMuchWorkError, RecursionError):
        return schema
    if id(schema) in endless:
        text = f"{field}: no finite document matches: part of the schema requires itself"
        raise RequestError(text, param=field, code="invalid_grammar")

    def cut(each: Any) -> Any:
        if not isinstance(each, Mapping):
            return each
        return False if id(each) in endless else with_each(each, cut)

    return with_each(schema, cut) if endless else schema


class _Documents:
    """Finds out which schemas within `root` have a finite document. Schemas are known by their `id`."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._known: dict[int, Mapping[str, Any]] = {}
        self._joint: dict[frozenset[int], Mapping[str, Any]] = {}
        self._constants: dict[int, Mapping[str, Any]] = {}
        self._work = 0
        self._references = _References(root)

    def endless(self) -> set[int]:
        """The schemas that have none."""
        pending = [*self._references.schemas]
        ways: dict[int, list[list[int]]] = {}
        while pending:
            schema = pending.pop()
            if id(schema) in ways:
                continue
            found = [way for case in self._cases(schema, frozenset()) for way in self._ways(case)]
            possible = [[each for each in way if each is not True] for way in found if False not in way]
            needed = [each for way in possible for each in way if isinstance(each, Mapping)]
            ways[id(schema)] = [[id(each) for each in way] for way in possible]
            self._known |= {id(each): each for each in needed}
            pending += needed
        left, before = dict(ways), -1
        while len(left) != before:
            before = len(left)
            for each in [*reversed(left)]:
                self._count(1)
                if any(left.keys().isdisjoint(way) for way in left[each]):
                    del left[each]
        return set(left)

    def _cases(self, schema: Any, within: frozenset[int]) -> list[frozenset[int]]:
        """The sets of schemas that a value may have to match at once, one for every choice there is.

        A choice that only leads back to where it was made (`within`) adds no document.
        """
        self._count(1)
        if schema is False or id(schema) in within:
            return []
        if not isinstance(schema, Mapping):
            return [frozenset()]
        self._known[id(schema)] = schema
        within |= {id(schema)}
        cases = {frozenset([id(schema)])}
        for options in self._conditions(schema):
            found = {case for option in options for case in self._cases(option, within)}
            self._count(len(cases) * len(found))
            cases = {first | second for first in cases for second in found}
        return list(cases)

    def _conditions(self, schema: Mapping[str, Any]) -> Iterable[list[Any]]:
        """For each condition beside the schema's own keywords the schemas of which one must match."""
        if isinstance(reference := schema.get("$ref"), str):
            yield [self._references.target(schema, reference)]
        for each in _list(schema, "allOf"):
            yield [each]
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list):
                yield options

    def _ways(self, case: frozenset[int]) -> Iterable[list[Schema]]:
        """Lists of schemas; where all of one have a finite document, so has the case."""
        members = [part for i in case for part in self._spelled_out(self._known[i])]
        types = set.intersection(TYPES, *map(_types, members))
        if types & SCALARS or (types and any("enum" in m for m in members)):
            yield []
            return
        if "object" in types:
            yield from self._object_ways(members)
        if "array" in types:
            fewest = max((_count_of(m, "minItems") for m in members), default=0)
            listed = max((len(_prefix(m)) for m in members), default=0)
            yield [self._joined(_item(m, i) for m in members) for i in range(min(fewest, listed + 1))]

    def _spelled_out(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """A schema, and beside it what its constant says, as a schema of objects or arrays."""
        if not isinstance(value := schema.get("const"), Mapping | list):
            return [schema]
        if id(schema) not in self._constants:
            self._constants[id(schema)] = _of_constant(value)
        return [schema, self._constants[id(schema)]]

    def _object_ways(self, members: list[Mapping[str, Any]]) -> Iterable[list[Schema]]:
        required = {name for m in members for name in _list(m, "required") if isinstance(name, str)}
        needed = [self._joined(_property(m, name) for m in members) for name in sorted(required)]
        if max(_count_of(m, "minProperties") for m in members) <= len(required):
            yield needed
            return
        named = {name for m in members for name in _map(m, "properties")} - required
        for name in sorted(named):
            yield [*needed, self._joined(_property(m, name) for m in members)]
        for other in (each for m in members for each in _map(m, "patternProperties").values()):
            yield [*needed, other]
        yield [*needed, self._joined(m.get("additionalProperties", True) for m in members)]

    def _joined(self, schemas: Iterable[Any]) -> Schema:
        """One schema for values that match all of `schemas`."""
        each = {id(schema): schema for schema in schemas if isinstance(schema, Mapping) or schema is False}
        if False in each.values():
            return False
        if len(each) < 2:
            return next(iter(each.values()), True)
        return self._joint.setdefault(frozenset(each), {"allOf": [*each.values()]})

    def _count(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise _TooMuchWorkError


class _References:
    """Finds what `$ref` names: a place in the document, an `$anchor` or an `$id`.

    schemas    all schemas of the document, those within after those around them
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.schemas: list[Mapping[str, Any]] = []
        self._base: dict[int, str] = {}
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], Any] = {}
        self._enter(root, "")

    def target(self, schema: Mapping[str, Any], reference: str) -> Any:
        """What `reference` within `schema` leads to; True where that is nothing known."""
        base = self._base.get(id(schema), "")
        uri, _, place = reference.partition("#")
        uri = urljoin(base, uri) if uri else base
        place = unquote(place)
        if place and not place.startswith("/"):
            return self._anchors.get((uri, place), True)
        found = self._resources.get(uri, True)
        for step in place.split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(key, True)
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                return True
        return found

    def _enter(self, schema: Any, base: str) -> Any:
        if isinstance(schema, Mapping):
            if isinstance(name := schema.get("$id"), str):
                base = urljoin(base, name).removesuffix("#")
                self._resources[base] = schema
            if isinstance(anchor := schema.get("$anchor"), str):
                self._anchors[base, anchor] = schema
            self._base[id(schema)] = base
            self.schemas.append(schema)
            with_each(schema, lambda each: self._enter(each, base))
        return schema


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema's own keywords leave."""
    named = [schema["type"]] if isinstance(schema.get("type"), str) else _list(schema, "type")
    types = {"number" if each == "integer" else each for each in named if isinstance(each, str)}
    types = types if types and types <= TYPES else TYPES  # what is no type is reported by who compiles
    if "const" in schema:
        return types & {_type_of(schema["const"])}
    if isinstance(values := schema.get("enum"), list):
        return types & set(map(_type_of, values))
    return types


def _of_constant(value: Mapping[str, Any] | list[Any]) -> Mapping[str, Any]:
    """A schema that only `value` matches, as far as its types go."""
    if isinstance(value, list):
        return {"prefixItems": [{"const": each} for each in value], "items": False, "minItems": len(value)}
    named = {name: {"const": each} for name, each in value.items()}
    return {"properties": named, "required": [*named], "additionalProperties": False}


def _type_of(value: object) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _property(schema: Mapping[str, Any], name: str) -> Any:
    """What a schema's own keywords say of a property's value."""
    if name in (properties := _map(schema, "properties")):
        return properties[name]
    for pattern, value in _map(schema, "patternProperties").items():
        if not _QUICK.fullmatch(pattern) or len(name) > 99:
            return True  # nobody knows
        try:
            if re.search(pattern, name):
                return value
        except re.error:
            return True
    return schema.get("additionalProperties", True)


def _prefix(schema: Mapping[str, Any]) -> list[Any]:
    return _list(schema, "prefixItems") or _list(schema, "items")


def _item(schema: Mapping[str, Any], index: int) -> Any:
    """What a schema's own keywords say of an item's value."""
    prefix = _prefix(schema)
    if index < len(prefix):
        return prefix[index]
    return schema.get("additionalItems" if isinstance(schema.get("items"), list) else "items", True)


def _count_of(schema: Mapping[str, Any], keyword: str) -> int:
    value = schema.get(keyword, 0)
    return value if isinstance(value, int) else 0


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _map(schema: Mapping[str, Any], keyword: str) -> Mapping[str, Any]:
    value = schema.get(keyword)
    return value if isinstance(value, Mapping) else {}
