"""V4's operations noted for a program, and the step that runs it: each row is one sequence's newest token.

Where everything lies in DRAM, a step is one native call. Where experts move, it comes back in layers whose
experts are not all at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache.grouped import GroupedCache
from engine.families.base import Batch
from engine.families.deepseek_v4.notes import V4Notes
from engine.families.deepseek_v4.operations import V4Parts
from engine.families.replay import replay
from engine.layers.recorded_experts import RecordedExperts
from quant.kernels.cpu.program import Buffer, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.layers import RoutingRule


class V4Recorded(V4Notes):
    """`V4Operations` noted for host memory, for steps with `cache`."""

    _recorder: Recorder

    def __init__(self, parts: V4Parts, recorder: Recorder, cache: GroupedCache) -> None:
        super().__init__(parts, recorder, cache)
        self._experts = RecordedExperts(recorder, parts.weights.experts, parts.config.swiglu_limit)
        self._by_token: dict[int, Buffer] = {}  # experts, by layer
        self.program: Program | None = None

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of `batch.logit_rows`, `[n, vocab_size]`."""
        assert self.program is not None
        if not isinstance(self._embed, torch.Tensor):  # its rows are read from disk
            self.program.source[: len(batch.ids)] = self._embed[batch.token_ids].float()
        return self.replay(batch)

    def replay(self, batch: Batch) -> torch.Tensor:
        """The same, of a program whose inputs are filled."""
        assert self.program is not None
        return replay(self.program, self._experts, batch, self._cache)

    def captured_rows(self, rows: int) -> torch.Tensor:
        """What the last run has captured of so many rows; valid until the next one."""
        assert self.program is not None
        return self._captured_rows(self.program, rows)

    def begin(self) -> Buffer:
        """The embedded tokens, `[rows, hidden]`."""
        if isinstance(self._embed, torch.Tensor):
            return self._recorder.embed(self._embed)
        return self._recorder.input(self._config.hidden_size)

    def finish(self, source: Buffer, result: Buffer) -> None:
        """Make the program, from embedded tokens to logits."""
        self.program = self._recorder.finish(source, result)

    def move(self, device: torch.device, *values: Buffer) -> Sequence[Buffer]:
        return values  # all are in host memory

    # ---------------------------------------------------------------------------------------- experts

    def by_token(self, number: int, table: torch.Tensor) -> Buffer:
        if number not in self._by_token:
            self._by_token[number] = self._recorder.by_token(table)
        return self._by_token[number]

    def weigh(self, logits: Buffer, ids: Buffer, rule: RoutingRule) -> Buffer:
        return self._recorder.weigh(logits, ids, rule)

    def wants_guesses(self, number: int) -> bool:
        return self._experts.wants_guesses(number)

    def prefetch(self, number: int, ids: Buffer) -> None:
        self._experts.prefetch(number, ids)

    def acquire(self, number: int, ids: Buffer) -> None:
        self._experts.acquire(number, ids)

    def experts(self, number: int, x: Buffer, ids: Buffer, weights: Buffer) -> Buffer:
        return self._experts.run(number, x, ids, weights)
