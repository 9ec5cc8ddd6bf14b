"""Machines that others have measured, and what the planner says of them.

Each row's inputs are what was published with the figure. A row whose inputs are not all known, or which the
model misses, says so in `why`. Print the table with: python -m tests.memory.planner.published_machines
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from engine.families.released import released_shape
from memory.hardware.profiles import GIB, GpuSpec, HardwareProfile
from memory.planner.cost_model import CostModel, Efficiency
from memory.planner.placement import Placement, Workload
from memory.planner.placing import plan
from memory.planner.prefill import PrefillModel
from memory.planner.routing import SKEWED, UNIFORM, Routing, from_counts
from memory.planner.shape import ModelShape, Weights

WITHIN = 0.25
# These engines replay a layer's kernels from a captured graph: about 20 of them at 5 us.
GRAPHS = replace(Efficiency(), gpu_layer_s=100e-6)
# With one draft a step computes two tokens a sequence, of which 1.8 are kept (the V3 report).
COMPUTED, KEPT = 2, 1.8

RELEASED_V4 = released_shape("deepseek-v4-flash")
# Other engines share experts in DRAM between links and processor, which our recorded steps do not.
V4 = replace(RELEASED_V4, layers=tuple(replace(layer, launches=None) for layer in RELEASED_V4.layers))
V41 = released_shape("deepseek-v4.1-flash")


@dataclass(frozen=True)
class Row:
    """A published figure.

    machine, model  in words
    low, high  as published, in `unit`
    forecast   calculates what the planner says
    why        of a row that is not met: what is not known, or what the model leaves out
    """

    engine: str
    machine: str
    model: str
    low: float
    high: float
    forecast: Callable[[], float]
    note: str = ""
    why: str = ""
    unit: str = "tok/s"

    @property
    def middle(self) -> float:
        """Of what was published."""
        return (self.low + self.high) / 2


def gpu(name: str, gib: float, gb_per_s: float, tflops: float, link: float) -> GpuSpec:
    """A card; GB/s of its memory and of its link."""
    return GpuSpec(name, "cuda", int(gib * GIB), gb_per_s * 1e9, tflops * 1e12, link * 1e9, link * 1e9)


def host(
    cores: int, dram: float, experts: float | None, gib: float, gpus: tuple[GpuSpec, ...], gflops: float = 25
) -> HardwareProfile:
    """A machine; GB/s that plain reads and expert kernels reach, gigaflops of a core."""
    return HardwareProfile(
        name="published", description="", cores=cores, cpu_level="avx2",
        cpu_matmul_flops=cores * gflops * 1e9, expert_bytes_per_s=experts and experts * 1e9,
        dram_bytes=int(gib * GIB), dram_bytes_per_s=dram * 1e9, dram_rows_per_s=3e7,
        disk_bytes=10**12, disk_bytes_per_s=3e9, disk_reads_per_s=5e5, gpus=gpus,
    )  # fmt: skip


def hits(shape: ModelShape, held: int, share: float) -> Routing:
    """Routing in which the hottest `held` experts of a layer take a share of its picks, and the others are
    alike: what an owner who measured hits has told of it."""
    rows = []
    for layer in shape.layers:
        others = layer.experts - held
        rows.append([share / held] * held + [(1 - share) / others] * others if layer.experts else [])
    return from_counts(rows, "published hits")


def holding(placement: Placement, shape: ModelShape, on_gpus: Mapping[str, int]) -> Placement:
    """The same with so many of each layer's experts in a GPU's memory, and the others in DRAM."""
    places = [place for place in placement.places if place.kind != "routed_experts"]
    of_each = [place for place in placement.places if place.kind == "routed_experts"]
    for n, layer in enumerate(shape.layers):
        if not layer.experts:
            continue
        like = next(place for place in of_each if place.layer == n)
        counts = {**on_gpus, "dram": layer.experts - sum(on_gpus.values())}
        places += [
            replace(like, tier=tier, count=count, nbytes=count * layer.expert.nbytes)
            for tier, count in counts.items()
            if count
        ]
    return replace(placement, places=tuple(places))


def weighing(shape: ModelShape, expert_bytes: float, dense_bytes: float) -> ModelShape:
    """A model whose experts, and all else that a token reads, have other sizes than as released."""
    before = sum(layer.dense.nbytes + layer.shared.nbytes for layer in shape.layers) + shape.head.nbytes
    factor = dense_bytes / before

    def scaled(weights: Weights, by: float) -> Weights:
        return Weights(int(weights.nbytes * by), weights.parameters)

    layers = tuple(
        replace(
            layer,
            dense=scaled(layer.dense, factor),
            shared=scaled(layer.shared, factor),
            expert=Weights(int(expert_bytes), layer.expert.parameters) if layer.experts else layer.expert,
        )
        for layer in shape.layers
    )
    return replace(shape, head=scaled(shape.head, factor), layers=layers)


def decode(
    shape: ModelShape,
    machine: HardwareProfile,
    routing: Routing,
    sequences: int = 1,
    *,
    room_for: int = 8,
    held: int = 4096,
    on_gpus: Mapping[str, int] | None = None,
) -> CostModel:
    """The cost model of a placed model; `on_gpus` says how many experts of each layer cards hold."""
    placement = plan(shape, machine, Workload(8192, max(room_for, sequences)))
    if on_gpus is not None:
        placement = holding(placement, shape, on_gpus)
    return CostModel(shape, machine, placement, routing, GRAPHS)


# ------------------------------------------------------------------- FreeToken: RTX 5090, EPYC, V4-Flash


def epyc_with_5090(stream: float, experts: float, link: float) -> HardwareProfile:
    """64-core EPYC, eight channels of DDR4-3200, RTX 5090 on PCIe 4.0; GB/s as its owner measured them."""
    return host(64, stream, experts, 245, (gpu("RTX 5090", 31.3, 1792, 210, link),))


HOSTS = (epyc_with_5090(146.1, 110.3, 26.1), epyc_with_5090(142.7, 108.4, 25.3))


def freetoken(machine: HardwareProfile, routing: Routing, sequences: int) -> float:
    """Tokens a second."""
    return decode(V4, machine, routing).decode(sequences, 4096).tokens_per_s


# ------------------------------------------------------- vLLM: two RTX Pro 6000, all in VRAM, V4-Flash

# Matrices split over both cards, so that they work as one of twice the size and bandwidth.
BOTH_PRO = replace(HOSTS[0], gpus=(gpu("two RTX Pro 6000", 190, 2 * 1792, 500, 50),))


def vllm(clients: int) -> float:
    """Tokens a second; drafts and acceptance are not published: the V3 report's are taken."""
    costs = decode(V4, BOTH_PRO, SKEWED, room_for=10 * COMPUTED)
    return clients * KEPT / costs.decode(clients * COMPUTED, 4096).total_s


