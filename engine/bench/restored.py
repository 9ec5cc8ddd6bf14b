"""A prompt whose state comes back from disk: the time to its first token beside that of reading the files."""

from __future__ import annotations

import os
import statistics
import threading
import time
from pathlib import Path

import torch

from engine.cache.state_files import ENDING
from engine.cache.stored_states import StatesOnDisk, StoredStates
from engine.engine import Engine
from engine.families.base import Batch
from engine.families.loader import Loaded
from engine.output import Output
from engine.sampling.params import SamplingParams
from quant.bench.timing import Figure

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


def states(folder: Path) -> list[Path]:
    """The files of all states."""
    return sorted(folder.glob(f"*/*{ENDING}"))


def read_s(folder: Path) -> float:
    """Seconds that reading all states' bytes takes."""
    started = time.perf_counter()
    for path in states(folder):
        path.read_bytes()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Have the system forget what it holds of the files."""
    for path in states(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_up(loaded: Loaded, on_disk: StatesOnDisk, ids: list[int]) -> None:
    """Save a state of random numbers for a text."""
    cache = loaded.model.new_cache(1, len(ids) + 8)
    cache.pages.hold(0, len(ids))
    for ratio, view in cache.appended(0):
        _fill(view[: len(ids) // ratio])
    for view in cache.recent(0, len(ids)):
        _fill(view)
    cache.resume(0, len(ids), max(0, len(ids) - cache.margin))
    stored = StoredStates(cache, on_disk, 1 << 40)
    stored.save(0, ids, "", None)
    stored.close()


def _fill(view: torch.Tensor) -> None:
    if view.dtype.is_floating_point:
        view.copy_(torch.rand(view.shape) - 0.5)
    else:
        view.copy_(torch.randint(2, 100, view.shape))


def step_s(loaded: Loaded, count: int) -> float:
    """Seconds that a step takes for one token behind so many, once it has been done before."""
    cache = loaded.model.new_cache(1, count + 8)
    cache.pages.hold(0, count + 8)
    cache.resume(0, count, count)
    took = []
    for at in range(count, count + 4):
        started = time.perf_counter()
        loaded.model.forward(Batch.of([(0, at, [7])]), cache)
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:])


def measure(loaded: Loaded, folder: Path, tokens: int, rounds: int, *, made_up: bool = False) -> list[Figure]:
    """Figures of a state of so many tokens, whose files are put into `folder`, and are read from the disk."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, loaded.model.info.vocab_size, (tokens + 1,), generator=generator).tolist()
    on_disk = StatesOnDisk(folder, 1 << 40, "bench", "bench")
    computed = []
    if made_up:
        make_up(loaded, on_disk, ids[:-1])
    else:
        took, cached = first_token_s(loaded, on_disk, ids[:-1])
        assert cached == 0
        computed = [Figure("computed_s", took, "s")]
    saved = states(folder)
    nbytes = sum(path.stat().st_size for path in saved)
    restored, reads = [], []
    for number in range(rounds):
        forget(folder)
        took, cached = first_token_s(loaded, on_disk, [*ids[:-1], 2 + number])
        assert cached == tokens
        restored.append(took)
        for path in set(states(folder)) - set(saved):
            path.unlink()  # the turn's own
        forget(folder)
        reads.append(read_s(folder))
    ratios = [a / b for a, b in zip(restored, reads, strict=True)]
    step = step_s(loaded, tokens)
    beside = [a / (b + step) for a, b in zip(restored, reads, strict=True)]
    return [
        Figure("restored_over_read", statistics.median(ratios), "ratio", 1.3, at_most=True),
        Figure("restored_over_read_and_step", statistics.median(beside), "ratio"),
        Figure("restored_s", statistics.median(restored), "s"),
        Figure("read_s", statistics.median(reads), "s"),
        Figure("step_s", step, "s"),
        *computed,
        Figure("state", nbytes / 1e6, "MB"),
    ]
