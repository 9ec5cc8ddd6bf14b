"""Routed experts of a recorded step: computed natively where they are at hand, else by the expert store.

Where nothing ever moves, a step's experts are native operations like all others. Where experts move, each
layer's choice and its prediction are first looked up natively: what is all at hand is computed without coming
back, and the store hears of it after the step. Otherwise the step hands over: the store reads and computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from memory.experts.step import ExpertStep
from memory.experts.store import ExpertStore
from quant.kernels.cpu.program import Buffer, HandOver, Program
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import NO_EXTRAS, ExpertExtras

NOTHING = nullcontext()


@dataclass
class _Layer:
    """What a run leaves of a layer: its choice, its predictions, and whether they were at hand."""

    ids: Buffer
    at_hand: torch.Tensor
    guesses: list[tuple[Buffer, torch.Tensor]]


class RecordedExperts:
    """The routed experts of a program.

    limit      of the activation: see `MoeCall.swiglu_limit`
    is_native  True if all experts are native operations for good
    """

    def __init__(self, recorder: Recorder, store: ExpertStore, limit: float) -> None:
        self._recorder = recorder
        self._store = store
        self._limit = limit
        at_hand = store.at_hand
        self.is_native = store.is_still and at_hand is not None and bool(at_hand.addresses.all())
        # Different experts, computed natively: of the step, or of all steps where the store follows it.
        self._used = torch.zeros(1, dtype=torch.int64)
        if self.is_native:
            store.follow_uses(self._used)
        self._layers: dict[int, _Layer] = {}
        self._guesses: dict[int, list[tuple[Buffer, torch.Tensor]]] = {}
        self._acquired: ExpertStep | None = None
        self._program: Program | None = None

    # ----------------------------------------------------------------------------------------- recording

    def wants_guesses(self, layer: int) -> bool:
        """Whether experts move at all."""
        return not self._store.is_still

    def prefetch(self, layer: int, ids: Buffer) -> None:
        """Prefetch what was predicted for a layer: ids `[rows, top_k]`, best first."""
        if self._store.is_still:
            return
        flag = self._look_up(layer, ids)
        self._recorder.keep(ids)
        self._guesses.setdefault(layer, []).append((ids, flag))

        def work(rows: int) -> None:
            best_first = self._rows(ids, rows).t().flatten().tolist()
            self._store.prefetch(layer, best_first)

        self._recorder.hand_over(work, [ids], [], flag)

    def acquire(self, layer: int, ids: Buffer) -> None:
        """Begin a layer: what is missing is on its way from now on. ids `[rows, top_k]`."""
        if self.is_native:
            return
        flag = self._look_up(layer, ids)
        self._recorder.keep(ids)
        self._layers[layer] = _Layer(ids, flag, self._guesses.get(layer, []))
        self._recorder.hand_over(lambda rows: self._acquire(layer, rows), [ids], [], flag)

    def run(
        self, layer: int, x: Buffer, ids: Buffer, weights: Buffer, extras: ExpertExtras = NO_EXTRAS
    ) -> Buffer:
        """The weighted sum of the chosen experts' outputs, `[rows, hidden]`."""

        def compute(out: Buffer) -> HandOver:
            def work(rows: int) -> None:
                if self._acquired is None:  # they were at hand, but have been evicted since
                    self._acquire(layer, rows)
                acquired, self._acquired = self._acquired, None
                assert acquired is not None
                with acquired:
                    self._rows(out, rows)[:] = acquired.run(
                        self._rows(x, rows), self._rows(weights, rows), self._limit, extras
                    )

            return work

        at_hand = self._store.at_hand
        if at_hand is None:
            out = self._recorder.buffer(x.width)
            self._recorder.hand_over(compute(out), [x, ids, weights], [out])
            return out
        unless: tuple[torch.Tensor, Callable[[Buffer], HandOver]] | None = None
        if not self.is_native:
            unless = self._layers[layer].at_hand, compute
        nbytes = self._store.slots.dram.layouts[layer].nbytes
        addresses, activation = at_hand.addresses[layer], (self._limit, extras)
        return self._recorder.experts(x, ids, weights, addresses, activation, self._used, nbytes, unless)

    def _look_up(self, layer: int, ids: Buffer) -> torch.Tensor:
        """Whether these experts are at hand: what hand-overs are skipped by."""
        at_hand = self._store.at_hand
        if at_hand is None:
            return torch.zeros(1, dtype=torch.int64)
        return self._recorder.at_hand(ids, at_hand.addresses[layer], at_hand.busy[layer : layer + 1])

    # ------------------------------------------------------------------------------------------- running

    def running(self, program: Program, rows: int) -> AbstractContextManager[None]:
        """Around a run: nothing stays claimed, and the store hears of what it was not asked for."""
        return NOTHING if self.is_native else self._running(program, rows)

    @contextmanager
    def _running(self, program: Program, rows: int) -> Iterator[None]:
        self._program = program
        self._used[0] = 0
        self._store.slots.settle()
        try:
            yield
        except BaseException:
            if self._acquired is not None:
                self._acquired.__exit__()
                self._acquired = None
            raise
        self._report(rows)

    def _report(self, rows: int) -> None:
        if int(self._used):
            for number, layer in self._layers.items():
                if int(layer.at_hand):
                    skipped = [ids for ids, flag in layer.guesses if int(flag)]
                    guess = self._rows(skipped[-1], rows).flatten().tolist() if skipped else None
                    needed = sorted(set(self._rows(layer.ids, rows).flatten().tolist()))
                    self._store.used_at_hand(number, needed, guess)

    def _acquire(self, layer: int, rows: int) -> None:
        ids = self._rows(self._layers[layer].ids, rows)
        self._layers[layer].at_hand[0] = 0  # the store knows
        self._acquired = self._store.acquire(layer, ids)

    def _rows(self, buffer: Buffer, rows: int) -> torch.Tensor:
        assert self._program is not None
        return self._program.rows(buffer)[:rows]
