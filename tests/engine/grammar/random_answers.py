"""Answers of a model that knows nothing: any token that a constraint allows, with some wish to end."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from engine.grammar.constraint import GrammarCompiler
from engine.grammar.lark import Grammar
from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 2000


def random_answer(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    grammar: Grammar,
    seed: int,
    closers: Sequence[str] = ('"',),
) -> str:
    """Text up to a token that ends the answer; `closers` are now and then begun, so that texts end."""
    dice, constraint, text = random.Random(seed), compiler.start(grammar), Detokenizer(tokenizer)
    spelled = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
    answer, wanted = "", b""
    for _ in range(MAX_TOKENS):
        allowed = allowed_tokens(constraint.mask(torch.zeros(tokenizer.size)))
        if 1 in allowed and dice.random() < 0.5:
            return answer + text.finish().text
        if not wanted and dice.random() < 0.3:
            wanted = dice.choice(closers).encode()
        fitting = [i for i in allowed if wanted and i != 1 and wanted.startswith(spelled[i])]
        token = max(fitting, key=lambda i: len(spelled[i])) if fitting else dice.choice(allowed)
        if token == 1:
            return answer + text.finish().text
        wanted = wanted[len(spelled[token]) :] if fitting else b""
        constraint.advance(token)
        answer += text.push(token).text
    raise AssertionError(f"no end within {MAX_TOKENS} tokens: {answer[:200]!r}")


def allowed_tokens(masked: torch.Tensor) -> list[int]:
    """The tokens whose logits are finite."""
    return masked.isfinite().nonzero().flatten().tolist()


def _object(properties: dict[str, object], optional: set[str]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


_NAMES = st.text('abcé _"\\/<', min_size=1, max_size=6)
_PATTERNS = st.sampled_from(["^[a-f]{1,8}$", "^\\d\\d:\\d\\d$", "^(yes|no)$"])
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.text(max_size=9))
_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}]),
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=2).map(
        lambda ends: {"type": "integer", "minimum": min(ends), "maximum": max(ends)}
    ),
    st.integers(0, 12).map(lambda n: {"type": "string", "maxLength": n}),
    _PATTERNS.map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
    st.lists(_VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.text('aé"\\\n', max_size=5).map(lambda value: {"const": value}),
)


def _array(items: object, most: int) -> dict[str, object]:
    return {"type": "array", "items": items, "maxItems": most}


# Schemas whose texts are short, so that random ones come to an end.
SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(_NAMES, inner, max_size=4), st.sets(_NAMES, max_size=2)),
        st.builds(_array, inner, st.integers(0, 3)),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)