# ------------------- dsv41-flash-offload: RTX 3090, EPYC 7443P with eight channels of DDR4, EXL3 at 3.0 bits

# 190.5 GiB of 15,360 experts; 7.7 GiB of all else, of which a token does not read the embedding.
EXL3 = weighing(V41, 190.5 * GIB / 15_360, 7.7 * GIB - V41.embedding.nbytes)
# "About 3.5 experts per layer miss" and the processor "computes them in about 1 ms": 46.6 GB/s of experts.
ROME_3090 = host(22, 150, 3.5 * EXL3.expert_nbytes / 1e-3 / 1e9, 480, (gpu("RTX 3090", 23, 936, 71, 25),))


def exl3(streams: int) -> float:
    """Tokens a second with 709 experts in VRAM, which served 40.8 % of picks."""
    held = 709 // 40
    costs = decode(EXL3, ROME_3090, hits(EXL3, held, 0.408), on_gpus={"vram:0": held})
    return costs.decode(streams, 1024).tokens_per_s


def exl3_prompt(tokens: int) -> float:
    """Tokens a second of a prompt in chunks of 16,384: all experts cross the link, all layers compute all."""
    whole = replace(EXL3, layers=tuple(replace(layer, tail=None) for layer in EXL3.layers))
    machine = replace(ROME_3090, expert_bytes_per_s=1e9, cpu_matmul_flops=1e9)  # the processor does nothing
    chunk = min(16_384, tokens)
    placement = plan(whole, machine, Workload(tokens, 1, chunk))
    placement = holding(placement, whole, {"vram:0": 1})
    return PrefillModel(whole, machine, placement, UNIFORM, GRAPHS).prefill(chunk, tokens).tokens_per_s


# ----------- dsv41-flash-dual-epyc: two RTX 5070 Ti, two EPYC 7452 at 226 GB/s, MXFP4 in 0.625 bytes a weight

KT_BYTES = 0.625 * V41.layers[0].expert.parameters
KT = weighing(V41, KT_BYTES, V41.nbytes - sum(
    layer.experts * layer.expert.nbytes + (layer.table.nbytes if layer.table else 0) for layer in V41.layers
) - V41.embedding.nbytes)  # fmt: skip
DUAL_EPYC = host(64, 226, None, 480, (gpu("two RTX 5070 Ti", 31, 2 * 896, 176, 2 * 22.7),))


def dual_epyc(held: int, share: float) -> float:
    """Tokens a second with so many experts of each layer on the cards, which served a share of picks."""
    costs = decode(KT, DUAL_EPYC, hits(KT, held, share), on_gpus={"vram:0": held})
    return costs.decode(1, 1024).tokens_per_s


