"""llguidance against xgrammar: `python tests/bench/grammar_libraries.py [--json FILE]`.

Typical grammars are compiled, and the documents beside them walked token by token; a mask is computed
before each token, as while serving. xgrammar is measured where it can be imported; it is no dependency.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llguidance
from rich.console import Console
from rich.table import Table

from engine.embedded import model_path
from engine.grammar.constraint import vocabulary_of
from engine.tokenizer.synthetic import EOS, synthetic_tokenizer
from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.gguf_files import open_gguf

ROOT = Path(__file__).parents[2]
REPEATS = 3

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z.]+@[a-z.]+$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
WIDE = {
    "type": "object",
    "properties": {
        f"field_{i}": {"type": "string", "maxLength": 40} if i % 2 else {"type": ["integer", "null"]}
        for i in range(60)
    },
    "required": [f"field_{i}" for i in range(60)],
    "additionalProperties": False,
}


def _tree(depth: int) -> dict[str, Any]:
    return {"value": depth + 0.5, "children": [_tree(depth - 1) for _ in range(2)] if depth else []}


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "any object": (
        {"type": "object"},
        {"a": [1, 2.5, "three", None, {"b": True}], "c": "some longer text " * 8},
    ),
    "person": (
        PERSON,
        {"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "tags": ["red", "blue"]},
    ),
    "tree": (TREE, _tree(3)),
    "60 fields": (WIDE, {f"field_{i}": f"text {i}" if i % 2 else i for i in range(60)}),
}


def vocabularies() -> dict[str, tuple[Tokenizer, int]]:
    """Tokenizers by name, each with its end-of-sequence token."""
    tiny = Tokenizer.from_directory(ROOT / "tests" / "golden" / "v41-c")
    smollm = Tokenizer.from_gguf(open_gguf(model_path(Path("smollm2"))))
    assert smollm.eos_token_id is not None
    large = Tokenizer(synthetic_tokenizer(129280), bos_token_id=0, add_bos=True)
    return {
        "tiny, 1k": (tiny, 1),
        "SmolLM2, 49k": (smollm, smollm.eos_token_id),
        "V4.1's size, 129k": (large, EOS),
    }


def measure_llguidance(tokenizer: Tokenizer, eos: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds to take in the vocabulary, and a row per case."""
    began = time.perf_counter()
    vocabulary = vocabulary_of(tokenizer, (eos,))
    setup_s = time.perf_counter() - began

    def compile_(schema: dict[str, Any]) -> Any:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def step(matcher: Any, token: int) -> None:
        matcher.compute_bitmask()
        assert matcher.consume_token(token)

    return setup_s, [_row(name, tokenizer, compile_, lambda m: m.deep_copy(), step) for name in CASES]


def measure_xgrammar(tokenizer: Tokenizer, eos: int) -> tuple[float, list[dict[str, Any]]]:
    """The same for xgrammar."""
    import xgrammar

    began = time.perf_counter()
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
    info = xgrammar.TokenizerInfo(tokens, stop_token_ids=[eos])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    setup_s = time.perf_counter() - began
    bitmask = xgrammar.allocate_token_bitmask(1, tokenizer.size)

    def compile_(schema: dict[str, Any]) -> Any:
        compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)
        return xgrammar.GrammarMatcher(compiled), compiled

    def step(pair: Any, token: int) -> None:
        pair[0].fill_next_token_bitmask(bitmask)
        assert pair[0].accept_token(token)

    def copy(pair: Any) -> Any:
        return xgrammar.GrammarMatcher(pair[1]), pair[1]

    return setup_s, [_row(name, tokenizer, compile_, copy, step) for name in CASES]


def _row(
    name: str,
    tokenizer: Tokenizer,
    compile_: Callable[[dict[str, Any]], Any],
    copy: Callable[[Any], Any],
    step: Callable[[Any, int], None],
) -> dict[str, Any]:
    schema, document = CASES[name]
    tokens = tokenizer.encode(json.dumps(document, separators=(",", ":")), parse_special=False)
    compile_s, copy_s, first_s = [], [], []
    steps_s: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        prototype = compile_(schema)
        compile_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        matcher = copy(prototype)
        copy_s.append(time.perf_counter() - began)
        laps = []
        for token in tokens:
            began = time.perf_counter()
            step(matcher, token)
            laps.append(time.perf_counter() - began)
        first_s.append(laps[0])
        steps_s += laps
    return {
        "case": name,
        "tokens": len(tokens),
        "compile_ms": 1e3 * statistics.median(compile_s),
        "copy_us": 1e6 * statistics.median(copy_s),
        "first_step_us": 1e6 * statistics.median(first_s),
        "mean_step_us": 1e6 * statistics.mean(steps_s),
        "p99_step_us": 1e6 * sorted(steps_s)[int(0.99 * len(steps_s))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    libraries = {"llguidance": measure_llguidance}
    try:
        import xgrammar  # noqa: F401
    except ImportError:
        Console(stderr=True).print("xgrammar cannot be imported; llguidance alone is measured")
    else:
        libraries["xgrammar"] = measure_xgrammar
    results = []
    for vocabulary, (tokenizer, eos) in vocabularies().items():
        for library, measure in libraries.items():
            setup_s, rows = measure(tokenizer, eos)
            results += [
                {"vocabulary": vocabulary, "library": library, "setup_s": setup_s, **row} for row in rows
            ]
    table = Table("vocabulary", "library", "set up, s", "case", "tokens", "compile, ms", "copy, us")
    for column in ("first step, us", "mean step, us", "p99 step, us"):
        table.add_column(column)
    for r in results:
        figures = (r["compile_ms"], r["copy_us"], r["first_step_us"], r["mean_step_us"], r["p99_step_us"])
        name = (r["vocabulary"], r["library"], f"{r['setup_s']:.2f}", r["case"], str(r["tokens"]))
        table.add_row(*name, *(f"{figure:.1f}" for figure in figures))
    Console(width=160).print(table)
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
