"""Schemas that only endless documents match are refused, those that may recurse are not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammar.finite import without_endless
from quant.errors import RequestError

HERE = {"$ref": "#"}
NODE: dict[str, Any] = {"type": "object", "properties": {"next": HERE}, "required": ["next"]}
ENDLESS = {"$defs": {"e": {**NODE, "properties": {"next": {"$ref": "#/$defs/e"}}}}}
TO_ENDLESS = {"$ref": "#/$defs/e"}


def to(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def is_refused(schema: dict[str, Any]) -> bool:
    try:
        without_endless(schema, "field")
    except RequestError as error:
        return (error.param, error.code) == ("field", "invalid_grammar")
    return False


@pytest.mark.parametrize(
    "schema",
    [
        HERE,
        NODE,
        {**NODE, "properties": {"next": {"anyOf": [HERE, {"allOf": [HERE]}]}}},
        {"type": "object", "required": ["next"], "allOf": [{"properties": {"next": HERE}}]},
        {"$defs": {"a": {**NODE, "properties": {"next": to("b")}}, "b": {"allOf": [to("a")]}}, **to("a")},
        {"anyOf": [NODE, {"type": "array", "minItems": 1, "items": HERE}]},
        {"oneOf": [NODE, {"allOf": [NODE, {"title": "the same"}]}]},
        {"allOf": [NODE, {"anyOf": [{"type": "object"}, {"type": "null"}]}]},
        {"type": "array", "minItems": 1, "items": HERE},
        {"type": "array", "minItems": 2, "prefixItems": [{"type": "null"}, HERE]},
        {"type": "array", "minItems": 2, "prefixItems": [{"type": "null"}], "items": HERE},
        {"type": "array", "minItems": 2, "items": [{"type": "null"}], "additionalItems": HERE},
        {"type": "object", "required": ["x"], "additionalProperties": HERE},
        {"type": "object", "required": ["x"], "patternProperties": {"^x": HERE}},
        {"type": "object", "minProperties": 1, "additionalProperties": HERE},
        {"type": "object", "minProperties": 1, "properties": {"x": HERE}, "additionalProperties": False},
        {"$id": "https://example.org/a/b", **NODE, "properties": {"next": {"$ref": "b"}}},
        {"$anchor": "here", **NODE, "properties": {"next": {"$ref": "#here"}}},
        {"$defs": {"a/b c": NODE}, "$ref": "#/$defs/a~1b%20c", "properties": {"next": HERE}},
        {"definitions": {"a": {**NODE, "properties": {"next": {"$ref": "#/definitions/a"}}}}}
        | {"$ref": "#/definitions/a"},
    ],
)
def test_a_schema_that_requires_itself_is_refused(schema: dict[str, Any]) -> None:
    assert is_refused(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {**NODE, "required": []},
        {**NODE, "type": ["object", "null"]},
        {**NODE, "properties": {"next": {"anyOf": [HERE, {"type": "null"}]}}},
        {**NODE, "properties": {"next": {"oneOf": [HERE, {"const": 1}]}}},
        {**NODE, "properties": {"next": {"type": "array", "items": HERE}}},
        {**NODE, "properties": {"next": {"type": "object", "additionalProperties": HERE}}},
        {**NODE, "properties": {"next": {"enum": [{"next": None}]}}},
        {"properties": {"next": HERE}, "required": ["next"]},
        {"type": "array", "items": HERE, "maxItems": 3},
        {"type": "array", "minItems": 1, "prefixItems": [{"type": "null"}], "items": HERE},
        {"type": "object", "minProperties": 1, "properties": {"x": {"type": "null"}, "y": HERE}},
        {"type": "object", "required": ["x"], "patternProperties": {"^y": HERE}},
        {"$defs": {"a": {**NODE, "properties": {"next": to("b")}}, "b": {"type": ["array"]}}, **to("a")},
        {**NODE, "properties": {"next": {"$ref": "#/properties/gone"}}},
        {"properties": {"$ref": {"type": "string"}}, "required": ["$ref"], "type": "object"},
        {"default": {"$ref": "#"}, "type": "string"},
    ],
)
def test_a_schema_that_may_recurse_is_accepted(schema: dict[str, Any]) -> None:
    assert not is_refused(schema)


@pytest.mark.parametrize(
    ("schema", "left"),
    [
        ({"anyOf": [TO_ENDLESS, {"const": 1}]}, {"anyOf": [False, {"const": 1}]}),
        ({"properties": {"a": TO_ENDLESS}}, {"properties": {"a": False}}),
        ({"items": TO_ENDLESS}, {"items": False}),
        ({"properties": {"a": HERE}}, {"properties": {"a": HERE}}),
        ({"default": TO_ENDLESS}, {"default": TO_ENDLESS}),
    ],
)
def test_an_answer_cannot_begin_what_it_could_not_end(schema: dict[str, Any], left: dict[str, Any]) -> None:
    found = without_endless(ENDLESS | schema, "field")

    assert {name: value for name, value in found.items() if name != "$defs"} == left
    assert found["$defs"] == {"e": False}


LEAVES = st.sampled_from(
    [
        {"type": "null"},
        {"type": "object"},
        {"type": ["array", "null"]},
        {"required": ["a"]},
        {"minItems": 1},
        {"const": {"a": None}},
        {"const": None},
        to("x"),
        to("y"),
        HERE,
    ]
)


def _shapes(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        st.builds(lambda a, n: {"type": "object", "properties": {"a": a}, "required": ["a"][:n]}, inner, ONE),
        st.builds(lambda a, n: {"type": "object", "additionalProperties": a, "minProperties": n}, inner, ONE),
        st.builds(lambda a, n: {"type": "array", "items": a, "minItems": n}, inner, ONE),
        st.builds(lambda a, n: {"type": "array", "prefixItems": [a], "minItems": n}, inner, ONE),
        lists.map(lambda options: {"anyOf": options}),
        lists.map(lambda parts: {"allOf": parts}),
    )


ONE = st.integers(0, 1)
SHAPES = st.recursive(LEAVES, _shapes, max_leaves=4)
ROOTS = st.builds(lambda x, y, root: {"$defs": {"x": x, "y": y}, "allOf": [root]}, SHAPES, SHAPES, SHAPES)


def documents(depth: int) -> list[Any]:
    """All of nothing but null, one property `a` and lists of up to one item."""
    inner = documents(depth - 1) if depth else []
    return [None, {}, [], *({"a": each} for each in inner), *([each] for each in inner)]


DOCUMENTS = documents(6)


def matches(root: dict[str, Any], schema: Any, value: Any, patience: int = 9) -> bool:
    """Whether a document is valid; who is sent back and forth between references is not."""
    if schema is False or not patience:
        return False
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].split("/")[1:]:
            target = target[step]
        return matches(root, target, value, patience - 1)
    kind = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "null"
    if kind not in schema.get("type", [kind]) or schema.get("const", value) != value:
        return False
    if not all(matches(root, each, value, patience) for each in schema.get("allOf", [])):
        return False
    if "anyOf" in schema and not any(matches(root, each, value, patience) for each in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {}).get("a", schema.get("additionalProperties", {}))
        enough = "a" in value or ("a" not in schema.get("required", []) and not schema.get("minProperties"))
        return enough and all(matches(root, known, each) for each in value.values())
    if isinstance(value, list):
        known = (schema.get("prefixItems") or [schema.get("items", {})])[0]
        return len(value) >= schema.get("minItems", 0) and all(matches(root, known, each) for each in value)
    return True


@settings(max_examples=250)
@given(schema=ROOTS)
def test_what_is_refused_is_what_no_document_matches(schema: dict[str, Any]) -> None:
    schema = json.loads(json.dumps(schema))

    assert is_refused(schema) == (not any(matches(schema, schema, each) for each in DOCUMENTS))


@settings(max_examples=100)
@given(schema=ROOTS)
def test_what_is_left_out_changes_no_document(schema: dict[str, Any]) -> None:
    schema = json.loads(json.dumps(schema))
    valid = [each for each in DOCUMENTS if matches(schema, schema, each)]
    if valid:
        left = without_endless(schema, "field")

        assert [each for each in DOCUMENTS if matches(dict(left), left, each)] == valid


@pytest.mark.slow
def test_a_hostile_schema_is_looked_at_for_a_limited_time() -> None:
    doubling: dict[str, Any] = {
        f"d{i}": {"allOf": [{"anyOf": [to(f"d{i + 1}"), {"type": "null"}]}] * 2} for i in range(200)
    }

    assert not is_refused({"$defs": {**doubling, "d200": {"type": "object"}}, **to("d0")})
    assert not is_refused({"$defs": {f"d{i}": to(f"d{i + 1}") for i in range(5000)}, **to("d0")})
    assert not is_refused({"allOf": [{"anyOf": [{"title": f"{i}{j}"} for j in range(4)]} for i in range(40)]})
