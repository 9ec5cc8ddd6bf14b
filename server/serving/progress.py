"""How far the prompts of a request have been computed, as llama.cpp's clients read it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from engine.engine import PromptProgress
from server.serving.generation import Generation


class Progress:
    """Tells each state of the prompts once: first what was cached of them, last that all is computed."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._told: PromptProgress | None = None

    def of(self, generation: Generation) -> dict[str, Any] | None:
        """`prompt_progress`; None where it is as it was, or nothing has been computed yet."""
        now = None if self._is_over else generation.prompt_progress()
        if now is not None and self._told is None:
            now = now._replace(processed=now.cached)
        if now is None or now == self._told:
            return None
        self._told = now
        elapsed_ms = round((time.perf_counter() - self._began) * 1000)
        return {"total": now.total, "cache": now.cached, "processed": now.processed, "time_ms": elapsed_ms}

    def rest(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """What has not been told yet."""
        while (told := self.of(generation)) is not None:
            yield told

    @property
    def _is_over(self) -> bool:
        return self._told is not None and self._told.processed == self._told.total
