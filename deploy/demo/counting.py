"""Engram rows made by counting: what an n-gram adds to the expectation of the next token.

Every token has a code, a direction that it shares with tokens that follow the same words. After a
context h the next token's expected code is m(h) = sum of p(w | h) code(w), with Kneser-Ney
probabilities, and the news of h is m(h) - m(h without its oldest token): nothing for contexts that
were hardly seen. Rows are fitted such that the rows of a context add up to its news, as nearly as
collisions allow, and best where contexts occur often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.families.deepseek_v41.config import V41Config
from kneser_ney import BITS, PAD, KneserNey, Order, suffix
from rows import RowFinder

# Heads of an order in so many groups; the rows of a group add up to one piece of the news. More groups
# say more of it, fewer say it more exactly: there are four times as many contexts of three tokens as of two.
GROUPS = {2: 2, 3: 1}
RIDGE = 0.5  # in uses: rows of contexts that hardly occur stay small
ITERATIONS = 8
MANY = 100_000  # contexts looked up at once
SEED = 41


def code_size(config: V41Config) -> int:
    """How long a token's code is: every layer tells another piece of it."""
    return max(GROUPS.values()) * config.engram_head_dim * len(config.engram_layer_ids)


def next_token_codes(documents: Sequence[np.ndarray], vocabulary: int, size: int) -> Tensor:
    """Codes `[vocabulary, size]` of length one, from which tokens follow which.

    The positive pointwise mutual information of neighbours, its strongest `size` directions, turned at
    random so that each piece of a code says as much as any other.
    """
    pairs = torch.zeros(vocabulary, vocabulary)  # [following, token]
    for document in documents:
        keys = torch.from_numpy(document[1:] * vocabulary + document[:-1])
        pairs.view(-1).index_add_(0, keys, torch.ones(len(keys)))
    expected = pairs.sum(1, keepdim=True) * pairs.sum(0, keepdim=True) / pairs.sum()
    information = torch.log((pairs / expected.clamp(min=1e-9)).clamp(min=1.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        left, strength, _ = torch.svd_lowrank(information, q=size + 16, niter=3)
        turn, _ = torch.linalg.qr(torch.randn(size, size))
    codes = left[:, :size] * strength[:size].sqrt()
    return (codes / (codes.norm(dim=1, keepdim=True) + 1e-6)) @ turn


def news_of(orders: Sequence[Order], codes: Tensor) -> list[Tensor]:
    """For contexts of 0, 1, 2... tokens what they add to the expected code, `[contexts, size]` each."""
    news: list[Tensor] = []
    expected = codes.mean(0, keepdim=True)  # before anything is known
    contexts = np.zeros(1, dtype=np.int64)
    for length, order in enumerate(orders):
        seen = torch.zeros(len(order.contexts), codes.shape[1])
        following = torch.from_numpy(suffix(order.grams, 1))
        shares = torch.from_numpy(order.shares).float().unsqueeze(1)
        at = torch.from_numpy(np.searchsorted(order.contexts, order.grams >> BITS))
        seen.index_add_(0, at, codes[following] * shares)
        shorter = np.searchsorted(contexts, suffix(order.contexts, max(length - 1, 0)))
        less = expected[torch.from_numpy(shorter)]
        news.append(seen - (1 - torch.from_numpy(order.rest).float().unsqueeze(1)) * less)
        expected, contexts = less + news[-1], order.contexts
    return news


def rows_of(contexts: np.ndarray, length: int, find: RowFinder) -> list[Tensor]:
    """Per Engram layer the rows `[contexts, columns]` that a token ending such a context looks up."""
    places = BITS * np.arange(length - 1, -1, -1)
    ids = torch.from_numpy(suffix(contexts[:, None] >> places, 1))
    longest = find.longest
    ids = torch.cat((torch.full((len(ids), longest - length), PAD), ids), 1)
    parts = [
        [rows.view(-1, longest, rows.shape[1])[:, -1] for rows in find(part, torch.zeros_like(part))]
        for part in ids.split(MANY)
    ]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def fit(rows: Tensor, news: Tensor, uses: Tensor, count: int) -> Tensor:
    """Rows x `[count, dim]` that make sum of uses * |news - sum over heads of x[rows]|^2 + RIDGE |x|^2 small.

    rows `[contexts, heads]`, news `[contexts, dim]`, uses `[contexts]`. Conjugate gradients, all columns of x
    side by side, preconditioned by each row's uses.
    """
    heads = rows.unbind(1)
    uses = uses.unsqueeze(1)

    def gathered(values: Tensor) -> Tensor:
        out = torch.zeros(count, values.shape[1])
        for head in heads:
            out.index_add_(0, head, values)
        return out

    weight = gathered(uses) + RIDGE
    x = torch.zeros(count, news.shape[1])
    left = gathered(news * uses)
    step = left / weight
    direction = step.clone()
    size = (left * step).sum(0)
    for _ in range(ITERATIONS):
        summed = sum((direction[head] for head in heads[1:]), direction[heads[0]])
        product = gathered(summed * uses) + RIDGE * direction
        length = size / ((direction * product).sum(0) + 1e-20)
        x += length * direction
        left -= length * product
        step = left / weight
        size, before = (left * step).sum(0), size
        direction = step + size / (before + 1e-20) * direction
    return x


def count(documents: Sequence[np.ndarray], codes: Tensor, config: V41Config, find: RowFinder) -> list[Tensor]:
    """The Engram tables `[rows, dim]` that these texts make, one per layer."""
    orders = KneserNey(documents, config.vocab_size, config.engram_max_ngram_size + 1).orders[::-1]
    news = news_of(orders, codes)
    dim, heads = config.engram_head_dim, config.engram_n_heads
    tables = [torch.zeros(rows, dim) for rows in config.engram_num_embeddings]
    for length, groups in GROUPS.items():
        order = orders[length]
        uses = torch.from_numpy(order.totals * (1 - order.rest)).float()
        for layer, rows in enumerate(rows_of(order.contexts, length, find)):
            columns = rows[:, (length - 2) * heads : (length - 1) * heads].chunk(groups, dim=1)
            for group, places in enumerate(columns):
                begin = (layer * groups + group) * dim
                first, last = int(places.min()), int(places.max())
                piece = news[length][:, begin : begin + dim]
                tables[layer][first : last + 1] += fit(places - first, piece, uses, last + 1 - first)
    return tables
