"""How a checkpoint stores the matrices of a decoder: the tensors of each, and what they are read as.

Single matrices are found by `quant/formats/stored_matrix.py`. A stack of matrices, one for each expert, is
one tensor `[experts, rows, cols]`, of floats or of a GGUF type; or, in gpt-oss, `NAME_blocks` and
`NAME_scales`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.families.decoder.tensors import Use
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry, TensorSpec
from memory.checkpoint.reads import RowsOnDisk
from quant.errors import CheckpointError, FormatError
from quant.formats.gguf import FORMATS, weight_from_bytes
from quant.formats.mxfp4 import MXFP4
from quant.formats.plain import PLAIN, as_packed
from quant.formats.quantization_config import QuantizationConfig
from quant.formats.stored import FLOAT_DTYPES
from quant.formats.stored_matrix import StoredMatrix, find_matrix, from_mxfp4_blocks
from quant.kernels.interface import Weight
from quant.packed import Format, PackedTensor

FLOATS = tuple(FLOAT_DTYPES)
STACK_DTYPES = (*FLOATS, *FORMATS)


class RowsInFile:
    """A matrix of which a few rows at a time are read from its file."""

    def __init__(self, entry: TensorEntry, format_: Format) -> None:
        self._rows = RowsOnDisk(entry)
        self._cols = entry.shape[1]
        self._format = format_

    def decoded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[n]` int64 as `[n, cols]` float32."""
        return self._format.decode(PackedTensor(self._format, (len(rows), self._cols), self._rows[rows]))


def decoded_value_bytes(config: Mapping[str, Any]) -> int:
    """Bytes that a value of a packed matrix takes where it is held as a plain number."""
    return 2 if QuantizationConfig.parse(config).is_exact_in_bfloat16 else 4


class StoredMatrices:
    """Matrices of a checkpoint by name. Raises FormatError for tensors that no format has."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._entries = checkpoint.entries
        self._config = QuantizationConfig.parse(checkpoint.config)

    def specs(self, use: Use) -> dict[str, TensorSpec]:
        """The tensors that hold what is used, with the shapes and dtypes that they must have."""
        if not use.is_matrix:
            return {use.name: TensorSpec(use.shape, FLOATS)}
        if len(use.shape) == 3:
            return self._stack_specs(use)
        stored = self._matrix(use.name, use.shape)
        return {
            stored.name + ending: TensorSpec(part.shape, part.dtypes)
            for ending, part in stored.tensors.items()
        }

    def entries(self, use: Use) -> list[TensorEntry]:
        """Those of the tensors that are there."""
        return [self._entries[name] for name in self.specs(use) if name in self._entries]

    def format_of(self, name: str, shape: tuple[int, ...]) -> Format:
        """The format of a matrix or of a stack of them."""
        if len(shape) == 2:
            return self._matrix(name, shape).format
        if f"{name}_blocks" in self._entries:
            return MXFP4
        dtype = self._entries[name].dtype
        return FORMATS[dtype] if dtype in FORMATS else PLAIN[FLOAT_DTYPES[dtype]]

    # ---------------------------------------------------------------------------------------- matrices

    def read(self, name: str, shape: tuple[int, int]) -> Weight:
        """A matrix."""
        stored = self._matrix(name, shape)
        return stored.weight({tensor: self._checkpoint.read(tensor) for tensor in stored.needed})

    def read_floats(self, name: str) -> torch.Tensor:
        """A tensor of plain floats, as float32."""
        entry = self._entries[name]
        values = weight_from_bytes(entry.dtype, entry.shape, self._checkpoint.read(name))
        assert isinstance(values, torch.Tensor)
        return values.float()

    def read_plain(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A matrix, or a stack of them `[n, rows, cols]`, as plain numbers: where it is packed float32, or
        bfloat16 if that is as exact."""
        if len(shape) == 2:
            weight = self.read(name, (shape[0], shape[1]))
        else:
            *stacked, cols = shape
            weight = weight_from_bytes(
                self._entries[name].dtype, (math.prod(stacked), cols), self._checkpoint.read(name)
            )
        if isinstance(weight, torch.Tensor):
            return weight.view(shape)
        values = weight.decode().view(shape)
        if not self._config.is_exact_in_bfloat16:
            return values
        narrow = values.bfloat16()
        if not torch.equal(narrow.float(), values):
            raise CheckpointError(
                f"{self._checkpoint.path}: scales of {name} are no powers of two, although scale_fmt is "
                "'ue8m0'; remove scale_fmt from quantization_config"
            )
        return narrow

    def has_rows(self, name: str, shape: tuple[int, int]) -> bool:
        """Whether a matrix's rows lie one behind the other, so that `in_file` can leave it where it is."""
        stored = self._matrix(name, shape)
        return len(stored.needed) == 1 and stored.format.tile_rows == 1

    def in_file(self, name: str, shape: tuple[int, int]) -> RowsInFile:
        """A matrix that stays where it is, of those that `has_rows` is true of."""
        assert self.has_rows(name, shape)
        stored = self._matrix(name, shape)
        return RowsInFile(self._entries[stored.needed[0]], stored.format)

    def parts(self, name: str, shape: tuple[int, int]) -> list[TensorEntry]:
        """The tensors that `from_parts` makes a matrix of."""
        return [self._entries[tensor] for tensor in self._matrix(name, shape).needed]

    def from_parts(self, name: str, shape: tuple[int, int], raw: Mapping[str, torch.Tensor]) -> PackedTensor:
        """The matrix from the bytes of its tensors, by name."""
        return self._matrix(name, shape).packed(raw)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> StoredMatrix:
        rows, cols = shape
        return find_matrix(name.removesuffix(".weight"), (rows, cols), self._entries, self._config)

    # ------------------------------------------------------------------------------------------ stacks

    def stack_parts(self, name: str, number: int, start: int, stop: int) -> list[TensorEntry]:
        """The parts of tensors that hold rows start..stop of matrix `number` of a stack."""
        names = (f"{name}_blocks", f"{name}_scales")
        tensors = names if names[0] in self._entries else (name,)
        return [self._entries[tensor].of(number).rows(start, stop) for tensor in tensors]

    def from_stack_parts(
        self, shape: tuple[int, int], parts: Sequence[tuple[TensorEntry, torch.Tensor]]
    ) -> PackedTensor:
        """A matrix of `shape` from what `stack_parts` named, with their bytes."""
        if len(parts) == 2:
            return from_mxfp4_blocks(shape, parts[0][1], parts[1][1])
        ((entry, raw),) = parts
        weight = weight_from_bytes(entry.dtype, shape, raw)
        return as_packed(weight) if isinstance(weight, torch.Tensor) else weight

    def _stack_specs(self, use: Use) -> dict[str, TensorSpec]:
        experts, rows, cols = use.shape
        if f"{use.name}_blocks" not in self._entries:
            return {use.name: TensorSpec(use.shape, STACK_DTYPES)}
        if cols % MXFP4.tile_cols:
            raise FormatError(f"{use.name}: {cols} columns are not whole blocks of {MXFP4.tile_cols}")
        blocks = cols // MXFP4.tile_cols
        return {
            f"{use.name}_blocks": TensorSpec((experts, rows, blocks, MXFP4.tile_cols // 2), ("U8",)),
            f"{use.name}_scales": TensorSpec((experts, rows, blocks), ("U8",)),
        }
