"""A reader of an engine's Outputs that can be waited for."""

from __future__ import annotations

import threading

from engine.output import FinishReason, Output

PATIENCE_S = 60


class Answer:
    """Collects the Outputs of one sequence and waits for its end."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._changed = threading.Condition()

    def __call__(self, output: Output) -> None:
        with self._changed:
            self.outputs.append(output)
            self._changed.notify_all()

    def wait(self) -> Answer:
        with self._changed:
            assert self._changed.wait_for(lambda: self.finish_reason is not None, PATIENCE_S)
        return self

    def wait_for_tokens(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.token_ids) >= count, PATIENCE_S)

    def wait_for_tokens_or_end(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.token_ids) >= count or self.finish_reason is not None, PATIENCE_S
            )

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def token_ids(self) -> list[int]:
        return [i for output in self.outputs for i in output.token_ids]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)
