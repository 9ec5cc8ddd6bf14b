"""A long prompt whose late layers compute only what its end looks back on, and all of it, in turns.

python -m tests.bench.exact_tail [MODEL] [--tokens 1900] [--chunk 512] [--rounds 5] [--json FILE]

The bound counts rows of layers, as if all layers cost the same and nothing else did.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from engine.bench.prefill import tail_bound, tail_pairs
from engine.embedded import model_path
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import load
from memory.hardware.detect import detect
from memory.hardware.this_machine import write_results
from quant.bench.timing import Figure
from server.cli.bench.figures import print_figures, results_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", type=Path)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = load(model_path(asked.model)).model
    assert isinstance(model, DeepseekV41)
    pairs = tail_pairs(model, asked.tokens, asked.chunk, asked.rounds)
    figures = [
        Figure("exact_tail_gain", statistics.median(a / b for a, b in pairs), "ratio"),
        Figure("exact_tail_bound", tail_bound(model, asked.tokens), "ratio"),
        Figure("whole", statistics.median(a for a, _ in pairs), "s"),
        Figure("tail", statistics.median(b for _, b in pairs), "s"),
    ]
    print_figures("a prompt's end", figures)
    if asked.json is not None:
        write_results(asked.json, detect(), results_of(figures))


if __name__ == "__main__":
    main()
