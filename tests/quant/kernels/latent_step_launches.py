"""The launches of recorded steps of V4 and of families with latent attention, with published widths:
described, on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quant.formats.fp8 import FP8_32, FP8_128
from quant.formats.kv import index_key_rows, latent_rows, v4_rows
from quant.formats.kv_names import KvFormat
from quant.formats.rows import first_columns, rows_in, stored_as
from quant.kernels.cpu.cache_notes import KvPlace, Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.heads import Columns, move_launch
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.mailbox import Mailbox
from quant.kernels.cuda.noted import fused
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.schedule import scheduled
from quant.kernels.interface import NO_EXTRAS
from quant.kernels.layers import RoutingRule
from quant.packed import PackedTensor
from tests.quant.kernels.step_launches import (
    MAX_ROWS,
    META,
    SLOTS,
    described,
    expert_slots,
    floats,
    kept,
    launches_of,
)

BF16 = torch.bfloat16


def fp8(rows: int, cols: int) -> PackedTensor:
    """A matrix in FP8 with a float32 scale for 128 x 128."""
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=META)
    return PackedTensor(FP8_128, (rows, cols), codes, floats(*FP8_128.scale_shape(rows, cols)))


class V4Layer:
    """Notes layers of V4-Pro's widths: one that chooses among entries, one that sees all, the last mix."""

    hidden, heads, dim, q_lora, index_heads, index_dim, streams = 7168, 128, 512, 1536, 64, 128, 4

    def __init__(self, kv_format: KvFormat) -> None:
        self.recorder = GpuRecorder(TritonKernels(META), MAX_ROWS)
        self._rows = v4_rows(kv_format, self.dim, 64, self.index_dim)
        self._turns = self.recorder.turns(torch.zeros(32))

    def groups(self) -> list[list[Noted]]:
        """Their operations in the order of their launches."""
        r, hidden, n = self.recorder, self.hidden, self.streams
        source = r.input(hidden)
        streams = r.repeat(source, n)
        for ratio in (4, 128):
            mix = r.mix(streams, floats(24, n * hidden), floats(24), floats(24), 20, 1e-6, 1e-6)
            x = r.norm(r.weighted_sum(streams, mix[0]), floats(hidden), 1e-6)
            streams = r.mix_streams(streams, self._attention(x, ratio), *mix[1:])
        (logits,) = r.linears(x, [floats(384, hidden, dtype=BF16)])
        ids, (table, slots) = r.input(6, torch.int64), expert_slots()
        rule = RoutingRule(6, "sqrt softplus", is_renormalised=True, epsilon=1e-20, factor=1.5)
        shares = r.weigh(logits, ids, rule, table)
        box = Mailbox(1, MAX_ROWS, 6, hidden, pinned=False)
        x = r.input(5120)  # of which those experts are
        y = r.add(r.experts(x, ids, shares, slots, (10.0, NO_EXTRAS), box, 0, None), x)
        pre = r.read_mix(streams, floats(n, n * hidden), floats(n), floats(n), 1e-6, 1e-6)
        result = r.norm(r.weighted_sum(streams, pre), floats(hidden), 1e-6)
        return scheduled(fused(r._noted, [source, result, y]))

    def _compressed(self, x: Buffer, dim: int, ratio: int, count: int, kind: int) -> object:
        r, overlaps = self.recorder, ratio == 4
        width, places = dim * (1 + overlaps), ratio * (1 + overlaps) + 15
        rings = floats(SLOTS, places, width), floats(SLOTS, places, width)
        kv, gate = r.linears(x, [floats(width, self.hidden, dtype=BF16) for _ in range(2)])
        r.ring(kv, rings[0])
        r.ring(r.bias(gate, floats(ratio, width)), rings[1])
        latent = r.norm(r.pool(*rings, ratio, overlaps=overlaps), floats(dim), 1e-6)
        entries = kept(count, dim, self._rows.index_keys if kind else self._rows.entries)
        r.entry(r.rotate(latent, r.turns(torch.zeros(32), unit=ratio), 1), entries, ratio)
        return entries

    def _attention(self, x: Buffer, ratio: int) -> Buffer:
        r = self.recorder
        qr, kv = r.linears(x, [described(FP8_32, self.q_lora, self.hidden), fp8(self.dim, self.hidden)])
        qr, kv = r.norm(qr, floats(self.q_lora), 1e-6), r.norm(kv, floats(self.dim), 1e-6)
        (q,) = r.linears(qr, [fp8(self.heads * self.dim, self.q_lora)])
        q = r.rotate(r.norm(q, floats(self.dim), 1e-6), self._turns, self.heads)
        count, chosen = 1 << 18, None
        entries = self._compressed(x, self.dim, ratio, count // ratio, 0)
        if ratio == 4:
            keys = self._compressed(x, self.index_dim, ratio, count // ratio, 1)
            (queries,) = r.linears(qr, [fp8(self.index_heads * self.index_dim, self.q_lora)])
            (weights,) = r.linears(x, [floats(self.index_heads, self.hidden, dtype=BF16)])
            queries = r.rotate(queries, self._turns, self.index_heads)
            selector = Selector(1024, 0, 0)
            chosen, _ = r.select(queries, weights, keys, ratio, selector, None, makes_pool=False)  # type: ignore[arg-type]
        window = kept(128 + 16, self.dim, self._rows.window)
        r.ring(r.rotate(kv, self._turns, 1), window)
        every = None if chosen is not None else ratio
        out = r.attend_sparse(q, window, floats(self.heads), 128, entries, chosen, every)  # type: ignore[arg-type]
        out = r.rotate(out, r.turns(torch.zeros(32), backwards=True), self.heads)
        (y,) = r.linears(out, [fp8(self.hidden, self.heads * self.dim)])
        return y


class LatentLayer:
    """Notes a layer of V3's widths, or of V3.2's, which chooses among tokens; then its router and experts."""

    hidden, heads, rank, q_rank, plain, dims, values, experts = 7168, 128, 512, 1536, 128, 64, 128, 256
    index_heads, index_dim, top_k = 64, 128, 2048

    def __init__(self, kv_format: KvFormat, *, is_indexed: bool, capacity: int = 1 << 17) -> None:
        self.recorder = GpuRecorder(TritonKernels(META), MAX_ROWS)
        self._format = kv_format
        self._is_indexed = is_indexed
        self._capacity = capacity

    def groups(self) -> list[list[Noted]]:
        """Its operations in the order of their launches."""
        r = self.recorder
        source = r.input(self.hidden)
        x = r.add(source, self._attention(r.norm(source, floats(self.hidden), 1e-6)))
        normed = r.norm(x, floats(self.hidden), 1e-6)
        (logits,) = r.linears(normed, [floats(self.experts, self.hidden, dtype=BF16)])
        rule = RoutingRule(8, "sigmoid", (8, 4, 2), True, 1e-20, 2.5)
        chosen = r.route(logits, floats(self.experts), rule)
        return scheduled(fused(r._noted, [source, x, *chosen]))

    def _attention(self, x: Buffer) -> Buffer:
        r, heads, dim = self.recorder, self.heads, self.rank + self.dims
        turns = r.turns(torch.zeros(self.dims // 2))
        of_queries, kv = r.linears(x, [fp8(self.q_rank, self.hidden), fp8(dim, self.hidden)])
        of_queries = r.norm(of_queries, floats(self.q_rank), 1e-6)
        (q,) = r.linears(of_queries, [fp8(heads * (self.plain + self.dims), self.q_rank)])
        q = r.scale(q, 1.5)
        made = r.batched_linear(
            r.part(q, heads, 0, self.plain), floats(heads, self.rank, self.plain, dtype=BF16)
        )
        turned = r.rotate(r.part(q, heads, self.plain, self.dims), turns, heads)
        latent = r.norm(r.part(kv, 1, 0, self.rank), floats(self.rank), 1e-6)
        shared = r.rotate(r.part(kv, 1, self.rank, self.dims), turns, 1)
        form = latent_rows(self._format, self.rank, self.dims)
        cols, dtype = stored_as(dim, form)
        held = rows_in(floats(SLOTS, 1, self._capacity, cols, dtype=dtype), form)
        place = KvPlace(held, first_columns(held, self.rank))
        chosen = self._choice(x, of_queries, turns) if self._is_indexed else None
        r.append(r.join(latent, shared, 1), None, place)
        seen = r.attend(r.join(made, turned, heads), place, chosen=chosen)
        seen = r.batched_linear(seen, floats(heads, self.values, self.rank, dtype=BF16))
        (out,) = r.linears(seen, [fp8(self.hidden, heads * self.values)])
        return out

    def _choice(self, x: Buffer, of_queries: Buffer, turns: Buffer) -> Buffer:
        r, dim = self.recorder, self.index_dim
        (queries,) = r.linears(of_queries, [fp8(self.index_heads * dim, self.q_rank)])
        keys, weights = r.linears(x, [fp8(dim, self.hidden), floats(self.index_heads, self.hidden)])
        keys = r.norm(r.batched_linear(keys, floats(1, dim, dim)), floats(dim), 1e-6)
        keys = r.rotate(r.bias(keys, floats(dim)), turns, 1)
        held = kept(self._capacity, dim, index_key_rows(self._format, dim))
        r.entry(keys, held, 1)
        queries, weights = r.rotate(queries, turns, self.index_heads), r.scale(weights, 0.1)
        selector = Selector(self.top_k, 1, 0)
        return r.select(queries, weights, held, 1, selector, None, makes_pool=False)[0]


def latent_launches() -> Iterator[Launch]:
    """What steps of these models start for one row, and for 16, with KV in some formats; and what they would
    if parts of vectors were moved."""
    yield move_launch(Columns(floats(16, 1024), 0, 64), Columns(floats(16, 1024), 0, 64), 16, 64, 16, 1.0)
    forms: tuple[KvFormat, ...] = ("float32", "vendor", "fp8")
    for form in forms:
        yield from launches_of(V4Layer(form).groups())
        yield from launches_of(LatentLayer(form, is_indexed=True).groups())
    yield from launches_of(LatentLayer("float32", is_indexed=False).groups())
    yield from launches_of(LatentLayer("bf16", is_indexed=False).groups())
