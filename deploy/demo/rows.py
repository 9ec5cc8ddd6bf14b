"""Engram rows of packed documents: which table rows each token's n-grams use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.families.deepseek_v41.config import V41Config
from engine.families.deepseek_v41.family import hashing_of


class RowFinder:
    """Rows of every token of packed rows; a document's first n-grams begin with the padding key."""

    def __init__(self, config: V41Config, token_map: np.ndarray) -> None:
        self.token_map = torch.from_numpy(token_map)
        self.pad_key = self.token_map[config.engram_pad_token_id]
        self.longest = config.engram_max_ngram_size
        self.hashing = hashing_of(config)

    @property
    def tables(self) -> int:
        """Engram layers, each of which has a table."""
        return len(self.hashing.primes)

    def __call__(self, ids: Tensor, documents: Tensor) -> list[Tensor]:
        """ids, documents `[B, T]` -> per Engram layer `[B * T, columns]` int64."""
        keys = self.token_map[ids]
        return [self._rows(table, keys, documents) for table in range(self.tables)]

    def _rows(self, table: int, keys: Tensor, documents: Tensor) -> Tensor:
        multipliers = self.hashing.multipliers[table].tolist()
        hashed = keys * multipliers[0]
        columns = []
        for n in range(1, len(multipliers)):
            behind = torch.full_like(keys, int(self.pad_key))
            same = documents[:, n:] == documents[:, :-n]
            behind[:, n:] = torch.where(same, keys[:, :-n], behind[:, n:])
            hashed = hashed ^ (behind * multipliers[n])
            columns.append(hashed.flatten().unsqueeze(1).expand(-1, self.hashing.heads))
        primes, offsets = (torch.from_numpy(a[table]) for a in (self.hashing.primes, self.hashing.offsets))
        return torch.cat(columns, dim=1) % primes + offsets
