"""Measurements for the planner: bandwidth of DRAM, disk and links to GPUs.

Every figure is the median of several runs (for disks, whose caches would flatter a second one: of one
long run). Names are those that `memory/hardware/this_machine.py` looks for.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from memory.hardware.detect import available_memory_bytes
from memory.hardware.this_machine import Result
from memory.tiers import lock_pages, unlock_pages
from quant.errors import ConfigError, LociError
from quant.formats.fp8 import FP8_32, FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from quant.kernels.interface import ExpertWeights, MoeCall, Weight
from quant.packed import PackedTensor

RUNS = 5
ATTEMPTS = 4
DOUBT = 0.9  # all cores at less than this part of one core's rate are no noise but another program's work
BLOCK = 4096  # direct reads want offsets, lengths and addresses to be multiples of this
READ_DEPTHS = (1, 4, 16)
READ_BYTES = 8 << 20
RANDOM_DEPTHS = (1, 8, 32)
RANDOM_SECONDS = 0.5
ROW_COLUMNS = 256
# An expert of V4-Flash's size: 13.4 MB in MXFP4, so that a few dozen are beyond any cache.
EXPERT_HIDDEN, EXPERT_WIDTH, EXPERT_TOP_K = 4096, 2048, 6
PROMPT_TOKENS = 64
LINK_BYTES = 256 << 20


def measure_dram(nbytes: int) -> list[Result]:
    """Plain reads of `nbytes` with one thread and with all, and random Engram rows gathered from them."""
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)

    def rate(threads: int) -> Callable[[], float]:
        read = _reader(data, threads)
        return lambda: nbytes / _median_s(read) / 1e9

    alone, together = rates_of_one_and_all(rate(1), rate(torch.get_num_threads()))
    results = [Result("dram_read_1_thread", alone, "GB/s"), Result("dram_read", together, "GB/s")]
    rows = nbytes // (ROW_COLUMNS + ROW_COLUMNS // 32)
    codes = data[: rows * ROW_COLUMNS].view(rows, ROW_COLUMNS)
    scales = data[rows * ROW_COLUMNS :][: rows * ROW_COLUMNS // 32].view(rows, -1)
    table = PackedTensor(FP8_ROW, (rows, ROW_COLUMNS), codes, scales)
    chosen = torch.randint(0, rows, (100_000,))
    kernels = choose()
    seconds = _median_s(lambda: kernels.gather_rows(table, chosen))
    results.append(Result("dram_random_rows", len(chosen) / seconds, "rows/s"))
    return results


def rates_of_one_and_all(one: Callable[[], float], every: Callable[[], float]) -> tuple[float, float]:
    """What one core reaches and what all do, measured again while all seem slower than one.

    What else runs on the machine only slows them down, so the best counts. Raises LociError where all stay
    slower: such a figure would mislead every plan.
    """
    alone = together = 0.0
    for _ in range(ATTEMPTS):
        alone, together = max(alone, one()), max(together, every())
        if together >= alone:
            return alone, together
    if together < DOUBT * alone:
        raise LociError(
            f"all cores together read memory at {together:.3g} GB/s, but one core alone at {alone:.3g} "
            "GB/s: the machine is busy; measure again when it is idle"
        )
    return alone, alone  # all reach what one of them does


def measure_cpu(nbytes: int) -> list[Result]:
    """The kernels themselves: experts of about `nbytes` in all, one token, and many tokens at once."""
    kernels = choose()

    def as_stored(rows: int, cols: int) -> PackedTensor:
        codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8)
        scales = torch.randint(120, 130, (rows, cols // 32), dtype=torch.uint8)
        return PackedTensor(MXFP4, (rows, cols), codes, scales)

    def matrix(rows: int, cols: int) -> PackedTensor:
        ready: Weight = kernels.prepare(as_stored(rows, cols))
        assert isinstance(ready, PackedTensor)
        return ready

    each = 3 * MXFP4.bytes_for(EXPERT_WIDTH, EXPERT_HIDDEN)
    hidden, width = EXPERT_HIDDEN, EXPERT_WIDTH
    experts = [
        ExpertWeights(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))
        for _ in range(max(2 * EXPERT_TOP_K, nbytes // each))
    ]
    x, weights = torch.randn(1, hidden), torch.full((1, EXPERT_TOP_K), 1 / EXPERT_TOP_K)
    turn = iter(range(1 << 30))

    def one_token() -> None:
        first = next(turn) * EXPERT_TOP_K
        ids = torch.arange(first, first + EXPERT_TOP_K).remainder(len(experts)).unsqueeze(0)
        kernels.moe(MoeCall(x, ids, weights, experts, 10.0))

    layout = kernels.slot_layout(hidden, width, MXFP4)
    stored = as_stored(width, hidden), as_stored(width, hidden), as_stored(hidden, width)
    slots = [torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(4)]

    def rearrange() -> None:
        layout.pack_into(slots[next(turn) % len(slots)], *stored)

    prompt = torch.randn(PROMPT_TOKENS, hidden)
    dense = kernels.prepare(FP8_32.encode(torch.randn(width, hidden)))

    def flops_per_s(weight: Weight) -> float:
        seconds = _median_s(lambda: kernels.linear(prompt, weight))
        return 2 * PROMPT_TOKENS * hidden * width / seconds

    return [
        Result("cpu_experts", EXPERT_TOP_K * each / _median_s(one_token, 3 * RUNS) / 1e9, "GB/s"),
        Result("expert_rearranged_1_thread", each / _median_s(rearrange) / 1e9, "GB/s"),
        Result("cpu_matmul", flops_per_s(experts[0].w1) / 1e9, "GFLOP/s"),
        Result("cpu_matmul_fp8", flops_per_s(dense) / 1e9, "GFLOP/s"),
    ]


def measure_disk(directory: Path, nbytes: int) -> list[Result]:
    """Direct reads of a file of `nbytes` in `directory`, in sequence and at random, at several depths.

    Empty where the file system refuses direct reads. Raises ConfigError where nothing can be written.
    """
    nbytes = nbytes // READ_BYTES * READ_BYTES
    with _test_file(directory, nbytes) as file:
        try:
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            return []
        try:
            return _disk_results(descriptor, nbytes)
        except OSError:
            return []
        finally:
            os.close(descriptor)


def read_rates(file: Path, seconds: float) -> list[float]:
    """Bytes a second of direct reads of 8 MiB anywhere in `file`, for so long at each depth of READ_DEPTHS.

    Empty for a smaller file, and where the file system refuses direct reads. Raises ConfigError where the
    drive fails.
    """
    count = file.stat().st_size // READ_BYTES
    if count == 0:
        return []
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return []
    try:
        rates = []
        for depth in READ_DEPTHS:
            # Other places each time: what was read lately may come from a cache below the disk.
            places = np.random.default_rng().integers(0, count, size=100_000) * READ_BYTES
            done, taken = _read_all(descriptor, depth, READ_BYTES, iter(places.tolist()), seconds)
            rates.append(done * READ_BYTES / taken)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); is the drive still connected?") from None
    finally:
        os.close(descriptor)
    return rates


def _disk_results(descriptor: int, nbytes: int) -> list[Result]:
    results = []
    for depth in READ_DEPTHS:
        offsets = iter(range(0, nbytes, READ_BYTES))
        done, seconds = _read_all(descriptor, depth, READ_BYTES, offsets, 60.0)
        results.append(Result(f"disk_read_depth_{depth}", done * READ_BYTES / seconds / 1e9, "GB/s"))
    results.append(Result("disk_read", max(r.value for r in results), "GB/s"))
    random = np.random.default_rng(0)
    rates = []
    for depth in RANDOM_DEPTHS:
        places = random.integers(0, nbytes // BLOCK, size=2_000_000) * BLOCK
        done, seconds = _read_all(descriptor, depth, BLOCK, iter(places.tolist()), RANDOM_SECONDS)
        rates.append(Result(f"disk_random_reads_depth_{depth}", done / seconds, "reads/s"))
    return [*results, *rates, Result("disk_random_reads", max(r.value for r in rates), "reads/s")]


def _read_all(
    descriptor: int, depth: int, size: int, offsets: Iterator[int], most_seconds: float
) -> tuple[int, float]:
    """Read `size` bytes at each offset with `depth` threads: how many reads, and the time they took.

    Threads and buffers are there, and the buffers' pages, before the clock runs: readers keep theirs.
    """
    lock = threading.Lock()
    deadline = 0.0

    def set_deadline() -> None:
        nonlocal deadline
        deadline = time.perf_counter() + most_seconds

    ready = threading.Barrier(depth, set_deadline)

    def work() -> tuple[int, float]:
        done = 0
        with mmap.mmap(-1, size) as buffer:  # anonymous maps begin on pages
            np.frombuffer(buffer, np.uint8)[::BLOCK] = 0
            ready.wait()
            while time.perf_counter() < deadline:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    break
                if os.preadv(descriptor, [buffer], offset) != size:
                    raise OSError(f"short read at {offset}")
                done += 1
            return done, time.perf_counter()

    with ThreadPoolExecutor(depth) as pool:
        found = [future.result() for future in [pool.submit(work) for _ in range(depth)]]
    last = max(end for _, end in found)
    return sum(done for done, _ in found), last - (deadline - most_seconds)


@contextmanager
def _test_file(directory: Path, nbytes: int) -> Iterator[Path]:
    """A file of random bytes that is on the disk when this yields, and gone afterwards."""
    block = np.random.default_rng(0).bytes(READ_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".loci-bench-") as file:
            for _ in range(nbytes // READ_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name)
    except OSError as error:
        raise ConfigError(
            f"{directory}: cannot write a test file ({error}); name another directory"
        ) from None


def measure_gpus() -> list[Result]:
    """Each GPU: copies from pinned host memory alone and with all GPUs at once, its memory, arithmetic.

    What that took of their memory and of the host's is free again afterwards: plans count on it.
    """
    if not torch.cuda.is_available():
        return []
    try:
        with _pinned(torch.cuda.device_count()) as hosts:
            return _gpu_results(hosts)
    except RuntimeError as error:
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        raise
    finally:
        torch.cuda.empty_cache()


@contextmanager
def _pinned(count: int) -> Iterator[list[torch.Tensor]]:
    """Host memory for copies to each GPU inside the block. PyTorch would keep what it pins itself."""
    with ExitStack() as locked:
        hosts = [torch.empty(LINK_BYTES, dtype=torch.uint8) for _ in range(count)]
        for host in hosts:
            problem = lock_pages(host)
            if problem:
                raise RuntimeError(f"{LINK_BYTES >> 20} MiB of host memory cannot be page-locked ({problem})")
            locked.callback(unlock_pages, host)
        yield hosts


def _gpu_results(hosts: list[torch.Tensor]) -> list[Result]:
    gpus = range(len(hosts))
    targets = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{i}") for i in gpus]
    results = []
    for i in gpus:
        (seconds,) = _copies_s([hosts[i]], [targets[i]])
        results.append(Result(f"link_{i}", LINK_BYTES / seconds / 1e9, "GB/s"))
    for i, seconds in zip(gpus, _copies_s(hosts, targets), strict=True):
        results.append(Result(f"link_{i}_together", LINK_BYTES / seconds / 1e9, "GB/s"))
    for i in gpus:
        other = torch.empty_like(targets[i])
        (seconds,) = _copies_s([targets[i]], [other])
        results.append(Result(f"vram_{i}", 2 * LINK_BYTES / seconds / 1e9, "GB/s"))
        a = torch.randn(4096, 4096, device=f"cuda:{i}", dtype=torch.bfloat16)

        def multiply(a: torch.Tensor = a) -> None:
            torch.mm(a, a)
            torch.cuda.synchronize(a.device)

        results.append(Result(f"gpu_matmul_{i}", 2 * 4096**3 / _median_s(multiply) / 1e12, "TFLOP/s"))
    return results


def _copies_s(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> list[float]:
    """Median seconds of each copy while all of them run at once, by the GPUs' own clocks."""
    times: list[list[float]] = [[] for _ in targets]
    for _ in range(RUNS + 1):
        events = []
        for source, target in zip(sources, targets, strict=True):
            with torch.cuda.device(target.device):
                start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                start.record()
                target.copy_(source, non_blocking=True)
                stop.record()
                events.append((start, stop))
        for taken, (start, stop) in zip(times, events, strict=True):
            stop.synchronize()
            taken.append(start.elapsed_time(stop) / 1e3)
    return [statistics.median(taken[1:]) for taken in times]


def working_bytes() -> int:
    """How much memory a measurement may fill: beyond caches, yet little of what is free."""
    return min(1 << 30, available_memory_bytes() // 8) // BLOCK * BLOCK


def _reader(data: torch.Tensor, threads: int) -> Callable[[], object]:
    """A read of every byte of `data`, natively where the compiled kernels are there."""
    try:
        native = library.load()
    except library.LibraryMissingError:
        parts = np.array_split(data.numpy().view(np.int64), threads)
        pool = ThreadPoolExecutor(threads)
        return lambda: list(pool.map(np.bitwise_xor.reduce, parts))
    level = library.LEVELS.index(library.available_levels()[-1])
    streams = 4
    return lambda: native.loci_read(level, threads, data.data_ptr(), data.numel(), streams)


def _median_s(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median seconds of `work`, the first run not counted."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
