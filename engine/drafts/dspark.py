"""DSpark: draft stages that read what the model captures, and draft a block of tokens at once.

Of committed tokens a stage keys what was captured; its own rows are those of a block, the newest token and
noise for each further token to be drafted, all of which see each other and the window before them. A Markov
head adds to each place's logits what the token before it says, and a confidence head says how likely each is
to be accepted (docs/drafts.md, DSpark).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.cache.sparse import CacheShape, SparseCache
from engine.drafts.base import NOTHING, Draft, DraftRequest, Rows
from engine.families.base import NO_TRACE, Batch, Segment
from engine.families.deepseek_v41.draft_stages import DraftStages
from engine.families.deepseek_v41.eager import V41Eager
from engine.families.deepseek_v41.operations import V41Parts
from engine.families.deepseek_v41.recorded import V41Recorded
from engine.families.places import HOST
from engine.families.streams.operations import MAX_ROWS
from engine.families.streams.weights import StreamAttention
from engine.layers.rope import Rotation
from quant.kernels.choice import recorder_of
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels

# Values of a Markov head that stays in a processor's cache.
SMALL_HEAD = 1 << 20


@dataclass
class _Known:
    """What stages have seen of a sequence: its tokens from `first` on, up to `end`; of the last of these,
    what was captured, `[n, width]` in pieces, waits to be keyed."""

    slot: int
    first: int = 0
    end: int = 0
    waiting: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Drafted:
    """Blocks, `[blocks, block_size, ...]`: tokens, their logits, and the confidence in each, 0 to 1."""

    token_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray


class DSpark:
    """`Drafter` of a model with DSpark stages, for up to `slots` sequences at once."""

    name = "dspark"
    wants_captures = True

    def __init__(self, stages: DraftStages, slots: int) -> None:
        self._stages = stages
        self._config = c = stages.layers.config
        self._kernels = stages.layers.kernels
        self.longest = stages.shape.block_size
        self._free = list(range(slots))
        self._known: dict[int, _Known] = {}
        # A slot has a ring for the window, and behind it one for the block's own rows.
        shape = CacheShape(
            layers=c.num_hidden_layers,
            window=c.sliding_window,
            head_dim=c.head_dim,
            index_dim=0,
            sources={},
            history=0,
            history_pad=0,
            margin=MAX_ROWS,
            devices=(HOST,) * c.num_hidden_layers,
        )
        self._cache = SparseCache(shape, slots, c.max_position_embeddings)
        self._parts: V41Parts = stages.layers.parts
        self._markov = _Markov(stages, self._kernels)
        sure = stages.confidence[0].numpy()
        self._confidence = sure[: c.hidden_size], sure[c.hidden_size :]
        self._ring_places = torch.arange(c.sliding_window)
        others = torch.arange(self.longest).expand(self.longest, -1)
        others = others[~torch.eye(self.longest, dtype=torch.bool)].view(self.longest, -1)
        self._block_places = [c.sliding_window + (at + others) % MAX_ROWS for at in range(MAX_ROWS)]
        self._drafting: _StageRecorded | None = None
        self._observing: V41Recorded | None = None
        if recorder_of(self._kernels, MAX_ROWS) is not None:
            self._drafting, self._observing = self._record_draft(), self._record_observe()

    @property
    def nbytes(self) -> int:
        """Windows and buffers of programs."""
        parts = (self._drafting, self._observing)
        programs = [part.program for part in parts if part is not None and part.program is not None]
        return self._cache.nbytes + sum(program.nbytes for program in programs)

    def close_all(self) -> None:
        """Release what weights have opened."""
        self._stages.layers.weights.experts.close()

    # -------------------------------------------------------------------------------------- sequences

    def open(self, sequence_id: int, token_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        """See `Drafter`."""
        self._known[sequence_id] = _Known(self._free.pop())

    def close(self, sequence_id: int) -> None:
        """See `Drafter`."""
        known = self._known.pop(sequence_id, None)
        if known is not None:
            self._free.append(known.slot)

    def observe(self, computed: Sequence[Rows]) -> None:
        """Keep what was captured of committed tokens. It is keyed when a block is drafted, or when there is
        much of it: most steps have one token, and many no draft."""
        long = []
        for rows in computed:
            known, found = self._known[rows.sequence_id], rows.captures
            if found is None or not len(found):
                continue
            end = rows.start + len(rows.token_ids)
            if (start := end - len(found)) != known.end:
                known.first, known.waiting = start, []  # what was before is not known, or not any more
            known.end = end
            known.waiting.append(found.clone())
            if len(known.waiting) >= MAX_ROWS or len(found) >= MAX_ROWS:
                long.append(known)
        if long:
            self._key(long)

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Drafter`; nothing where the tokens just before were not captured."""
        drafts = [NOTHING] * len(requests)
        ready = [
            (at, known)
            for at, request in enumerate(requests)
            if (known := self._known[request.sequence_id]).end == len(request.token_ids) - 1 > known.first
        ]
        for first in range(0, len(ready), MAX_ROWS // self.longest):
            some = ready[first : first + MAX_ROWS // self.longest]
            newest = [requests[at].token_ids[-1] for at, _ in some]
            found = self.blocks([known for _, known in some], newest)
            tokens, chances = found.token_ids.tolist(), found.confidence.tolist()
            for (at, _), ids, sure in zip(some, tokens, chances, strict=True):
                most = requests[at].most
                drafts[at] = Draft(tuple(ids[:most]), tuple(sure[:most]))
        return drafts

    # ------------------------------------------------------------------------------------- computation

    def blocks(self, of: Sequence[_Known], newest: Sequence[int]) -> Drafted:
        """A block for each sequence, behind its newest token, which was not captured yet."""
        self._key(of)
        block, shape = self.longest, self._stages.shape
        ids = [i for token in newest for i in (token, *[shape.noise_token_id] * (block - 1))]
        segments = tuple(Segment(known.slot, known.end, block) for known in of)
        batch = Batch(ids, segments, None)
        if self._drafting is None:
            states, base = self._compute(batch, of)
        else:
            states, base = self._drafting.run_block(batch, self._seen(of))
        return self._chained(states.view(len(of), block, -1), base.view(len(of), block, -1), newest)

    def _chained(self, states: torch.Tensor, base: torch.Tensor, newest: Sequence[int]) -> Drafted:
        """Tokens from the left to the right, each knowing the one before."""
        of_places = base.numpy()  # between native calls, NumPy's calls cost less than torch's
        of_states, of_said = self._confidence
        logits = np.empty_like(of_places)
        tokens = np.empty(of_places.shape[:2], dtype=np.int64)
        sure = states.numpy() @ of_states
        before = np.array(newest)
        for place in range(self.longest):
            said = self._markov.embed(before)
            np.add(of_places[:, place], self._markov.logits(said), out=logits[:, place])
            before = tokens[:, place] = logits[:, place].argmax(1)
            sure[:, place] += said @ of_said
        return Drafted(tokens, logits, 1 / (1 + np.exp(-sure)))

    def _seen(self, of: Sequence[_Known]) -> torch.Tensor:
        """Places of the slots' rows that each row sees besides itself, `[rows, window + block - 1]`, -1 for
        none: the window before the block, and the other rows of the block."""
        window, block = self._config.sliding_window, self.longest
        seen = torch.empty(len(of), block, window + block - 1, dtype=torch.int64)
        for n, known in enumerate(of):
            first = max(known.first, known.end - window)
            if known.end - first == window:
                seen[n, :, :window] = self._ring_places
            else:
                seen[n, :, :window] = -1
                seen[n, :, : known.end - first] = torch.arange(first, known.end) % window
            seen[n, :, window:] = self._block_places[known.end % MAX_ROWS]
        return seen.flatten(0, 1)

    def _compute(self, batch: Batch, of: Sequence[_Known]) -> tuple[torch.Tensor, torch.Tensor]:
        """States before the last norm and logits of a batch's rows, operation by operation."""
        layers, stages = self._stages.layers, self._stages
        embedded = layers.weights.embed[batch.token_ids].float()
        with _StageEager(self._parts, batch, self._cache, self._seen(of)) as ops:
            states = ops.read_streams(*layers._layers(ops, embedded))
            x = ops.norm(states, stages.norm, self._config.rms_norm_eps)
            return states, ops.linears(x, layers.weights.head)[0]

    def _record_draft(self) -> _StageRecorded:
        recorder = recorder_of(self._kernels, MAX_ROWS)
        assert recorder is not None
        layers, stages = self._stages.layers, self._stages
        ops = _StageRecorded(self._parts, recorder, self._cache, self.longest)
        source = ops.begin()
        ops.states = ops.read_streams(*layers._layers(ops, source))
        recorder.keep(ops.states)
        x = ops.norm(ops.states, stages.norm, self._config.rms_norm_eps)
        ops.finish(source, ops.linears(x, layers.weights.head)[0])
        return ops

    def _record_observe(self) -> V41Recorded:
        """A program that keys what was captured."""
        recorder = recorder_of(self._kernels, MAX_ROWS)
        assert recorder is not None
        stages, eps = self._stages, self._config.rms_norm_eps
        ops = V41Recorded(self._parts, recorder, self._cache)
        source = recorder.input(int(stages.main_proj.shape[1]))
        main = ops.norm(ops.linears(source, stages.main_proj)[0], stages.main_norm, eps)
        for number, layer in enumerate(stages.layers.weights.layers):
            ops.at_layer(number)
            (kv,) = ops.linears(main, layer.attn.wkv)
            kv = ops.rotate(ops.norm(kv, layer.attn.kv_norm, eps), 1, compressed=False)
            recorder.ring(kv, self._window(number))
        ops.finish(source, main)
        return ops

    @torch.inference_mode()
    def _key(self, of: Sequence[_Known]) -> None:
        """Store keys of what waits for it, as far as windows reach."""
        slots: list[int] = []
        positions: list[int] = []
        pieces: list[torch.Tensor] = []
        for known in of:
            if not known.waiting:
                continue
            captures = known.waiting[0] if len(known.waiting) == 1 else torch.cat(known.waiting)
            captures, known.waiting = captures[-self._config.sliding_window :], []
            pieces.append(captures)
            slots += [known.slot] * len(captures)
            positions += range(known.end - len(captures), known.end)
        if not slots:
            return
        captures = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self._observing is None or len(slots) > 2 * MAX_ROWS:
            return self._key_at_once(slots, positions, captures)
        program = self._observing.program
        assert program is not None
        for first in range(0, len(slots), MAX_ROWS):
            rows = slice(first, first + MAX_ROWS)
            program.source[: len(slots[rows])] = captures[rows]
            program.run(slots[rows], positions[rows])

    def _key_at_once(self, slots: list[int], positions: list[int], captures: torch.Tensor) -> None:
        stages, kernels, eps = self._stages, self._kernels, self._config.rms_norm_eps
        at = torch.tensor(positions)
        turns = Rotation.at(kernels, at, self._parts.frequencies.plain)
        main = kernels.rms_norm(kernels.linear(captures, stages.main_proj), stages.main_norm, eps)
        for number, layer in enumerate(stages.layers.weights.layers):
            kv = kernels.rms_norm(kernels.linear(main, layer.attn.wkv), layer.attn.kv_norm, eps)
            place = torch.tensor(slots), at % self._config.sliding_window
            self._window(number)[place] = turns.apply(kernels, kv)

    def _window(self, number: int) -> torch.Tensor:
        """Where a stage keys committed tokens, `[slots, window, dim]`."""
        return _plain(self._cache, number)[:, : self._config.sliding_window]


class _StageEager(V41Eager):
    """V4.1's operations for blocks; seen: see `DSpark._seen`."""

    def __init__(self, parts: V41Parts, batch: Batch, cache: SparseCache, seen: torch.Tensor) -> None:
        super().__init__(parts, batch, cache, NO_TRACE, None)
        self._seen = seen

    def attend(self, number: int, attn: StreamAttention, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        rows, window = _plain(self._cache, number), self._config.sliding_window
        q, outs, stop = q.view(len(q), len(attn.sink), -1), [], 0
        for segment in self._batch.segments:
            of = slice(stop, stop := stop + segment.length)
            positions = torch.arange(segment.start, segment.start + segment.length)
            rows[segment.slot, window + positions % MAX_ROWS] = kv[of]
            for row in range(of.start, of.stop):  # each sees itself as its window, and all others as chosen
                one = slice(row, row + 1)
                outs.append(
                    self._kernels.attend_sparse(
                        q[one], kv[one], attn.sink, 1, rows[segment.slot], self._seen[one]
                    )
                )
        return torch.cat(outs).flatten(1)


class _StageRecorded(V41Recorded):
    """V4.1's operations for blocks, noted."""

    states: Buffer

    def __init__(self, parts: V41Parts, recorder: Recorder, cache: SparseCache, block: int) -> None:
        super().__init__(parts, recorder, cache)
        self._others = recorder.input(parts.config.sliding_window + block - 1, torch.int64)
        recorder.keep(self._others)

    def attend(self, number: int, attn: StreamAttention, q: Buffer, kv: Buffer) -> Buffer:
        rows, window = _plain(self._cache, number), self._config.sliding_window
        own = rows[:, window:]
        self._recorder.ring(kv, own)
        return self._recorder.attend_sparse(q, own, attn.sink, 1, rows, self._others)

    def run_block(self, batch: Batch, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States before the last norm and logits of a batch's rows; seen: see `DSpark._seen`."""
        program = self.program
        assert isinstance(program, Program)
        rows, embed = len(batch.ids), self._parts.weights.embed
        if not isinstance(embed, torch.Tensor):
            program.source[:rows] = embed[batch.token_ids].float()
        program.rows(self._others)[:rows] = seen
        with self._experts.running(program, rows):
            program.run(*batch.places(), batch.ids)
        return program.rows(self.states)[:rows], program.result[:rows]


class _Markov:
    """The Markov head: `[n, rank]` of tokens, and what these add to logits, `[n, vocab]`."""

    def __init__(self, stages: DraftStages, kernels: Kernels) -> None:
        self._embed, self._head, self._kernels = stages.markov_embed, stages.markov_head, kernels
        self._small: tuple[np.ndarray, np.ndarray] | None = None
        if self._head.numel() < SMALL_HEAD:  # what stays in the cache needs not be unpacked each time
            self._small = self._embed.float().numpy(), self._head.float().T.contiguous().numpy()

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        if self._small is None:
            return _array(self._embed[torch.from_numpy(tokens)].float())
        found: np.ndarray = self._small[0][tokens]
        return found

    def logits(self, said: np.ndarray) -> np.ndarray:
        if self._small is None:
            return _array(self._kernels.linear(torch.from_numpy(said), self._head))
        added: np.ndarray = np.matmul(said, self._small[1])
        return added


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array


def _plain(cache: SparseCache, number: int) -> torch.Tensor:
    """A stage's rows, `[slots, window + block, dim]`; they are not rounded."""
    rows = cache.windows[number]
    assert isinstance(rows, torch.Tensor)
    return rows
