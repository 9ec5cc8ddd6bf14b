"""What V4.1's forward is written in: operations on streams, compressed entries, Engram and experts.

`eager.py` computes them at once, for prompts, on GPUs and where something is to be traced; `recorded.py`
notes them for a program that decodes. Section numbers refer to docs/deepseek-v41.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.weights import CompressorWeights, V41Weights
from engine.families.streams.operations import Frequencies, StreamOperations, Written
from engine.layers.operations import Value
from quant.kernels.cpu.row_notes import Ngrams
from quant.kernels.interface import Kernels


@dataclass(frozen=True)
class V41Parts:
    """What operations need of a loaded model.

    ngrams  how native code finds Engram rows; None where there are none, or not all in DRAM
    """

    config: V41Config
    weights: V41Weights
    kernels: Kernels
    ngrams: Ngrams | None

    @cached_property
    def frequencies(self) -> Frequencies:
        """What positions are turned by."""
        return Frequencies.by(self.config)

    def table(self, layer: int) -> int:
        """Which of the Engram tables a layer reads."""
        return self.config.engram_layer_ids.index(layer)

    def is_compressed(self, layer: int) -> bool:
        """Whether a layer sees compressed entries, and so turns by their frequencies."""
        return self.config.compress_ratios[layer] > 0


class V41Operations(StreamOperations[Value], Protocol[Value]):
    """And what V4.1 alone has."""

    def streams(self, x: Value, n: int) -> tuple[Value, Value]:
        """x in n streams, and the mix that the first sublayer reads with: stream 0 alone."""
        ...

    def received(self, x: Value, n: int) -> tuple[Value, Value]:
        """n streams and their mix, from another part's `handed`."""
        ...

    def handed(self, streams: Value, pre: Value) -> Value:
        """Streams and mix side by side, `[rows, hc * (hidden + 1)]`, for the next part."""
        ...

    def narrow(self, number: int, *values: Value) -> Sequence[Value] | None:
        """The rows that attention of layer `number` and those after it need: None where it is none at all."""
        ...

    def engram(self, number: int, streams: Value) -> Value:
        """The gated value of the tokens' table rows added to every stream (section 7)."""
        ...

    def capture(self, streams: Value) -> None:
        """Keep the mean of the streams, which draft stages read (section 9)."""
        ...

    def compress(self, number: int, compressor: CompressorWeights, x: Value) -> None:
        """Append the entries and index keys of the groups that these tokens complete (section 4.3): within
        `each_rows`."""
        ...

    def prefetch(self, number: int, streams: Value, pre: Value, written: Written[Value]) -> None:
        """Start prefetching the experts that layer `number` will probably choose, from the streams so far,
        with what will be written to them where that is known."""
        ...
