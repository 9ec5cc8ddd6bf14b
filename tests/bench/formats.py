"""Every format that files have, one token: `python -m tests.bench.formats [FORMAT ...]`.

Of each, with native kernels and as many threads as torch has: products with one matrix a call and six experts a
call, as shares of plain reads of as many bytes in the same run; the speed of products that stay in the caches,
which arithmetic alone decides; how fast one thread rearranges a file's bytes into panels. Where llama-cpp-python
is installed, the time of llama.cpp's product of the same shape and type, rearranged where it can, by ours.
`loci` asks for huge pages; here THP_MEM_ALLOC_ENABLE=1 does. Two to five minutes for all.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from quant.bench.arena import Arena
from quant.bench.decode import (
    HIDDEN,
    TOP_K,
    TURN_BYTES,
    WIDTH,
    cached_case,
    moe_case,
    product_case,
    read_case,
)
from quant.bench.ggml import TYPES, GgmlMissingError, GgmlProducts
from quant.bench.timing import Case, Figure, Neighbours, take_turns
from quant.formats.plain import PLAIN, Plain
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cpu.panels import NativeWeight, native_weight, tile
from quant.kernels.interface import Weight, matrix_shapes
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import GGUF, NATIVE, any_weight

ARENA_BYTES = 1 << 30
TURNS, TILINGS = 25, 15


def random_weight(format_: Format, rows: int, cols: int) -> PackedTensor:
    """In file layout."""
    if isinstance(format_, Plain):
        return format_.encode(torch.randn(rows, cols))
    found = any_weight(format_, rows, cols)
    assert isinstance(found, PackedTensor)
    return found


def tiled(packed: PackedTensor) -> NativeWeight:
    """As the kernels read it: in panels, or plain rows as they are."""
    native = native_weight(packed)
    assert native is not None
    return native if isinstance(packed.format, Plain) else tile(packed)


def tiling_rate(packed: PackedTensor) -> float:
    """Bytes of file layout that one thread turns into panels a second, at best."""
    if isinstance(packed.format, Plain):
        return float("nan")
    out, source = tile(packed).codes, native_weight(packed)
    assert source is not None
    taken = []
    for _ in range(TILINGS):
        start = time.perf_counter()
        library.load().loci_tile(1, source.address, out.data_ptr())
        taken.append(time.perf_counter() - start)
    return packed.nbytes / min(taken)


def ggml_case(name: str) -> Case | None:
    """llama.cpp's products of the same shape; None where it has no such type, or is not installed."""
    if name not in TYPES:
        return None
    count = TURN_BYTES // (WIDTH * HIDDEN // 2) * 4
    for rearranged in (True, False):
        try:
            products = GgmlProducts(name, WIDTH, HIDDEN, count, rearranged)
        except GgmlMissingError:
            continue
        each = max(1, TURN_BYTES // products.nbytes)
        graphs = products.graphs(each)
        return Case("llama.cpp", each, lambda turn: products.compute(graphs[turn % len(graphs)]))
    return None


def measure(arena: Arena, kernels: NativeKernels, format_: Format) -> list[Figure]:
    file = random_weight(format_, WIDTH, HIDDEN)
    weight, x = tiled(file), torch.randn(1, HIDDEN)
    matrices: list[Weight] = arena.matrices(weight)
    product = product_case("product", kernels, matrices, x)
    cases = [read_case(arena, int(product.work)), product, cached_case("cached", kernels, weight, x)]
    if isinstance(format_, Plain):
        cases.pop()  # 1024 rows are more than the caches hold
    if (other := ggml_case(format_.name)) is not None:
        cases.append(other)
    rates = take_turns(cases, TURNS)
    figures = [
        Figure("read GB/s", rates.median("read") / 1e9, ""),
        Figure("one matrix / reads", rates.ratio("product", "read"), ""),
    ]
    layout = ExpertSlotLayout(HIDDEN, WIDTH, format_)
    slot = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.pack_into(slot, *(random_weight(format_, *shape) for shape in matrix_shapes(HIDDEN, WIDTH)))
    experts = [layout.views(copy) for copy in arena.copies(slot)]
    moe = moe_case("experts", kernels, experts, HIDDEN, TOP_K, 1)
    of_experts = take_turns([read_case(arena, int(moe.work)), moe], TURNS)
    figures.append(Figure("six experts / reads", of_experts.ratio("experts", "read"), ""))
    if not isinstance(format_, Plain):
        figures.append(Figure("in caches GB/s", rates.median("cached") / 1e9, ""))
        figures.append(Figure("to panels GB/s", tiling_rate(file) / 1e9, ""))
    if other is not None:
        per_turn = zip(rates.per_turn["product"], rates.per_turn["llama.cpp"], strict=True)
        figures.append(Figure("llama.cpp's time / ours", statistics.median(a / weight.nbytes / b for a, b in per_turn), ""))
        figures.append(Figure("llama.cpp us", 1e6 / rates.median("llama.cpp"), ""))
    figures.append(Figure("us", 1e6 * weight.nbytes / rates.median("product"), ""))
    return figures


def main() -> None:
    kernels = choose()
    assert isinstance(kernels, NativeKernels)
    formats = {format_.name: format_ for format_ in (*GGUF, *NATIVE, *PLAIN.values())}
    arena, neighbours = Arena(ARENA_BYTES, kernels), Neighbours()
    print(kernels.describe())
    for name in sys.argv[1:] or formats:
        figures = measure(arena, kernels, formats[name])
        print(f"{name:20}", "; ".join(f"{f.name} {f.value:.2f}" for f in figures), flush=True)
    print(f"{neighbours.cores():.2f} cores busy elsewhere")


if __name__ == "__main__":
    main()
