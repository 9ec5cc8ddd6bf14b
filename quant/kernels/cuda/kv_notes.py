"""Notes operations of families that keep keys and values of all heads, or of the last tokens in rings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch

from quant.errors import FormatError
from quant.formats.rows import bytes_of
from quant.kernels.cpu.cache_notes import KvPlace, StatePlace
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.kv_attention import kv_parts
from quant.kernels.cuda.notes import GpuNotes
from quant.kernels.cuda.row_codes import RowCodes
from quant.kernels.cuda.row_tasks import IN_RING, NOWHERE
from quant.kernels.layers import DeltaRule


@dataclass
class KvNotes(GpuNotes):
    """Those methods of `StepRecorder`. All raise FormatError for what there is no kernel for."""

    def bias(self, x: Buffer, rows: torch.Tensor) -> Buffer:
        """x + a row `[width]`, of a product, which adds it itself; or of several, that of the position."""
        if rows.numel() > x.width:
            return self._to(x.width, "bias", x=x, rows=self._floats(rows))
        op = self._noted[-1] if self._noted else None
        for op in reversed(self._noted):
            if any(out is x for out in op.outs.values()):
                break
        is_product = op is not None and op.kind == "product" and op.is_plain("bias", "column", "up")
        if op is not None and op.kind in ("read", "latent"):  # a norm, which adds it itself
            return self._to(x.width, "bias", x=x, rows=self._floats(rows))
        if op is None or not is_product or rows.numel() != x.width:
            raise FormatError("no Triton kernel adds a bias to anything but products")
        op.ins["bias"] = self._floats(rows.flatten())
        return x

    def clip(self, x: Buffer, limit: float) -> Buffer:
        """x cut to -limit .. limit."""
        return self._to(x.width, "latent", x=x, limit=limit, heads=1, stored=NOWHERE)

    def append(self, keys: Buffer, values: Buffer | None, place: KvPlace) -> None:
        """Write keys and values to the cache, each row at its slot and position."""
        assert values is not None
        heads = place.keys.shape[1]
        self._store(keys, place.keys, IN_RING, 1, heads)
        self._store(values, place.values, IN_RING, 1, heads)

    def attend(
        self,
        q: Buffer,
        place: KvPlace,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        chosen: Buffer | None = None,
    ) -> Buffer:
        """Attention of each row over what its slot holds up to its position."""
        _, _, places, dim = place.keys.shape
        if chosen is not None or place.values.shape[3] != dim:
            raise FormatError("no Triton kernel attends to latents of which values are a part")
        RowCodes.of(place.keys)  # raises FormatError
        parts = kv_parts(places, window, self.max_rows)
        sees = bytes_of(place.keys), bytes_of(place.values)
        ins = {
            "q": q, "keys": place.keys, "values": place.values, "window": window,
            "sinks": self._floats(sinks), "scale": dim**-0.5, "parts": self.buffer(q.width, rows=parts),
            "stats": self.buffer(q.width // dim * 2, rows=parts),
        }  # fmt: skip
        out = self.buffer(q.width)
        self._note(Noted("attend_kv", ins, {"out": out}, sees=sees))
        return out

    def gate(self, x: Buffer, gates: Buffer) -> Buffer:
        """Each of x's parts times the sigmoid of its gate."""
        _has_none("gates outputs")

    def convolve(self, x: Buffer, weights: torch.Tensor, place: StatePlace) -> Buffer:
        """Each row convolved with those before it in its slot."""
        _has_none("convolves a sequence's rows")

    def delta_rule(self, x: Buffer, a: Buffer, b: Buffer, rule: DeltaRule, place: StatePlace) -> Buffer:
        """The state of each row's slot, changed and asked."""
        _has_none("changes states by the delta rule")


def _has_none(what: str) -> NoReturn:
    raise FormatError(f"no Triton kernel {what} in a recorded step")
