"""Random experts in a file, and stores of them within budgets, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memory.checkpoint.entries import TensorEntry
from memory.experts.reader import APART
from memory.experts.store import ExpertStore
from memory.tiers import Tier
from quant.formats.mxfp4 import MXFP4
from quant.kernels.choice import choose
from quant.kernels.interface import ExpertFormats
from quant.packed import PackedTensor

CPU = torch.device("cpu")
LIMIT = 10.0


@dataclass(frozen=True)
class ExpertsOnDisk:
    """`ExpertFiles` of one file: expert after expert, of each w1, w3, w2, of each scales, then codes."""

    file: Path
    layers: int
    experts: int
    hidden: int
    width: int
    together = APART

    @classmethod
    def write(cls, file: Path, layers: int, experts: int, hidden: int, width: int) -> ExpertsOnDisk:
        """Random codes, scales near 1."""
        made = cls(file, layers, experts, hidden, width)
        rng = np.random.default_rng(3)
        with file.open("wb") as out:
            for _ in range(layers * experts * 3):
                out.write(rng.integers(119, 123, hidden * width // 32, dtype=np.uint8).tobytes())
                out.write(rng.integers(0, 256, hidden * width // 2, dtype=np.uint8).tobytes())
        return made

    def formats(self, layer: int) -> ExpertFormats:
        return MXFP4, MXFP4, MXFP4

    @property
    def slot_bytes(self) -> int:
        """Bytes of an expert."""
        return 3 * self._matrix_bytes

    @property
    def _matrix_bytes(self) -> int:
        return self.hidden * self.width // 32 * 17

    def entries(self, layer: int, expert: int, number: int) -> list[TensorEntry]:
        start = ((layer * self.experts + expert) * 3 + number) * self._matrix_bytes
        scales = self.hidden * self.width // 32
        return [
            TensorEntry("scales", "U8", (scales,), self.file, start, scales),
            TensorEntry("codes", "U8", (16 * scales,), self.file, start + scales, 16 * scales),
        ]

    def matrix(self, layer: int, expert: int, number: int, raw: dict[str, torch.Tensor]) -> PackedTensor:
        shape = (self.hidden, self.width) if number == 2 else (self.width, self.hidden)
        rows, cols = shape
        return PackedTensor(MXFP4, shape, raw["codes"].view(rows, -1), raw["scales"].view(rows, cols // 32))

    def store(
        self, dram: float, *gpus: float, bytes_per_s: float | None = None, readers: int = 4, lent: float = 0.0
    ) -> ExpertStore:
        """A store with room for so many experts in DRAM and on virtual GPUs."""
        tiers = [Tier(f"vram:{i}", int(n * self.slot_bytes), CPU, bytes_per_s) for i, n in enumerate(gpus)]
        return ExpertStore(
            self, choose(), Tier("dram", int(dram * self.slot_bytes), CPU), tiers,
            readers=readers, lent_bytes=int(lent * self.slot_bytes),
        )  # fmt: skip


def steps(
    files: ExpertsOnDisk, store: ExpertStore, count: int, top_k: int = 4, seed: int = 0
) -> torch.Tensor:
    """Outputs of `count` tokens through all layers, with a guess ahead that is right more often than not."""
    random = torch.Generator().manual_seed(seed)
    outputs = []
    for _ in range(count):
        x = torch.randn(1, files.hidden, generator=random)
        choices = [
            torch.randperm(files.experts, generator=random)[:top_k].unsqueeze(0) for _ in range(files.layers)
        ]
        for layer, chosen in enumerate(choices):
            step = store.acquire(layer, chosen)
            if layer + 1 < files.layers:
                wrong = torch.randint(files.experts, (1,), generator=random).tolist()
                store.prefetch(layer + 1, [*choices[layer + 1].flatten().tolist()[: top_k - 1], *wrong])
            x = step.run(x, torch.ones(1, top_k) / top_k, LIMIT)
        outputs.append(x)
    return torch.cat(outputs)
