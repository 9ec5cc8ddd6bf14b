"""A prompt whose state comes back from disk: the time to its first token beside that of reading the files."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.cache.state_files import ENDING
from engine.cache.stored_states import StatesOnDisk
from engine.engine import Engine
from engine.families.loader import Loaded
from engine.output import Output
from engine.sampling.params import SamplingParams

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


@dataclass(frozen=True)
class Restored:
    """By round: seconds to the first token of a prompt whose state is on disk, and to read the files.

    computed_s  to compute that prompt; nbytes of its state on disk
    """

    restored_s: list[float]
    read_s: list[float]
    computed_s: float
    nbytes: int


def restore(loaded: Loaded, tokens: int, rounds: int) -> Restored:
    """Each round starts an engine anew. The system holds the files in memory by then, for both alike; the
    prompt has one token more than what was saved, as the next turn of a conversation has."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, loaded.model.info.vocab_size, (tokens + 1,), generator=generator).tolist()
    restored, reads = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_disk = StatesOnDisk(folder, 1 << 40, "bench", "bench")
        computed, cached = first_token_s(loaded, on_disk, ids[:-1])
        assert cached == 0
        nbytes = sum(path.stat().st_size for path in folder.glob(f"*/*{ENDING}"))
        for number in range(rounds):
            took, cached = first_token_s(loaded, on_disk, [*ids[:-1], (ids[-1] + number) % 100])
            assert cached == tokens
            restored.append(took)
            reads.append(read_s(folder))
    return Restored(restored, reads, computed, nbytes)
