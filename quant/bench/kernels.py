"""All measurements of the kernels on this machine, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quant.bench.arena import Arena
from quant.bench.decode import TURN_BYTES, Both, measure_decode, measure_others
from quant.bench.prefill import measure_prefill
from quant.bench.rows import measure_rows
from quant.bench.timing import Figure, Neighbours
from quant.errors import ConfigError
from quant.kernels.choice import choose
from quant.kernels.cpu.native import NativeKernels

# Of plain read bandwidth, by instruction set; and of torch's own floating-point speed.
READ_TARGETS = {"avx512": 0.90, "avx2": 0.75, "portable": None}
READ_TARGET_OTHERS = 0.80
FLOPS_TARGET = 0.7
MIN_BYTES = 2 * TURN_BYTES


@dataclass(frozen=True)
class Effort:
    """How much memory and how many turns; the least is enough to see that everything runs."""

    arena_bytes: int
    turns: int
    prefill_turns: int


def measure_kernels(effort: Effort) -> Iterator[tuple[str, list[Figure]]]:
    """Figures by topic, as they are measured.

    Takes three times `effort.arena_bytes` of memory at most. Raises ConfigError where there are no compiled
    kernels, or less memory than a measurement beyond caches takes.
    """
    kernels = choose()
    if not isinstance(kernels, NativeKernels):
        raise ConfigError(f"nothing to measure: {kernels.describe()}")
    if effort.arena_bytes < MIN_BYTES:
        raise ConfigError(f"at least {MIN_BYTES >> 20} MiB of memory is needed; free some")
    both = Both({mode: NativeKernels(mode, kernels.level) for mode in ("exact", "int8")}, kernels.activations)
    neighbours = Neighbours()
    arena = Arena(effort.arena_bytes, kernels)
    target = READ_TARGETS[kernels.level]
    yield "one token", measure_decode(arena, both, effort.turns, target, READ_TARGET_OTHERS)
    yield "one token, alongside others", measure_others(arena, both, effort.turns)
    yield "many tokens", measure_prefill(both, effort.prefill_turns, FLOPS_TARGET)
    yield "Engram rows", measure_rows(arena, kernels, effort.turns)
    yield "meanwhile", [Figure("cores_busy_elsewhere", neighbours.cores(), "cores")]
