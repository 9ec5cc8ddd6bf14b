"""One token: how close each kernel comes to plain reads of the same bytes, and others side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from quant.bench.arena import Arena
from quant.bench.ggml import TYPES, GgmlMissingError, GgmlProducts
from quant.bench.timing import Case, Figure, Rates, take_turns
from quant.formats.fp8 import FP8_32
from quant.formats.int4 import INT4_32
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panel_slots import ExpertSlotLayout
from quant.kernels.cpu.panels import tile
from quant.kernels.interface import ExpertWeights, MoeCall, Weight
from quant.packed import Format, PackedTensor

HIDDEN, WIDTH, TOP_K = 5120, 2304, 6  # of V4.1-Flash
SMALL_HIDDEN, SMALL_WIDTH = 4096, 2048  # of V4-Flash
DEMO_HIDDEN, DEMO_WIDTH, DEMO_EXPERTS, DEMO_TOP_K = 256, 128, 24, 2
LIMIT = 10.0
HEAD_ROWS = 12_928  # a tenth of the vocabulary
TURN_BYTES = 100 << 20  # that a case reads in one turn: some milliseconds
CACHED_ROWS = 1024  # of a matrix that stays in the caches: its products take as long as their arithmetic
# Beside int4pack, groups of 128 with scale and zero are 4.25 bits a weight, as MXFP4 has.
INT4PACK_GROUP = 128

T = TypeVar("T")


@dataclass(frozen=True)
class Both:
    """The native kernels with each kind of activations; `default` names the kind that serves."""

    modes: dict[str, NativeKernels]
    default: str

    def suffix(self, mode: str) -> str:
        """What a figure's name ends in: nothing for the kind that serves."""
        return "" if mode == self.default else f"_{mode}"


def due(items: Sequence[T], each: int, turn: int) -> list[T]:
    """The next `each` items, round and round."""
    return [items[(turn * each + i) % len(items)] for i in range(each)]


def read_case(arena: Arena, nbytes: int) -> Case:
    """A plain read of the same number of bytes, elsewhere in the arena in each turn."""
    parts = len(arena.bytes) // nbytes
    return Case("read", nbytes, lambda turn: arena.read(turn % parts * nbytes, nbytes))


