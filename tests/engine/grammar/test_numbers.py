"""Numbers in schemas: an answer lies within its bounds to the last digit, or the schema is refused."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.grammar.constraint import GrammarCompiler
from engine.grammar.lark import GrammarWriter
from engine.grammar.numbers import FAREST, with_safe_numbers
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import RequestError
from tests.conftest import golden_path
from tests.engine.grammar.random_answers import random_answer

END = 1
EDGES = [sign * edge for edge in (2**53, 2**63, 2**64, 10**20) for sign in (1, -1)]
BOUNDS = st.one_of(
    st.builds(lambda edge, step: edge + step, st.sampled_from(EDGES), st.integers(-5, 5)),
    st.builds(lambda edge, step: float(edge + step), st.sampled_from(EDGES), st.integers(-5, 5)),
    st.integers(-(2**70), 2**70),
    st.integers(-10, 10),
    st.floats(-(2.0**53), 2.0**53),
    st.sampled_from([1e300, -1e300, 10**400]),
)
KEYWORDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(golden_path("v41-c"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, (END,), tokenizer.size)


def is_within(value: Fraction, bounds: dict[str, float]) -> bool:
    return (
        value >= Fraction(bounds.get("minimum", value))
        and value <= Fraction(bounds.get("maximum", value))
        and value > Fraction(bounds.get("exclusiveMinimum", value - 1))
        and value < Fraction(bounds.get("exclusiveMaximum", value + 1))
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    bounds=st.dictionaries(st.sampled_from(KEYWORDS), BOUNDS, min_size=1),
    kind=st.sampled_from(["integer", "number"]),
    splits=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_answer_lies_within_its_bounds_or_is_refused(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    bounds: dict[str, float],
    kind: str,
    splits: bool,
    seed: int,
) -> None:
    schema: dict[str, Any] = {"type": kind, **bounds}
    if splits:
        schema = {"allOf": [{"type": kind}, *({name: bound} for name, bound in bounds.items())]}
    writer = GrammarWriter({})
    try:
        grammar = writer.finished(writer.json(schema, "field"))
        answer = random_answer(compiler, tokenizer, grammar, seed)
    except RequestError as error:
        assert (error.param, error.code) == ("field", "invalid_grammar")  # noqa: PT017
    else:
        assert is_within(Fraction(answer), bounds), answer


@pytest.mark.parametrize(
    ("bounds", "safe"),
    [
        ({"minimum": 2**53 - 1, "exclusiveMaximum": 9}, {"minimum": 2**53 - 1, "exclusiveMaximum": 9}),
        ({"minimum": 9007199254740991.0}, {"minimum": 2**53 - 1}),
        ({"maximum": 0.30000000000000004, "minimum": 0.1}, {"maximum": 0.3, "minimum": 0.1}),
        ({"const": [9007199254740991.0]}, {"const": [2**53 - 1]}),
        ({"minimum": 2**53 + 2}, {"minimum": 2**53 + 2}),
        ({"minimum": 2**53 + 1}, {"minimum": 2**53 + 2}),
        ({"maximum": 2**53 + 3}, {"maximum": 2**53 + 2}),
        ({"exclusiveMaximum": 2**53 + 4}, {"maximum": 2**53 + 2}),
        ({"exclusiveMinimum": -(2**53) - 4}, {"minimum": -(2**53) - 2}),
        ({"maximum": 7, "exclusiveMaximum": 1e20}, {"maximum": 7}),
        ({"maximum": 2**63 - 1}, {"maximum": FAREST}),
        ({"minimum": -1e300}, {"minimum": -FAREST}),
        ({"minimum": 5, "exclusiveMinimum": True}, {"exclusiveMinimum": 5}),
    ],
)
def test_large_bounds_move_inwards(bounds: dict[str, Any], safe: dict[str, Any]) -> None:
    assert with_safe_numbers(bounds, "field") == safe
    assert with_safe_numbers({"items": {"anyOf": [bounds]}}, "field") == {"items": {"anyOf": [safe]}}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"const": 2**53 + 1}, "const has a number beyond"),
        ({"enum": ["a", [{"b": -1e20}]]}, "enum has a number beyond"),
        ({"properties": {"a": {"minimum": 1e20}}}, "minimum leaves only numbers beyond"),
        ({"exclusiveMaximum": -(2**64)}, "exclusiveMaximum leaves only numbers beyond"),
    ],
)
def test_numbers_that_cannot_be_enforced_are_refused_or_passed_over(
    schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason):
        with_safe_numbers(schema, "field")

    assert with_safe_numbers(schema, "field", lenient=True) in ({}, {"properties": {"a": {}}})


@pytest.mark.parametrize(
    ("schema", "is_taken"),
    [
        ({"multipleOf": 997}, True),
        ({"multipleOf": 2**32}, True),
        ({"multipleOf": 0.001}, True),
        ({"multipleOf": 1234567}, False),
        ({"multipleOf": 10**400 + 1}, False),
        ({"items": {"multipleOf": 12.34567}}, False),
        ({"properties": {"a": {"multipleOf": 10007}, "b": {"multipleOf": 10009}}}, True),
        ({"allOf": [{"multipleOf": 10007}, {"multipleOf": 10009}]}, False),
        ({"allOf": [{"multipleOf": 700}, {"multipleOf": 0.9}]}, True),
    ],
)
def test_multiples_that_would_take_minutes_are_refused(schema: dict[str, Any], is_taken: bool) -> None:
    if is_taken:
        GrammarWriter({}).json(schema, "field")
    else:
        with pytest.raises(RequestError, match="multipleOf is beyond") as caught:
            GrammarWriter({}).json(schema, "field")
        assert caught.value.code == "invalid_grammar"


def test_data_and_names_are_no_keywords() -> None:
    schema = {
        "properties": {"const": {"type": "integer"}, "minimum": {"type": "string"}},
        "default": {"minimum": 2**60 + 1},
        "const": {"maximum": 2**53},
    }

    assert with_safe_numbers(schema, "field") == schema
    assert json.dumps(with_safe_numbers(schema, "field")) == json.dumps(schema)