def dual_epyc_prompt() -> float:
    """Tokens a second of a prompt in chunks of 2,048 whose experts all cross the links."""
    whole = replace(KT, layers=tuple(replace(layer, tail=None) for layer in KT.layers))
    machine = replace(DUAL_EPYC, expert_bytes_per_s=1e9, cpu_matmul_flops=1e9)
    placement = holding(plan(whole, machine, Workload(38_072, 1, 2048)), whole, {"vram:0": 5})
    routing = hits(whole, 5, 0.479)
    return PrefillModel(whole, machine, placement, routing, GRAPHS).prefill(2048, 38_072).tokens_per_s


# ------------------------ fastllm: RTX 3090 Ti, EPYC 7C13, dense weights in FP16, all experts in DRAM

FP16 = weighing(V41, V41.expert_nbytes, 2 * sum(
    layer.dense.parameters + layer.shared.parameters for layer in V41.layers
) + 2 * V41.head.parameters)  # fmt: skip
# The processor's part of a step takes 43 ms: 240 experts.
TI_3090 = host(31, 160, 240 * V41.expert_nbytes / 43e-3 / 1e9, 900, (gpu("RTX 3090 Ti", 23.3, 1008, 80, 25),))


def fastllm() -> float:
    """Tokens a second with no expert on the card."""
    return decode(FP16, TI_3090, UNIFORM, on_gpus={}).decode(1, 1024).tokens_per_s


# ---------------------------------- llama.cpp: an Intel i7-8700 without a GPU, Qwen3-30B-A3B in Q4_K_M

# Dense models of 4683 and 1930 MB made 4.9 and 11.8 tokens a second there: 22.9 GB/s.
QWEN = released_shape("qwen3-30b-a3b")
_Q4 = 18.557e9 / QWEN.nbytes
Q4_QWEN = weighing(QWEN, _Q4 * QWEN.expert_nbytes, _Q4 * (QWEN.nbytes - QWEN.embedding.nbytes - sum(
    layer.experts * layer.expert.nbytes for layer in QWEN.layers
)))  # fmt: skip
I7 = host(6, 22.9, 22.9, 60, ())


def i7() -> float:
    """Tokens a second."""
    return decode(Q4_QWEN, I7, UNIFORM, room_for=1).decode(1, 256).tokens_per_s


# ----------------------------------------------- a table in DRAM beside a model in VRAM (the Engram paper)


def table_penalty() -> float:
    """Per cent of throughput that look-ups in a table in DRAM cost, for V4.1-Flash all in GPUs' memory."""
    machine = host(64, 200, None, 300, (gpu("eight H800", 600, 8 * 3350, 8 * 990, 50),))
    without = replace(V41, layers=tuple(replace(layer, table=None) for layer in V41.layers))
    with_it, alone = (decode(shape, machine, SKEWED).decode(8, 4096).tokens_per_s for shape in (V41, without))
    return 100 * (1 - with_it / alone)


# ------------------------------------------------------------------------------- rows that are not met


def four_pro_step(clients: int) -> float:
    """Milliseconds of a step that verifies five drafts for each client, in VRAM, split over four cards."""
    cards = replace(HOSTS[0], gpus=(gpu("four RTX Pro 6000", 380, 4 * 1792, 1000, 50),))
    costs = decode(V41, cards, SKEWED, room_for=6 * clients)
    return 1e3 * costs.decode(6 * clients, 4096).total_s


def minimax(cards: int) -> float:
    """Tokens a second of MiniMax-M2.1 in FP8 on RTX 4090 with 48 GB and two Xeon 8488C."""
    machine = host(96, 0.7 * 614, None, 500, (gpu("RTX 4090 48 GB", 47, cards * 1008, 165, 25),))
    return decode(released_shape("minimax-m2"), machine, UNIFORM, room_for=1).decode(1, 2048).tokens_per_s


def v4_pro() -> float:
    """Tokens a second of V4-Pro on an RTX Pro 6000 and 12 modules of DDR5."""
    machine = host(64, 350, None, 1100, (gpu("RTX Pro 6000", 95, 1792, 250, 50),))
    return (
        decode(released_shape("deepseek-v4-pro"), machine, UNIFORM, room_for=1).decode(1, 1024).tokens_per_s
    )


