"""Every format that files have, one token: `python -m tests.bench.formats [FORMAT ...]` prints a table.

Of each, with native kernels and as many threads as torch has: products with one matrix a call and six experts
a call, as shares of plain reads of as many bytes in the same run; the speed of products that stay in the
caches, which arithmetic alone decides; how fast one thread turns a file's bytes into panels. Where
llama-cpp-python is installed, also the time of llama.cpp's product of the same shape and type, rearranged
where it can, by ours. `loci` asks for huge pages; here THP_MEM_ALLOC_ENABLE=1 does. Some minutes for all.
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
from quant.bench.ggml import GgmlMissingError, GgmlProducts
from quant.bench.timing import Case, Neighbours, Rates, take_turns
from quant.formats.plain import PLAIN, Plain
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cpu.panels import NativeWeight, native_weight, tile
from quant.kernels.interface import ExpertWeights, Weight, matrix_shapes
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import GGUF, NATIVE, any_weight

ARENA_BYTES = 1 << 30
TURNS, TILINGS = 25, 15
COLUMNS = (
    "us a product", "of reads", "experts, of reads", "in caches GB/s", "to panels GB/s", "llama.cpp / ours",
    "reads GB/s",
)  # fmt: skip


def random_weight(format_: Format, rows: int, cols: int) -> PackedTensor:
    """In file layout."""
    if isinstance(format_, Plain):
        return format_.encode(torch.randn(rows, cols))
    found = any_weight(format_, rows, cols)
    assert isinstance(found, PackedTensor)
    return found


def prepared(packed: PackedTensor) -> NativeWeight:
    """As the kernels read it: in panels, or plain rows as they are."""
    native = native_weight(packed)
    assert native is not None
    return native if isinstance(packed.format, Plain) else tile(packed)


def tiling_rate(packed: PackedTensor) -> float:
    """Bytes of file layout that one thread turns into panels a second, at best."""
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
    count = TURN_BYTES // (WIDTH * HIDDEN // 2) * 4
    for rearranged in (True, False):
        try:
            return graphs_case(GgmlProducts(name, WIDTH, HIDDEN, count, rearranged))
        except (GgmlMissingError, KeyError):
            continue
    return None


def graphs_case(products: GgmlProducts) -> Case:
    each = max(1, TURN_BYTES // products.nbytes)
    graphs = products.graphs(each)
    return Case("llama.cpp", each, lambda turn: products.compute(graphs[turn % len(graphs)]))


def random_experts(arena: Arena, format_: Format) -> list[ExpertWeights]:
    layout = ExpertSlotLayout(HIDDEN, WIDTH, format_)
    slot = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for number, shape in enumerate(matrix_shapes(HIDDEN, WIDTH)):
        layout.pack_matrix(slot, number, random_weight(format_, *shape))
    return [layout.views(copy) for copy in arena.copies(slot)]


def against_llama(rates: Rates, nbytes: int) -> float:
    """How long llama.cpp takes for a product, in units of how long we do."""
    pairs = zip(rates.per_turn["product"], rates.per_turn["llama.cpp"], strict=True)
    return statistics.median(ours / nbytes / theirs for ours, theirs in pairs)


def measure(arena: Arena, kernels: NativeKernels, format_: Format) -> list[float | None]:
    """A figure for each column, None where there is none."""
    file = random_weight(format_, WIDTH, HIDDEN)
    weight, x = prepared(file), torch.randn(1, HIDDEN)
    matrices: list[Weight] = arena.matrices(weight)
    product = product_case("product", kernels, matrices, x)
    cases = [read_case(arena, int(product.work)), product]
    is_plain = isinstance(format_, Plain)  # 1024 rows are more than the caches hold, and there are no panels
    if not is_plain:
        cases.append(cached_case("cached", kernels, weight, x))
    other = ggml_case(format_.name.removesuffix("_gguf")) if format_ in GGUF else None
    if other is not None:
        cases.append(other)
    rates = take_turns(cases, TURNS)
    moe = moe_case("experts", kernels, random_experts(arena, format_), HIDDEN, TOP_K, 1)
    of_experts = take_turns([read_case(arena, int(moe.work)), moe], TURNS)
    return [
        1e6 * weight.nbytes / rates.median("product"),
        rates.ratio("product", "read"),
        of_experts.ratio("experts", "read"),
        None if is_plain else rates.median("cached") / 1e9,
        None if is_plain else tiling_rate(file) / 1e9,
        None if other is None else against_llama(rates, weight.nbytes),
        rates.median("read") / 1e9,
    ]


def two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    kernels = choose()
    assert isinstance(kernels, NativeKernels)
    formats = {format_.name: format_ for format_ in (*GGUF, *NATIVE, *PLAIN.values())}
    arena, neighbours = Arena(ARENA_BYTES, kernels), Neighbours()
    print(kernels.describe())
    print("| format |", " | ".join(COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for name in sys.argv[1:] or formats:
        shown = map(two_digits, measure(arena, kernels, formats[name]))
        print(f"| {name} |", " | ".join(shown), "|", flush=True)
    print(f"{neighbours.cores():.2f} cores busy elsewhere")


if __name__ == "__main__":
    main()
