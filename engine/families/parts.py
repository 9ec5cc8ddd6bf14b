"""Bytes and parameters of a checkpoint, summed by part."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.planner.shape import Weights

LAYER_PREFIXES = ("layers.", "model.layers.", "blk.")


class Parts:
    """`(part, layer)` -> Weights; tensors whose names match `ignored` are left out.

    nbytes_of  the bytes of a tensor, where not those of its file
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ignored: re.Pattern[str] | None = None,
        nbytes_of: Callable[[str, TensorEntry], int] | None = None,
    ) -> None:
        self.weights: dict[tuple[str, int], Weights] = defaultdict(Weights)
        for name, entry in checkpoint.used(ignored).items():
            nbytes = entry.nbytes if nbytes_of is None else nbytes_of(name, entry)
            self.weights[_part_of(name)] += Weights(nbytes, _numbers_in(name, entry))

    def of(self, part: str, layer: int = -1) -> Weights:
        """Bytes and parameters of a part; zero if the checkpoint has none."""
        return self.weights.get((part, layer), Weights())


def _part_of(name: str) -> tuple[str, int]:
    prefix = next((p for p in LAYER_PREFIXES if name.startswith(p)), None)
    if prefix is None:
        is_embedding = name.startswith(("embed.", "model.embed_tokens.", "token_embd."))
        return ("embedding" if is_embedding else "head"), -1
    layer = int(name.removeprefix(prefix).partition(".")[0])
    for mark, part in (
        (".engram.embed.", "table"),
        (".tid2eid", "look_ups"),
        (".ffn.experts.", "experts"),
        (".ffn.shared_experts.", "shared"),
    ):
        if mark in name:
            return part, layer
    return "dense", layer


def _numbers_in(name: str, entry: TensorEntry) -> int:
    if name.endswith(".scale") or entry.dtype == "I64":  # neither is multiplied with
        return 0
    two_codes_a_byte = ".ffn.experts." in name and entry.dtype in ("I8", "U8")
    return math.prod(entry.shape) * (2 if two_codes_a_byte else 1)
