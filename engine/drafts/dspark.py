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

from engine.drafts.base import NOTHING, Draft, DraftRequest, Rows
from engine.drafts.blocks import RecordedBlocks, block_steps, rows_of
from engine.families.base import Batch, Segment
from engine.families.streams.draft_stages import DraftStages
from engine.families.streams.operations import MAX_ROWS, Frequencies
from engine.layers.rope import Rotation
from quant.kernels.choice import recorder_of
from quant.kernels.cpu.program import Program
from quant.kernels.cpu.recorder import Recorder


@dataclass
class _Known:
    """What stages have seen of a sequence: its tokens from `first` on, up to `end`; of the last of these,
    what was captured, `[n, width]` in pieces, waits to be keyed."""

    slot: int
    first: int = 0
    end: int = 0
    waiting: list[np.ndarray] = field(default_factory=list)


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
    is_whole = True

    def __init__(self, stages: DraftStages, slots: int) -> None:
        self._stages = stages
        self._config = c = stages.layers.config
        self._kernels = stages.layers.kernels
        self._turns = Frequencies.by(c).plain
        self.longest = stages.shape.block_size
        self._free = list(range(slots))
        self._known: dict[int, _Known] = {}
        self._steps = block_steps(stages.layers, slots)
        others = np.arange(self.longest) + np.zeros((self.longest, 1), dtype=np.int64)
        others = others[~np.eye(self.longest, dtype=bool)].reshape(self.longest, -1)
        in_ring = np.broadcast_to(np.arange(c.sliding_window), (self.longest, c.sliding_window))
        self._seen = [  # once the window is full, by where in its ring a block begins: see `_seen_by`
            np.concatenate((in_ring, c.sliding_window + (at + others) % MAX_ROWS), axis=1)
            for at in range(MAX_ROWS)
        ]
        self._drafting: RecordedBlocks | None = None
        self._observing: Program | None = None
        for_drafts, for_keys = (recorder_of(self._kernels, MAX_ROWS) for _ in range(2))
        if for_drafts is not None and for_keys is not None:
            self._drafting, self._observing = self._record_draft(for_drafts), self._record_observe(for_keys)

    @property
    def nbytes(self) -> int:
        """Windows and buffers of programs."""
        programs = [self._observing, None if self._drafting is None else self._drafting.program]
        return self._steps.cache.nbytes + sum(program.nbytes for program in programs if program is not None)

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
            count = 0 if found is None else len(found)
            if found is None or not count:
                continue
            end = rows.start + len(rows.token_ids)
            if (start := end - count) != known.end:
                known.first, known.waiting = start, []  # what was before is not known, or not any more
            known.end = end
            known.waiting.append(found.numpy().copy())
            if len(known.waiting) >= MAX_ROWS or count >= MAX_ROWS:
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
        noise = [self._stages.shape.noise_token_id] * (self.longest - 1)
        ids = [i for token in newest for i in (token, *noise)]
        batch = Batch(ids, tuple(Segment(known.slot, known.end, self.longest) for known in of), None)
        seen = [self._seen_by(known) for known in of]
        if self._drafting is not None:
            return Drafted(*self._drafting.run(batch, seen))
        states, base = self._steps.compute(batch, torch.from_numpy(np.concatenate(seen)))
        shape = len(of), self.longest, -1
        return self._chained(states.view(shape), base.view(shape), torch.tensor(newest))

    def _chained(self, states: torch.Tensor, logits: torch.Tensor, before: torch.Tensor) -> Drafted:
        """Tokens from the left to the right, each knowing the one before: what `Recorder.chain` notes."""
        stages, tokens, chances = self._stages, [], []
        for place in range(self.longest):
            said = stages.markov_embed[before].float()
            logits[:, place] += self._kernels.linear(said, stages.markov_head)
            sure = torch.cat((states[:, place], said), dim=1) @ stages.confidence[0]
            before = logits[:, place].argmax(1)
            tokens.append(before)
            chances.append(sure.sigmoid())
        return Drafted(torch.stack(tokens, 1).numpy(), logits.numpy(), torch.stack(chances, 1).numpy())

    def _seen_by(self, known: _Known) -> np.ndarray:
        """Places of its slot's rows that each row of a block sees besides itself, `[block, window + block -
        1]`, -1 for none: the window before the block, and the other rows of the block."""
        window, seen = self._config.sliding_window, self._seen[known.end % MAX_ROWS]
        if known.end - known.first >= window:
            return seen
        seen = seen.copy()
        seen[:, :window] = -1
        seen[:, : known.end - known.first] = np.arange(known.first, known.end) % window
        return seen

    def _record_draft(self, recorder: Recorder) -> RecordedBlocks:
        stages = self._stages
        tables = stages.markov_embed, stages.markov_head, stages.confidence
        return RecordedBlocks(
            self._steps,
            stages.layers,
            recorder,
            self.longest,
            lambda logits, states: recorder.chain(logits, states, *tables, self.longest),
        )

    def _record_observe(self, recorder: Recorder) -> Program:
        """What keys what was captured."""
        stages, eps = self._stages, self._config.rms_norm_eps
        ops = self._steps.notes(recorder)
        source = recorder.input(int(stages.main_proj.shape[1]))
        main = ops.norm(ops.linears(source, stages.main_proj)[0], stages.main_norm, eps)
        for number, layer in enumerate(stages.layers.weights.layers):
            ops.at_layer(number)
            (kv,) = ops.linears(main, layer.attn.wkv)
            kv = ops.rotate(ops.norm(kv, layer.attn.kv_norm, eps), 1, compressed=False)
            recorder.ring(kv, self._window(number))
        ops.finish(source, main)
        assert ops.program is not None
        return ops.program

    @torch.inference_mode()
    def _key(self, of: Sequence[_Known]) -> None:
        """Store keys of what waits for it, as far as windows reach."""
        slots: list[int] = []
        positions: list[int] = []
        pieces: list[np.ndarray] = []
        for known in of:
            if not known.waiting:
                continue
            captures = known.waiting[0] if len(known.waiting) == 1 else np.concatenate(known.waiting)
            captures, known.waiting = captures[-self._config.sliding_window :], []
            pieces.append(captures)
            slots += [known.slot] * len(captures)
            positions += range(known.end - len(captures), known.end)
        if not slots:
            return
        captures = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if self._observing is None or len(slots) > 2 * MAX_ROWS:
            return self._key_at_once(slots, positions, torch.from_numpy(captures))
        program = self._observing
        source = program.source.numpy()
        for first in range(0, len(slots), MAX_ROWS):
            rows = slice(first, first + MAX_ROWS)
            source[: len(slots[rows])] = captures[rows]
            program.run(slots[rows], positions[rows])

    def _key_at_once(self, slots: list[int], positions: list[int], captures: torch.Tensor) -> None:
        stages, kernels, eps = self._stages, self._kernels, self._config.rms_norm_eps
        at = torch.tensor(positions)
        turns = Rotation.at(kernels, at, self._turns)
        main = kernels.rms_norm(kernels.linear(captures, stages.main_proj), stages.main_norm, eps)
        for number, layer in enumerate(stages.layers.weights.layers):
            kv = kernels.rms_norm(kernels.linear(main, layer.attn.wkv), layer.attn.kv_norm, eps)
            place = torch.tensor(slots), at % self._config.sliding_window
            self._window(number)[place] = turns.apply(kernels, kv)

    def _window(self, number: int) -> torch.Tensor:
        """Where a stage keys committed tokens, `[slots, window, dim]`."""
        return rows_of(self._steps.cache, number)[:, : self._config.sliding_window]
