"""The thread that answers GPUs' mailboxes while a recorded step runs, and what ends a wait that nobody ends.

It polls the mailboxes of all GPUs, computes what is left to the processor and writes the answers. If that
fails, or an answer, its own or another GPU's, takes longer than anybody's patience, or no GPU comes to its
next hand-over, the mailboxes are abandoned: the GPUs finish the step with numbers that mean nothing, and
whoever waits for the step gets the error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quant.kernels.cuda.mailbox import PAUSE_S, Mailbox, StalledError

# With one layer's answer. An expert is read from a slow disk in some tens of milliseconds; a layer of a
# hundred of these, from a disk that others use as well, takes seconds.
PATIENCE_S = 60.0

# With GPUs that ask for nothing. They need milliseconds from one layer to the next, but layers on the
# processor may lie between, with experts on that same disk.
SILENCE_S = 300.0

# Outputs `[n, hidden]` of a layer's experts ids `[n]` for inputs `[n, hidden]`.
Answer = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
# Is told after a layer's answer which experts the next layer will probably choose, likeliest first.
Foresee = Callable[[int, list[int]], None]


@dataclass(frozen=True)
class Round:
    """A GPU's hand-overs in a step: its mailbox, and the layer of each."""

    box: Mailbox
    layers: Sequence[int]


class Coordinator:
    """Answers mailboxes by `answer`, on a thread of its own. `begin` and `end` are called by one thread."""

    def __init__(
        self,
        answer: Answer,
        foresee: Foresee | None = None,
        patience_s: float = PATIENCE_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._answer = answer
        self._foresee = foresee
        self._patience_s = patience_s
        self._silence_s = silence_s
        self._changed = threading.Condition()
        self._rounds: Sequence[Round] | None = None  # of the step that runs
        self._error: BaseException | None = None
        self._is_served = True  # all hand-overs of the step
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._serve, name="loci-coordinator", daemon=True),
            threading.Thread(target=self._watch, name="loci-watchdog", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, rounds: Sequence[Round]) -> None:
        """Answer these from now on; their GPUs have nothing to do yet. Raises StalledError after `close`."""
        for each in rounds:
            each.box.begin()
        with self._changed:
            if self._is_closed:
                raise StalledError("the model is being closed")
            self._rounds, self._error, self._is_served = rounds, None, False
            self._changed.notify_all()

    def end(self) -> None:
        """After the step: raise what has made it fail."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_served or self._error is not None)
            self._rounds, error = None, self._error
            self._changed.notify_all()
        if error is not None:
            raise error

    def fail(self, error: BaseException) -> None:
        """The step that runs, if one does, has failed: no GPU waits any more, and `end` raises this."""
        with self._changed:
            if self._rounds is not None:
                self._fail(error)

    @property
    def has_failed(self) -> bool:
        """Whether the step that runs has."""
        return self._error is not None

    def give_up(self) -> None:
        """The step has failed elsewhere: no GPU waits for an answer any more."""
        with self._changed:
            if self._rounds is not None:
                self._fail(StalledError("the step has failed"))
            self._rounds = None
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, also in the middle of a step, which then fails."""
        with self._changed:
            self._is_closed = True
            if self._rounds is not None:
                self._fail(StalledError("the model is being closed"))
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(self._patience_s)

    # ------------------------------------------------------------------------------------- the threads

    def _serve(self) -> None:
        while (rounds := self._next_step()) is not None:
            try:
                self._serve_step(rounds)
            except BaseException as error:
                with self._changed:
                    if self._rounds is rounds:
                        self._fail(error)
            with self._changed:
                if self._rounds is rounds:
                    self._is_served = True
                    self._changed.notify_all()
                while self._rounds is rounds and not self._is_closed:
                    self._changed.wait()

    def _serve_step(self, rounds: Sequence[Round]) -> None:
        done = [0] * len(rounds)
        while self._rounds is rounds and any(
            n < len(each.layers) for n, each in zip(done, rounds, strict=True)
        ):
            is_idle = True
            for at, each in enumerate(rounds):
                if each.box.is_abandoned:
                    return
                if done[at] < len(each.layers) and each.box.is_posted(done[at]):
                    self._reply(each, done[at])
                    done[at] += 1
                    is_idle = False
            if is_idle:
                time.sleep(PAUSE_S)

    def _reply(self, each: Round, number: int) -> None:
        """Answer a hand-over, unless its GPU has done that itself."""
        box = each.box
        pairs = box.missing(number)
        if len(pairs):
            inputs = box.inputs[pairs // box.top_k]
            box.outputs[pairs] = self._answer(each.layers[number], box.ids[number][pairs], inputs)
            if not box.is_abandoned:
                box.answer(number)
        guess = box.guess(number)
        if guess and self._foresee is not None:
            self._foresee(each.layers[number] + 1, guess)

    def _watch(self) -> None:
        """End steps in which one and the same answer, or a GPU's next hand-over, does not come."""
        before: tuple[Sequence[Round] | None, object] = None, None
        since = 0.0
        with self._changed:
            while not self._is_closed:
                if not self._rounds or self._error is not None:
                    self._changed.wait()
                    continue
                self._changed.wait(min(1.0, self._patience_s / 4, self._silence_s / 4))
                rounds = self._rounds
                if not rounds:
                    continue
                now = [(each.box.posts, each.box.unanswered()) for each in rounds]
                if rounds is not before[0] or now != before[1]:
                    before, since = (rounds, now), time.monotonic()
                    continue
                missing = sorted({name for _, found in now if found is not None for name in found[1]})
                if time.monotonic() - since > (self._patience_s if missing else self._silence_s):
                    self._fail(self._stalled(missing))

    def _stalled(self, missing: Sequence[str]) -> StalledError:
        """The error of a step in which these have not answered, or nobody was asked."""
        if missing:
            return StalledError(
                f"experts that a GPU does not hold were not there after {self._patience_s:.0f} s: no answer "
                f"from {' and '.join(missing)}; check the GPUs with `nvidia-smi`, and the drive"
            )
        return StalledError(
            f"no GPU has come to its next experts, or to the end of a step, in {self._silence_s:.0f} s; "
            "check the GPUs with `nvidia-smi`"
        )

    def _next_step(self) -> Sequence[Round] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._rounds is not None or self._is_closed)
            return None if self._is_closed else self._rounds

    def _fail(self, error: BaseException) -> None:
        """The step that runs has failed; only with `_changed` held."""
        self._error = self._error or error
        for each in self._rounds or ():
            each.box.abandon()
        self._changed.notify_all()
