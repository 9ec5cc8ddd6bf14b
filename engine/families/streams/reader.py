"""Reads the weights that V4 and V4.1 have in common from a verified checkpoint.

Nothing is expanded: matrices stay packed; only norms, mixes and biases (a few values per layer)
become float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.families.places import HOST
from engine.families.streams.config import StreamConfig
from engine.families.streams.stored import StoredFormats
from engine.families.streams.weights import SharedExpert, StreamAttention, StreamIndexer
from engine.layers.hyper_connections import HyperConnection
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.reads import RowsOnDisk
from quant.formats.fp8 import FP8_32, Fp8
from quant.formats.quantization_config import Role
from quant.formats.stored import FLOAT_DTYPES, unpack
from quant.kernels.interface import Kernels, Weight
from quant.packed import PackedTensor


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
        return _in_one_piece([self.kernels.prepare(stored.rows(start, start + rows)) for start in starts])

    def stored(self, name: str, rows: int, cols: int) -> Weight:
        """A dense matrix as the file has it."""
        format_ = self.formats.of(Role.DENSE, name)
        if format_ is None:
            return self.plain(f"{name}.weight")
        codes, scales = self.checkpoint.read(f"{name}.weight"), self.checkpoint.read(f"{name}.scale")
        return unpack(format_, (rows, cols), codes, scales, self.checkpoint.entries[f"{name}.scale"].dtype)

    def connection(self, c: StreamConfig, prefix: str) -> HyperConnection:
        """A sublayer's hyper-connection, its three scales spread out."""
        hc = c.hc_mult
        scales = zip(self.small(f"{prefix}_scale"), (hc, hc, hc**2), strict=True)
        return HyperConnection(
            fn=self.small(f"{prefix}_fn"),
            base=self.small(f"{prefix}_base"),
            scale=torch.cat([scale.expand(size) for scale, size in scales]),
            sinkhorn_iters=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )

    def attention(self, c: StreamConfig, attn: str) -> StreamAttention:
        """What attention has in every layer."""
        query_dim = c.num_attention_heads * c.head_dim
        return StreamAttention(
            wq_a=self.dense(f"{attn}.wq_a", c.q_lora_rank, c.hidden_size),
            q_norm=self.small(f"{attn}.q_norm.weight"),
            wq_b=self.dense(f"{attn}.wq_b", query_dim, c.q_lora_rank),
            wkv=self.dense(f"{attn}.wkv", c.head_dim, c.hidden_size),
            kv_norm=self.small(f"{attn}.kv_norm.weight"),
            sink=self.small(f"{attn}.attn_sink"),
            wo_a=self.dense_groups(f"{attn}.wo_a", c.o_groups, c.o_lora_rank, query_dim // c.o_groups),
            wo_b=self.dense(f"{attn}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank),
        )

    def indexer(self, c: StreamConfig, attn: str) -> StreamIndexer:
        """What a layer that chooses among entries asks with."""
        return StreamIndexer(
            self.dense(f"{attn}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank),
            self.plain(f"{attn}.indexer.weights_proj.weight"),
        )

    def shared_expert(self, c: StreamConfig, layer: str) -> SharedExpert:
        """The expert that every token uses."""
        prefix, hidden = f"{layer}.ffn.shared_experts", c.hidden_size
        width = c.moe_intermediate_size * c.n_shared_experts
        return SharedExpert(
            self.dense(f"{prefix}.w1", width, hidden),
            self.dense(f"{prefix}.w3", width, hidden),
            self.dense(f"{prefix}.w2", hidden, width),
        )


def _in_one_piece(weights: list[Weight]) -> tuple[Weight, ...]:
    """The same weights, of one format and shape, with the codes of packed ones behind each other: huge pages
    cover nearly all of one large piece of memory, but only half of each of several that are hardly larger."""
    packed = [weight for weight in weights if isinstance(weight, PackedTensor)]
    if len(packed) < len(weights):
        return tuple(weights)
    codes = torch.stack([weight.codes for weight in packed])
    return tuple(replace(weight, codes=part) for weight, part in zip(packed, codes, strict=True))


def _in_smaller_tiles(packed: PackedTensor) -> PackedTensor:
    """The same FP8 values as tiles of 32 by 32: each has the scale of the tile that it was a part of."""
    rows, cols = FP8_32.scale_shape(*packed.shape)
    assert isinstance(packed.format, Fp8)
    assert packed.scales is not None
    tall, wide = packed.format.tile_rows // 32, packed.format.tile_cols // 32
    scales = packed.scales.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]
    return PackedTensor(FP8_32, packed.shape, packed.codes, scales.contiguous())
