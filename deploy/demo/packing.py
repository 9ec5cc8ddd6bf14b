"""Documents laid end to end into rows of equal length, such that packing changes nothing.

Documents in a row do not see each other (`attention.Geometry`). For that to be exact, each begins
where a compression group and a candidate block begin, so a few padding tokens lie between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.families.deepseek_v41.config import V41Config

PADDING = -1


def alignment(config: V41Config) -> int:
    """Documents begin at multiples of this."""
    step = math.lcm(*(ratio for ratio in config.compress_ratios if ratio), 1)
    if config.candidate_source_layer_id >= 0:
        ratio = config.compress_ratios[config.candidate_source_layer_id]
        step = math.lcm(step, config.candidate_block_size * ratio)
    return step


def lay_out(lengths: Sequence[int], row_length: int, step: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (document, first token, last token + 1) pieces, in order; what does not fit is cut.

    A document longer than what is left of a row goes on in the next one where at least a quarter
    row is left, as a piece that does not see its beginning; else the rest of the row stays empty.
    """
    rows: list[list[tuple[int, int, int]]] = [[]]
    free = row_length
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            fits = length - start <= free
            if not fits and (free < row_length // 4):
                rows.append([])
                free = row_length
                continue
            stop = min(length, start + free)
            rows[-1].append((document, start, stop))
            free -= stop - start
            free -= free % step
            start = stop
    return rows


def pack(rows: Sequence[Sequence[np.ndarray]], row_length: int, step: int) -> tuple[Tensor, Tensor]:
    """Token ids and document numbers, both `[rows, row_length]` int64; padding is document -1."""
    ids = np.zeros((len(rows), row_length), dtype=np.int64)
    documents = np.full((len(rows), row_length), PADDING, dtype=np.int64)
    for i, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces):
            ids[i, start : start + len(piece)] = piece
            documents[i, start : start + len(piece)] = number
            start += -(-len(piece) // step) * step
    return torch.from_numpy(ids), torch.from_numpy(documents)


def targets(ids: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The next token at each place `[B, T]`, and where there is one in the same document (bool)."""
    following = torch.zeros_like(ids)
    following[:, :-1] = ids[:, 1:]
    known = torch.zeros_like(ids, dtype=torch.bool)
    known[:, :-1] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != PADDING)
    return following, known
