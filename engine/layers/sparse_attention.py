"""Attention over a sliding window and selected compressed entries (spec section 4).

Keys and values are one shared latent per token, so there is one key "head" for all query heads.
Everything here works on one sequence's tokens; `L` is the number of query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Query tokens handled together: bounds the score matrices to [block, heads, window + block + selected].
QUERY_BLOCK = 64


@dataclass(frozen=True)
class Selection:
    """The compressed entries that each token sees: `[L, k]` int64, padded with -1."""

    entries: torch.Tensor

    def to(self, device: torch.device) -> Selection:
        """The same on `device`."""
        return Selection(self.entries.to(device))


@dataclass(frozen=True)
class CandidatePool:
    """Blocks of consecutive entries that later indexers may choose from: `[L, blocks]` int64, -1 pads."""

    blocks: torch.Tensor
    block_size: int

    def to(self, device: torch.device) -> CandidatePool:
        """The same on `device`."""
        return CandidatePool(self.blocks.to(device), self.block_size)

    def entries(self, visible: torch.Tensor) -> torch.Tensor:
        """The pool's entries for each token, `[L, blocks * block_size]`, -1 where not visible."""
        offsets = torch.arange(self.block_size, device=visible.device)
        entries = (self.blocks.unsqueeze(-1) * self.block_size + offsets).flatten(1)
        outside = (self.blocks < 0).repeat_interleave(self.block_size, dim=1)
        return torch.where(outside | (entries >= visible.unsqueeze(1)), -1, entries)


def index_scores(queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """sum_h w[t,h] * relu(q[t,h] . k[g]), `[L, G]`.

    queries `[L, index_heads, index_dim]`, weights `[L, index_heads]`, keys `[G, index_dim]` shared by
    all tokens or `[L, G, index_dim]`, one set per token.
    """
    dots = queries @ keys.transpose(-2, -1)  # [L, index_heads, G]
    return torch.einsum("lh,lhg->lg", weights, dots.relu())


def top_visible(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Columns of the `top_k` best scores per row, `[L, min(top_k, G)]`; -1 where the score is -inf."""
    values, columns = scores.topk(min(top_k, scores.shape[1]), dim=-1)
    return columns.masked_fill(values == -torch.inf, -1)


def select_entries(
    queries: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    top_k: int,
    pool: CandidatePool | None = None,
) -> tuple[Selection, torch.Tensor]:
    """The `top_k` best visible entries of each token, within `pool` where one is given.

    keys `[G, index_dim]`; visible `[L]`, how many entries (from the first) a token may see.
    Returns the selection and the scores over all G entries (over the pool's, with a pool).
    """
    if pool is None:
        scores = index_scores(queries, weights, keys)
        hidden = torch.arange(keys.shape[0], device=keys.device) >= visible.unsqueeze(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        return Selection(top_visible(scores, top_k)), scores
    entries = pool.entries(visible)  # [L, pool]
    scores = index_scores(queries, weights, keys[entries.clamp(min=0)])
    scores = scores.masked_fill(entries < 0, -torch.inf)
    best = top_visible(scores, top_k)
    chosen = entries.gather(1, best.clamp(min=0))
    return Selection(chosen.masked_fill(best < 0, -1)), scores


def candidate_blocks(
    scores: torch.Tensor, visible: torch.Tensor, block_size: int, top_blocks: int
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
    return CandidatePool(top_visible(best, top_blocks), block_size)


def attend(
    q: torch.Tensor,
    window_kv: torch.Tensor,
    sink: torch.Tensor,
    window: int,
    compressed: torch.Tensor | None = None,
    selection: Selection | None = None,
) -> torch.Tensor:
    """Attention of `L` new tokens, `[L, heads, head_dim]`.

    q          `[L, heads, head_dim]`
    window_kv  `[n + L, head_dim]`: the latents of the n <= window - 1 tokens before, then of the new ones
    sink       `[heads]`: the denominator of head h gains exp(sink_h)
    compressed `[G, head_dim]` and selection: the compressed entries and which of them are seen; the entries
               may lie on another device, then the selected ones are fetched from there
    """
    before = window_kv.shape[0] - q.shape[0]
    blocks = []
    for start in range(0, q.shape[0], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[0])
        first = max(0, start + before - window + 1)
        keys = window_kv[first : stop + before]
        chosen, hidden = None, None
        if compressed is not None and selection is not None:
            chosen = compressed, selection.entries[start:stop]
        if stop - start > 1:  # a single query sees all of these keys
            own = torch.arange(start, stop, device=q.device).unsqueeze(1) + before  # each query's own key
            key_index = torch.arange(first, stop + before, device=q.device)
            hidden = (key_index > own) | (key_index <= own - window)  # [block, keys]
        blocks.append(_attend_block(q[start:stop], keys, hidden, sink, chosen))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _attend_block(
    q: torch.Tensor,
    keys: torch.Tensor,
    hidden: torch.Tensor | None,
    sink: torch.Tensor,
    chosen: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """One block of queries `[block, heads, head_dim]` over `[keys, head_dim]` and gathered entries.

    hidden `[block, keys]`: what a query must not see; None where it is nothing.
    """
    block, heads, head_dim = q.shape
    q = q * head_dim**-0.5
    scores = q @ keys.t()  # [block, heads, keys]
    if hidden is not None:
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
    parts = [sink.view(1, heads, 1).expand(block, heads, 1), scores]
    if chosen is not None:
        compressed, entries = chosen
        latents = compressed[entries.clamp(min=0).to(compressed.device)].to(q.device)  # [block, k, head_dim]
        selected = (q @ latents.transpose(1, 2)).masked_fill((entries < 0).unsqueeze(1), -torch.inf)
        parts.append(selected)
    weights = torch.cat(parts, dim=-1).softmax(-1)
    seen = 1 + keys.shape[0]
    out = weights[..., 1:seen] @ keys
    if chosen is not None:
        out = out + weights[..., seen:] @ latents
    return out
