"""The launches of a recorded V4.1 step with its published widths: described, on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quant.formats.four_bit import FourBit
from quant.formats.fp8 import FP8_32, Fp8
from quant.formats.kv import EXACT, GroupedRows, v41_rows
from quant.formats.kv_names import KvFormat
from quant.formats.mxfp4 import MXFP4
from quant.formats.rows import RowFormat, Rows, rows_in, stored_as
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.chains import Noted
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.launch import Launch
from quant.kernels.cuda.lowering import Places
from quant.kernels.cuda.mailbox import Mailbox
from quant.kernels.cuda.noted import fused
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.cuda.schedule import LAUNCHES, scheduled
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.interface import NO_EXTRAS, ExpertWeights
from quant.kernels.layers import RoutingRule
from quant.packed import PackedTensor

HIDDEN, WIDTH, Q_LORA, HEADS, DIM, GROUPS, O_LORA = 5120, 2304, 1280, 64, 512, 8, 1024
STREAMS, EXPERTS, INDEX_HEADS, INDEX_DIM, WINDOW, PAIRS = 4, 384, 32, 128, 128, 32
TOP_K, CHOSEN, BLOCK, BLOCKS, MAX_ROWS, SLOTS, ENTRIES = 6, 512, 64, 128, 16, 4, 65536
META = torch.device("meta")
ACTIVATION = 10.0, NO_EXTRAS
RULE = RoutingRule(TOP_K, "sqrt softplus", is_renormalised=True, epsilon=1e-20, factor=1.5)


def described(format_: Fp8 | FourBit, rows: int, cols: int) -> PackedTensor:
    """A weight with a shape and no bytes."""
    bytes_of_codes = cols if format_ is FP8_32 else cols // 2
    codes = torch.empty(rows, bytes_of_codes, dtype=torch.uint8, device=META)
    scales = torch.empty(format_.scale_shape(rows, cols), dtype=torch.uint8, device=META)
    return PackedTensor(format_, (rows, cols), codes, scales)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def kept(count: int, dim: int, form: RowFormat | None) -> Rows:
    """So many rows of every slot, in a format."""
    width, dtype = stored_as(dim, form)
    return rows_in(floats(SLOTS, count, width, dtype=dtype), form)


def expert_slots() -> tuple[torch.Tensor, SlotsOnGpu]:
    """A layer's table of places, and the slots."""
    places = torch.empty(1, EXPERTS, dtype=torch.int64, device=META)
    matrices = (described(MXFP4, *shape) for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    return places[0], SlotsOnGpu(places, ExpertWeights(*matrices), 0)


class Layer:
    """Notes one layer with everything that a layer may have."""

    def __init__(self, entries: int = ENTRIES, rows: GroupedRows = EXACT) -> None:
        self._rows = rows
        self.recorder = GpuRecorder(TritonKernels(META), MAX_ROWS)
        self.recorder.layer = 0
        self._entries = entries

    def groups(self) -> list[list[Noted]]:
        """Its operations in the order of their launches."""
        r = self.recorder
        source = r.input(HIDDEN)
        streams, pre = r.repeat(source, STREAMS), r.constant(torch.ones(STREAMS))
        table = r.input(6144)
        (kv,) = r.linears(table, [described(FP8_32, HIDDEN * (STREAMS + 1), 6144)])
        streams = r.engram(streams, kv, floats(STREAMS, HIDDEN), 1e-6)
        mix = self._mix(streams)
        x = r.norm(r.weighted_sum(streams, pre), floats(HIDDEN), 1e-6)
        streams = r.mix_streams(streams, self._attention(x), *mix[1:])
        mix = self._mix(streams)
        x = r.norm(r.weighted_sum(streams, mix[0]), floats(HIDDEN), 1e-6)
        streams = r.mix_streams(streams, self._experts(x), *mix[1:])
        (result,) = r.linears(
            r.norm(r.weighted_sum(streams, mix[0]), floats(HIDDEN), 1e-6),
            [floats(129280, HIDDEN, dtype=torch.bfloat16)],
        )
        r._kept.append(result)
        return scheduled(fused(r._noted, r._kept))

    def _mix(self, streams: Buffer) -> tuple[Buffer, Buffer, Buffer]:
        count = (2 + STREAMS) * STREAMS
        fn = floats(count, STREAMS * HIDDEN)
        return self.recorder.mix(streams, fn, floats(count), floats(count), 20, 1e-6, 1e-20)

    def _attention(self, x: Buffer) -> Buffer:
        r = self.recorder
        qr, kv = r.linears(x, [described(FP8_32, Q_LORA, HIDDEN), described(FP8_32, DIM, HIDDEN)])
        qr, kv = r.norm(qr, floats(Q_LORA), 1e-20), r.norm(kv, floats(DIM), 1e-20)
        (q,) = r.linears(qr, [described(FP8_32, HEADS * DIM, Q_LORA)])
        turns = r.turns(torch.zeros(PAIRS))
        q, kv = r.rotate(q, turns, HEADS), r.rotate(kv, turns, 1)
        keys = kept(self._entries, INDEX_DIM, self._rows.index_keys)
        entries = kept(self._entries, DIM, self._rows.entries)
        rings, gates = floats(SLOTS, 17, DIM), floats(SLOTS, 17, DIM)
        plain = [floats(DIM, HIDDEN, dtype=torch.bfloat16) for _ in range(2)]
        raw, gate = r.linears(x, plain)
        r.ring(raw, rings)
        r.ring(gate, gates)
        latent = r.norm(r.pool(rings, gates, 2), floats(DIM), 1e-20)
        (key,) = r.linears(latent, [floats(INDEX_DIM, DIM, dtype=torch.bfloat16)])
        key = r.norm(key, floats(INDEX_DIM), 1e-20)
        of_group = r.turns(torch.zeros(PAIRS), unit=2)
        r.entry(r.rotate(latent, of_group, 1), entries, 2)
        r.entry(r.rotate(key, of_group, 1), keys, 2)
        (queries,) = r.linears(qr, [described(FP8_32, INDEX_HEADS * INDEX_DIM, Q_LORA)])
        (weights,) = r.linears(x, [floats(INDEX_HEADS, HIDDEN, dtype=torch.bfloat16)])
        selector = Selector(CHOSEN, BLOCK, BLOCKS)
        queries, weights = r.rotate(queries, turns, INDEX_HEADS), r.scale(weights, 0.1)
        chosen, pool = r.select(queries, weights, keys, 2, selector, None, makes_pool=True)
        r.select(queries, weights, keys, 2, selector, pool, makes_pool=False)
        window = kept(WINDOW + 16, DIM, self._rows.window)
        r.ring(kv, window)
        out = r.attend_sparse(q, window, floats(HEADS), WINDOW, entries, chosen)
        out = r.rotate(out, r.turns(torch.zeros(PAIRS), backwards=True), HEADS)
        wo_a = [described(FP8_32, O_LORA, HEADS * DIM // GROUPS) for _ in range(GROUPS)]
        (y,) = r.linears(r.blocks(out, wo_a), [described(FP8_32, HIDDEN, GROUPS * O_LORA)])
        return y

    def _experts(self, x: Buffer) -> Buffer:
        r = self.recorder
        (logits,) = r.linears(x, [floats(EXPERTS, HIDDEN, dtype=torch.bfloat16)])
        table, slots = expert_slots()
        ids, weights = r.route(logits, floats(EXPERTS), RULE, table)
        shared = [described(FP8_32, WIDTH, HIDDEN) for _ in range(2)]
        gate, up = r.linears(x, shared)
        (y,) = r.linears(r.gated(gate, up, 10.0), [described(FP8_32, HIDDEN, WIDTH)])
        box = Mailbox(1, MAX_ROWS, TOP_K, HIDDEN, pinned=False)
        return r.add(r.experts(x, ids, weights, slots, ACTIVATION, box, 0, ids), y)


def shared_groups() -> list[list[Noted]]:
    """What another GPU does for a layer."""
    recorder = GpuRecorder(TritonKernels(META), MAX_ROWS)
    table, slots = expert_slots()
    box = Mailbox(1, MAX_ROWS, TOP_K, HIDDEN, pinned=False, others=["cuda:1"])
    x = recorder.serve(slots, table, ACTIVATION, box, 0, 1)
    return scheduled(fused(recorder._noted, [x]))


def step_launches() -> Iterator[Launch]:
    """What a step starts for one row, and for 16, with KV in some formats; then what another GPU starts."""
    forms: tuple[KvFormat, ...] = ("float32", "vendor", "fp8")
    for form in forms:
        yield from launches_of(Layer(rows=v41_rows(form, DIM, 2 * PAIRS, INDEX_DIM)).groups())
    yield from launches_of(shared_groups())


def launches_of(groups: list[list[Noted]]) -> Iterator[Launch]:
    """The launches of groups of operations."""
    places = Places(
        torch.empty(1 << 32, dtype=torch.uint8, device=META),
        torch.empty(1 + 2 * MAX_ROWS, dtype=torch.int64, device=META),
        MAX_ROWS,
    )
    for rows in (1, 16):
        for group in groups:
            if LAUNCHES.get(group[0].kind, 1):
                yield from places.launches(group, rows)
