"""How a checkpoint stores the matrices of a decoder: the tensors of each, and what they are read as."""

from __future__ import annotations

import torch

from engine.families.decoder.tensors import Use
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry, TensorSpec
from memory.checkpoint.reads import RowsOnDisk
from quant.formats.gguf import FORMATS, PLAIN_DTYPES, weight_from_bytes
from quant.formats.plain import PLAIN
from quant.kernels.interface import Weight
from quant.packed import Format, PackedTensor

FLOATS = tuple(PLAIN_DTYPES)
MATRIX_DTYPES = (*FORMATS, *FLOATS)


class RowsInFile:
    """A matrix of which a few rows at a time are read from its file."""

    def __init__(self, entry: TensorEntry, format_: Format) -> None:
        self._rows = RowsOnDisk(entry)
        self._cols = entry.shape[1]
        self._format = format_

    def decoded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[n]` int64 as `[n, cols]` float32."""
        return self._format.decode(PackedTensor(self._format, (len(rows), self._cols), self._rows[rows]))


class StoredMatrices:
    """Matrices of a checkpoint by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._entries = checkpoint.entries

    def specs(self, use: Use) -> dict[str, TensorSpec]:
        """The tensors that hold what is used, with the dtypes they may have."""
        return {use.name: TensorSpec(use.shape, MATRIX_DTYPES if use.is_matrix else FLOATS)}

    def parts(self, name: str) -> list[TensorEntry]:
        """The tensors that hold a matrix."""
        return [self._entries[name]]

    def read(self, name: str) -> Weight:
        """A matrix, or floats of any shape, as the file has it."""
        entry = self._entries[name]
        return weight_from_bytes(entry.dtype, entry.shape, self._checkpoint.read(name))

    def in_file(self, name: str) -> RowsInFile:
        """A matrix, or the rows of an embedding, that stays where it is."""
        return RowsInFile(self._entries[name], self.format_of(name))

    def format_of(self, name: str) -> Format:
        """The format of a matrix."""
        dtype = self._entries[name].dtype
        return PLAIN[dtype] if dtype in PLAIN else FORMATS[dtype]

    def slices(self, name: str, number: int, start: int, stop: int) -> list[TensorEntry]:
        """The parts of tensors that hold rows start..stop of matrix `number` of a stack."""
        return [part.of(number).rows(start, stop) for part in self.parts(name)]

    def matrix(self, format_: Format, shape: tuple[int, int], raw: list[torch.Tensor]) -> PackedTensor:
        """The matrix from the raw bytes of its tensors."""
        (codes,) = raw
        return PackedTensor(format_, shape, codes.view(shape[0], -1))
