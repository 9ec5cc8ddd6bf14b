"""A prompt whose state comes back from disk: the time to its first token beside that of reading the files.

python -m tests.bench.restored_prompt [MODEL] [--tokens 1900] [--rounds 5] [--made-up] [--json FILE]

Each round starts an engine anew. The prompt has one token more than what was saved, as the next turn of a
conversation has; the step that computes it is measured by itself as well. With --made-up, the state is random
numbers of the right layout instead of a prompt's: a long conversation with a large model takes hours to
compute here. The system is told to forget the files before each measurement.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from engine.bench.restored import measure
from engine.embedded import model_path
from engine.families.loader import load
from memory.hardware.detect import detect
from memory.hardware.this_machine import write_results
from server.cli.bench.figures import print_figures, results_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", type=Path)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--made-up", action="store_true")
    parser.add_argument("--scratch", type=Path, help="where the files are put for the run")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    loaded = load(model_path(asked.model))
    with tempfile.TemporaryDirectory(dir=asked.scratch) as name:
        figures = measure(loaded, Path(name), asked.tokens, asked.rounds, made_up=asked.made_up)
    print_figures("a prompt from disk", figures)
    if asked.json is not None:
        write_results(asked.json, detect(), results_of(figures))


if __name__ == "__main__":
    main()
