"""Recorders: what notes a decode step's operations for one device and makes a program of them.

`quant/kernels/cpu/recorder.py` is one for host memory, `quant/kernels/cuda/recorder.py` one for a GPU. Values
are buffers of `[rows, width]` float32, chosen experts and entries int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from quant.formats.rows import Rows
from quant.kernels.cpu.cache_notes import KvPlace, Selector, StatePlace
from quant.kernels.cpu.program import Buffer, HandOver
from quant.kernels.interface import Weight
from quant.kernels.layers import DeltaRule, RoutingRule


class StepProgram(Protocol):
    """A recorded step. Used by one thread at a time.

    source  `[max_rows, width]`, to be filled before a run
    result  `[max_rows, width]`, valid until the next run
    nbytes  of the device's memory that it holds
    """

    source: torch.Tensor
    result: torch.Tensor
    nbytes: int

    def rows(self, buffer: Buffer) -> torch.Tensor:
        """A buffer's rows, `[rows, width]`, on the device: valid while it lives."""
        ...

    def run(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Compute `result` from `source` for as many rows as there are slots."""
        ...


class StepRecorder(Protocol):
    """Notes operations; `finish` makes a program of them. Raises FormatError where there is no kernel.

    layer  of which operations are noted
    """

    layer: int | None

    @property
    def device(self) -> torch.device:
        """Where its programs run."""
        ...

    def input(self, width: int, dtype: torch.dtype = torch.float32) -> Buffer:
        """A buffer that is filled before each run."""
        ...

    def buffer(self, width: int, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Buffer:
        """A buffer for what the next operation writes, which may be a hand-over."""
        ...

    def hand_over(self, work: HandOver, reads: Sequence[Buffer], writes: Sequence[Buffer]) -> torch.Tensor:
        """A place where a run comes back to its caller, who does `work` on some buffers.

        Returns a number `[1]` int64 that is 0; a run goes on without `work` while it is not.
        """
        ...

    def finish(self, source: Buffer, result: Buffer) -> StepProgram:
        """The program of what was noted, from `source`, filled before each run, to `result`."""
        ...

    def nbytes(self, source: Buffer, result: Buffer) -> int:
        """Bytes of the device's memory that this program would hold."""
        ...

    def norm(self, x: Buffer, weight: torch.Tensor | None, eps: float) -> Buffer:
        """x * rsqrt(mean(x^2) + eps) * weight; with a weight shorter than x, each such part by itself."""
        ...

    def linears(self, x: Buffer, weights: Sequence[Weight]) -> list[Buffer]:
        """`x @ weight^T` for each weight."""
        ...

    def turns(self, frequencies: torch.Tensor, *, unit: int = 1, backwards: bool = False) -> Buffer:
        """Rotations of the rows' positions, rounded down to a multiple of `unit`: frequencies `[pairs]`."""
        ...

    def rotate(self, x: Buffer, turns: Buffer, heads: int) -> Buffer:
        """The last channels of each head turned."""
        ...

    def gated(self, gate: Buffer, up: Buffer, limit: float) -> Buffer:
        """silu(min(gate, limit)) * clamp(up, -limit, limit)."""
        ...

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        """x + y."""
        ...

    def scale(self, x: Buffer, factor: float) -> Buffer:
        """x * factor."""
        ...

    def route(self, logits: Buffer, bias: torch.Tensor | None, rule: RoutingRule) -> tuple[Buffer, Buffer]:
        """The experts that the logits choose, int64, and their weights: see `LayerOperations.route`."""
        ...

    def bias(self, x: Buffer, rows: torch.Tensor) -> Buffer:
        """x + a row `[width]`; of several `[n, width]`, that of the position modulo n."""
        ...

    def weigh(self, logits: Buffer, ids: Buffer, rule: RoutingRule) -> Buffer:
        """The weights of experts that were chosen otherwise: see `LayerOperations.weigh`."""
        ...

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
        ...

    def clip(self, x: Buffer, limit: float) -> Buffer:
        """x cut to -limit .. limit."""
        ...

    def append(self, keys: Buffer, values: Buffer | None, place: KvPlace) -> None:
        """Write keys and values to the cache, each row at its slot and position; keys alone where the values
        are columns of theirs."""
        ...

    def attend(
        self,
        q: Buffer,
        place: KvPlace,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
        chosen: Buffer | None = None,
    ) -> Buffer:
        """Attention of each row over what its slot holds up to its position: see `LayerOperations.attend`."""
        ...

    def gate(self, x: Buffer, gates: Buffer) -> Buffer:
        """Each of x's parts, of which there are as many as gates, times the sigmoid of its gate."""
        ...

    def convolve(self, x: Buffer, weights: torch.Tensor, place: StatePlace) -> Buffer:
        """Each row convolved with those before it in its slot: see `LayerOperations.convolve`."""
        ...

    def delta_rule(self, x: Buffer, a: Buffer, b: Buffer, rule: DeltaRule, place: StatePlace) -> Buffer:
        """The state of each row's slot, changed and asked: see `LayerOperations.delta_rule`."""
        ...

    def part(self, x: Buffer, parts: int, first: int, width: int) -> Buffer:
        """Columns first .. first + width of each of x's parts."""
        ...

    def join(self, x: Buffer, y: Buffer, parts: int) -> Buffer:
        """Each of x's parts, and beside it the same of y's."""
        ...

    def batched_linear(self, x: Buffer, weights: torch.Tensor) -> Buffer:
        """Plain weights `[n, rows, cols]`, each times its own columns of x, side by side."""
        ...

    def constant(self, row: torch.Tensor) -> Buffer:
        """The same values `[width]` in every row."""
        ...

    def repeat(self, x: Buffer, n: int) -> Buffer:
        """x, n times side by side."""
        ...

    def weighted_sum(self, parts: Buffer, weights: Buffer) -> Buffer:
        """sum_i weights_i * part_i: as many parts side by side as there are weights."""
        ...

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

        fn `[(2 + n) * n, streams]`, times the streams by their root mean square; scale and base
        `[(2 + n) * n]`.
        """
        ...

    def mix_streams(self, streams: Buffer, y: Buffer, post: Buffer, combine: Buffer) -> Buffer:
        """post_j * y + sum_i combine[i, j] * stream_i."""
        ...

    def engram(self, streams: Buffer, kv: Buffer, qk: torch.Tensor, eps: float) -> Buffer:
        """Streams and the gated value of table rows; kv has a key for each stream, then the value."""
        ...

    def blocks(self, x: Buffer, weights: Sequence[Weight]) -> Buffer:
        """Weights of one shape, each times its own columns of x, side by side."""
        ...

    def ring(self, x: Buffer, to: Rows) -> None:
        """Write x into the rings `[slots, ring, width]`, each row at its slot and position."""
        ...

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
        """Attention over the last `window` latents in rings `[slots, ring, dim]`, and over those `chosen` of
        the compressed entries `[slots, entries, dim]`; or over all that stand for `every` so many tokens."""
        ...

    def if_complete(self, ratio: int) -> AbstractContextManager[None]:
        """Operations that may be skipped while no row is the last token of a group of `ratio`."""
        ...

    def pool(self, rows: torch.Tensor, gates: torch.Tensor, ratio: int, *, overlaps: bool = False) -> Buffer:
        """The last `ratio` rows in rings `[slots, ring, dim]`, pooled; for rows that complete a group.

        overlaps: of the group's rows `[2 * dim]` the second halves, with the first ones of the group before.
        """
        ...

    def entry(self, x: Buffer, to: Rows, ratio: int) -> None:
        """Write x, of rows that complete a group, among the entries `[slots, groups, width]`."""
        ...

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
        """The entries that each row attends to, int64, -1 behind; and the best blocks, where later choices
        are to be made among these. Index keys `[slots, entries, dim]`."""
        ...
