"""kt-kernel's MXFP4 experts beside ours, one token, six experts of 5120x2304.

Its package asks for another torch, but its compiled part works beside any:

    pip install --no-deps --target KT kt-kernel==0.7.2
    PYTHONPATH=KT python -m tests.bench.kt_experts

Each has a pool of threads of its own that wait for work by spinning. So each runs in a process alone, in
turns, beside plain reads of its own. Compared are the microseconds of a call, and the bytes that it reads
a second in units of those reads.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from quant.bench.arena import Arena
from quant.bench.decode import HIDDEN, LIMIT, TOP_K, WIDTH, due, read_case
from quant.bench.timing import Case, take_turns
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.interface import MoeCall
from quant.packed import PackedTensor

EXPERTS = 18
TURNS, ROUNDS = 20, 3
SHAPES = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))


def stored() -> list[list[PackedTensor]]:
    """Copies, each at a place of its own, of a random expert's w1, w3 and w2."""
    torch.manual_seed(7)
    one = [MXFP4.encode(torch.randn(shape) / shape[1] ** 0.5) for shape in SHAPES]
    return [[replace(w, codes=w.codes.clone()) for w in one] for _ in range(EXPERTS)]


def ours(x: torch.Tensor, factors: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """The native kernels: a call for some experts, and the bytes it reads."""
    kernels = NativeKernels()
    layout = ExpertSlotLayout(HIDDEN, WIDTH)
    arena = torch.empty(EXPERTS * layout.nbytes, dtype=torch.uint8).view(EXPERTS, -1)
    experts = [layout.pack_into(slot, w1, w3, w2) for (w1, w3, w2), slot in zip(stored(), arena, strict=True)]
    return lambda ids: kernels.moe(MoeCall(x, ids, factors, experts, LIMIT)), TOP_K * layout.nbytes


def theirs(x: torch.Tensor, factors: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """kt-kernel: the same. It keeps scales as bfloat16 and takes activations as bfloat16."""
    from kt_kernel import kt_kernel_ext as kt  # type: ignore[import-not-found]

    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map = 1, [0]
    pool.subpool_thread_count = [torch.get_num_threads()]
    infer = kt.CPUInfer(pool)
    on_gpu = torch.zeros(EXPERTS, dtype=torch.bool)
    config = kt.moe.MOEConfig(EXPERTS, TOP_K, HIDDEN, WIDTH, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, infer.backend_, 16
    config.swiglu_limit = LIMIT
    config.quant_config.bits, config.quant_config.group_size = 4, MXFP4.tile_cols
    config.quant_config.zero_point = False
    experts = stored()
    scales = [[(w.scales.to(torch.int16) << 7).contiguous() for w in e] for e in experts]  # type: ignore[union-attr]
    for place, name in enumerate(("gate", "up", "down")):
        setattr(config, f"{name}_projs", [[e[place].codes.data_ptr() for e in experts]])
        setattr(config, f"{name}_scales", [[s[place].data_ptr() for s in scales]])
    moe = kt.moe.AMXFP4_KGroup_MOE(config)
    order = torch.arange(EXPERTS)
    infer.submit(moe.load_weights_task(order.data_ptr()))
    infer.sync()
    count, half = torch.tensor([1], dtype=torch.int32), x.bfloat16()
    out = torch.empty(1, HIDDEN, dtype=torch.bfloat16)
    operands = (factors, half, out, on_gpu)  # that live as long as the call

    def call(ids: torch.Tensor) -> torch.Tensor:
        addresses = [tensor.data_ptr() for tensor in operands[:3]]
        infer.submit(moe.forward_task(count.data_ptr(), TOP_K, ids.data_ptr(), *addresses, False))
        infer.sync()
        return out

    nbytes = sum(e.codes.nbytes + s.nbytes for e, s in zip(experts[0], scales[0], strict=True))
    return call, TOP_K * nbytes


SIDES = {"loci": ours, "kt-kernel": theirs}


def one_side(name: str) -> None:
    """Measure one of them in this process and print it as JSON."""
    torch.manual_seed(8)
    x, factors = torch.randn(1, HIDDEN), torch.full((1, TOP_K), 1 / TOP_K)
    call, nbytes = SIDES[name](x, factors)
    sets = [torch.arange(first, first + TOP_K).unsqueeze(0) for first in range(0, EXPERTS, TOP_K)]
    first = call(sets[0]).float().flatten()[:8].tolist()
    arena = Arena(256 << 20, NativeKernels())
    arena.bytes.fill_(1)
    cases = [
        read_case(arena, nbytes),
        Case("moe", nbytes, lambda turn: [call(i) for i in due(sets, 1, turn)]),
    ]
    rates = take_turns(cases, TURNS)
    us = 1e6 * nbytes / rates.median("moe")
    print(json.dumps({"us": us, "ratio": rates.ratio("moe", "read"), "first": first}))


def main() -> None:
    """Both in turns; prints the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(ROUNDS):
        for name, results in found.items():
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.kt_experts", name],
                check=True,
                capture_output=True,
                text=True,
            )
            results.append(
                json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
            )
    for name, results in found.items():
        us, ratio = (statistics.median(r[key] for r in results) for key in ("us", "ratio"))
        print(f"{name:10s} {us:7.0f} us a call, {ratio:.2f} of reads; results begin {results[0]['first']}")


if __name__ == "__main__":
    one_side(sys.argv[1]) if len(sys.argv) > 1 else main()
