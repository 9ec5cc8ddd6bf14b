"""Operations on parallel streams, computed at once, for the tokens of some segments.

What attention makes of a token (queries, index queries, scores) is many times what the token has between
layers: it is made of `BLOCK` tokens at a time, so a long chunk needs no more memory for it than a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from engine.families.base import Batch, Segment, Trace
from engine.families.streams.operations import Frequencies, StreamMix
from engine.layers.eager import EagerBasics
from engine.layers.hyper_connections import HyperConnection
from engine.layers.rope import Rotation
from engine.layers.routed_experts import EagerExperts
from memory.experts.store import BLOCK_TOKENS
from quant.formats.rows import Rows
from quant.kernels.interface import Kernels, Weight

BLOCK = BLOCK_TOKENS

# What a piece (its number, itself, its rows) attends to: latents of its window `[n + L, dim]`, and perhaps
# compressed entries `[G, dim]` with those that each token sees `[L, k]`, -1 for none.
Seen = Callable[[int, Segment, slice], tuple[Rows, Rows | None, torch.Tensor | None]]


@dataclass(frozen=True)
class RowBlock:
    """Rows whose attention is computed together.

    rows    of all that values have
    pieces  the numbers of those that they are
    turns   of their positions, by kind of layer and device
    """

    rows: slice
    pieces: range
    turns: dict[tuple[bool, torch.device], Rotation]


class EagerStreams(EagerBasics):
    """`StreamOperations` for a batch. A context: experts that it has acquired are released at the end.

    hc  streams of a token
    """

    def __init__(
        self,
        kernels: Kernels,
        batch: Batch,
        trace: Trace,
        frequencies: Frequencies,
        hc: int,
        experts: EagerExperts,
    ) -> None:
        super().__init__(kernels)
        self._batch = batch
        self._trace = trace
        self._hc = hc
        self._experts = experts
        self._frequencies = frequencies
        self._work_on(batch.segments)

    def __enter__(self) -> Self:
        self._experts.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._experts.__exit__(*raised)

    def _work_on(self, segments: Sequence[Segment]) -> None:
        """The tokens that values have rows of, from now on: in pieces that are computed like segments."""
        self._pieces: list[tuple[Segment, slice]] = []  # with its rows of all
        self._blocks: list[RowBlock] = []
        row = 0
        for segment in segments:
            for piece in pieces_of(segment):
                self._pieces.append((piece, slice(row, row := row + piece.length)))
        first = 0
        while first < len(self._pieces):
            start, stop = self._pieces[first][1].start, first + 1
            while stop < len(self._pieces) and self._pieces[stop][1].stop - start <= BLOCK:
                stop += 1
            pieces = range(first, stop)
            rows = slice(start, self._pieces[stop - 1][1].stop)
            self._blocks.append(RowBlock(rows, pieces, self._turns_of(pieces)))
            first = stop
        self._block = self._blocks[0]

    def _turns_of(self, pieces: range) -> dict[tuple[bool, torch.device], Rotation]:
        of_pieces = [self._pieces[i][0] for i in pieces]
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in of_pieces])
        return {
            (compressed, torch.device("cpu")): Rotation.at(
                self._kernels, positions, self._frequencies.of(compressed=compressed)
            )
            for compressed in (False, True)
        }

    def by_rows(self, work: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        if len(self._blocks) == 1:
            return work(x)
        outs: torch.Tensor | None = None
        for block in self._blocks:
            self._block = block
            out = work(x[block.rows])
            if outs is None:
                outs = out.new_empty(len(x), out.shape[1])
            outs[block.rows] = out
        assert outs is not None
        return outs

    def each_rows(self, work: Callable[[torch.Tensor], None], x: torch.Tensor) -> None:
        for block in self._blocks:
            self._block = block
            work(x[block.rows])

    def _pieces_here(self) -> Iterator[tuple[int, Segment, slice]]:
        """The block's pieces: the number of each, itself, and its rows of the block's."""
        first = self._block.rows.start
        for i in self._block.pieces:
            piece, at = self._pieces[i]
            yield i, piece, slice(at.start - first, at.stop - first)

    def at_layer(self, number: int | None) -> None:
        """All layers are alike."""

    def move(self, device: torch.device, *values: torch.Tensor) -> Sequence[torch.Tensor]:
        return [value.to(device) for value in values]

    def trace(self, name: str, value: torch.Tensor, *shape: int) -> None:
        self._trace.add(name, value.view(-1, *shape) if shape else value)

    # ---------------------------------------------------------------------------------------- streams

    def mix(self, connection: HyperConnection, streams: torch.Tensor) -> StreamMix[torch.Tensor]:
        mix = connection.mix(self._kernels, self._parallel(streams))
        return StreamMix(mix.pre, mix.post, mix.combine.flatten(1))

    def read_streams(self, streams: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
        return self._kernels.weighted_sum(self._parallel(streams), pre)

    def write_streams(
        self, streams: torch.Tensor, y: torch.Tensor, mix: StreamMix[torch.Tensor]
    ) -> torch.Tensor:
        parallel = self._parallel(streams)
        combine = mix.combine.view(len(y), self._hc, self._hc)
        return self._kernels.mix_streams(parallel, y, mix.post, combine).flatten(1)

    def _parallel(self, streams: torch.Tensor) -> torch.Tensor:
        """`[tokens, hc, hidden]`; of no tokens too."""
        return streams.view(len(streams), self._hc, streams.shape[1] // self._hc)

    # -------------------------------------------------------------------------------------- attention

    def rotate(
        self, x: torch.Tensor, heads: int, *, compressed: bool, backwards: bool = False
    ) -> torch.Tensor:
        rotation = self._rotation(x.device, compressed=compressed)
        if backwards:
            rotation = rotation.inverse
        # in its own memory: queries are the most that a layer makes, and nobody needs them as they were
        return rotation.apply(self._kernels, x.view(len(x), heads, -1), in_place=True).view(x.shape)

    def blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        return self._kernels.linear_blocks(x, weights)

    def _attend(self, q: torch.Tensor, sink: torch.Tensor, window: int, seen: Seen) -> torch.Tensor:
        """Attention of `[tokens, heads * head_dim]` queries, to the same."""
        q = q.view(len(q), len(sink), -1)
        attended = []
        for i, segment, at in self._pieces_here():
            window_kv, compressed, entries = seen(i, segment, at)
            entries = None if entries is None else entries.to(q.device)
            attended.append(
                self._kernels.attend_sparse(
                    q[at], window_kv, sink, window, compressed, entries, in_place=True
                )
            )
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        return out.flatten(1)

    def _rotation(self, device: torch.device, *, compressed: bool) -> Rotation:
        """The rotation of the block's positions on `device`, copied there once."""
        key, turns = (compressed, device), self._block.turns
        if key not in turns:
            turns[key] = turns[compressed, torch.device("cpu")].to(device)
        return turns[key]

    def _group_rotation(self, first: int, count: int, ratio: int, device: torch.device) -> Rotation:
        """That of the first positions of `count` groups of `ratio` tokens, from group `first` on."""
        positions = torch.arange(first, first + count) * ratio
        return Rotation.at(self._kernels, positions, self._frequencies.compressed).to(device)

    # ---------------------------------------------------------------------------------------- experts

    def acquire(self, number: int, ids: torch.Tensor) -> None:
        self._experts.acquire(number, ids)

    def experts(self, number: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._experts.run(number, x, ids, weights)


def pieces_of(segment: Segment) -> list[Segment]:
    """A segment cut into pieces of at most `BLOCK` tokens."""
    return [
        Segment(segment.slot, segment.start + at, min(BLOCK, segment.length - at))
        for at in range(0, segment.length, BLOCK)
    ]
