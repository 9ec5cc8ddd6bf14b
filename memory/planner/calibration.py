"""A plan beside what was measured while it ran: seconds of steps, hits of tiers, bytes of links.

Nothing is fitted: a comparison says how far off the plan is, and `Learned` keeps what was seen, for plans to
come (`loci plan --measured`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memory.planner.cost_model import DISK, StepCost
from memory.planner.prefill import PrefillModel
from memory.telemetry import Snapshot
from memory.user_files import whole_file
from quant.errors import ConfigError

ENOUGH_STEPS = 100  # of answers, before anything is said
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Seen:
    """Steps of one kind that were measured: `count` of them, of `tokens` tokens in all, whose sequences held
    `held` tokens before."""

    count: int = 0
    seconds: float = 0.0
    tokens: int = 0
    held: int = 0

    def plus(self, seconds: float, tokens: int, held: int) -> Seen:
        """And one more."""
        return Seen(self.count + 1, self.seconds + seconds, self.tokens + tokens, self.held + held)

    def since(self, before: Seen) -> Seen:
        """Those that came after `before`."""
        return Seen(
            self.count - before.count,
            self.seconds - before.seconds,
            self.tokens - before.tokens,
            self.held - before.held,
        )


@dataclass(frozen=True)
class StepTimes:
    """How long steps took: those of answers alone, one token of each sequence, by how many sequences they
    had; and those of one prompt alone. Others say nothing of either."""

    decode: dict[int, Seen] = field(default_factory=dict)
    prompts: Seen = Seen()

    @property
    def decoded(self) -> int:
        """Steps of answers alone."""
        return sum(seen.count for seen in self.decode.values())

    def plus(self, segments: Sequence[tuple[int, int]], logits: int, seconds: float) -> StepTimes:
        """And a step of sequences that held so many tokens and got so many, of `(held, tokens)` each, and of
        whose tokens so many had logits."""
        count, held = len(segments), sum(before for before, _ in segments)
        tokens = sum(length for _, length in segments)
        if is_of_answers(segments, logits):
            found = self.decode.get(count, Seen()).plus(seconds, tokens, held)
            return replace(self, decode={**self.decode, count: found})
        if count == 1 and logits <= 1:
            return replace(self, prompts=self.prompts.plus(seconds, tokens, held))
        return self

    def since(self, before: StepTimes) -> StepTimes:
        """Those of steps that came after `before`."""
        decode = {count: seen.since(before.decode.get(count, Seen())) for count, seen in self.decode.items()}
        return StepTimes(
            {count: seen for count, seen in decode.items() if seen.count}, self.prompts.since(before.prompts)
        )


def is_of_answers(segments: Sequence[tuple[int, int]], logits: int) -> bool:
    """Whether a step is of answers alone, as `StepTimes.plus` is told of it: one token of each sequence, and
    logits of all."""
    return sum(length for _, length in segments) == len(segments) == logits


@dataclass(frozen=True)
class Comparison:
    """A quantity as planned and as measured: seconds, shares of uses, or bytes."""

    what: str
    unit: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured by planned; None where nothing was planned."""
        return self.measured / self.planned if self.planned > 0 else None


def compare(model: PrefillModel, times: StepTimes, moved: Snapshot | None) -> list[Comparison]:
    """A plan's steps and those that were measured, the same number of each kind.

    moved  what was hit, read and waited for in steps of answers alone; None where nothing can move
    """
    steps, prompts = times.decoded, times.prompts
    if steps < ENOUGH_STEPS:
        return []
    planned = [
        (model.decode(sequences, seen.held // max(1, seen.tokens)), seen)
        for sequences, seen in sorted(times.decode.items())
    ]
    found = [
        Comparison(
            "decode", "s/step", _mean([cost.total_s for cost, _ in planned], planned),
            sum(seen.seconds for _, seen in planned) / steps,
        )
    ]  # fmt: skip
    if prompts.tokens:
        chunk = max(1, prompts.tokens // prompts.count)
        cost = model.prefill(chunk, chunk, prompts.held // prompts.count)
        found.append(
            Comparison("prompts", "s/token", cost.total_s / cost.tokens, prompts.seconds / prompts.tokens)
        )
    uses = sum(moved.hits.values()) if moved is not None else 0
    if moved is None or not uses:
        return found
    tokens = sum(seen.tokens for _, seen in planned)
    for tier in ("vram", "dram", "nvme"):
        hits = sum(count for name, count in moved.hits.items() if name.startswith(tier))
        share = _mean([cost.hit_rates.get(tier, 0.0) for cost, _ in planned], planned)
        if hits or share:
            found.append(Comparison(f"hits in {tier}", "share", share, hits / uses))
    if read := moved.moved_bytes.get("nvme", 0):
        nbytes = _mean([cost.nbytes.get("nvme", 0.0) for cost, _ in planned], planned)
        found.append(Comparison("read from disk", "B/token", nbytes * steps / tokens, read / tokens))
        wait = _mean([cost.seconds.get(DISK, 0.0) for cost, _ in planned], planned)
        found.append(Comparison("waits for disk", "s/step", wait, moved.stalled_on("nvme") / steps))
    return found


def _mean(values: Sequence[float], planned: Sequence[tuple[StepCost, Seen]]) -> float:
    """Of all steps, given a value for each kind."""
    weights = [seen.count for _, seen in planned]
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(1, sum(weights))


@dataclass(frozen=True)
class Learned:
    """What a run has taught about a model on a machine.

    uses    of each layer's experts; empty for layers without, and where nothing could move
    rates   of the machine, as `loci bench hardware` names them
    ratios  by which steps took longer than planned, by kind
    """

    model: str
    uses: tuple[tuple[float, ...], ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON. Raises ConfigError where it cannot be written."""
        report = {
            "model": self.model,
            "uses": [[round(n, 3) for n in layer] for layer in self.uses],
            "rates": dict(self.rates),
            "ratios": dict(self.ratios),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(report))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error}); choose another path") from None

    @classmethod
    def read(cls, path: Path) -> Learned:
        """What `write` wrote. Raises ConfigError in one line for anything else."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ConfigError(f"{path}: larger than any file of measurements")
            report = json.loads(path.read_text())
            return cls(
                str(report["model"]),
                tuple(tuple(_number(n) for n in layer) for layer in report["uses"]),
                {str(name): _number(value) for name, value in report["rates"].items()},
                {str(name): _number(value) for name, value in report["ratios"].items()},
            )
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}; --measured takes a file that a server wrote"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not a file of measurements ({error}); `loci serve --measured-file` writes one"
            ) from None


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is no measurement")
    return number
