"""Which compressed entries, or which tokens, each token attends to in sparse attention.

Everything here works on one sequence's tokens; `L` is the number of query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.formats.rows import Rows
from quant.kernels.interface import Kernels

# Scores that are made at a time: 64 MB, and some copies of them.
MOST_SCORES = 1 << 24


@dataclass(frozen=True)
class Selection:
    """The compressed entries that each token attends to: `[L, k]` int64, padded with -1."""

    entries: torch.Tensor

    def to(self, device: torch.device) -> Selection:
        """The same on `device`."""
        return Selection(self.entries.to(device))

    def last(self, tokens: int) -> Selection:
        """Those of the last tokens."""
        return Selection(self.entries[len(self.entries) - tokens :])


@dataclass(frozen=True)
class CandidatePool:
    """Blocks of consecutive entries that later indexers may choose from: `[L, blocks]` int64, -1 pads."""

    blocks: torch.Tensor
    block_size: int

    def to(self, device: torch.device) -> CandidatePool:
        """The same on `device`."""
        return CandidatePool(self.blocks.to(device), self.block_size)

    def last(self, tokens: int) -> CandidatePool:
        """Those of the last tokens."""
        return CandidatePool(self.blocks[len(self.blocks) - tokens :], self.block_size)

    def entries(self, visible: torch.Tensor) -> torch.Tensor:
        """The pool's entries for each token, `[L, blocks * block_size]`, -1 where not visible."""
        offsets = torch.arange(self.block_size, device=visible.device)
        entries = (self.blocks.unsqueeze(-1) * self.block_size + offsets).flatten(1)
        outside = (self.blocks < 0).repeat_interleave(self.block_size, dim=1)
        return torch.where(outside | (entries >= visible.unsqueeze(1)), -1, entries)


def select_entries(
    kernels: Kernels,
    queries: torch.Tensor,
    weights: torch.Tensor,
    keys: Rows,
    visible: torch.Tensor,
    top_k: int,
    pool: CandidatePool | None = None,
) -> tuple[Selection, torch.Tensor]:
    """The `top_k` best visible entries of each token, within `pool` where one is given.

    keys `[G, index_dim]`; visible `[L]`, how many entries (from the first) a token may see.
    Returns the selection and the scores over all G entries (over the pool's, with a pool).
    """
    if pool is None:
        scores = kernels.index_scores(queries, weights, keys, visible)
        return Selection(kernels.best_columns(scores, top_k)), scores
    entries = pool.entries(visible)  # [L, pool]
    scores = kernels.index_scores(queries, weights, keys, visible, entries)
    best = kernels.best_columns(scores, top_k)
    chosen = entries.gather(1, best.clamp(min=0))
    return Selection(chosen.masked_fill(best < 0, -1)), scores


def choose_entries(
    kernels: Kernels,
    queries: torch.Tensor,
    weights: torch.Tensor,
    keys: Rows,
    visible: torch.Tensor,
    top_k: int,
    pool: CandidatePool | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[Selection, CandidatePool | None]:
    """`select_entries` for any number of tokens: scores are made of some at a time, so a long prompt takes no
    more memory than a short one.

    blocks: size and number of those that `candidate_blocks` shall find for each token, returned as well.
    """
    columns = keys.shape[0] if pool is None else pool.blocks.shape[1] * pool.block_size
    most = max(1, MOST_SCORES // max(1, columns))
    chosen: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    for start in range(0, len(queries), most):
        rows = slice(start, start + most)
        of_rows = None if pool is None else CandidatePool(pool.blocks[rows], pool.block_size)
        selection, scores = select_entries(
            kernels, queries[rows], weights[rows], keys, visible[rows], top_k, of_rows
        )
        chosen.append(selection.entries)
        if blocks is not None:
            found.append(candidate_blocks(kernels, scores, visible[rows], *blocks).blocks)
    made = None if blocks is None else CandidatePool(torch.cat(found), blocks[0])
    return Selection(chosen[0] if len(chosen) == 1 else torch.cat(chosen)), made


def choose_tokens(
    kernels: Kernels, queries: torch.Tensor, weights: torch.Tensor, keys: Rows, top_k: int
) -> torch.Tensor:
    """The `top_k` tokens that each of the last `L` scores best among itself and those before it: `[L, top_k]`
    int64, ascending, -1 behind.

    queries `[L, heads, dim]`, weights `[L, heads]`, keys `[end, dim]`. Where there are no more tokens than
    are chosen, no scores are made.
    """
    length = len(queries)
    end, device = len(keys), queries.device
    visible = torch.arange(end - length + 1, end + 1, device=device)  # [L]
    chosen = torch.arange(top_k, device=device).repeat(length, 1)
    chosen[chosen >= visible.unsqueeze(1)] = -1
    choosing = max(0, min(length, top_k - (end - length)))  # the first that has to choose
    if choosing < length:
        rows = slice(choosing, length)
        found, _ = choose_entries(kernels, queries[rows], weights[rows], keys, visible[rows], top_k)
        chosen[rows] = found.entries
    return chosen


def candidate_blocks(
    kernels: Kernels, scores: torch.Tensor, visible: torch.Tensor, block_size: int, top_blocks: int
) -> CandidatePool:
    """The blocks whose best visible entry scores highest; the newest visible entry's block always wins.

    scores `[L, G]` with -inf where not visible; visible `[L]`.
    """
    tokens, entries = scores.shape
    blocks = -(-entries // block_size)
    padded = scores.new_full((tokens, blocks * block_size), -torch.inf)
    padded[:, :entries] = scores
    best = padded.view(tokens, blocks, block_size).amax(-1)  # [L, blocks]
    newest = ((visible - 1).clamp(min=0) // block_size).unsqueeze(1)
    has_any = (visible > 0).unsqueeze(1)
    best.scatter_(1, newest, torch.where(has_any, torch.inf, -torch.inf))
    return CandidatePool(kernels.best_columns(best, top_blocks), block_size)
