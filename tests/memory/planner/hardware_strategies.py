"""Machines for property tests: GPUs that are alike and, as in reality, faster than DRAM."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from memory.hardware.profiles import GpuSpec, HardwareProfile
from memory.planner.placement import Workload
from memory.planner.shape import KeptRows, KvShape, LayerShape, ModelShape, Table, Weights

GB = 1_000_000_000

GPU = GpuSpec("GPU", "cuda", 24 * GB, 1e12, 150e12, 25e9, 20e9)
MACHINE = HardwareProfile(
    name="machine", description="", cores=16, cpu_level="avx512", cpu_matmul_flops=1e12,
    expert_bytes_per_s=None, dram_bytes=128 * GB, dram_bytes_per_s=80e9, dram_rows_per_s=8e6,
    disk_bytes=2000 * GB, disk_bytes_per_s=7e9, disk_reads_per_s=8e5, gpus=(GPU,),
)  # fmt: skip


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    """From a small box without a GPU to three big GPUs; disks that hold any of `shapes`."""
    link = draw(st.floats(3e9, 60e9))
    gpu = replace(
        GPU,
        memory_bytes=draw(st.integers(GB, 100 * GB)),
        memory_bytes_per_s=draw(st.floats(700e9, 3e12)),
        matmul_flops=draw(st.floats(50e12, 400e12)),
        link_bytes_per_s=link,
        link_together_bytes_per_s=link * draw(st.floats(0.5, 1.0)),
    )
    return replace(
        MACHINE,
        cpu_matmul_flops=draw(st.floats(0.1e12, 3e12)),
        dram_bytes=draw(st.integers(4 * GB, 400 * GB)),
        dram_bytes_per_s=draw(st.floats(20e9, 140e9)),
        disk_bytes_per_s=draw(st.floats(1e9, 14e9)),
        gpus=(gpu,) * draw(st.integers(0, 3)),
    )


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Mixture-of-experts models of a few layers, some with a table, about as big as such machines."""
    expert = draw(st.integers(1_000_000, 60_000_000))
    dense = draw(st.integers(10_000_000, 500_000_000))
    kv = KvShape(fixed_bytes=65_536, rows=(KeptRows(2, 2048),), seen_ratio=2, selected_bytes=2048)
    experts = draw(st.integers(8, 256))
    layer = LayerShape(
        Weights(dense, dense), kv, shared=Weights(expert, 2 * expert), experts=experts,
        expert=Weights(expert, 2 * expert),
    )  # fmt: skip
    layers = [layer] * draw(st.integers(1, 12))
    if draw(st.booleans()):
        layers[0] = replace(layer, table=Table(draw(st.integers(1000, 300_000_000)), 264, 24))
    embedding = Weights(500_000_000, 250_000_000)
    return ModelShape(
        name="made up", vocab_size=50_000, hidden=4096, max_context=1 << 20,
        top_k=draw(st.integers(1, 8)), embedding=embedding, head=embedding, layers=tuple(layers),
        activation_bytes=400_000,
    )  # fmt: skip


workloads = st.builds(
    Workload,
    context=st.integers(1, 200_000),
    sequences=st.integers(1, 32),
    prefill_chunk=st.integers(1, 4096),
)
