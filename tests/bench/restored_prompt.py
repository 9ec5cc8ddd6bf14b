"""A prompt whose state comes back from disk: the time to its first token beside that of reading the files.

python -m tests.bench.restored_prompt [MODEL] [--tokens 1900] [--rounds 5] [--json FILE]

Each round starts an engine anew. The system holds the files in memory by then, for both alike; the prompt has
one token more than what was saved, as the next turn of a conversation has.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from engine.bench.restored import restore
from engine.embedded import model_path
from engine.families.loader import load
from memory.hardware.detect import detect
from memory.hardware.this_machine import write_results
from quant.bench.timing import Figure
from server.cli.bench.figures import print_figures, results_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", type=Path)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    loaded = load(model_path(asked.model))
    run = restore(loaded, asked.tokens, asked.rounds)
    figures = [
        Figure(
            "restored_over_read",
            statistics.median(a / b for a, b in zip(run.restored_s, run.read_s, strict=True)),
            "ratio",
        ),
        Figure("restored_s", statistics.median(run.restored_s), "s"),
        Figure("read_s", statistics.median(run.read_s), "s"),
        Figure("computed_s", run.computed_s, "s"),
        Figure("state", run.nbytes / 1e6, "MB"),
    ]
    print_figures("a prompt from disk", figures)
    if asked.json is not None:
        write_results(asked.json, detect(), results_of(figures))


if __name__ == "__main__":
    main()
