"""How far the prompts of a request have been computed, as llama.cpp's clients read it."""

from __future__ import annotations

import time
from typing import Any

from server.serving.generation import Generation


class Progress:
    """Tells each state of the prompts once."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._told: object = None

    def of(self, generation: Generation) -> dict[str, Any] | None:
        """`prompt_progress`; None where it is as it was, or the prompts are done."""
        now = generation.prompt_progress()
        if now is None or now == self._told:
            return None
        self._told = now
        elapsed_ms = round((time.perf_counter() - self._began) * 1000)
        return {"total": now.total, "cache": now.cached, "processed": now.processed, "time_ms": elapsed_ms}
