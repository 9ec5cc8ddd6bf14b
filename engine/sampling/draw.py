"""Samples tokens for several sequences at once: temperature, top_k, top_p, min_p, and the draw itself.

Each row's token depends on that row, its parameters and its random number alone, never on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, isnan

import numpy as np
import torch

from engine.sampling.params import SamplingParams
from quant.kernels.cpu.draws import Draw, native_draws

# How many of the top tokens are considered first, and the factor by which that grows until it suffices.
# top_k, top_p and min_p usually leave a few tokens; sorting the whole vocabulary takes milliseconds.
FIRST_LOOK = 64
GROWTH = 16
# Lower temperatures leave only the top token, and would overflow the logits.
MIN_TEMPERATURE = 1e-5


def draw_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]
) -> list[int]:
    """A token for each row of logits `[rows, vocab]` float32, on the CPU; -1 where they are NaN.

    numbers are random, at least 0 and below 1; the same number draws the same token.
    """
    native = native_draws()
    if native is None or not logits.is_contiguous():
        return draw_plainly(logits, params, numbers)
    return native.tokens(
        logits,
        [
            Draw(
                0.0 if wanted.temperature < MIN_TEMPERATURE else wanted.temperature,
                wanted.top_p,
                wanted.min_p,
                wanted.top_k,
                number,
            )
            for wanted, number in zip(params, numbers, strict=True)
        ],
    )


def draw_plainly(
    logits: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]
) -> list[int]:
    """The same where there are no compiled kernels; rounding may decide otherwise."""
    tokens = [0] * len(params)
    greedy, plain, cut = [], [], []
    for row, wanted in enumerate(params):
        if wanted.temperature < MIN_TEMPERATURE:
            greedy.append(row)
        elif wanted.top_p == 1 and wanted.min_p == 0 and not 0 < wanted.top_k < logits.shape[1]:
            plain.append(row)
        else:
            cut.append(row)
    if greedy:
        # NumPy's argmax is vectorised, torch's is not: 3 us against 43 us for 49152 tokens.
        rows = _rows(logits, greedy).numpy()
        best = rows.argmax(-1).tolist()  # the first NaN, if there is any
        _put(tokens, greedy, [-1 if isnan(row[i]) else i for row, i in zip(rows, best, strict=True)])
    if plain:
        probs = _probabilities(logits, params, plain)
        sums = probs.cumsum(-1, dtype=torch.float64).numpy()
        _put(tokens, plain, _columns(sums, [numbers[row] for row in plain]))
    if cut:
        probs = _probabilities(logits, params, cut)
        chosen = [params[row] for row in cut]
        _put(tokens, cut, _among_the_best(probs, chosen, [numbers[row] for row in cut], FIRST_LOOK))
    return tokens


def _put(tokens: list[int], rows: list[int], found: list[int]) -> None:
    for row, token in zip(rows, found, strict=True):
        tokens[row] = token


def _rows(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == logits.shape[0] else logits[rows]


def _probabilities(logits: torch.Tensor, params: Sequence[SamplingParams], rows: list[int]) -> torch.Tensor:
    temperatures = np.array([[params[row].temperature] for row in rows], dtype=np.float32)
    # torch would wake other threads to divide a large vocabulary, which takes longer than the division.
    return torch.from_numpy(_rows(logits, rows).numpy() / temperatures).softmax(-1)


def _columns(sums: np.ndarray, numbers: Sequence[float]) -> list[int]:
    """The column that each row's number falls on; columns end at their sums `[rows, n]`. -1 among NaN."""
    points = [number * float(row[-1]) for number, row in zip(numbers, sums, strict=True)]
    return [
        min(int(row.searchsorted(point, "right")), len(row) - 1) if isfinite(point) else -1
        for point, row in zip(points, sums, strict=True)
    ]


def _among_the_best(
    probs: torch.Tensor, params: Sequence[SamplingParams], numbers: Sequence[float], look: int
) -> list[int]:
    """Draw among the tokens that top_k, top_p and min_p leave, of probs `[rows, vocab]`."""
    vocab = probs.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    widths = [min(vocab, max(look, limit) if limit < vocab else look) for limit in limits]
    tokens = [0] * len(params)
    # The order of equally likely tokens depends on the width, which must not be another row's.
    for width in sorted(set(widths)):
        rows = [row for row, own in enumerate(widths) if own == width]
        found = _among(
            _rows(probs, rows),
            [params[row] for row in rows],
            [limits[row] for row in rows],
            [numbers[row] for row in rows],
            width,
            look,
        )
        _put(tokens, rows, found)
    return tokens


def _among(
    probs: torch.Tensor,
    params: list[SamplingParams],
    limits: list[int],
    numbers: list[float],
    width: int,
    look: int,
) -> list[int]:
    """The same for rows that consider their top `width` tokens, of which top_k leaves `limits`."""
    vocab = probs.shape[1]
    best, ids = (found.numpy() for found in probs.topk(width))  # [rows, width], likeliest first
    # NumPy from here on: so few values take it a microsecond an operation, and torch five.
    sums = best.cumsum(-1, dtype=np.float64)
    top_k, top_p, min_p = (
        np.array([[limit] for limit in limits]),
        np.array([[p.top_p] for p in params]),
        np.array([[p.min_p] for p in params], dtype=np.float32),
    )
    # top_p is a share of what top_k leaves.
    whole = [[row[limit - 1] if limit < vocab else 1.0] for row, limit in zip(sums, limits, strict=True)]
    # A token stays while those before it hold less than top_p; the first always stays.
    stays = (sums - best < top_p * whole) & (best >= min_p * best[:, :1]) & (np.arange(width) < top_k)
    columns = _columns((best * stays).cumsum(-1, dtype=np.float64), numbers)
    tokens = [int(row[column]) if column >= 0 else -1 for row, column in zip(ids, columns, strict=True)]
    if width < vocab:
        unsure = [row for row, more in enumerate(stays[:, -1]) if more and limits[row] > width]
        if unsure:
            picked = [params[row] for row in unsure], [numbers[row] for row in unsure]
            _put(tokens, unsure, _among_the_best(_rows(probs, unsure), *picked, look * GROWTH))
    return tokens
