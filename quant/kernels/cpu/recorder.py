"""Notes the operations of a decode step, in the order of their calls, and makes a program of them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from quant.kernels.cpu.cache_notes import CacheNotes
from quant.kernels.cpu.native_layers import Routing
from quant.kernels.cpu.panels import NativeWeight
from quant.kernels.cpu.program import DENSE_KINDS, Buffer, HandOver, Operand
from quant.kernels.interface import ExpertExtras, Weight
from quant.kernels.layers import RoutingRule

GROUP = 3  # matrices of one operation at most


class _Extras(ctypes.Structure):
    """`Extras` of native_src/program.cpp."""

    _fields_ = (
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
    )


class Recorder(CacheNotes):
    """Notes operations; `finish` makes a program of them."""

    # -------------------------------------------------------------------------------------- any model

    def norm(self, x: Buffer, weight: torch.Tensor | None, eps: float) -> Buffer:
        """x * rsqrt(mean(x^2) + eps) * weight; with a weight shorter than x, each such part by itself."""
        out, width = self.buffer(x.width), x.width if weight is None else len(weight)
        at = None if weight is None else self._weight(weight)
        self._note("norm", [x, at], [out], [width, x.width // width], eps)
        return out

    def linears(self, x: Buffer, weights: Sequence[Weight]) -> list[Buffer]:
        """`x @ weight^T` for each weight. Raises FormatError for a format without a kernel."""
        outs = [self.buffer(int(weight.shape[0])) for weight in weights]
        prepared = [self._prepared(weight) for weight in weights]
        pairs = list(zip(prepared, outs, strict=True))
        for kind, group in groupby(pairs, key=lambda pair: self._group(pair[0])):
            members = list(group)
            if kind is None:
                for dense, out in members:
                    assert isinstance(dense, torch.Tensor)
                    sizes = [DENSE_KINDS[dense.dtype], *dense.shape]
                    self._note("dense", [x, self._weight(dense)], [out], sizes, nbytes=dense.nbytes)
                continue
            for at in range(0, len(members), GROUP):
                self._linear(x, members[at : at + GROUP])
        return outs

    def turns(self, frequencies: torch.Tensor, *, unit: int = 1, backwards: bool = False) -> Buffer:
        """Rotations of the rows' positions, rounded down to a multiple of `unit`: frequencies `[pairs]`."""
        out = self.buffer(2 * len(frequencies))
        sizes = [len(frequencies), unit]
        self._note("turns", [self._address(frequencies.double())], [out], sizes, -1.0 if backwards else 1.0)
        return out

    def rotate(self, x: Buffer, turns: Buffer, heads: int) -> Buffer:
        """The last channels of each head turned."""
        out = self.buffer(x.width)
        self._note("rotate", [x, turns], [out], [heads, x.width // heads, turns.width // 2])
        return out

    def gate(self, x: Buffer, gates: Buffer) -> Buffer:
        """Each of x's parts, of which there are as many as gates, times the sigmoid of its gate."""
        out = self.buffer(x.width)
        self._note("gate", [x, gates], [out], [gates.width, x.width // gates.width])
        return out

    def part(self, x: Buffer, parts: int, first: int, width: int) -> Buffer:
        """Columns first .. first + width of each of x's parts."""
        out = self.buffer(parts * width)
        self._note("part", [x], [out], [parts, x.width // parts, first, width])
        return out

    def join(self, x: Buffer, y: Buffer, parts: int) -> Buffer:
        """Each of x's parts, and beside it the same of y's."""
        out = self.buffer(x.width + y.width)
        self._note("join", [x, y], [out], [parts, x.width // parts, y.width // parts])
        return out

    def batched_linear(self, x: Buffer, weights: torch.Tensor) -> Buffer:
        """Plain weights `[n, rows, cols]`, each times its own columns of x, side by side."""
        n, rows, cols = weights.shape
        out = self.buffer(n * rows)
        sizes = [n, 1, DENSE_KINDS[weights.dtype], rows, cols]
        self._note("blocks", [x, self._weight(weights)], [out], sizes, nbytes=weights.nbytes)
        return out

    def gated(self, gate: Buffer, up: Buffer, limit: float) -> Buffer:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        out = self.buffer(gate.width)
        self._note("gated", [gate, up], [out], [gate.width], limit)
        return out

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """x + y."""
        out = self.buffer(x.width)
        self._note("add", [x, y], [out], [x.width])
        return out

    def bias(self, x: Buffer, rows: torch.Tensor) -> Buffer:
        """x + a row `[width]`; of several `[n, width]`, that of the position modulo n."""
        out = self.buffer(x.width)
        self._note("bias", [x, self._weight(rows)], [out], [x.width, rows.numel() // x.width])
        return out

    def clip(self, x: Buffer, limit: float) -> Buffer:
        """x cut to -limit .. limit."""
        out = self.buffer(x.width)
        self._note("clip", [x], [out], [x.width], limit)
        return out

    def scale(self, x: Buffer, factor: float) -> Buffer:
        """x * factor."""
        out = self.buffer(x.width)
        self._note("scale", [x], [out], [x.width], factor)
        return out

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        """The experts that the logits choose, int64, and their weights: see `LayerOperations.route`."""
        ids, weights = self.buffer(rule.top_k, torch.int64), self.buffer(rule.top_k)
        native = Routing.of(rule)
        self._recording.held.append(native)
        inputs: list[Operand] = [
            logits,
            None if bias is None else self._weight(bias),
            ctypes.addressof(native),
        ]
        self._note("route", inputs, [ids, weights], [logits.width])
        return ids, weights

    def weigh(self, logits: Buffer, ids: Buffer, rule: RoutingRule) -> Buffer:
        """The weights of experts that were chosen otherwise: see `LayerOperations.weigh`."""
        weights, native = self.buffer(rule.top_k), Routing.of(rule)
        self._recording.held.append(native)
        inputs: list[Operand] = [logits, None, ctypes.addressof(native), ids]
        self._note("route", inputs, [None, weights], [logits.width])
        return weights

    def at_hand(self, ids: Buffer, addresses: torch.Tensor, busy: torch.Tensor) -> torch.Tensor:
        """Whether all chosen experts are at hand and nothing is on its way that may have to be cancelled: a
        number `[1]` int64, 0 or 1, which hand-overs may be skipped by.

        addresses  `[experts, 3]` int64 of the layer's matrices, 0 where they are not there; may change
        busy       `[1]` int64, transfers under way for the layer; may change
        """
        flag = torch.zeros(1, dtype=torch.int64)
        inputs: list[Operand] = [ids, self._address(addresses), self._address(busy)]
        self._note("at_hand", inputs, [self._address(flag)], [ids.width])
        return flag

    def experts(
        self,
        x: Buffer,
        ids: Buffer,
        weights: Buffer,
        addresses: torch.Tensor,
        activation: tuple[float, ExpertExtras],
        used: torch.Tensor,
        nbytes: int,
        unless: tuple[torch.Tensor, Callable[[Buffer], HandOver]] | None = None,
    ) -> Buffer:
        """The sum of the chosen experts' outputs, weighted, in the router's order.

        addresses  `[experts, 3]` int64 of the layer's matrices
        activation its limit, and what else there is (`MoeCall`)
        used       `[1]` int64, to which each run adds how many different experts it has computed
        nbytes     of an expert's matrices
        unless     what `at_hand` gave, and what is done, with the result's buffer, where that is 0
        """
        out, apart = self.buffer(x.width), self.buffer(ids.width * x.width)
        at_hand = None if unless is None else self._address(unless[0])
        extras, width = self._extras(*activation)
        inputs: list[Operand] = [x, ids, weights, self._address(addresses), at_hand, extras]
        if unless is not None:
            self._recording.hand_overs[len(self._recording.noted)] = unless[1](out)
        outputs: list[Operand] = [out, apart, self._address(used)]
        self._note("experts", inputs, outputs, [ids.width, x.width, width], nbytes=ids.width * nbytes)
        return out

    # ----------------------------------------------------------------- parallel streams (mHC), Engram

    def constant(self, row: torch.Tensor) -> Buffer:
        """The same values `[width]` in every row."""
        out = self.buffer(len(row))
        rows = row.float().repeat(self.max_rows, 1)
        self._note("scale", [self._address(rows)], [out], [len(row)], 1.0)
        return out

    def repeat(self, x: Buffer, n: int) -> Buffer:
        """x, n times side by side."""
        out = self.buffer(n * x.width)
        self._note("repeat", [x], [out], [x.width, n])
        return out

    def weighted_sum(self, parts: Buffer, weights: Buffer) -> Buffer:
        """sum_i weights_i * part_i: as many parts side by side as there are weights."""
        n = weights.width
        out = self.buffer(parts.width // n)
        self._note("weighted_sum", [parts, weights], [out], [n, out.width])
        return out

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
        """pre, post `[rows, n]` and combine `[rows, n * n]` of hyper-connections, off the streams.

        fn `[(2 + n) * n, streams]`, times the streams by their root mean square; scale and base `[(2 + n) *
        n]`.
        """
        n = math.isqrt(len(scale) + 1) - 1
        (x,) = self.linears(self.norm(streams, None, norm_eps), [fn])
        outs = self.buffer(n), self.buffer(n), self.buffer(n * n)
        self._note("mix", [x, self._weight(scale), self._weight(base)], [*outs], [n, iterations], eps)
        return outs

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
        (x,) = self.linears(self.norm(streams, None, norm_eps), [fn])
        out = self.buffer(len(scale))
        inputs: list[Operand] = [x, self._weight(scale), self._weight(base)]
        self._note("mix", inputs, [out], [len(scale), 0], eps)
        return out

    def mix_streams(self, streams: Buffer, y: Buffer, post: Buffer, combine: Buffer) -> Buffer:
        """post_j * y + sum_i combine[i, j] * stream_i."""
        out = self.buffer(streams.width)
        self._note("mix_streams", [streams, y, post, combine], [out], [post.width, y.width])
        return out

    def engram(self, streams: Buffer, kv: Buffer, qk: torch.Tensor, eps: float) -> Buffer:
        """Streams and the gated value of table rows; kv has a key for each stream, then the value."""
        n, dim = qk.shape
        out, gates = self.buffer(streams.width), self.buffer(n)
        self._note("engram", [streams, kv, self._weight(qk)], [out, gates], [n, dim], eps)
        return out

    def blocks(self, x: Buffer, weights: Sequence[Weight]) -> Buffer:
        """Weights of one shape, each times its own columns of x, side by side."""
        if isinstance(weights[0], torch.Tensor):
            plain = [weight for weight in weights if isinstance(weight, torch.Tensor)]
            return self.batched_linear(x, torch.stack(plain))
        out = self.buffer(weights[0].shape[0] * len(weights))
        nbytes = sum(weight.nbytes for weight in weights)
        natives = [self._native(weight) for weight in weights]
        matrices = (ctypes.c_void_p * len(natives))(*(native.address for native in natives))
        self._recording.held += [matrices, natives]
        self._note("blocks", [x, ctypes.addressof(matrices)], [out], [len(natives), 0], nbytes=nbytes)
        return out

    # ------------------------------------------------------------------------------------------ drafts

    def chain(
        self,
        logits: Buffer,
        states: Buffer,
        embed: torch.Tensor,
        head: torch.Tensor,
        weights: torch.Tensor,
        block: int,
    ) -> tuple[Buffer, Buffer]:
        """Tokens of blocks of so many rows, int64 `[rows, 1]`, and how sure each is, 0 to 1, `[rows, 1]`.

        To logits, which change, is added what the token before says, by plain tables `[vocab, rank]`, the
        second of which is read turned over; the largest is the row's token. Before a block's first row is the
        step's token of that row. weights `[hidden + rank]`: the sigmoid of states and the token's row of
        `embed` times these is how sure it is.
        """
        tokens, chances = self.buffer(1, torch.int64), self.buffer(1)
        inputs: list[Operand] = [logits, states, *map(self._weight, (embed, head.t(), weights))]
        sizes = [block, *head.shape, states.width, DENSE_KINDS[embed.dtype], DENSE_KINDS[head.dtype]]
        self._note("chain", inputs, [logits, tokens, chances], sizes, nbytes=block * head.nbytes)
        return tokens, chances

    # ------------------------------------------------------------------------------------------------

    def _linear(self, x: Buffer, members: Sequence[tuple[NativeWeight | torch.Tensor, Buffer]]) -> None:
        """Packed matrices of one format, multiplied with the same x together."""
        weights = [weight for weight, _ in members if isinstance(weight, NativeWeight)]
        matrices = (ctypes.c_void_p * len(weights))(*(weight.address for weight in weights))
        self._recording.held += [matrices, *weights]
        nbytes = sum(weight.nbytes for weight in weights)
        outs = [out for _, out in members]
        self._note("linear", [x, ctypes.addressof(matrices)], outs, [len(weights)], nbytes=nbytes)

    def _extras(self, limit: float, extras: ExpertExtras) -> tuple[int, int]:
        """The address of what experts have beyond matrices, and their width where they have biases."""
        biases, width = extras.biases, 0
        native = _Extras(limit, extras.alpha, extras.shift)
        if biases is not None:
            native.gate, native.up, native.down = map(self._weight, (biases.gate, biases.up, biases.down))
            width = biases.gate.shape[1]
        self._recording.held.append(native)
        return ctypes.addressof(native), width

    def _prepared(self, weight: Weight) -> NativeWeight | torch.Tensor:
        return weight.contiguous() if isinstance(weight, torch.Tensor) else self._native(weight)

    def _group(self, weight: NativeWeight | torch.Tensor) -> str | None:
        """What weights must share to be multiplied together; None where each is alone."""
        return None if isinstance(weight, torch.Tensor) else weight.format.name
