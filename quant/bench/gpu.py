"""A CUDA GPU: its kernels against the GPU's own memory, and what starting them costs the host.

A product with one matrix takes a few microseconds there, less than the host needs to start it. So calls are
recorded into a CUDA graph and played back, timed by the GPU's clock; what a call costs the host is measured
beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

from quant.bench.arena import random_slot
from quant.bench.decode import HEAD_ROWS, HIDDEN, LIMIT, TOP_K, WIDTH, due
from quant.bench.timing import Case, Figure, take_turns
from quant.errors import ConfigError
from quant.formats.fp8 import FP8_32, FP8_ROW
from quant.formats.int4 import INT4_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.choice import choose
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cuda.slots import GpuSlotLayout
from quant.kernels.interface import Kernels, MoeCall, SlotLayout, Weight
from quant.packed import Format, PackedTensor

ARENA_BYTES = 2 << 30  # beyond the cache of any GPU
TURN_BYTES = 1 << 30  # that a case reads in one turn: a millisecond or less
ROW_COLUMNS, ROWS = 256, 100_000
PREFILL_TOKENS = (64, 512)
PREFILL_CALLS = 10
HOST_CALLS = 200
READ_TARGET, FLOPS_TARGET = 0.9, 0.7
DTYPES = {"": torch.float32, "_bf16": torch.bfloat16}


@dataclass(frozen=True)
class Gpu:
    """A GPU, its kernels, and memory there to measure with.

    Every case uses the same memory and overwrites what others laid there: its bytes are read all the same.
    """

    device: torch.device
    kernels: Kernels
    arena: torch.Tensor

    @classmethod
    def numbered(cls, index: int) -> Gpu:
        """Raises ConfigError where there is no such GPU, or no Triton."""
        if index >= torch.cuda.device_count():
            raise ConfigError(f"there is no CUDA GPU {index}; this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        arena = torch.zeros(ARENA_BYTES, dtype=torch.uint8, device=device)
        return cls(device, choose([device]).on(device), arena)

    def copies(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """As many copies of a tensor as the arena holds, each on a cache line of its own."""
        flat = weight.reshape(-1).view(torch.uint8).to(self.device)
        stride = -(-len(flat) // 256) * 256
        slots = self.arena[: len(self.arena) // stride * stride].view(-1, stride)[:, : len(flat)]
        slots.copy_(flat)
        return [slot.view(weight.dtype).view(weight.shape) for slot in slots]

    def matrices(self, weight: Weight) -> list[Weight]:
        """As many copies of a matrix as the arena holds; scales, which are few bytes, are shared."""
        if isinstance(weight, torch.Tensor):
            return list(self.copies(weight))
        moved = self.kernels.prepare(weight)
        assert isinstance(moved, PackedTensor)
        return [replace(moved, codes=codes) for codes in self.copies(weight.codes)]

    def randn(self, *shape: int) -> torch.Tensor:
        """Random float32 numbers on the GPU."""
        return torch.randn(*shape, device=self.device)

    def recorded(self, name: str, work: float, run: Callable[[], object]) -> Case:
        """A case whose calls are recorded once and played in each turn."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):  # compiles kernels, and lets libraries allocate
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()

        def play(_turn: int, kept: Callable[[], object] = run) -> None:
            """`kept` holds what the recorded kernels read: a graph knows addresses only."""
            graph.replay()

        return Case(name, work, play)

    def products(
        self, name: str, matrices: Sequence[Weight], nbytes: int, product: Callable[[Weight], object]
    ) -> Case:
        """One token times as many matrices as a turn reads."""
        chosen = due(matrices, max(1, min(len(matrices), TURN_BYTES // nbytes)), 0)
        return self.recorded(name, len(chosen) * nbytes, lambda: [product(matrix) for matrix in chosen])

    def seconds(self, run: Callable[[], object]) -> float:
        """How long the GPU takes for what `run` starts, by its own clock."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def measure_gpu(index: int, turns: int) -> Iterator[tuple[str, list[Figure]]]:
    """Figures by topic, as they are measured, of GPU number `index`.

    Takes ARENA_BYTES of the GPU's memory, and a gigabyte to copy. Raises ConfigError where there is none.
    """
    gpu = Gpu.numbered(index)
    with torch.inference_mode():
        yield f"one token, {gpu.kernels.describe()}", _decode(gpu, turns)
        yield "what a call costs the host", _calls(gpu)
        yield "many tokens", _prefill(gpu, max(1, turns // 5))
        yield "experts that arrive", _arrivals(gpu, turns)
        yield "Engram rows", _rows(gpu, turns)


def _decode(gpu: Gpu, turns: int) -> list[Figure]:
    """Products of one token against plain reads of the same GPU in the same turns."""
    cases = _reads(gpu)
    x = gpu.randn(1, HIDDEN)
    formats: list[tuple[str, Format, int]] = [
        ("fp4_gemv", MXFP4, WIDTH), ("nf4_gemv", NF4, WIDTH), ("int4_gemv", INT4_32, WIDTH),
        ("fp8_gemv", FP8_32, HIDDEN),
    ]  # fmt: skip
    for name, format_, rows in formats:
        packed = format_.encode(torch.randn(rows, HIDDEN) / HIDDEN**0.5)
        matrices = gpu.matrices(packed)
        cases.append(gpu.products(name, matrices, packed.nbytes, lambda m: gpu.kernels.linear(x, m)))
    cases += [
        _bitsandbytes(gpu, x),
        _head(gpu, "torch_bf16_gemv", x.bfloat16()),
        _head(gpu, "bf16_gemv", x),
    ]
    for tokens in (1, 4):
        cases.append(_experts(gpu, tokens))
    rates = take_turns(cases, turns, gpu.seconds)
    limit = max(("copy", "sum"), key=rates.median)
    figures = [Figure(f"gpu_{name}", rates.median(name) / 1e9, "GB/s") for name in ("copy", "sum")]
    for case in cases[2:]:
        target = READ_TARGET if case.name.startswith(("fp4", "fp8", "bf16")) else None
        figures += [
            Figure(f"gpu_{case.name}_rate", rates.median(case.name) / 1e9, "GB/s"),
            Figure(f"gpu_{case.name}_read_ratio", rates.ratio(case.name, limit), "ratio", target),
        ]
    ratio = rates.ratio("nf4_gemv", "bitsandbytes_nf4_gemv")
    return [*figures, Figure("gpu_nf4_gemv_vs_bitsandbytes", ratio, "ratio", 1.0)]


def _reads(gpu: Gpu) -> list[Case]:
    """Two ways to read: a copy, which writes as many bytes, and a sum, which writes none."""
    half = len(gpu.arena) // 2
    target, source = gpu.arena[:half], gpu.arena[half:]
    numbers = source.view(torch.float32)
    return [
        gpu.recorded("copy", 2 * half, lambda: target.copy_(source)),
        gpu.recorded("sum", half, lambda: numbers.sum()),
    ]


def _head(gpu: Gpu, name: str, x: torch.Tensor) -> Case:
    """Plain bfloat16 rows: by torch, which rounds the activations, or by our own kernel, which does not."""
    head = torch.randn(HEAD_ROWS, HIDDEN).bfloat16()
    return gpu.products(name, gpu.matrices(head), head.nbytes, lambda m: gpu.kernels.linear(x, m))


def _bitsandbytes(gpu: Gpu, x: torch.Tensor) -> Case:
    """Their product with an NF4 matrix, in bfloat16."""
    from bitsandbytes import functional as bnb  # takes seconds to import

    codes, state = bnb.quantize_nf4(gpu.randn(WIDTH, HIDDEN).bfloat16(), blocksize=NF4.tile_cols)
    half = x.bfloat16()
    nbytes = codes.nbytes + state.absmax.nbytes
    return gpu.products(
        "bitsandbytes_nf4_gemv",
        gpu.matrices(codes),
        nbytes,
        lambda m: bnb.gemv_4bit(half, m.t(), state=state),  # type: ignore[union-attr]
    )


def _slots(gpu: Gpu) -> tuple[GpuSlotLayout, list[torch.Tensor]]:
    """Random experts in the arena: their layout, and their slots."""
    layout = GpuSlotLayout(HIDDEN, WIDTH, MXFP4)
    return layout, gpu.copies(random_slot(layout))


def _experts(gpu: Gpu, tokens: int) -> Case:
    """A layer's routed experts; every token chooses others. As the store calls them, less the schedule."""
    from quant.kernels.cuda.moe import moe_launches, schedule

    layout, slots = _slots(gpu)
    experts = [layout.views(slot) for slot in slots]
    x = gpu.randn(tokens, HIDDEN)
    factors = torch.full((tokens, TOP_K), 1 / TOP_K, device=gpu.device)
    out = torch.empty(tokens * TOP_K, HIDDEN, device=gpu.device)
    used = tokens * TOP_K
    launches = []
    for first in range(0, len(experts) - used + 1, used):
        ids = torch.arange(first, first + used).view(tokens, TOP_K)
        call = MoeCall(x, ids, factors, experts, LIMIT)
        found = moe_launches(call, schedule(ids, x.dtype))
        launches.append((found.gate_up, found.down(out, 0, HIDDEN)))
    torch.cuda.synchronize()

    def run() -> None:
        for pair in launches:
            for launch in pair:
                gpu.kernels.launcher.start(launch)  # type: ignore[attr-defined]
            out.view(tokens, TOP_K, -1).sum(1)

    name = "fp4_moe" if tokens == 1 else f"moe_{tokens}_tokens"
    return gpu.recorded(name, len(launches) * used * layout.nbytes, run)


def _calls(gpu: Gpu) -> list[Figure]:
    """Microseconds of the host for a call that the GPU finishes sooner."""
    layout, slots = _slots(gpu)
    experts = [layout.views(slot) for slot in slots[:TOP_K]]
    small = gpu.kernels.prepare(MXFP4.encode(torch.randn(64, 256)))
    plain = gpu.randn(64, 256)
    x, wide = gpu.randn(1, 256), gpu.randn(1, HIDDEN)
    ids = torch.arange(TOP_K).unsqueeze(0)
    factors = torch.full((1, TOP_K), 1 / TOP_K, device=gpu.device)
    calls: dict[str, Callable[[], object]] = {
        "gpu_torch_linear_call": lambda: F.linear(x, plain),
        "gpu_fp4_linear_call": lambda: gpu.kernels.linear(x, small),
        "gpu_fp4_moe_call": lambda: gpu.kernels.moe(MoeCall(wide, ids, factors, experts, LIMIT)),
    }
    figures = []
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        figures.append(Figure(name, 1e6 * taken / HOST_CALLS, "us"))
    return figures


def _prefill(gpu: Gpu, turns: int) -> list[Figure]:
    """TFLOP/s of an FP4 product and of torch's own, in float32 and bfloat16."""
    stored = MXFP4.encode(torch.randn(WIDTH, HIDDEN) / HIDDEN**0.5)
    fp4, fp8 = (gpu.kernels.prepare(w) for w in (stored, FP8_32.encode(torch.randn(WIDTH, HIDDEN))))
    assert isinstance(fp4, PackedTensor)
    figures = []
    for tokens in PREFILL_TOKENS:
        work = 2.0 * tokens * WIDTH * HIDDEN
        cases = []
        for suffix, dtype in DTYPES.items():
            x = gpu.randn(tokens, HIDDEN).to(dtype)
            plain = fp4.decode(dtype)
            runs: dict[str, Callable[[], object]] = {
                f"fp4{suffix}": lambda x=x: gpu.kernels.linear(x, fp4),  # type: ignore[misc]
                f"fp8{suffix}": lambda x=x: gpu.kernels.linear(x, fp8),  # type: ignore[misc]
                f"torch{suffix}": lambda x=x, plain=plain: F.linear(x, plain),  # type: ignore[misc]
            }
            for name, run in runs.items():
                calls = partial(_repeated, run)
                cases.append(gpu.recorded(name, PREFILL_CALLS * work, calls))

            def dequantised(_turn: int, x: torch.Tensor = x, dtype: torch.dtype = dtype) -> torch.Tensor:
                return F.linear(x, fp4.decode(dtype))

            cases.append(Case(f"dequantised{suffix}", work, dequantised))
        rates = take_turns(cases, turns, gpu.seconds)
        prefix = f"gpu_prefill_{tokens}"
        figures += [
            Figure(f"{prefix}_{name}", rates.median(name) / 1e12, "TFLOP/s") for name in rates.per_turn
        ]
        for suffix in DTYPES:
            for other, target in (("torch", FLOPS_TARGET), ("dequantised", 1.0)):
                ratio = rates.ratio(f"fp4{suffix}", f"{other}{suffix}")
                figures.append(Figure(f"{prefix}_fp4_vs_{other}{suffix}", ratio, "ratio", target))
    return figures


def _repeated(run: Callable[[], object]) -> None:
    for _ in range(PREFILL_CALLS):
        run()


def _arrivals(gpu: Gpu, turns: int) -> list[Figure]:
    """An expert over the link from pinned memory, and rearranged on the GPU."""
    layout, slots = _slots(gpu)
    panels: SlotLayout = ExpertSlotLayout(HIDDEN, WIDTH, MXFP4)
    source = torch.zeros(panels.nbytes, dtype=torch.uint8).pin_memory()
    staging = torch.zeros(panels.nbytes, dtype=torch.uint8, device=gpu.device)
    cases = [
        Case("link", panels.nbytes, lambda _turn: staging.copy_(source, non_blocking=True)),
        Case("rearranged", panels.nbytes, lambda _turn: layout.from_panels(slots[0], staging)),
    ]
    rates = take_turns(cases, turns, gpu.seconds)
    return [
        Figure("gpu_link", rates.median("link") / 1e9, "GB/s"),
        Figure("gpu_expert_arrives", 1e3 * panels.nbytes / rates.median("link"), "ms"),
        Figure("gpu_expert_rearranged", 1e3 * panels.nbytes / rates.median("rearranged"), "ms"),
    ]


def _rows(gpu: Gpu, turns: int) -> list[Figure]:
    """Rows per second, of a table on the GPU and of one in pinned host memory."""
    count = 4_000_000
    codes = torch.full((count, ROW_COLUMNS), 0x38, dtype=torch.uint8)  # 1.0
    scales = torch.full((count, ROW_COLUMNS // FP8_ROW.tile_cols), 127, dtype=torch.uint8)
    pinned = PackedTensor(FP8_ROW, (count, ROW_COLUMNS), codes.pin_memory(), scales.pin_memory())
    on_gpu = gpu.kernels.prepare(pinned)
    assert isinstance(on_gpu, PackedTensor)
    wanted = torch.randint(0, count, (ROWS,), device=gpu.device)
    cases = [
        Case("in_vram", ROWS, lambda _turn: gpu.kernels.gather_rows(on_gpu, wanted)),
        Case("in_host_memory", ROWS, lambda _turn: gpu.kernels.gather_rows(pinned, wanted)),
    ]
    rates = take_turns(cases, turns, gpu.seconds)
    return [Figure(f"gpu_engram_rows_{name}", rates.median(name) / 1e6, "Mrows/s") for name in rates.per_turn]
