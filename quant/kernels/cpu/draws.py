"""Tokens drawn natively, from logits in host memory, and what log probabilities need."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

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
    """Draws on the best instruction set of this machine."""

    def __init__(self) -> None:
        self._library = library.load()
        self._level = library.LEVELS.index(library.available_levels()[-1])

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

    def best(self, logits: torch.Tensor, top: int) -> tuple[float, list[int]]:
        """The logarithm of the sum of all exponentials of logits `[vocab]` float32, contiguous, and the `top`
        best tokens, of equal ones the first; NaN where they are not numbers."""
        found = (ctypes.c_int64 * top)()
        total = self._library.loci_best_logits(
            self._level, torch.get_num_threads(), logits.data_ptr(), len(logits), top, found
        )
        return float(total), list(found)


@cache
def native_draws() -> NativeDraws | None:
    """None where the kernels were not built."""
    try:
        return NativeDraws()
    except library.LibraryMissingError:
        return None
