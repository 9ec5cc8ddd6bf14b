"""Reads the weights that V4 and V4.1 have in common from a verified checkpoint.

Nothing is expanded: matrices stay packed; only norms, mixes and biases (a few values per layer)
become float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.families.places import HOST
from engine.families.streams.stored import StoredFormats
from engine.layers.hyper_connections import HyperConnection
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.reads import RowsOnDisk
from memory.experts.reader import APART
from quant.formats.fp8 import FP8_32, Fp8
from quant.formats.quantization_config import Role
from quant.formats.stored import FLOAT_DTYPES, unpack
from quant.kernels.interface import ExpertFormats, Kernels, Weight
from quant.packed import Format, PackedTensor


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token uses; dense weights, so packed or plain."""

    w1: Weight
    w3: Weight
    w2: Weight


class Reader:
    """A verified checkpoint's tensors on `device`."""

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels, device: torch.device = HOST) -> None:
        self.checkpoint = checkpoint
        self.kernels = kernels.on(device)
        self.device = device
        self.formats = StoredFormats(checkpoint)

    def plain(self, name: str) -> torch.Tensor:
        """A float tensor as it is stored."""
        entry = self.checkpoint.entries[name]
        stored = self.checkpoint.read(name).view(FLOAT_DTYPES[entry.dtype]).view(entry.shape)
        return stored.to(self.device)

    def on_disk(self, name: str) -> RowsOnDisk:
        """A float matrix that stays in its file."""
        entry = self.checkpoint.entries[name]
        return RowsOnDisk(entry, FLOAT_DTYPES[entry.dtype])

    def small(self, name: str) -> torch.Tensor:
        """A norm, bias or mix as float32."""
        return self.plain(name).float()

    def dense(self, name: str, rows: int, cols: int) -> Weight:
        """A dense `[rows, cols]` matrix in the kernels' layout."""
        return self.kernels.prepare(self.stored(name, rows, cols))

    def dense_groups(self, name: str, groups: int, rows: int, cols: int) -> tuple[Weight, ...]:
        """A dense matrix cut into `groups` of `rows` rows."""
        stored = self.stored(name, groups * rows, cols)
        starts = range(0, groups * rows, rows)
        if isinstance(stored, torch.Tensor):
            return tuple(self.kernels.prepare(stored[start : start + rows]) for start in starts)
        if rows % stored.format.tile_rows:
            stored = _in_smaller_tiles(stored)
        return tuple(self.kernels.prepare(stored.rows(start, start + rows)) for start in starts)

    def stored(self, name: str, rows: int, cols: int) -> Weight:
        """A dense matrix as the file has it."""
        format_ = self.formats.of(Role.DENSE, name)
        if format_ is None:
            return self.plain(f"{name}.weight")
        codes, scales = self.checkpoint.read(f"{name}.weight"), self.checkpoint.read(f"{name}.scale")
        return unpack(format_, (rows, cols), codes, scales, self.checkpoint.entries[f"{name}.scale"].dtype)

    def connection(
        self, prefix: str, hc: int, *, iterations: int, hc_eps: float, norm_eps: float
    ) -> HyperConnection:
        """A sublayer's hyper-connection, its three scales spread out."""
        scales = zip(self.small(f"{prefix}_scale"), (hc, hc, hc**2), strict=True)
        return HyperConnection(
            fn=self.small(f"{prefix}_fn"),
            base=self.small(f"{prefix}_base"),
            scale=torch.cat([scale.expand(size) for scale, size in scales]),
            sinkhorn_iters=iterations,
            hc_eps=hc_eps,
            norm_eps=norm_eps,
        )

    def shared_expert(self, prefix: str, width: int, hidden: int) -> SharedExpert:
        """The expert that every token uses."""
        return SharedExpert(
            self.dense(f"{prefix}.w1", width, hidden),
            self.dense(f"{prefix}.w3", width, hidden),
            self.dense(f"{prefix}.w2", hidden, width),
        )


def _in_smaller_tiles(packed: PackedTensor) -> PackedTensor:
    """The same FP8 values as tiles of 32 by 32: each has the scale of the tile that it was a part of."""
    rows, cols = FP8_32.scale_shape(*packed.shape)
    assert isinstance(packed.format, Fp8)
    assert packed.scales is not None
    tall, wide = packed.format.tile_rows // 32, packed.format.tile_cols // 32
    scales = packed.scales.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]
    return PackedTensor(FP8_32, packed.shape, packed.codes, scales.contiguous())


@dataclass(frozen=True)
class StreamExpertFiles:
    """Where the routed experts of a checkpoint are, for the expert store."""

    checkpoint: Checkpoint
    layers: int
    experts: int
    hidden: int
    width: int
    format: Format
    together = APART

    def formats(self, layer: int) -> ExpertFormats:
        """The same in every layer."""
        return self.format, self.format, self.format

    def entries(self, layer: int, expert: int, number: int) -> list[TensorEntry]:
        """The tensors of one matrix of an expert: number 0 is w1, 1 is w3, 2 is w2."""
        name = self._name(layer, expert, number)
        return [self.checkpoint.entries[f"{name}.{part}"] for part in ("weight", "scale")]

    def matrix(self, layer: int, expert: int, number: int, raw: dict[str, torch.Tensor]) -> PackedTensor:
        """The matrix from the raw bytes of its tensors, by name."""
        name = self._name(layer, expert, number)
        is_down = number == 2
        shape = (self.hidden, self.width) if is_down else (self.width, self.hidden)
        scale_dtype = self.checkpoint.entries[f"{name}.scale"].dtype
        return unpack(self.format, shape, raw[f"{name}.weight"], raw[f"{name}.scale"], scale_dtype)

    def _name(self, layer: int, expert: int, number: int) -> str:
        return f"layers.{layer}.ffn.experts.{expert}.{('w1', 'w3', 'w2')[number]}"
