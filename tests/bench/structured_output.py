"""What a grammar costs while serving: `python tests/bench/structured_output.py [MODEL] [--json FILE]`.

The engine generates the same number of tokens for 1 and for 8 sequences, free and bound to any text, to
letters, and to a list of JSON objects; nothing else differs. Default: the embedded SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.embedded import model_path
from engine.engine import Engine
from engine.families.loader import load
from engine.grammar.answer import content_grammar
from engine.grammar.lark import Grammar
from engine.output import Output
from engine.sampling.params import SamplingParams

TOKENS = 64
REPEATS = 5
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 3}, "price": {"type": "number"}},
    "required": ["name", "price"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any] | None] = {
    "free": None,
    "any text": {"regex": "(.|\n){4000,}"},
    "letters": {"regex": "[a-z ]{4000,}"},
    "objects": {"json": {"type": "array", "items": ITEM, "minItems": 500}},
}


def tokens_per_s(engine: Engine, grammar: Grammar | None, sequences: int) -> float:
    """Generated tokens per second, the prompts' computation included."""
    done = threading.Semaphore(0)

    def take(output: Output) -> None:
        assert output.error is None, output.error
        if output.finish_reason is not None:
            done.release()

    params = SamplingParams(
        max_tokens=TOKENS, temperature=1.0, seed=1, grammar=grammar, ignore_eos=grammar is None
    )
    began = time.perf_counter()
    for _ in range(sequences):
        engine.submit(engine.tokenizer.encode("Once upon a time"), params, take)
    for _ in range(sequences):
        done.acquire()
    return sequences * TOKENS / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path("smollm2"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    loaded = load(model_path(arguments.model))
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=8, max_context=512)
    engine.start()
    results = []
    for sequences in (1, 8):
        rates: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(REPEATS):  # in turns, so that what else the machine does meets all alike
            for form, wanted in FORMS.items():
                grammar = content_grammar({"structured_outputs": wanted}, {}) if wanted else None
                rates[form].append(tokens_per_s(engine, grammar, sequences))
        free = statistics.median(rates["free"])
        for form, several in rates.items():
            rate = statistics.median(several)
            results.append({"sequences": sequences, "form": form, "tokens_per_s": rate, "ratio": rate / free})
    engine.stop()
    table = Table("sequences", "form", "tokens/s", "of free")
    for r in results:
        table.add_row(str(r["sequences"]), str(r["form"]), f"{r['tokens_per_s']:.1f}", f"{r['ratio']:.3f}")
    Console().print(table)
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2))


if __name__ == "__main__":
    main()
