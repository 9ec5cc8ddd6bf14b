"""Notes the operations of a decode step for one GPU, and makes a program of launches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quant.errors import FormatError
from quant.formats.rows import EncodedRows, Rows, bytes_of, row_format_of
from quant.kernels.cpu.cache_notes import Selector
from quant.kernels.cpu.program import Buffer, HandOver
from quant.kernels.cuda.attention import splits_of
from quant.kernels.cuda.chains import Fixed, Noted
from quant.kernels.cuda.latent_notes import LatentNotes
from quant.kernels.cuda.mailbox import Mailbox
from quant.kernels.cuda.products import check_multiplies
from quant.kernels.cuda.program import GpuProgram, arranged
from quant.kernels.cuda.row_codes import RowCodes
from quant.kernels.cuda.row_tasks import AS_ENTRY, IN_RING, NOWHERE
from quant.kernels.cuda.selection import CHANNELS_OF_CODES, COLUMNS, TILE, chunks_of
from quant.kernels.cuda.step_experts import SlotsOnGpu
from quant.kernels.cuda.streams import MixShape
from quant.kernels.interface import ExpertBiases, ExpertExtras, Weight
from quant.kernels.layers import RoutingRule


@dataclass
class GpuRecorder(LatentNotes):
    """`StepRecorder` for a GPU. Buffers are `[rows, width]` in its memory.

    All methods raise FormatError for what there is no kernel for.
    """

    _places: dict[int, Buffer] = field(default_factory=dict)  # of chosen experts, by the id of their ids

    # ------------------------------------------------------------------------------- beginning and end

    def input(self, width: int, dtype: torch.dtype = torch.float32) -> Buffer:
        """A buffer that is filled before each run."""
        buffer = self.buffer(width, dtype)
        self._kept.append(buffer)
        return buffer

    def hand_over(self, work: HandOver, reads: Sequence[Buffer], writes: Sequence[Buffer]) -> torch.Tensor:
        """A place where a run comes back to its caller: see `StepRecorder.hand_over`."""
        skip = torch.zeros(1, dtype=torch.int64)
        ins = {str(number): buffer for number, buffer in enumerate(reads)}
        outs = {str(number): buffer for number, buffer in enumerate(writes)}
        self._note(Noted("hand_over", ins, outs, work=work, skip=skip))
        return skip

    def finish(self, source: Buffer, result: Buffer, arena: torch.Tensor | None = None) -> GpuProgram:
        """The program of what was noted, from `source`, filled before each run, to `result`; in an arena of
        `nbytes` that programs which do not run at the same time share, if there is one."""
        return GpuProgram(self.kernels, self._noted, self._kept, source, result, self.max_rows, arena)

    def nbytes(self, source: Buffer, result: Buffer) -> int:
        """About what that program would hold: its buffers, without the tables of launches."""
        return arranged(self._noted, [*self._kept, source, result], self.max_rows)[1]

    # -------------------------------------------------------------------------------------- any model

    def norm(self, x: Buffer, weight: torch.Tensor | None, eps: float) -> Buffer:
        """x * rsqrt(mean(x^2) + eps) * weight; with a weight shorter than x, each such part by itself."""
        if weight is not None and len(weight) < x.width:
            heads, floats = x.width // len(weight), self._floats(weight)
            return self._to(x.width, "latent", x=x, weight=floats, eps=eps, heads=heads, stored=NOWHERE)
        return self._to(x.width, "read", x=x, pre=None, weight=self._floats(weight), eps=eps)

    def linears(self, x: Buffer, weights: Sequence[Weight]) -> list[Buffer]:
        """`x @ weight^T` for each weight."""
        for weight in weights:
            check_multiplies(weight)
        return [
            self._to(int(weight.shape[0]), "product", x=x, weight=weight, up=None, column=None, limit=0.0)
            for weight in weights
        ]

    def turns(self, frequencies: torch.Tensor, *, unit: int = 1, backwards: bool = False) -> Buffer:
        """Rotations of the rows' positions: see `StepRecorder.turns`."""
        by = frequencies.double().to(self.device)
        return self._to(2 * len(by), "turns", frequencies=by, unit=unit, backwards=backwards)

    def rotate(self, x: Buffer, turns: Buffer, heads: int) -> Buffer:
        """The last channels of each head turned."""
        if x.width // heads % 2:
            raise FormatError(f"heads of {x.width // heads} channels cannot be turned")
        return self._to(x.width, "latent", x=x, turns=turns, heads=heads, stored=NOWHERE)

    def gated(self, gate: Buffer, up: Buffer, limit: float) -> Buffer:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        return self._to(gate.width, "gated", x=gate, y=up, number=limit)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """x + y."""
        return self._to(x.width, "sum", x=x, y=y)

    def scale(self, x: Buffer, factor: float) -> Buffer:
        """x * factor."""
        return self._to(x.width, "times", x=x, number=factor)

    def route(
        self,
        logits: Buffer,
        bias: torch.Tensor | None,
        rule: RoutingRule,
        table: torch.Tensor | None = None,
    ) -> tuple[Buffer, Buffer]:
        """The experts that the logits choose, int64, and their weights; -1 in rows that are not alive.

        table  `[experts]` int64: what `experts` is to know of each chosen one, where it is called for these
               ids
        """
        outs = {"ids": self.buffer(rule.top_k, torch.int64), "weights": self.buffer(rule.top_k)}
        ins = {"x": logits, "bias": self._floats(bias), "rule": rule, "table": table}
        if table is not None:
            outs["places"] = self._places[id(outs["ids"])] = self.buffer(rule.top_k, torch.int64)
        self._note(Noted("route", ins, outs))
        return outs["ids"], outs["weights"]

    def weigh(
        self, logits: Buffer, ids: Buffer, rule: RoutingRule, table: torch.Tensor | None = None
    ) -> Buffer:
        """The weights of experts that were chosen otherwise, ids `[rows, top_k]` int64; table as in
        `route`."""
        if rule.score in ("softmax", "chosen softmax"):
            raise FormatError("no Triton kernel weighs experts by a softmax that it does not choose by")
        outs = {"weights": self.buffer(rule.top_k)}
        if table is not None:
            outs["places"] = self._places[id(ids)] = self.buffer(rule.top_k, torch.int64)
        self._note(Noted("weigh", {"x": logits, "ids": ids, "rule": rule, "table": table}, outs))
        return outs["weights"]

    def experts(
        self,
        x: Buffer,
        ids: Buffer,
        weights: Buffer,
        slots: SlotsOnGpu | None,
        activation: tuple[float, ExpertExtras],
        box: Mailbox,
        number: int,
        guesses: Buffer | None,
    ) -> Buffer:
        """The sum of the chosen experts' outputs, weighted, in the router's order.

        ids     of `route` with a table of places
        slots   where the GPU holds experts; None where it holds none
        activation  of the experts: the limit, and what is beyond it
        box     where choices that it does not hold are left, as the hand-over `number`, and answered
        guesses what a later layer is expected to choose, for whoever answers; None for no guess
        """
        places, top_k, state = self._places[id(ids)], ids.width, (box.outputs,)
        left: dict[str, Any] = {
            "left": x, "places": places, "box": box, "number": number, "guesses": guesses,
            "words": (box.post_word(number),),
        }  # fmt: skip
        self._note(Noted("mail", left, {}, changes=state))
        apart: Buffer | None = None
        if slots is not None:
            apart = self.buffer(top_k * x.width)
            held = self._held(slots, x, places, activation) | {"ids": ids}
            self._note(Noted("experts", held, {"apart": apart}))
        answers = {"apart": apart, "words": box.await_words(number)}
        self._note(Noted("await", answers, {}, changes=state))
        out = self.buffer(x.width)
        found = {"apart": apart, "weights": weights, "places": places, "mail": box.outputs, "y": None}
        self._note(Noted("add_up", found, {"out": out}, sees=state))
        return out

    def serve(
        self,
        slots: SlotsOnGpu,
        table: torch.Tensor,
        activation: tuple[float, ExpertExtras],
        box: Mailbox,
        number: int,
        answerer: int,
    ) -> Buffer:
        """Compute what the hand-over `number` of another GPU leaves to this one, its `answerer`, and answer.

        slots, table  where this GPU holds experts; of the layer, `[experts]` int64
        box           of the other GPU: its choices are read there, and outputs written

        Returns the inputs, `[rows, hidden]`, brought to this GPU.
        """
        (_, hidden), state = slots.sample.w1.shape, (box.outputs,)
        self._note(Noted("called", {"words": (box.call_word(number),)}, {}, changes=state))
        x, places = self.buffer(hidden), self.buffer(box.top_k, torch.int64)
        asked = {
            "box_ids": box.ids[number], "box_places": box.places[number], "inputs": box.inputs,
            "table": table, "answerer": answerer,
        }  # fmt: skip
        self._note(Noted("fetch", asked, {"x": x, "places": places}, changes=state))
        held = self._held(slots, x, places, activation) | {"ids": box.ids[number], "apart": box.outputs}
        self._note(Noted("experts", held, {}, changes=state))
        self._note(Noted("reply", {"words": (box.reply_word(number, answerer),)}, {}, changes=state))
        return x

    def _held(
        self, slots: SlotsOnGpu, x: Buffer, places: Buffer, activation: tuple[float, ExpertExtras]
    ) -> dict[str, Any]:
        """What it takes to compute experts that the GPU holds."""
        slots.check()
        limit, extras = activation
        biases = extras.biases
        if biases is not None:
            biases = ExpertBiases(*map(self._floats, (biases.gate, biases.up, biases.down)))
        inner = self.buffer(places.width * int(slots.sample.w1.shape[0]))
        return {
            "x": x, "places": places, "slots": slots, "inner": inner, "limit": limit,
            "extras": replace(extras, biases=biases),
        }  # fmt: skip

    # ----------------------------------------------------------------- parallel streams (mHC), Engram

    def constant(self, row: torch.Tensor) -> Buffer:
        """The same values `[width]` in every row."""
        held = row.float().repeat(self.max_rows, 1).to(self.device)
        return Fixed(len(row), 0, 0, held=held)

    def repeat(self, x: Buffer, n: int) -> Buffer:
        """x, n times side by side."""
        return self._to(n * x.width, "repeat", x=x, n=n)

    def weighted_sum(self, parts: Buffer, weights: Buffer) -> Buffer:
        """sum_i weights_i * part_i: as many parts side by side as there are weights."""
        width = parts.width // weights.width
        return self._to(width, "read", x=parts, pre=weights, weight=None, eps=None)

    def mix(
        self,
        streams: Buffer,
        fn: torch.Tensor,
        scale: torch.Tensor,
        base: torch.Tensor,
        iterations: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Buffer, Buffer, Buffer]:
        """pre, post and combine of hyper-connections: see `StepRecorder.mix`."""
        n = MixShape.n_of(len(scale))
        if n & (n - 1):
            raise FormatError(f"{n} streams are not a power of two")
        shape = MixShape(n, streams.width)
        parts = self.buffer(shape.splits * shape.padded)
        self._note(Noted("mixed", {"x": streams, "fn": self._floats(fn), "shape": shape}, {"parts": parts}))
        outs = {"pre": self.buffer(n), "post": self.buffer(n), "combine": self.buffer(n * n)}
        ins = {
            "parts": parts, "scale": self._floats(scale), "base": self._floats(base), "shape": shape,
            "iterations": iterations, "eps": eps, "norm_eps": norm_eps,
        }  # fmt: skip
        self._note(Noted("mix", ins, outs))
        return outs["pre"], outs["post"], outs["combine"]

    def read_mix(
        self,
        streams: Buffer,
        fn: torch.Tensor,
        scale: torch.Tensor,
        base: torch.Tensor,
        eps: float,
        norm_eps: float,
    ) -> Buffer:
        """How n streams are read, `[rows, n]`: as `mix`, of fn `[n, streams]` and nothing else."""
        n = len(scale)
        if n & (n - 1):
            raise FormatError(f"{n} streams are not a power of two")
        shape = MixShape(n, streams.width, is_reading=True)
        parts = self.buffer(shape.splits * shape.padded)
        self._note(Noted("mixed", {"x": streams, "fn": self._floats(fn), "shape": shape}, {"parts": parts}))
        ins = {
            "parts": parts, "scale": self._floats(scale), "base": self._floats(base), "shape": shape,
            "eps": eps, "norm_eps": norm_eps,
        }  # fmt: skip
        pre = self.buffer(n)
        self._note(Noted("mix", ins, {"pre": pre}))
        return pre

    def mix_streams(self, streams: Buffer, y: Buffer, post: Buffer, combine: Buffer) -> Buffer:
        """post_j * y + sum_i combine[i, j] * stream_i."""
        return self._to(streams.width, "write", x=streams, y=y, post=post, combine=combine)

    def engram(self, streams: Buffer, kv: Buffer, qk: torch.Tensor, eps: float) -> Buffer:
        """Streams and the gated value of table rows; kv has a key for each stream, then the value."""
        return self._to(streams.width, "engram", x=streams, kv=kv, qk=self._floats(qk), eps=eps)

    # ------------------------------------------------------------- windows and compressed entries

    def blocks(self, x: Buffer, weights: Sequence[Weight]) -> Buffer:
        """Weights of one shape, each times its own columns of x, side by side."""
        out = self.buffer(int(weights[0].shape[0]) * len(weights))
        for number, weight in enumerate(weights):
            check_multiplies(weight)
            ins = {"x": x, "weight": weight, "up": None, "column": number, "limit": 0.0}
            self._note(Noted("product", ins, {"out": out}))
        return out

    def ring(self, x: Buffer, to: Rows) -> None:
        """Write x into the rings `[slots, ring, width]`, each row at its slot and position."""
        self._store(x, to, IN_RING, 1)

    def entry(self, x: Buffer, to: Rows, ratio: int) -> None:
        """Write x, of rows that complete a group, among the entries `[slots, groups, width]`."""
        self._store(x, to, AS_ENTRY, ratio)

    @contextmanager
    def if_complete(self, ratio: int) -> Iterator[None]:
        """Operations that matter only to rows that complete a group; here all rows do them."""
        yield

    def pool(self, rows: torch.Tensor, gates: torch.Tensor, ratio: int, *, overlaps: bool = False) -> Buffer:
        """The last `ratio` rows in rings `[slots, ring, width]`, which were written before, pooled: see
        `StepRecorder.pool`."""
        out = self.buffer(rows.shape[2] // 2 if overlaps else rows.shape[2])
        ins: dict[str, Any] = {"state": rows, "gate_state": gates, "ratio": ratio, "overlaps": overlaps}
        self._note(Noted("pool", ins, {"out": out}, changes=(rows, gates)))
        return out

    def attend_sparse(
        self,
        q: Buffer,
        rings: Rows,
        sink: torch.Tensor,
        window: int,
        compressed: Rows | None,
        chosen: Buffer | None,
        every: int | None = None,
    ) -> Buffer:
        """Attention over windows and entries, chosen or all: see `StepRecorder.attend_sparse`."""
        dim = rings.shape[2]
        if compressed is not None and every is not None:
            return self._attend_latents(q, rings, sink, window, compressed, None, every, dim)
        entries = compressed if chosen is not None else None
        splits = splits_of(window, 0 if chosen is None else chosen.width)
        ins = {
            "q": q, "rings": rings, "sink": self._floats(sink), "window": window, "entries": entries,
            "chosen": None if compressed is None else chosen,
            "parts": self.buffer(splits * q.width), "stats": self.buffer(splits * q.width // dim * 2),
        }  # fmt: skip
        RowCodes.of(rings)  # raises FormatError
        sees = (bytes_of(rings),) if entries is None else (bytes_of(rings), bytes_of(entries))
        out = self.buffer(q.width)
        self._note(Noted("attend", ins, {"out": out}, sees=sees))
        return out

    def select(
        self,
        queries: Buffer,
        weights: Buffer,
        keys: Rows,
        ratio: int,
        selector: Selector,
        pool: Buffer | None,
        *,
        makes_pool: bool,
    ) -> tuple[Buffer, Buffer | None]:
        """The entries that each row attends to, and the best blocks: see `StepRecorder.select`."""
        if isinstance(keys, EncodedRows) and keys.format.turned:
            queries, keys = self._turned(queries, keys)
        form = row_format_of(keys)
        is_rounded = form is not None and form.rounds_queries and form.group > CHANNELS_OF_CODES
        if is_rounded:
            queries = self._to(queries.width, "round", x=queries, form=form)
        RowCodes.of(keys)  # raises FormatError
        block = selector.block
        columns = max(1, keys.shape[1] if pool is None else block * selector.blocks)
        if selector.top_k > TILE:
            raise FormatError(f"{selector.top_k} entries are more than a kernel chooses")
        if makes_pool and (block & (block - 1) or not 0 < block <= 4 * COLUMNS):
            raise FormatError(f"blocks of {block} entries are not a power of two up to {4 * COLUMNS}")
        chunks = chunks_of(columns)
        ins: dict[str, Any] = {
            "queries": queries, "weights": weights, "factor": 1.0, "keys": keys, "ratio": ratio,
            "block": block, "blocks": selector.blocks, "pool": pool, "scores": self.buffer(columns),
            "maxima": self.buffer(-(-columns // block)) if makes_pool else None,
            "best": self.buffer(chunks * selector.top_k) if chunks > 1 else None,
            "names": self.buffer(chunks * selector.top_k, torch.int64) if chunks > 1 else None,
            "is_rounded": is_rounded,
        }  # fmt: skip
        outs = {"chosen": self.buffer(selector.top_k, torch.int64)}
        if makes_pool:
            outs["best_blocks"] = self.buffer(selector.blocks, torch.int64)
        self._note(Noted("select", ins, outs, sees=(bytes_of(keys),)))
        return outs["chosen"], outs.get("best_blocks")
