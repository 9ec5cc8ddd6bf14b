"""Answers that are bound to a grammar match it, whatever the model would rather say."""

from __future__ import annotations

import json
import re
import threading
from typing import Any
from unittest import mock

import jsonschema_rs
import llguidance
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from engine.grammar.answer import content_grammar
from engine.grammar.constraint import MAX_COMPILING, GrammarCompiler
from engine.grammar.lark import Grammar, GrammarWriter
from engine.tokenizer.tokenizer import Tokenizer
from quant.errors import CapacityError, RequestError
from tests.conftest import golden_path
from tests.engine.grammar.random_answers import SCHEMAS, allowed_tokens, random_answer

END = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(golden_path("v41-c"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, (END,), tokenizer.size)


def outputs(**wanted: Any) -> Grammar:
    grammar = content_grammar({"structured_outputs": wanted}, {})
    assert grammar is not None
    return grammar


def by_schema(schema: dict[str, Any], **more: Any) -> Grammar:
    format_ = {"type": "json_schema", "json_schema": {"schema": schema, **more}}
    grammar = content_grammar({"response_format": format_}, {})
    assert grammar is not None
    return grammar


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_random_tokens_make_json_by_any_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    answer = random_answer(compiler, tokenizer, by_schema(schema), seed)

    assert jsonschema_rs.is_valid(schema, json.loads(answer)), answer


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_random_tokens_match_a_regular_expression(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    pattern = r"(a/b|[c-f]{2,5})-\d{4}\s?é\."

    assert re.fullmatch(pattern, random_answer(compiler, tokenizer, outputs(regex=pattern), seed))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), choices=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_random_tokens_make_one_of_the_choices(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int, choices: list[str]
) -> None:
    assert random_answer(compiler, tokenizer, outputs(choice=choices), seed) in choices


def test_random_tokens_follow_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = outputs(grammar='start: sum\nsum: NUMBER | "(" sum "+" sum ")"\nNUMBER: /[0-9]{1,3}/')

    answers = {random_answer(compiler, tokenizer, grammar, seed) for seed in range(20)}

    assert all(answer.count("(") == answer.count(")") == answer.count("+") for answer in answers)
    assert len(answers) > 5


def test_an_answer_ends_only_where_the_grammar_is_fulfilled(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.start(outputs(regex="ab?"))
    logits = torch.zeros(tokenizer.size)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")

    assert END not in allowed_tokens(constraint.mask(logits))
    constraint.advance(a)
    assert {END, b} <= set(allowed_tokens(constraint.mask(logits)))
    constraint.advance(b)
    assert allowed_tokens(constraint.mask(logits)) == [END]


def test_special_tokens_are_no_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    allowed = allowed_tokens(compiler.start(outputs(regex="(.|\n)*")).mask(torch.zeros(tokenizer.size)))

    assert set(allowed) & set(tokenizer.added_tokens.values()) == {END}


def test_logits_of_allowed_tokens_are_left_alone(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    logits = torch.randn(tokenizer.size)
    masked = compiler.start(outputs(regex="[a-z]+")).mask(logits)

    kept = allowed_tokens(masked)
    assert 0 < len(kept) < tokenizer.size
    assert torch.equal(masked[kept], logits[kept])


def test_ids_beyond_the_tokenizer_are_never_allowed(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, (END,), tokenizer.size + 77)

    allowed = allowed_tokens(compiler.start(outputs(regex="(.|\n)*")).mask(torch.zeros(tokenizer.size + 77)))

    assert max(allowed) < tokenizer.size


def test_answers_to_one_grammar_do_not_disturb_each_other(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    first, second = compiler.start(outputs(choice=["ab", "ac"])), compiler.start(outputs(choice=["ab", "ac"]))
    logits = torch.zeros(tokenizer.size)
    before = allowed_tokens(second.mask(logits))

    first.advance(tokenizer.encode("a")[0])

    assert allowed_tokens(first.mask(logits)) != before
    assert allowed_tokens(second.mask(logits)) == before


def test_a_grammar_is_compiled_once(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, (END,), tokenizer.size)
    with mock.patch.object(llguidance, "LLMatcher", wraps=llguidance.LLMatcher) as made:
        compiler.compile(outputs(regex="x+")).result()
        compiler.start(outputs(regex="x+"))
        compiler.start(outputs(regex="x+"))

    assert made.call_count == 1


def test_a_queue_of_grammars_is_bounded(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, (END,), tokenizer.size)
    gate = threading.Event()
    with mock.patch.object(compiler, "_matcher", side_effect=lambda grammar: gate.wait()):
        waiting = [compiler.compile(outputs(regex=f"x{i}")) for i in range(MAX_COMPILING)]
        with pytest.raises(CapacityError, match="try again later"):
            compiler.compile(outputs(regex="y"))
        gate.set()
        for each in waiting:
            each.result()

    compiler.compile(outputs(regex="y")).result()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ({"format": "password", "type": "string"}, "Unknown format"),
        ({"$ref": "#/$defs/gone"}, "does not exist"),
        ({"$ref": "https://example.org/schema"}, "does not fetch"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "Unsatisfiable"),
        (
            {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(9)]},
            "too large",
        ),
        ({"$ref": "#"}, "requires itself"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(
    compiler: GrammarCompiler, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        compiler.start(by_schema(schema))

    assert caught.value.param == "response_format.json_schema.schema"


def test_a_schema_that_is_not_strict_is_enforced_as_far_as_it_goes(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammar = by_schema(
        {"type": "array", "items": {"type": "null"}, "uniqueItems": True, "maxItems": 3}, strict=False
    )

    assert set(json.loads(random_answer(compiler, tokenizer, grammar, 3))) <= {None}


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
        {"type": "array", "minItems": 10**6, "maxItems": 10**9, "items": {"type": "string"}},
        {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
        {"type": "string", "pattern": ".*a.{2000}b.{2000}"},
        {"type": "integer", "multipleOf": 49_999, "minimum": 3},
        {"enum": [f"value {i}" for i in range(9000)]},
        json.loads('{"items":' * 100 + "{}" + "}" * 100),
    ],
    ids=["wide", "long", "nested repeats", "wildcards", "multiples", "many values", "deep"],
)
def test_a_hostile_schema_is_compiled_or_refused_but_not_for_ever(
    compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    error = compiler.compile(by_schema(schema)).exception(timeout=60)

    assert error is None or isinstance(error, RequestError)


def test_a_grammar_for_which_there_is_no_token_ends_with_an_error() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.add_special_tokens(["</s>"])
    compiler = GrammarCompiler(Tokenizer(backend, bos_token_id=None, add_bos=False), (END,), 2)

    constraint = compiler.start(outputs(regex="ab"))
    constraint.mask(torch.zeros(2))
    constraint.advance(0)
    with pytest.raises(RequestError, match="no token of the vocabulary matches"):
        constraint.mask(torch.zeros(2))
    with pytest.raises(RequestError, match="no token of the vocabulary matches"):
        compiler.start(outputs(regex="b"))


@pytest.mark.parametrize(
    ("schema", "advice"),
    [
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "may match several alternatives; write anyOf"),
        (
            {"$ref": "http://example.com/schema"},
            r"does not fetch resources; put it into the schema, under \$defs",
        ),
    ],
)
def test_advice_is_what_a_client_can_follow(
    compiler: GrammarCompiler, schema: dict[str, Any], advice: str
) -> None:
    with pytest.raises(RequestError, match=f"{advice}$"):
        compiler.start(by_schema(schema))


def test_a_model_without_end_token_cannot_be_bound(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        GrammarCompiler(tokenizer, (), tokenizer.size).start(outputs(regex="a"))


def test_text_before_a_tag_ends_with_the_first_one(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for added in ({}, tokenizer.added_tokens):
        writer = GrammarWriter(added)
        grammar = writer.finished(f"{writer.text_before('</think>')} {writer.plain('x')}")
        for seed in range(10):
            answer = random_answer(compiler, tokenizer, grammar, seed, ["</think>", "</th"])

            assert answer.count("</think>") == 1
            assert answer.endswith("</think>x")


SPACED: dict[str, dict[str, Any]] = {
    "metaspace": {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    "metaspace first": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first")])
    },
    "prepend": {
        "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    },
    "prepend alone": {"normalizer": normalizers.Prepend("▁")},
}


@pytest.mark.parametrize("parts", SPACED.values(), ids=SPACED)
@pytest.mark.parametrize("seed", range(3))
def test_a_tokenizer_that_puts_a_space_before_texts_puts_none_into_answers(
    parts: dict[str, Any], seed: int
) -> None:
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *'{}":,aqw', "▁{", '▁"', "{▁"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("▁", "{"), ("▁", '"'), ("{", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.add_special_tokens(["<unk>", "</s>"])
    spaced = Tokenizer(backend, bos_token_id=None, add_bos=False)
    schema = {"type": "object", "properties": {"q": {"enum": ["a", "w a"]}}, "required": ["q"]}
    grammar = by_schema(schema | {"additionalProperties": False})

    answer = random_answer(GrammarCompiler(spaced, (END,), spaced.size), spaced, grammar, seed)

    assert jsonschema_rs.is_valid(schema, json.loads(answer))
