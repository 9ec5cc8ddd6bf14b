"""A store whose layers, and matrices, are in different formats: as in GGUF files of mixed K types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from memory.checkpoint.entries import TensorEntry
from memory.experts.reader import APART
from memory.experts.store import ExpertStore
from memory.tiers import Tier
from quant.formats.fp8 import FP8_128
from quant.formats.gguf_k import Q4_K, Q6_K
from quant.formats.mxfp4 import MXFP4
from quant.formats.plain import BF16
from quant.kernels.choice import choose
from quant.kernels.cpu.library import LibraryMissingError
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cuda.slots import GpuSlotLayout
from quant.kernels.interface import ExpertFormats, ExpertWeights, MoeCall, matrix_shapes
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format, PackedTensor
from tests.quant.kernels.kernel_cases import any_weight, difference

HIDDEN = WIDTH = 256
EXPERTS, TOP_K, LIMIT = 6, 2, 10.0
LAYERS: list[ExpertFormats] = [(Q4_K, Q4_K, Q6_K), (BF16, BF16, BF16), (MXFP4, MXFP4, FP8_128)]


@dataclass
class MixedExperts:
    """`ExpertFiles` of one file that holds the given experts, by layer."""

    file: Path
    weights: list[list[ExpertWeights]]
    layers = len(LAYERS)
    experts = EXPERTS
    hidden = HIDDEN
    width = WIDTH
    together = APART

    def __post_init__(self) -> None:
        self.places: dict[tuple[int, int, int], list[TensorEntry]] = {}
        with self.file.open("wb") as out:
            for layer, experts in enumerate(self.weights):
                for expert, weights in enumerate(experts):
                    for number, matrix in enumerate(weights.matrices):
                        entries = self.places[layer, expert, number] = []
                        for part in (matrix.codes, matrix.scales):
                            if part is not None:
                                at = out.tell()
                                nbytes = out.write(part.contiguous().view(torch.uint8).numpy().tobytes())
                                name = f"{layer}.{expert}.{number}.{len(entries)}"
                                entries.append(TensorEntry(name, "U8", (nbytes,), self.file, at, nbytes))

    def formats(self, layer: int) -> ExpertFormats:
        return LAYERS[layer]

    def entries(self, layer: int, expert: int, number: int) -> list[TensorEntry]:
        return self.places[layer, expert, number]

    def matrix(self, layer: int, expert: int, number: int, raw: dict[str, torch.Tensor]) -> PackedTensor:
        like = self.weights[layer][expert].matrices[number]
        codes, *scales = (raw[entry.name] for entry in self.entries(layer, expert, number))
        found = None
        if like.scales is not None:
            found = scales[0].view(like.scales.dtype).view(like.scales.shape)
        return PackedTensor(like.format, like.shape, codes.view(like.codes.shape), found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> MixedExperts:
    weights = []
    for formats in LAYERS:
        experts = []
        for _ in range(EXPERTS):
            parts = []
            for format_, shape in zip(formats, matrix_shapes(HIDDEN, WIDTH), strict=True):
                made = BF16.encode(torch.randn(shape)) if format_ is BF16 else any_weight(format_, *shape)
                assert isinstance(made, PackedTensor)
                parts.append(made)
            experts.append(ExpertWeights(*parts))
        weights.append(experts)
    return MixedExperts(tmp_path_factory.mktemp("mixed") / "experts", weights)


@pytest.mark.parametrize("slots", [3, len(LAYERS) * EXPERTS])
@pytest.mark.parametrize("gpus", [0, 2])
def test_every_layer_is_computed_in_its_own_formats(files: MixedExperts, slots: int, gpus: int) -> None:
    cpu = torch.device("cpu")
    largest = 3 * BF16.bytes_for(HIDDEN, WIDTH)  # a slot fits an expert of any layer
    store = ExpertStore(
        files,
        choose(),
        Tier("dram", slots * largest, cpu),
        [Tier(f"vram:{n}", 2 * largest, cpu, None) for n in range(gpus)],
        readers=2,
    )
    assert store.slots.dram.arena.slot_bytes == largest
    torch.manual_seed(0)
    for turn in range(4):
        for layer, experts in enumerate(files.weights):
            x, ids = torch.randn(1, HIDDEN), torch.randperm(EXPERTS)[:TOP_K].unsqueeze(0)
            found = store.acquire(layer, ids).run(x, torch.ones(1, TOP_K), LIMIT)
            expected = ReferenceKernels().moe(MoeCall(x, ids, torch.ones(1, TOP_K), experts, LIMIT))
            assert difference(found, expected) < 2e-5, (turn, layer)
    store.close()


class NoSlotsOnGpus(NativeKernels):
    """Kernels whose GPU, `cpu:0`, has slots for some formats only."""

    def on(self, device: torch.device) -> NativeKernels:
        return self if device.index is None else OnGpu()


class OnGpu(NativeKernels):
    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> GpuSlotLayout:
        return GpuSlotLayout(hidden, width, formats)


def test_formats_that_gpus_have_no_kernels_for_stay_in_dram(
    files: MixedExperts, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        kernels = NoSlotsOnGpus()
    except LibraryMissingError as missing:
        pytest.skip(str(missing))
    gpu = Tier("vram:0", 1 << 20, torch.device("cpu", 0))
    store = ExpertStore(files, kernels, Tier("dram", 1 << 26, torch.device("cpu")), [gpu])
    assert "all experts stay in DRAM and are computed on the CPU: q4_k, q6_k: experts in this" in caplog.text
    assert store.is_still
    ids = torch.tensor([[1, 3]])
    found = store.acquire(0, ids).run(torch.ones(1, HIDDEN), torch.ones(1, TOP_K), LIMIT)
    call = MoeCall(torch.ones(1, HIDDEN), ids, torch.ones(1, TOP_K), files.weights[0], LIMIT)
    assert difference(found, ReferenceKernels().moe(call)) < 2e-5
    store.close()
