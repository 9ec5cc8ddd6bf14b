"""What the tensors of V4 and V4.1 take in memory, from headers: what `Reader` makes of each.

Matrices are in the kernels' panels, what is small is float32, all else is as its file has it.
"""

from __future__ import annotations

import math

from engine.families.streams.config import StreamConfig
from engine.families.streams.stored import StoredFormats
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.tiers import ALIGNMENT
from quant.formats.fp8 import FP8_32, Fp8
from quant.formats.quantization_config import Role
from quant.formats.stored import FLOAT_DTYPES
from quant.kernels.choice import choose
from quant.kernels.cpu.panels import TILED
from quant.packed import Format

# As stored: they are multiplied as plain floats, or rows of them are looked up.
PLAIN = ("embed", "head", ".ffn.gate", ".compressor.wkv", ".compressor.wgate", ".indexer.wk",
         ".indexer.weights_proj")  # fmt: skip
# Counted as what they are a part of: experts take slots, rows of tables shares, routers' tables lie apart.
APART = (".ffn.experts.", ".engram.embed.", ".tid2eid")
NOT_READ = (".gate.bias_vl", ".engram.k_weight")  # the latter is multiplied into `q_weight`


class InMemory:
    """Bytes of each tensor of a verified checkpoint once it is loaded to where the CPU's kernels compute."""

    def __init__(self, c: StreamConfig, checkpoint: Checkpoint) -> None:
        self._config = c
        self._entries = checkpoint.entries
        self._formats = StoredFormats(checkpoint)

    def nbytes(self, name: str, entry: TensorEntry) -> int:
        """Of a tensor, as `Parts` asks."""
        hc = self._config.hc_mult
        if any(mark in name for mark in APART):
            return entry.nbytes
        if name.endswith(NOT_READ):
            return 0
        if name.endswith("hc_head_scale"):
            return 4 * hc
        if name.endswith("_scale"):  # of the three mixes of a connection, one for each of their numbers
            return 4 * (2 * hc + hc**2)
        base, _, end = name.rpartition(".")
        if end in ("weight", "scale") and f"{base}.scale" in self._entries:
            return self._packed(base, entry, is_scale=end == "scale")
        is_matrix = len(entry.shape) == 2 and end == "weight"
        return entry.nbytes if is_matrix or base.endswith(PLAIN) else 4 * math.prod(entry.shape)

    def slot_bytes(self) -> int:
        """Of a routed expert."""
        c = self._config
        layout = choose().slot_layout(c.hidden_size, c.moe_intermediate_size, self._formats.experts)
        return -(-layout.nbytes // ALIGNMENT) * ALIGNMENT

    def _packed(self, base: str, entry: TensorEntry, *, is_scale: bool) -> int:
        """Of the codes or the scales of a packed matrix."""
        form = self._formats.of(Role.DENSE, base)
        assert form is not None
        weight = self._entries[f"{base}.weight"]
        rows, cols = weight.shape[0], weight.shape[1] * (1 if isinstance(form, Fp8) else 2)
        groups = self._config.o_groups if base.endswith(".wo_a") else 1
        if rows // groups % form.tile_rows:
            form = FP8_32
        tiled = TILED.get(form.name)
        if tiled is None or not tiled.holds(cols):
            return _scales(form, entry, rows, cols) if is_scale else entry.nbytes
        if not is_scale:
            return groups * tiled.bytes_for(rows // groups, cols)
        return _scales(form, entry, rows, cols) if tiled.keeps_scales else 0


def _scales(form: Format, entry: TensorEntry, rows: int, cols: int) -> int:
    """Bytes of scales: those of FP8 are float32 unless they are powers of two."""
    if not isinstance(form, Fp8):
        return entry.nbytes
    return math.prod(form.scale_shape(rows, cols)) * (4 if entry.dtype in FLOAT_DTYPES else 1)
