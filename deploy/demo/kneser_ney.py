"""An interpolated, modified Kneser-Ney 5-gram model over token ids: what a language model must beat.

Five ids of 12 bits fit into one 64-bit integer, so an n-gram is a number and counting is sorting.
After Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998):
the highest order uses counts, lower ones the number of different tokens seen before the n-gram,
and each order has three discounts, estimated from its counts of counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDER = 5
BITS = 12
LEAST_DISCOUNT = 0.05
PAD = 2  # stands before a document's beginning, as in the Engram hash


def suffix(keys: np.ndarray, length: int) -> np.ndarray:
    """The last `length` tokens of each n-gram."""
    return keys & ((1 << (BITS * length)) - 1)


def ngram_keys(document: np.ndarray, order: int) -> np.ndarray:
    """At each position the n-gram that ends there as one integer, oldest token in the highest bits."""
    padded = np.concatenate([np.full(order - 1, PAD), document])
    keys = np.zeros(len(document), dtype=np.int64)
    for i in range(order):
        keys = (keys << BITS) | padded[i : i + len(document)]
    return keys


@dataclass(frozen=True)
class Order:
    """One order's table: discounted share of each n-gram, and what each context leaves to lower orders."""

    grams: np.ndarray  # sorted keys
    shares: np.ndarray  # max(count - discount, 0) / count of the context
    contexts: np.ndarray  # sorted keys
    totals: np.ndarray  # how often each context was counted
    rest: np.ndarray  # weight of the lower order after each context

    @classmethod
    def from_counts(cls, grams: np.ndarray, counts: np.ndarray) -> Order:
        by_count = [max(1, int((counts == n).sum())) for n in range(1, 5)]
        y = by_count[0] / (by_count[0] + 2 * by_count[1])
        discounts = np.array([0.0] + [n - (n + 1) * y * by_count[n] / by_count[n - 1] for n in (1, 2, 3)])
        discounts[1:] = discounts[1:].clip(LEAST_DISCOUNT)  # odd texts give negative estimates
        discount = discounts[np.minimum(counts, 3)]
        contexts, first, totals = _sum_by(grams >> BITS, counts)
        lengths = np.diff(np.append(first, len(grams)))
        freed = np.add.reduceat(discount, first)
        shares = (counts - discount) / np.repeat(totals, lengths)
        return cls(grams, shares, contexts, totals, freed / totals)


def _sum_by(sorted_keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct keys, where each begins, and the sum of its values."""
    first = np.flatnonzero(np.append(True, sorted_keys[1:] != sorted_keys[:-1]))
    return sorted_keys[first], first, np.add.reduceat(values, first)


def _look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray, otherwise: float) -> np.ndarray:
    places = np.searchsorted(table, keys).clip(max=len(table) - 1)
    return np.where(table[places] == keys, values[places], otherwise)


class KneserNey:
    """The model: `log_probabilities` of documents it has not seen."""

    def __init__(self, documents: Sequence[np.ndarray], vocabulary: int, highest: int = ORDER) -> None:
        self.vocabulary = vocabulary
        keys = np.concatenate([ngram_keys(document, highest) for document in documents])
        grams, counts = np.unique(keys, return_counts=True)
        self.orders = [Order.from_counts(grams, counts)]  # highest first
        for order in range(highest - 1, 0, -1):
            # Each distinct longer n-gram counts once for the n-gram that it ends with.
            grams, counts = np.unique(suffix(grams, order), return_counts=True)
            self.orders.append(Order.from_counts(grams, counts))

    def log_probabilities(self, document: np.ndarray) -> np.ndarray:
        """Natural log of the probability of each token given those before it, `[len(document)]`."""
        probability = np.full(len(document), 1.0 / self.vocabulary)
        for order, table in enumerate(reversed(self.orders), start=1):
            keys = ngram_keys(document, order)
            share = _look_up(table.grams, table.shares, keys, 0.0)
            rest = _look_up(table.contexts, table.rest, keys >> BITS, 1.0)
            probability = share + rest * probability
        logarithms: np.ndarray = np.log(probability)
        return logarithms
