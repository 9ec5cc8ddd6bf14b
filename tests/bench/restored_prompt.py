"""A prompt whose state comes back from disk: the time to its first token beside that of reading the files.

python -m tests.bench.restored_prompt [MODEL] [--tokens 1900] [--rounds 5] [--json FILE]

Each round starts an engine anew. The system holds the files in memory by then, for both alike; the prompt has
one token more than what was saved, as the next turn of a conversation has.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch

from engine.cache.state_files import ENDING
from engine.cache.stored_states import StatesOnDisk
from engine.embedded import model_path
from engine.engine import Engine
from engine.families.loader import Loaded, load
from engine.output import Output
from engine.sampling.params import SamplingParams
from memory.hardware.detect import detect
from memory.hardware.this_machine import write_results
from quant.bench.timing import Figure
from server.cli.bench.figures import print_figures, results_of

MEMORY = 1 << 30


def first_token_s(loaded: Loaded, on_disk: StatesOnDisk, ids: list[int]) -> tuple[float, int]:
    """Seconds until an engine that has just started gives a prompt's first token; tokens restored for it."""
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=1,
        max_context=len(ids) + 8,
        prefix_cache_bytes=MEMORY,
        on_disk=on_disk,
    )
    engine.start()
    came, cached = threading.Event(), [0]

    def on_output(output: Output) -> None:
        if not came.is_set():
            cached[0] = output.cached_tokens or 0
            came.set()

    started = time.perf_counter()
    engine.submit(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), on_output)
    came.wait()
    took = time.perf_counter() - started
    engine.stop()
    return took, cached[0]


def read_s(folder: Path) -> float:
    """Seconds that reading all states' bytes takes."""
    started = time.perf_counter()
    for path in folder.glob(f"*/*{ENDING}"):
        path.read_bytes()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo", type=Path)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    loaded = load(model_path(asked.model))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, loaded.model.info.vocab_size, (asked.tokens + 1,), generator=generator).tolist()
    restored, reads = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_disk = StatesOnDisk(folder, 1 << 40, "bench", "bench")
        computed, cached = first_token_s(loaded, on_disk, ids[:-1])
        assert cached == 0
        nbytes = sum(path.stat().st_size for path in folder.glob(f"*/*{ENDING}"))
        for number in range(asked.rounds):
            took, cached = first_token_s(loaded, on_disk, [*ids[:-1], (ids[-1] + number) % 100])
            assert cached == asked.tokens
            restored.append(took)
            reads.append(read_s(folder))
    figures = [
        Figure(
            "restored_over_read",
            statistics.median(a / b for a, b in zip(restored, reads, strict=True)),
            "ratio",
        ),
        Figure("restored_s", statistics.median(restored), "s"),
        Figure("read_s", statistics.median(reads), "s"),
        Figure("computed_s", computed, "s"),
        Figure("state", nbytes / 1e6, "MB"),
    ]
    print_figures("a prompt from disk", figures)
    if asked.json is not None:
        write_results(asked.json, detect(), results_of(figures))


if __name__ == "__main__":
    main()
