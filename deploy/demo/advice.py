"""Soft targets: what Kneser-Ney expects next, counted in other texts than the one that is read.

A text says only what did follow. An n-gram model of the other texts says what could have, and where
text is scarce the two together teach more than the text alone: the model learns less by heart. Each
quarter of the texts is advised by the other three, as with Engram tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kneser_ney import BITS, PAD, KneserNey, Order, suffix
from tables import FOLDS

CONTEXT = 3  # tokens of it that count


class Advisor:
    """A Kneser-Ney model's whole distributions."""

    def __init__(self, model: KneserNey) -> None:
        lowest, second, *others = (_Listed(order) for order in reversed(model.orders))
        alone = torch.full((1, model.vocabulary), 1 / model.vocabulary)
        lowest.refine(alone, torch.zeros(1, dtype=torch.int64))
        self.after_token = alone.repeat(model.vocabulary, 1)  # [vocabulary, vocabulary]
        second.refine(self.after_token, torch.arange(model.vocabulary))
        self.others = others

    def distributions(self, contexts: Tensor) -> Tensor:
        """Probabilities `[N, vocabulary]` after contexts `[N, CONTEXT]` (`context_keys`)."""
        out = self.after_token[contexts[:, 0]]
        for order, keys in zip(self.others, contexts.unbind(1)[1:], strict=True):
            order.refine(out, keys)
        return out


class _Listed:
    """One order with its n-grams found by context."""

    def __init__(self, order: Order) -> None:
        self.contexts = torch.from_numpy(order.contexts)
        self.rest = torch.from_numpy(order.rest).float()
        self.following = torch.from_numpy(suffix(order.grams, 1))
        self.shares = torch.from_numpy(order.shares).float()
        begins = np.searchsorted(order.grams >> BITS, np.append(order.contexts, np.iinfo(np.int64).max))
        self.begins = torch.from_numpy(begins)

    def refine(self, probabilities: Tensor, keys: Tensor) -> None:
        """Make a lower order's probabilities `[N, vocabulary]` this one's, where it knows the context."""
        places = torch.searchsorted(self.contexts, keys.contiguous()).clamp(max=len(self.contexts) - 1)
        known = (self.contexts[places] == keys).nonzero().squeeze(1)
        places = places[known]
        probabilities[known] *= self.rest[places].unsqueeze(1)
        begins, lengths = self.begins[places], self.begins[places + 1] - self.begins[places]
        rows = known.repeat_interleave(lengths)
        within = torch.arange(len(rows)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        grams = begins.repeat_interleave(lengths) + within
        cells = rows * probabilities.shape[1] + self.following[grams]
        probabilities.view(-1).index_add_(0, cells, self.shares[grams])


def advisors_for(documents: Sequence[np.ndarray], folds: Sequence[int], vocabulary: int) -> list[Advisor]:
    """For each fold an advisor that has read the documents of the others."""
    pairs = list(zip(documents, folds, strict=True))
    return [
        Advisor(KneserNey([d for d, its in pairs if its != fold], vocabulary, CONTEXT + 1))
        for fold in range(FOLDS)
    ]


def context_keys(ids: Tensor, documents: Tensor) -> Tensor:
    """Keys of the 1 to CONTEXT tokens that end at each place of packed rows, `[B, T, CONTEXT]`."""
    key, keys = ids, [ids]
    for behind in range(1, CONTEXT):
        before = torch.full_like(ids, PAD)
        same = documents[:, behind:] == documents[:, :-behind]
        before[:, behind:] = torch.where(same, ids[:, :-behind], PAD)
        key = key + (before << (BITS * behind))
        keys.append(key)
    return torch.stack(keys, -1)


@dataclass(frozen=True)
class Advice:
    """For N tokens the advisors' share of the target, the fold that says whose advice it is, and contexts."""

    advisors: Sequence[Advisor]
    share: Tensor
    folds: Tensor
    contexts: Tensor  # [N, CONTEXT]

    def of(self, part: slice) -> tuple[Tensor, Tensor]:
        """Shares `[n, 1]` and distributions `[n, vocabulary]` of some tokens; zeros where the share is."""
        share, folds, contexts = self.share[part], self.folds[part], self.contexts[part]
        expected = torch.zeros(len(share), self.advisors[0].after_token.shape[1])
        for fold, advisor in enumerate(self.advisors):
            asked = ((folds == fold) & (share > 0)).nonzero().squeeze(1)
            if len(asked):
                expected[asked] = advisor.distributions(contexts[asked])
        return share.unsqueeze(1), expected
