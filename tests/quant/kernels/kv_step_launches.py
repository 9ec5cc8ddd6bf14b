"""The launches of recorded steps of families that keep keys and values, with published widths: described, on
torch's meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quant.formats.fp8 import FP8_128
from quant.formats.kv import plain_rows
from quant.formats.kv_names import KvFormat
from quant.formats.mxfp4 import MXFP4
from quant.formats.rows import rows_in, stored_as
from quant.kernels.cpu.cache_notes import KvPlace
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.mailbox import Mailbox
from quant.kernels.cuda.noted import fused
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.schedule import scheduled
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.interface import ExpertBiases, ExpertExtras, ExpertWeights
from quant.kernels.layers import RoutingRule
from quant.packed import PackedTensor
from tests.quant.kernels.step_launches import MAX_ROWS, META, SLOTS, described, floats, launches_of


@dataclass(frozen=True)
class Widths:
    """A layer; is_fp8: its matrices are in FP8 with float32 scales, else bfloat16."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    width: int
    experts: int
    rule: RoutingRule
    pairs: int
    qk_norm: str = "none"
    clip: float | None = None
    window: int | None = None
    has_biases: bool = False
    has_shared: bool = False
    is_fp8: bool = False
    extras: ExpertExtras | None = None
    context: int = 4096


QWEN3_235B = Widths(
    4096, 64, 4, 128, 1536, 128, RoutingRule(8, "softmax", None, True), 64, "head", is_fp8=True
)
GLM_45 = Widths(
    5120, 96, 8, 128, 1536, 160, RoutingRule(8, "sigmoid", (1, 1, 1), True, 1e-20, 2.5), 32, "head",
    has_biases=True, has_shared=True,
)  # fmt: skip
MINIMAX_M2 = Widths(
    3072, 48, 8, 128, 1536, 256, RoutingRule(8, "sigmoid", None, True), 32, "whole", is_fp8=True
)
OLMOE = Widths(2048, 16, 16, 128, 1024, 64, RoutingRule(8, "softmax"), 64, "whole", clip=8.0)
GPT_OSS = Widths(
    2880, 64, 8, 64, 2880, 128, RoutingRule(4, "chosen softmax"), 32, window=128, has_biases=True,
    extras=ExpertExtras(1.702, 1.0),
)  # fmt: skip
MODELS = {
    "Qwen3-235B-A22B": QWEN3_235B, "GLM-4.5": GLM_45, "MiniMax-M2": MINIMAX_M2, "OLMoE": OLMOE,
    "gpt-oss-120b": GPT_OSS,
}  # fmt: skip


class KvLayer:
    """Notes a layer of these widths, with what comes before and after it."""

    def __init__(self, widths: Widths, kv_format: KvFormat = "float32") -> None:
        self.recorder = GpuRecorder(TritonKernels(META), MAX_ROWS)
        self.recorder.layer = 0
        self._w = widths
        self._kv_format = kv_format

    def groups(self) -> list[list[Noted]]:
        """Its operations in the order of their launches."""
        r, w = self.recorder, self._w
        source = r.input(w.hidden)
        turns = r.turns(torch.zeros(w.pairs))
        x = r.add(source, self._attention(r.norm(source, floats(w.hidden), 1e-6), turns))
        x = r.add(x, self._experts(r.norm(x, floats(w.hidden), 1e-6)))
        (result,) = r.linears(
            r.norm(x, floats(w.hidden), 1e-6), [floats(150_000, w.hidden, dtype=torch.bfloat16)]
        )
        r._kept.append(result)
        return scheduled(fused(r._noted, r._kept))

    def _matrix(self, rows: int, cols: int) -> torch.Tensor | PackedTensor:
        if not self._w.is_fp8:
            return floats(rows, cols, dtype=torch.bfloat16)
        codes = torch.empty(rows, cols, dtype=torch.uint8, device=META)
        return PackedTensor(FP8_128, (rows, cols), codes, floats(*FP8_128.scale_shape(rows, cols)))

    def _attention(self, x: Buffer, turns: Buffer) -> Buffer:
        r, w = self.recorder, self._w
        widths = w.heads * w.dim, w.kv_heads * w.dim, w.kv_heads * w.dim
        q, k, v = r.linears(x, [self._matrix(rows, w.hidden) for rows in widths])
        if w.has_biases:
            q, k, v = (r.bias(value, floats(value.width)) for value in (q, k, v))
        if w.qk_norm != "none":
            q, k = (
                r.norm(value, floats(w.dim if w.qk_norm == "head" else value.width), 1e-6) for value in (q, k)
            )
        if w.clip is not None:
            q, k, v = (r.clip(value, w.clip) for value in (q, k, v))
        q, k = r.rotate(q, turns, w.heads), r.rotate(k, turns, w.kv_heads)
        form = plain_rows(self._kv_format, w.dim)
        cols, dtype = stored_as(w.dim, form)
        places = w.context if w.window is None else w.window + 16
        keys, values = (  # with addresses, which tell one from the other
            rows_in(torch.empty(SLOTS, w.kv_heads, places, cols, dtype=dtype), form) for _ in range(2)
        )
        place = KvPlace(keys, values, None if w.window is None else places)
        r.append(k, v, place)
        seen = r.attend(q, place, w.window, floats(w.heads) if w.extras else None)
        (out,) = r.linears(seen, [self._matrix(w.hidden, w.heads * w.dim)])
        return r.bias(out, floats(w.hidden)) if w.extras else out

    def _experts(self, x: Buffer) -> Buffer:
        r, w = self.recorder, self._w
        (logits,) = r.linears(x, [floats(w.experts, w.hidden, dtype=torch.bfloat16)])
        if w.extras is not None:
            logits = r.bias(logits, floats(w.experts))
        places = torch.empty(1, w.experts, dtype=torch.int64, device=META)
        shapes = (w.width, w.hidden), (w.width, w.hidden), (w.hidden, w.width)
        sample = ExpertWeights(*(described(MXFP4, *shape) for shape in shapes))
        slots = SlotsOnGpu(places, sample, 0)
        has_choice_bias = w.rule.score == "sigmoid"
        ids, weights = r.route(logits, floats(w.experts) if has_choice_bias else None, w.rule, places[0])
        extras = w.extras or ExpertExtras()
        if w.extras is not None:
            wide, narrow = floats(w.experts, w.width), floats(w.experts, w.hidden)
            extras = ExpertExtras(extras.alpha, extras.shift, ExpertBiases(wide, wide, narrow))
        shared: Buffer | None = None
        if w.has_shared:
            gate, up = r.linears(x, [self._matrix(w.width, w.hidden) for _ in range(2)])
            (shared,) = r.linears(r.gated(gate, up, math.inf), [self._matrix(w.hidden, w.width)])
        box = Mailbox(1, MAX_ROWS, w.rule.top_k, w.hidden, pinned=False)
        limit = 7.0 if w.extras else math.inf
        out = r.experts(x, ids, weights, slots, (limit, extras), box, 0, None)
        return out if shared is None else r.add(out, shared)


def kv_launches() -> Iterator[Launch]:
    """What steps of these models start for one row, and for 16; and with KV in other formats."""
    for widths in MODELS.values():
        yield from launches_of(KvLayer(widths).groups())
    for form in ("fp8", "int8", "bf16"):
        yield from launches_of(KvLayer(QWEN3_235B, form).groups())
