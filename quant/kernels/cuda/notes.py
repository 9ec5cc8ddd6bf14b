"""What all parts of a GPU's recorder share: operations noted so far, and how one is noted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from quant.formats.rows import EncodedRows, Rows
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.row_codes import check_has_kernels
from quant.kernels.cuda.row_tasks import AS_ENTRY


@dataclass
class GpuNotes:
    """Operations of up to `max_rows` rows; those that are noted now belong to `layer`."""

    kernels: TritonKernels
    max_rows: int
    layer: int | None = None
    _noted: list[Noted] = field(default_factory=list)
    _kept: list[Buffer] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where its programs run."""
        return self.kernels.device

    def buffer(self, width: int, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Buffer:
        """A buffer for what the next operation writes, which may be a hand-over."""
        return Buffer(width, 0, 0, dtype, rows)

    def _note(self, op: Noted) -> None:
        op.layer = self.layer
        self._noted.append(op)

    def _to(self, width: int, kind: str, **ins: Any) -> Buffer:
        out = self.buffer(width)
        self._note(Noted(kind, ins, {"out": out}))
        return out

    def _store(self, x: Buffer, to: Rows, stored: int, ratio: int, heads: int = 1) -> None:
        """Note that x goes to `to` `[slots, (heads,) places, width]`."""
        if isinstance(to, EncodedRows):
            check_has_kernels(to.format)
            ins = {"x": x, "state": to, "ratio": ratio if stored == AS_ENTRY else None}
            self._note(Noted("encode", ins, {}, changes=(to.codes,)))
            return
        ins = {"x": x, "state": to, "stored": stored, "ratio": ratio, "heads": heads}
        self._note(Noted("latent", ins, {}, changes=(to,)))

    def _floats(self, values: torch.Tensor | None) -> Any:
        """Values on the device as kernels read them: float32, one behind the other."""
        return None if values is None else values.to(self.device).float().contiguous()
