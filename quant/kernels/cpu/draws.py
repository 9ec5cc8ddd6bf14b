"""Tokens drawn natively, from logits in host memory, and what log probabilities need."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from quant.kernels.cpu import library


class Draw(ctypes.Structure):
    """How a row's token is drawn: `Draw` of native_src/draws.hpp.

    temperature 0 takes the best token, top_k 0 leaves all; number is random, at least 0 and below 1.
    """

    _fields_ = (
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        ("number", ctypes.c_double),
    )


class NativeDraws:
    """Draws on an instruction-set level, by default the best of this machine."""

    def __init__(self, level: str | None = None) -> None:
        self._library = library.load()
        self._level = library.LEVELS.index(level or library.available_levels()[-1])

    def tokens(self, logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        """A token for each row of logits `[rows, vocab]` float32, contiguous; -1 where there is a NaN."""
        count = len(draws)
        found = (ctypes.c_int64 * count)()
        self._library.loci_draw(
            self._level,
            torch.get_num_threads(),
            logits.data_ptr(),
            logits.shape[1],
            (Draw * count)(*draws),
            count,
            found,
        )
        return list(found)

    def best(
        self, logits: torch.Tensor, row: int, token: int, top: int
    ) -> tuple[float, list[tuple[int, float]]]:
        """Log probabilities in a row of logits `[rows, vocab]` float32, contiguous: of `token`, and of the
        `top` best ones with their ids, of equal ones the first. NaN where there is a NaN."""
        vocab = logits.shape[1]
        ids, values = (ctypes.c_int64 * top)(), (ctypes.c_double * (top + 1))()
        self._library.loci_log_probabilities(
            self._level,
            torch.get_num_threads(),
            logits.data_ptr() + row * vocab * logits.itemsize,
            vocab,
            token,
            top,
            ids,
            values,
        )
        chosen, *best = values
        return chosen, list(zip(ids, best, strict=True))

    def masked(self, logits: torch.Tensor, allowed: np.ndarray) -> torch.Tensor:
        """Logits `[vocab]` float32, contiguous, with minus infinity where a token's bit in `allowed` (uint8)
        is 0 or missing."""
        out = torch.empty_like(logits)
        self._library.loci_mask(
            self._level, logits.data_ptr(), len(logits), allowed.ctypes.data, len(allowed), out.data_ptr()
        )
        return out


@cache
def native_draws() -> NativeDraws | None:
    """None where the kernels were not built."""
    try:
        return NativeDraws()
    except library.LibraryMissingError:
        return None
