"""Notes operations on latents: parts of vectors, matrices of heads, attention to what all heads share."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from quant.errors import FormatError
from quant.formats.rows import EncodedRows, Rows, bytes_of, hadamard
from quant.kernels.cpu.cache_notes import KvPlace
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.kv_notes import KvNotes
from quant.kernels.cuda.latent_attention import SHARES, check_attends
from quant.kernels.cuda.products import PLAIN
from quant.kernels.cuda.row_tasks import IN_RING


class LatentNotes(KvNotes):
    """And what families with latents have besides."""

    def part(self, x: Buffer, parts: int, first: int, width: int) -> Buffer:
        """Columns first .. first + width of each of x's parts."""
        return self._to(parts * width, "part", x=x, parts=parts, first=first, cols=width, factor=1.0)

    def join(self, x: Buffer, y: Buffer, parts: int) -> Buffer:
        """Each of x's parts, and beside it the same of y's."""
        return self._to(x.width + y.width, "join", x=x, y=y, parts=parts)

    def batched_linear(self, x: Buffer, weights: torch.Tensor) -> Buffer:
        """Plain weights `[n, rows, cols]`, each times its own columns of x, side by side."""
        return self._heads(x, weights, len(weights))

    def append(self, keys: Buffer, values: Buffer | None, place: KvPlace) -> None:
        """Write keys and values to the cache, each row at its slot and position."""
        if values is not None:
            return super().append(keys, values, place)
        self._store(keys, _latents(place), IN_RING, 1)

    def attend(
        self,
        q: Buffer,
        place: KvPlace,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        chosen: Buffer | None = None,
    ) -> Buffer:
        """Attention of each row over what its slot holds up to its position, or over what is chosen of it."""
        if bytes_of(place.values).data_ptr() != bytes_of(place.keys).data_ptr():
            return super().attend(q, place, window, sinks, chosen)
        latents = _latents(place)
        if window is not None or sinks is not None:
            raise FormatError("no Triton kernel attends to a window of latents")
        nothing = torch.full((q.width // latents.shape[2],), -math.inf)
        return self._attend_latents(q, None, nothing, 0, latents, chosen, 1, place.values.shape[3])

    def _attend_latents(
        self,
        q: Buffer,
        rings: Rows | None,
        sink: torch.Tensor,
        window: int,
        entries: Rows,
        chosen: Buffer | None,
        every: int,
        value_dim: int,
    ) -> Buffer:
        """Attention over a window and all entries, or those chosen: see `LatentAttention`."""
        heads = len(sink)
        check_attends(rings, value_dim)
        check_attends(entries, value_dim)
        ins = {
            "q": q, "rings": rings, "sink": self._floats(sink), "window": window, "entries": entries,
            "chosen": chosen, "every": every, "scale": entries.shape[2] ** -0.5,
            "parts": self.buffer(heads * value_dim, rows=SHARES),
            "stats": self.buffer(heads * 2, rows=SHARES),
        }  # fmt: skip
        sees = (bytes_of(entries),) if rings is None else (bytes_of(rings), bytes_of(entries))
        out = self.buffer(heads * value_dim)
        self._note(Noted("attend", ins, {"out": out}, sees=sees))
        return out

    def _store(self, x: Buffer, to: Rows, stored: int, ratio: int, heads: int = 1) -> None:
        if isinstance(to, EncodedRows) and to.format.turned:
            x, to = self._turned(x, to)
        super()._store(x, to, stored, ratio, heads)

    def _turned(self, x: Buffer, rows: EncodedRows) -> tuple[Buffer, EncodedRows]:
        """Vectors of x by the Hadamard matrix, as a format wants them, and the format behind that."""
        dim = rows.format.dim
        matrix = hadamard(torch.eye(dim)).unsqueeze(0)
        x = self._heads(x, matrix.to(self.device), x.width // dim)
        return x, EncodedRows(rows.codes, replace(rows.format, turned=False), rows.columns)

    def _heads(self, x: Buffer, weights: torch.Tensor, heads: int) -> Buffer:
        if weights.dtype not in PLAIN or not weights.is_contiguous():
            raise FormatError(f"{weights.dtype}: no Triton kernel multiplies heads with it")
        width = heads * int(weights.shape[1])
        return self._to(width, "heads", x=x, weight=weights, heads=heads, factor=1.0)


def _latents(place: KvPlace) -> Rows:
    """What all heads share, `[slots, capacity, dim]`. Raises FormatError."""
    if place.keys.shape[1] != 1 or place.ring is not None:
        raise FormatError("no Triton kernel keeps latents of several heads, or in rings")
    return place.keys[:, 0]
