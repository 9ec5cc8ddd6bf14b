"""When what is trained: stages of growing context, and the learning rate over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    tokens     how many it lasts
    context    row length
    batch      tokens per step
    rounding   train on the numbers that the files will hold
    balance    the routing bias still moves
    decay      the learning rate falls to zero over this stage
    """

    name: str
    tokens: int
    context: int
    batch: int
    rounding: bool = False
    balance: bool = True
    decay: bool = False


@dataclass(frozen=True)
class Schedule:
    """All stages, the peak learning rate that a linear warm-up leads to, and the mix of the corpus.

    mix: how often a document of a part occurs in each pass (1.5: once, and every second one twice);
    parts not named occur once. advice: part -> share of its targets that are soft (`advice.py`).
    """

    peak: float
    warmup_tokens: int
    stages: tuple[Stage, ...]
    mix: Mapping[str, float] = field(default_factory=dict)
    advice: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> Schedule:
        raw = json.loads(file.read_text())
        stages = tuple(Stage(**stage) for stage in raw["stages"])
        return cls(raw["peak"], raw["warmup_tokens"], stages, raw.get("mix", {}), raw.get("advice", {}))

    @property
    def total(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    def stage_at(self, tokens: int) -> tuple[int, Stage]:
        """The stage that has seen `tokens` before it goes on; the last one for ever after."""
        end = 0
        for number, stage in enumerate(self.stages):
            end += stage.tokens
            if tokens < end:
                return number, stage
        return len(self.stages) - 1, self.stages[-1]

    def learning_rate(self, tokens: int) -> float:
        """Warm-up, stable, decay (WSD)."""
        number, stage = self.stage_at(tokens)
        rate = self.peak * min(1.0, (tokens + 1) / self.warmup_tokens)
        if stage.decay:
            begin = sum(s.tokens for s in self.stages[:number])
            rate *= max(0.0, 1 - (tokens - begin) / stage.tokens)
        return rate