def product_case(name: str, kernels: NativeKernels, matrices: Sequence[Weight], x: torch.Tensor) -> Case:
    """Products of one token with as many matrices as a turn reads."""
    nbytes = matrices[0].nbytes
    each = max(1, min(len(matrices), TURN_BYTES // nbytes))

    def run(turn: int) -> None:
        for matrix in due(matrices, each, turn):
            kernels.linear(x, matrix)

    return Case(name, each * nbytes, run)


def cached_case(name: str, kernels: NativeKernels, weight: PackedTensor, x: torch.Tensor) -> Case:
    """Products with the first rows of a matrix, again and again: as fast as arithmetic allows."""
    part = weight.rows(0, CACHED_ROWS)
    calls = TURN_BYTES // part.nbytes

    def run(_turn: int) -> None:
        for _ in range(calls):
            kernels.linear(x, part)

    return Case(name, calls * part.nbytes, run)


def moe_case(
    name: str, kernels: NativeKernels, experts: Sequence[ExpertWeights], hidden: int, top_k: int, calls: int
) -> Case:
    """A layer's routed experts for one token, other experts in each of `calls` calls a turn."""
    x, factors = torch.randn(1, hidden), torch.full((1, top_k), 1 / top_k)
    sets = len(experts) // top_k
    ids = [torch.arange(i * top_k, (i + 1) * top_k).unsqueeze(0) for i in range(sets)]
    nbytes = sum(matrix.nbytes for matrix in experts[0].matrices) * top_k

    def run(turn: int) -> None:
        for chosen in due(ids, calls, turn):
            kernels.moe(MoeCall(x, chosen, factors, experts, LIMIT))

    return Case(name, calls * nbytes, run)


def measure_decode(
    arena: Arena, both: Both, turns: int, target: float | None, target_others: float | None
) -> list[Figure]:
    """Ratios to plain reads. target: of FP4 and FP8; target_others: of NF4, INT4."""
    figures = _experts(arena, both, turns, "fp4", HIDDEN, WIDTH, target)
    figures += _experts(arena, both, turns, "fp4_4096x2048", SMALL_HIDDEN, SMALL_WIDTH, target)
    for name, format_ in (("nf4", NF4), ("int4", INT4_32)):
        figures += _products(arena, both, turns, name, format_, target_others)
    figures += _products(arena, Both({"exact": both.modes["exact"]}, "exact"), turns, "fp8", FP8_32, target)
    return figures + _head(arena, both.modes["exact"], turns) + _demo(arena, both, turns)


def _against_read(rates: Rates, case: str, name: str, target: float | None) -> list[Figure]:
    return [
        Figure(f"{name}_rate", rates.median(case) / 1e9, "GB/s"),
        Figure(f"{name}_read_ratio", rates.ratio(case, "read"), "ratio", target),
    ]


def _experts(
    arena: Arena, both: Both, turns: int, name: str, hidden: int, width: int, target: float | None
) -> list[Figure]:
    """GEMV and fused experts in MXFP4."""
    experts = arena.experts(ExpertSlotLayout(hidden, width, MXFP4))
    gates = [expert.w1 for expert in experts]
    x = torch.randn(1, hidden)
    cases, cached = [], []
    for mode, kernels in both.modes.items():
        cases.append(product_case(f"gemv {mode}", kernels, gates, x))
        cases.append(moe_case(f"moe {mode}", kernels, experts, hidden, TOP_K, 1))
        cached.append(cached_case(f"cached {mode}", kernels, gates[0], x))
    rates = take_turns([read_case(arena, int(cases[1].work)), *cases, *cached], turns)
    figures = [Figure(f"{name}_read_rate", rates.median("read") / 1e9, "GB/s")]
    for kind in ("gemv", "moe"):
        for mode in both.modes:
            promised = target if mode == both.default else None
            figures += _renamed(rates, f"{kind} {mode}", f"{name}_{kind}", both.suffix(mode), promised)
    return figures + [_cached(rates, f"cached {m}", f"{name}_gemv", both.suffix(m)) for m in both.modes]


def _renamed(rates: Rates, case: str, name: str, suffix: str, target: float | None) -> list[Figure]:
    return [
        Figure(f.name + suffix, f.value, f.unit, f.target) for f in _against_read(rates, case, name, target)
    ]


def _products(
    arena: Arena, both: Both, turns: int, name: str, format_: Format, target: float | None
) -> list[Figure]:
    """GEMV in a format, with each kind of activations, beyond caches and within them."""
    rows = HIDDEN if format_ is FP8_32 else WIDTH
    packed = tile(format_.encode(torch.randn(rows, HIDDEN)))
    matrices, x = arena.matrices(packed), torch.randn(1, HIDDEN)
    cases = [product_case(mode, kernels, matrices, x) for mode, kernels in both.modes.items()]
    cached = [cached_case(f"{mode} cached", kernels, packed, x) for mode, kernels in both.modes.items()]
    rates = take_turns([read_case(arena, int(cases[0].work)), *cases, *cached], turns)
    figures = []
    for mode in both.modes:
        promised, suffix = (target if mode == both.default else None), both.suffix(mode)
        figures += _renamed(rates, mode, f"{name}_gemv", suffix, promised)
        figures.append(_cached(rates, f"{mode} cached", f"{name}_gemv", suffix))
    return figures


def _cached(rates: Rates, case: str, name: str, suffix: str) -> Figure:
    return Figure(f"{name}_cached_rate{suffix}", rates.median(case) / 1e9, "GB/s")


def _head(arena: Arena, kernels: NativeKernels, turns: int) -> list[Figure]:
    """Plain bf16 rows: a tenth of the vocabulary's head."""
    head = torch.randn(HEAD_ROWS, HIDDEN).bfloat16()
    product = product_case("head", kernels, arena.matrices(head), torch.randn(1, HIDDEN))
    rates = take_turns([read_case(arena, int(product.work)), product], turns)
    return _against_read(rates, "head", "bf16_head_gemv", None)


def _demo(arena: Arena, both: Both, turns: int) -> list[Figure]:
    """The demonstration model's experts, which fit into caches: the call itself is what costs."""
    experts = arena.experts(ExpertSlotLayout(DEMO_HIDDEN, DEMO_WIDTH, MXFP4), DEMO_EXPERTS)
    calls = 200
    cases = [
        moe_case(mode, kernels, experts, DEMO_HIDDEN, DEMO_TOP_K, calls)
        for mode, kernels in both.modes.items()
    ]
    rates = take_turns([read_case(arena, int(cases[0].work)), *cases], turns)
    return [
        Figure(
            f"fp4_moe_demo_call{both.suffix(mode)}", 1e6 * cases[0].work / calls / rates.median(mode), "us"
        )
        for mode in both.modes
    ]


def measure_others(arena: Arena, both: Both, turns: int) -> list[Figure]:
    """GEMV of the same shape and of as many bits, here and in torch and llama.cpp, which is left out where
    its package is not installed. Ratios above 1: we are faster, a product for a product."""
    x = torch.randn(1, HIDDEN)
    half = Arena(len(arena.bytes) // 2, both.modes["exact"])
    products: dict[str, Sequence[Weight]] = {}
    for place, (name, format_) in enumerate((("fp4", MXFP4), ("int4", INT4_32))):
        packed = both.modes["exact"].prepare(format_.encode(torch.randn(WIDTH, HIDDEN)))
        products[name] = (half if place else arena).matrices(packed)
    each = 16
    cases = [
        Case(f"{name} {mode}", each, _products_of(kernels.linear, x, matrices, each))
        for name, matrices in products.items()
        for mode, kernels in both.modes.items()
    ]
    cases.append(Case("int4pack", each, _int4pack(len(half.bytes), each)))
    cases.append(Case("bitsandbytes", 1, _bitsandbytes()))
    opened, llama = [], []
    try:
        for type_ in TYPES:
            for rearranged in (False, True):
                ggml = GgmlProducts(type_, WIDTH, HIDDEN, 4 * each, rearranged)
                opened.append(ggml)
                llama.append(Case(f"{type_} {rearranged}", each, _ggml(ggml, each)))
    except GgmlMissingError:
        pass
    rates = take_turns([*cases, *llama], turns)
    for ggml in opened:
        ggml.close()
    return _side_by_side(rates, both, [case.name for case in llama])


def _side_by_side(rates: Rates, both: Both, llama: Sequence[str]) -> list[Figure]:
    us = {name: 1e6 / rates.median(name) for name in rates.per_turn}
    figures = [
        Figure("int4pack_gemv", us["int4pack"], "us"),
        Figure("bitsandbytes_nf4_gemv", us["bitsandbytes"], "us"),
    ]
    for mode in both.modes:
        promised = 1.0 if mode == both.default else None
        suffix = both.suffix(mode)
        figures += [
            Figure(f"fp4_gemv{suffix}", us[f"fp4 {mode}"], "us"),
            Figure(f"int4_gemv{suffix}", us[f"int4 {mode}"], "us"),
            Figure(
                f"fp4_gemv_vs_int4pack{suffix}", rates.ratio(f"fp4 {mode}", "int4pack"), "ratio", promised
            ),
        ]
        for ours, type_ in (("fp4", "mxfp4"), ("int4", "q4_0")):
            theirs = [name for name in llama if name.startswith(type_)]
            if not theirs:
                continue
            fastest = min(theirs, key=us.__getitem__)
            ratio = rates.ratio(f"{ours} {mode}", fastest)
            figures.append(Figure(f"{ours}_gemv_vs_llama_{type_}{suffix}", ratio, "ratio", promised))
    for name in llama:
        type_, rearranged = name.split()
        suffix = "_rearranged" if rearranged == "True" else ""
        figures.append(Figure(f"llama_{type_}_gemv{suffix}", us[name], "us"))
    return figures


def _products_of(
    linear: Callable[[torch.Tensor, Weight], object], x: torch.Tensor, matrices: Sequence[Weight], each: int
) -> Callable[[int], None]:
    def run(turn: int) -> None:
        for matrix in due(matrices, each, turn):
            linear(x, matrix)

    return run


def _int4pack(nbytes: int, each: int) -> Callable[[int], None]:
    """torch's own product with four-bit weights, bfloat16 activations."""
    codes = torch.randint(0, 16, (WIDTH, HIDDEN), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.ones(HIDDEN // INT4PACK_GROUP, WIDTH, 2, dtype=torch.bfloat16)
    matrices = [(packed.clone(), scales.clone()) for _ in range(nbytes // (packed.nbytes + scales.nbytes))]
    x = torch.randn(1, HIDDEN).bfloat16()

    def run(turn: int) -> None:
        for weight, scale in due(matrices, each, turn):
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, INT4PACK_GROUP, scale)

    return run


def _bitsandbytes() -> Callable[[int], None]:
    """bitsandbytes' product with an NF4 matrix on the CPU, bfloat16 activations."""
    import bitsandbytes  # takes seconds to import

    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(WIDTH, HIDDEN).bfloat16(), blocksize=NF4.tile_cols, quant_type="nf4"
    )
    x = torch.randn(1, HIDDEN).bfloat16()

    def run(_turn: int) -> None:
        bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)  # type: ignore[attr-defined]

    return run


def _ggml(ggml: GgmlProducts, each: int) -> Callable[[int], None]:
    graphs = ggml.graphs(each)
    return lambda turn: ggml.compute(graphs[turn % len(graphs)])