ROWS = (
    Row("FreeToken", "RTX 5090 (PCIe 4.0), EPYC, 146.1 GB/s", "V4-Flash, alone", 24.5, 26.9,
        lambda: freetoken(HOSTS[0], UNIFORM, 1),
        "its cache is known to serve 8 to 18 % of picks; uniform gives 16 %"),
    Row("FreeToken", "the same, another host: 142.7 GB/s", "V4-Flash, alone", 24.5, 26.9,
        lambda: freetoken(HOSTS[1], UNIFORM, 1), "as above"),
    Row("FreeToken", "the first", "V4-Flash, eight clients", 65.6, 65.6,
        lambda: freetoken(HOSTS[0], SKEWED, 8),
        "how alike the clients' texts were is not known: uniform gives 41.6"),
    Row("vLLM", "two RTX Pro 6000, all in VRAM", "V4-Flash, alone", 210, 210, lambda: vllm(1),
        "drafts not published: the V3 report's one draft, 1.8 tokens a step, is taken; split by tensor"),
    Row("vLLM", "the same", "V4-Flash, ten clients", 700, 700, lambda: vllm(10), "as above"),
    Row("dsv41-flash-offload", "RTX 3090, EPYC 7443P", "V4.1-Flash, 3.0 bits, alone", 21.34, 21.34,
        lambda: exl3(1), "hits, sizes and the processor's rate as published"),
    Row("dsv41-flash-offload", "the same", "two streams", 26.27, 26.27, lambda: exl3(2), "as above"),
    Row("dsv41-flash-offload", "the same", "four streams", 28.30, 28.30, lambda: exl3(4), "as above"),
    Row("fastllm", "RTX 3090 Ti, EPYC 7C13", "V4.1-Flash, dense in FP16", 12.8, 12.8, fastllm,
        "the processor's 43 ms as published; the rest is forecast"),
    Row("llama.cpp", "i7-8700, no GPU", "Qwen3-30B-A3B, Q4_K_M", 10.6, 10.6, i7,
        "22.9 GB/s, as dense models of known sizes ran there"),
    Row("dsv41-flash-dual-epyc", "two RTX 5070 Ti, two EPYC 7452", "V4.1-Flash, prompt of 38k", 256, 258,
        dual_epyc_prompt,
        "22.7 GB/s on each link, 0.625 bytes a weight, chunks of about 2,048, as published"),
    Row("dsv41-flash-offload", "RTX 3090, EPYC 7443P", "V4.1-Flash, 3.0 bits, prompt of 8k", 565, 565,
        lambda: exl3_prompt(8192), "25 GB/s on the link; all layers compute all of the prompt"),
    Row("dsv41-flash-offload", "the same", "prompt of 32k, chunks of 16k", 745, 745,
        lambda: exl3_prompt(32_768),
        why="that engine brings each expert to FP16 before its products, which the model does not count; "
        "with 8k, the link takes most of the time"),
    Row("dsv41-flash-dual-epyc", "two RTX 5070 Ti, two EPYC 7452", "V4.1-Flash, five experts a layer on GPUs",
        27.9, 30.6, lambda: dual_epyc(5, 0.479),
        why="10 ms a token more than forecast, in both rows, whatever the processor computes: dense products "
        "take 8.7 instead of 5 ms there, look-ups 2; how long the two cards and two sockets wait for each "
        "other is not published"),
    Row("dsv41-flash-dual-epyc", "the same", "ten experts a layer on GPUs", 31.3, 31.3,
        lambda: dual_epyc(10, 0.609), why="as above"),
    Row("deepseek-v4.1-flash-4x-rtx-pro-6000", "four RTX Pro 6000 without NVLink, 275 W each",
        "V4.1-Flash, a step with five drafts", 23.59, 23.59, lambda: four_pro_step(1), unit="ms",
        why="split by tensor over PCIe: sums over four cards in each layer, and the drafts' own steps, are "
        "not in the model"),
    Row("KTransformers", "RTX 4090 48 GB, two Xeon 8488C", "MiniMax-M2.1, FP8", 20.9, 21.8,
        lambda: minimax(1),
        why="inputs not known: memory modules (eight channels of DDR5-4800 a socket, of which 70 % are "
        "reached, taken), how many experts the card holds"),
    Row("KTransformers", "RTX Pro 6000, 12 x 96 GB DDR5", "V4-Pro", 7.33, 7.33, v4_pro,
        why="inputs not known: processor, speed of the modules (350 GB/s taken). Its prompts, 46 tok/s, are "
        "computed by the processor alone; Loci would use the link"),
)  # fmt: skip


def table() -> str:
    """All rows as docs/planner.md has them."""
    lines = ["| engine | machine | model | published | forecast | |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        found = row.forecast()
        low_high = f"{row.low:g}" if row.low == row.high else f"{row.low:g} to {row.high:g}"
        off = f"{found:.3g} ({found / row.middle - 1:+.0%})"
        note = f"**not met**: {row.why}" if row.why else row.note
        lines.append(
            f"| {row.engine} | {row.machine} | {row.model} | {low_high} {row.unit} | {off} | {note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
